"""JAX on GPUs, without one: the programs that are made for them. What their kernels give is tested
as of every backend.
"""

import functools
import importlib.util
import re
import sys
import zlib

import numpy as np
import pytest

import roialign
from conftest import draw_problem, draw_pyramid
from isolation import isolated
from roialign import _rule

jax = pytest.importorskip("jax", reason="the tests of JAX on GPUs need jax")
import jax.numpy as jnp  # noqa: E402
from jax.interpreters import mlir  # noqa: E402
from jax.sharding import (  # noqa: E402
    Mesh,
    NamedSharding,
    PartitionSpec as P,
)

import roialign.jax  # noqa: E402
from jax_triton_stand_in import module  # noqa: E402

FORWARD = ["axis_taps", "forward"]
ADJOINT = ["axis_taps", "touched", "adjoint"]
ADJOINT_BY_ROWS = ["axis_taps", "columns", "scatter"]
BOX_GRADIENT = ["axis_taps", "box_gradient", "sum_blocks"]
BOX_GRADIENT_BY_ROWS = ["pack", "plan", "box_rows", "sum_blocks"]
UNITS = {"shape": (1, 1, 1, 1), "count": 1, "size": (1, 1), "scale": (1.0, 1.0), "sampling": 1}
FOUR = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}


def needs(*modules):
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def pool(problem, features, boxes, index=None):
    index = jnp.asarray(problem.index, jnp.int32) if index is None else index
    return roialign.roi_align(features, (boxes, index), problem.size, **problem.options)


def gradients(problem):
    """Of the features and the boxes."""
    return jax.grad(lambda *x: pool(problem, *x).sum().astype(jnp.float32), argnums=(0, 1))


def leaves(problem):
    return jnp.asarray(problem.features), jnp.asarray(problem.boxes)


# Programs for GPUs, which jax-triton compiles. It needs JAX's plugin, and asks for the GPU's kind.

compiled = needs("jax_triton", "triton", "jax_cuda12_plugin")
COMPILER = {"TRITON_INTERPRET": "0"}


def pretend_gpu():
    import jax_triton

    jax_triton.get_compute_capability = lambda device: 90


def program(function, *arguments, platforms=("cuda",)):
    """The kernels that a program for GPUs calls, and its text without them."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=platforms)
    names = []

    def see(operation):
        attributes = operation.attributes
        if str(attributes.get("call_target_name")) == '"triton_kernel_call"':
            code = zlib.decompress(attributes["backend_config"].value_bytes)
            names.append(re.search(rb"\.entry (\w+)", code)[1].decode())
        return mlir.ir.WalkResult.ADVANCE

    lowered.compiler_ir().operation.walk(see)
    return names, re.sub(r'backend_config = "[^"]*"', "", lowered.as_text())


def check_kernels():
    pretend_gpu()
    problem = draw_problem()
    features, boxes = leaves(problem)
    index = jnp.asarray(problem.index, jnp.int32)
    d_output = jnp.asarray(problem.draw_output())
    rois, options = (boxes, index), problem.options
    f = functools.partial(pool, problem)
    box_gradient = functools.partial(roialign.roi_align_box_gradient, rois=rois, **options)
    many = jnp.stack([features, features])

    def adjoint(g):
        return roialign.roi_align_adjoint(g, rois, features.shape, **options)

    def along(boxes, v):
        return jax.jvp(lambda b: f(features, b), (boxes,), (v,))

    def mixed(features):
        return jax.grad(lambda x: (box_gradient(d_output, x) ** 2).sum())(features)

    for function, arguments, expected in (
        (f, (features, boxes), FORWARD),
        (adjoint, (d_output,), ADJOINT),
        (box_gradient, (d_output, features), BOX_GRADIENT),
        (gradients(problem), (features, boxes), ADJOINT + BOX_GRADIENT),
        (jax.vmap(gradients(problem), (0, None)), (many, boxes), ADJOINT + BOX_GRADIENT),
        (along, (boxes, boxes), FORWARD + FORWARD),
        (mixed, (features,), BOX_GRADIENT + ADJOINT),
    ):
        names, text = program(function, *arguments)
        assert sorted(names) == sorted(expected)
        assert "dot_general" not in text and "while" not in text

    # channels in sixteens
    sixteen = draw_problem(shape=(1, 16, 9, 11))
    names, text = program(functools.partial(pool, sixteen), *leaves(sixteen))
    assert names == ["plan", "gather"] and "dot_general" not in text
    names, text = program(gradients(sixteen), *leaves(sixteen))
    assert sorted(names) == sorted([*ADJOINT_BY_ROWS, *BOX_GRADIENT_BY_ROWS])

    # a launch for each map
    p = draw_pyramid(np.float32)
    names, text = program(jax.value_and_grad(p.loss, (0, 1, 2)), *p.maps, *p.rois, p.d_output)
    assert sorted(names) == sorted(2 * (FORWARD + ADJOINT + BOX_GRADIENT))
    assert "dot_general" not in text and "while" not in text

    # jax-triton makes sizes, strides and numbers constants where they are 1
    units = draw_problem(**UNITS, convention="mmdet_legacy")
    for drawn, dtype in (
        (problem, jnp.float16),
        (problem, jnp.bfloat16),
        (problem, jnp.float64),
        (units, jnp.float32),
    ):
        both = lambda *x: (pool(drawn, *x), gradients(drawn)(*x))  # noqa: E731
        with jax.enable_x64(dtype == jnp.float64):
            features, boxes = leaves(drawn)
            names, _ = program(both, features.astype(dtype), boxes)
        assert sorted(names) == sorted(FORWARD + ADJOINT + BOX_GRADIENT)


def check_platforms():
    """In a program for several platforms each has its own way."""
    pretend_gpu()
    problem = draw_problem()
    f = functools.partial(pool, problem)
    for platforms in (("cpu", "cuda"), ("cuda", "tpu"), ("tpu", "cuda", "cpu")):
        targets = "roialign_forward_maps", "triton_kernel_call"
        exported = jax.export.export(
            jax.jit(f),
            platforms=platforms,
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(name) for name in targets],
        )(*leaves(problem))
        text = exported.mlir_module()
        assert text.count("@triton_kernel_call") == 2
        assert ("@roialign_forward_maps" in text) == ("cpu" in platforms)
        assert ("dot_general" in text) == ("tpu" in platforms)
        if "cpu" in platforms:
            np.testing.assert_array_equal(exported.call(*leaves(problem)), f(*leaves(problem)))


def check_devices():
    """Each device runs the kernels on its part."""
    pretend_gpu()
    problem = draw_problem(shape=(2, 6, 9, 11), count=4)
    features, boxes = leaves(problem)
    index = jnp.asarray(problem.index, jnp.int32)
    f = functools.partial(pool, problem)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
    cut = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in ((features, P(None, "y")), (boxes, P("x")), (index, P("x")))
    ]
    # in `jit` XLA asks later how it is cut; then the part is lowered as this here
    names, text = program(f, *cut)
    assert not names and "@CustomSPMDPartitioning" in text and "dot_general" not in text
    rule = _rule.vector(problem.convention, problem.sampling)
    names = "boxes", "image_index", "features"
    maps, scales = ((9, 11),), problem.scale
    call = roialign.jax._Call("forward", problem.size, 2, maps, scales, rule, names=names)
    sharding = NamedSharding(mesh, P("x", "y"))
    whole = jax.ShapeDtypeStruct((4, 6, *problem.size), features.dtype, sharding=sharding)
    partitioned = roialign.jax._partitioned(roialign.jax._kernels, call)
    _, part, *_ = partitioned.partition(mesh, (cut[1], cut[2], cut[0]), [whole])
    local = boxes[:2], index[:2], features[:, :3]
    assert program(part, *local)[0] == FORWARD
    assert jax.eval_shape(part, *local)[0].shape == (2, 3, *problem.size)

    ins = P(None, "y"), P("x"), P("x")
    mapped = jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=P("x", "y"))
    names, text = program(mapped, features, boxes, index)
    assert names == FORWARD and "dot_general" not in text


def check_dense():
    """Without a GPU, or where sizes are not known or nothing is there to do: plain JAX."""
    problem = draw_problem()
    features, boxes = leaves(problem)
    names, text = program(functools.partial(pool, problem), features, boxes)
    assert not names and "dot_general" in text

    pretend_gpu()
    f = lambda features, rois: roialign.roi_align(features, rois, 2)  # noqa: E731
    names, _ = program(f, features, jnp.zeros((0, 5)))
    assert not names
    names, _ = program(f, features[:, :0], jnp.zeros((3, 5)))
    assert not names
    (k,) = jax.export.symbolic_shape("k")
    rois = jax.ShapeDtypeStruct((k, 5), jnp.float32)
    text = jax.export.export(jax.jit(f), platforms=["cuda"])(features, rois).mlir_module()
    assert "triton_kernel_call" not in text and "dot_general" in text
    names, _ = program(f, features, jnp.zeros((3, 5)))
    assert names == FORWARD


@compiled
@pytest.mark.parametrize("check", [check_kernels, check_platforms, check_devices, check_dense])
def test_programs(check):
    isolated(check, env=COMPILER | (FOUR if check is check_devices else {}))


@pytest.mark.parametrize("version", [None, (0, 2, 0), (0, 4, 1)], ids=["missing", "older", "newer"])
def test_no_jax_triton(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "jax_triton", version and module(version))
    problem = draw_problem()
    names, text = program(functools.partial(pool, problem), *leaves(problem))
    assert not names and "dot_general" in text
