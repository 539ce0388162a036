"""JAX over 8 devices: what one device gives, and no features that travel to RoIs or channels."""

import functools
import inspect
import re
from dataclasses import replace

import numpy as np
import pytest

import roialign
from backends import calls
from conftest import draw_problem
from isolation import isolated

jax = pytest.importorskip("jax", reason="the tests of sharding in JAX need jax")
import jax.numpy as jnp  # noqa: E402
from jax.sharding import (  # noqa: E402
    Mesh,
    NamedSharding,
    PartitionSpec as P,
)

DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
PROBLEM = draw_problem(shape=(8, 16, 8, 12), count=24)
WHOLE = P()

# features, boxes and image index, d_output: cut how
CUT = {
    "replicated": (WHOLE, WHOLE, WHOLE),
    "RoIs": (WHOLE, P("x"), P("x")),
    "RoIs over both axes": (WHOLE, P(("x", "y")), P(("x", "y"))),
    "channels": (P(None, "y"), WHOLE, P(None, "y")),
    "RoIs and channels": (P(None, "y"), P("x"), P("x", "y")),
    "images": (P("x"), WHOLE, WHOLE),
    "images and RoIs": (P("x"), P("y"), P("y")),
    "images and RoIs over one axis": (P("x"), P("x"), P("x")),
    "images and channels": (P("x", "y"), WHOLE, P(None, "y")),
    "channels and RoIs over one axis": (P(None, "x"), P("x"), P("x")),
    "pixels and bins": (P(None, None, "x", "y"), P("x"), P(None, None, None, "x")),
}


def pool(features, boxes, index):
    return roialign.roi_align(features, (boxes, index), PROBLEM.size, **PROBLEM.options)


def differentiated(pool, maps, boxes, *others):
    """Output, d_features (of each map) and d_boxes; last of the others is d_output."""
    *others, d_output = others
    output, pull = jax.vjp(lambda m, b: pool(m, b, *others), maps, boxes)
    return jax.tree.leaves((output, pull(d_output)))


def both(pool):
    return jax.jit(functools.partial(differentiated, pool))


def sends_nothing(function, *arrays):
    return not re.search("all-|collective", jax.jit(function).lower(*arrays).compile().as_text())


def arguments():
    index = PROBLEM.index.astype(np.int32)
    given = PROBLEM.features, PROBLEM.boxes, index, PROBLEM.draw_output()
    return tuple(map(jnp.asarray, given))


def mesh_of_eight():
    assert len(jax.devices()) == 8
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))


def check(results, expected):
    """Equal; a sum over devices is one of a few numbers in another order."""
    for actual, right in zip(results, expected, strict=True):
        assert actual.shape == right.shape and actual.dtype == right.dtype
        bound = 8 * float(jnp.finfo(right.dtype).eps) * float(abs(right).max())
        actual, right = (np.asarray(a, np.float64) for a in (actual, right))
        np.testing.assert_allclose(actual, right, rtol=0, atol=bound)


def put(mesh, arrays, cut):
    features, rois, d_output = cut
    specs = features, rois, rois, d_output
    return [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)]


def moved_features(compiled, features):
    """Collectives that give an array of the features' pixels."""
    pixels = ",".join(map(str, features.shape[2:]))
    return re.findall(
        rf"\[\d+,\d+,{pixels}\][^=\n]* (?:all-gather|all-to-all|collective-permute)", compiled
    )


def check_jit(names):
    mesh, arrays = mesh_of_eight(), arguments()
    expected = differentiated(pool, *arrays)
    for name in names:
        features, boxes, index, d_output = put(mesh, arrays, CUT[name])
        forward = jax.jit(pool).lower(features, boxes, index).compile()
        output = forward(features, boxes, index)
        np.testing.assert_array_equal(output, expected[0])
        assert name == "pixels and bins" or not moved_features(forward.as_text(), features), name
        check(both(pool)(features, boxes, index, d_output), expected)
        check(differentiated(pool, features, boxes, index, d_output), expected)  # eagerly
    # where RoIs or channels are cut nothing is sent at all, and the output stays cut
    for name in {"RoIs", "channels", "RoIs and channels"} & set(names):
        features, boxes, index, _ = put(mesh, arrays, CUT[name])
        assert sends_nothing(pool, features, boxes, index), name
        wanted = NamedSharding(mesh, CUT[name][2])
        output = jax.jit(pool)(features, boxes, index)
        assert output.sharding.is_equivalent_to(wanted, 4), name


def check_other_numbers():
    """Numbers that the devices do not divide, other dtypes, no mesh with names, vmap."""
    mesh = mesh_of_eight()
    features, boxes, index, d_output = arguments()
    uneven = boxes[:7], index[:7]
    expected = pool(features, *uneven)

    @jax.jit
    def some(features, boxes, index):
        return pool(features, boxes[:7], index[:7])

    given = put(mesh, (features, boxes, index, d_output), CUT["RoIs over both axes"])[:3]
    np.testing.assert_array_equal(some(*given), expected)

    for dtype in (jnp.bfloat16, jnp.float16):
        low = features.astype(dtype), boxes, index, d_output.astype(dtype)
        right = differentiated(pool, *low)
        results = both(pool)(*put(mesh, low, CUT["RoIs and channels"]))
        np.testing.assert_array_equal(results[0], right[0])
        check(results, right)

    many = jnp.stack([features, 2 * features, -features, features])
    cut = jax.device_put(many, NamedSharding(mesh, P("y")))
    pooled = jax.jit(jax.vmap(pool, (0, None, None)))(cut, boxes, index)
    np.testing.assert_array_equal(pooled, jax.vmap(pool, (0, None, None))(many, boxes, index))

    bad = index.at[3].set(8).at[4].set(-1)
    for name in ("images", "RoIs", "images and RoIs"):
        given = put(mesh, (features, boxes, bad, d_output), CUT[name])
        results = both(pool)(*given)
        check(results, both(pool)(features, boxes, bad, d_output))
        assert not results[0][3:5].any() and not results[2][3:5].any()


# Boxes per image


def check_per_image():
    """Maps, boxes and results are cut over images, or over the boxes of each: data parallel."""
    mesh = mesh_of_eight()
    features, boxes, _, d_output = arguments()
    maps, boxes = (features, jnp.cos(features[:, :, 1:, :7])), boxes.reshape(8, 3, 4)
    d_output, levels = d_output.reshape(8, 3, *d_output.shape[1:]), jnp.arange(24) % 3 - 1
    last = lambda x: jnp.moveaxis(x, -3, -1)  # noqa: E731
    scales = PROBLEM.scale, (0.25, 0.3)

    def per_image(maps, boxes, levels):
        image = lambda x: jax.tree.map(lambda array: array[None], x)  # noqa: E731
        rois = boxes, jnp.zeros(len(boxes), jnp.int32)
        return roialign.multiscale_roi_align(
            image(maps), rois, PROBLEM.size, spatial_scales=scales, levels=levels
        )

    def pool_maps(maps, boxes, levels, layout="NCHW"):
        options = {"spatial_scales": scales, "levels": levels, "layout": layout}
        return roialign.multiscale_roi_align(maps, boxes, PROBLEM.size, **options)

    given = maps, boxes, levels.reshape(8, 3), d_output
    expected = differentiated(pool_maps, *given)
    over = lambda *axes: NamedSharding(mesh, P(*axes))  # noqa: E731
    for function in (pool_maps, jax.vmap(per_image)):
        for axes in ("x", ("x", "y")):
            cut = jax.device_put(given, over(axes))
            results = both(function)(*cut)
            check(results, expected)
            assert sends_nothing(functools.partial(differentiated, function), *cut)
            for result in results:
                assert result.sharding.is_equivalent_to(over(axes), result.ndim)
    cut = jax.device_put(given, over("x"))
    check(differentiated(pool_maps, *cut), expected)  # eagerly
    # channels last; the boxes of an image over devices, with their gradients
    turned = jax.tree.map(last, maps), *given[1:3], last(d_output)
    in_layout = functools.partial(pool_maps, layout="NHWC")
    right = differentiated(in_layout, *turned)
    check(jax.tree.map(last, expected[:3]), right[:3])
    cut = jax.device_put(turned, over("x"))
    check(both(in_layout)(*cut), right)
    assert sends_nothing(functools.partial(differentiated, in_layout), *cut)
    two = [a[:, :2] for a in given[1:]]
    cut = jax.device_put((maps, *two), (over("y"), over("y", "x"), over("y", "x"), over("y", "x")))
    check(both(pool_maps)(*cut), differentiated(pool_maps, maps, *two))
    assert sends_nothing(pool_maps, *cut[:3])
    # an image has no other
    of_image = jax.jit(jax.vmap(lambda f, b, i: pool(f[None], b, i)))
    index = jnp.zeros((8, 3), jnp.int32)
    right = of_image(features, boxes, index).at[2, 1].set(0)
    np.testing.assert_array_equal(of_image(features, boxes, index.at[2, 1].set(1)), right)


# Several maps


def check_maps():
    """In `jit`, where the arrays are cut, and in a shard_map."""
    coarse = replace(PROBLEM, features=PROBLEM.features[:, :, 1:, :7], scale=(0.25, 0.3))
    forward, *_ = calls([PROBLEM, coarse])

    def pool_maps(maps, *rois):
        return forward(*maps, *rois)

    results = both(pool_maps)
    mesh = mesh_of_eight()
    features, boxes, index, d_output = arguments()
    maps = features, jnp.cos(features[:, :, 1:, :7])
    levels = jnp.arange(24, dtype=jnp.int32) % 4 - 1
    expected = results(maps, boxes, index, levels, d_output)
    for name in ("RoIs and channels", "images and RoIs", "pixels and bins"):
        first, rois, pooled = CUT[name]
        specs = (first, P(*first[:2])), rois, rois, rois, pooled
        shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
        cut = jax.device_put((maps, boxes, index, levels, d_output), shardings)
        check(results(*cut), expected)

    features, rois, pooled = CUT["RoIs and channels"]
    ins = (features, features), rois, rois, rois
    for shard_map in spellings():
        cut = mapped(shard_map, mesh, True, pool_maps, ins, pooled)
        check(both(cut)(maps, boxes, index, levels, d_output), expected)


# Largest samples, and boxes that are turned


def pool_largest(reduction, features, boxes, index):
    if reduction == "max_corner":  # the boxes have no gradient
        boxes = jax.lax.stop_gradient(boxes)
    options = PROBLEM.options | {"reduction": reduction}
    return roialign.roi_align(features, (boxes, index), PROBLEM.size, **options)


def pool_turned(features, boxes, index):
    return roialign.roi_align_rotated(features, (boxes, index), PROBLEM.size, sampling_ratio=2)


def check_sampled(dense):
    """In `jit`, where the arrays are cut, and in a shard_map."""
    import roialign.jax

    roialign.jax._dense_everywhere = dense
    mesh, (features, boxes, index, d_output) = mesh_of_eight(), arguments()
    turned = jnp.pad(boxes, ((0, 0), (0, 1)), constant_values=30)  # any numbers make a box
    kinds = [(functools.partial(pool_largest, name), boxes) for name in ("max", "max_corner")]
    for pool, boxes in [*kinds[: 1 if dense else 2], (pool_turned, turned)]:
        given = features, boxes, index, d_output
        expected = differentiated(pool, *given)
        for name in () if dense else ("RoIs and channels", "images and RoIs", "pixels and bins"):
            cut = put(mesh, given, CUT[name])
            check(both(pool)(*cut), expected)
            assert name != "RoIs and channels" or sends_nothing(pool, *cut[:3])
        ins, _, outs = CUT["RoIs and channels"]
        ins = ins, P("x"), P("x")
        for shard_map in spellings():
            check(both(mapped(shard_map, mesh, True, pool, ins, outs))(*given), expected)


# shard_map, in each of its spellings


def spellings():
    """Name, a shard_map, its name of the check."""
    if hasattr(jax, "shard_map"):
        yield jax.shard_map
    if not hasattr(jax, "shard_map") or tuple(map(int, jax.__version__.split(".")[:2])) < (0, 8):
        from jax.experimental.shard_map import shard_map

        yield shard_map


def mapped(shard_map, mesh, checked, function, ins, outs):
    parameters = inspect.signature(shard_map).parameters
    name = "check_vma" if "check_vma" in parameters else "check_rep"
    return shard_map(function, mesh=mesh, in_specs=ins, out_specs=outs, **{name: checked})


def check_shard_map(dense):
    import roialign.jax

    roialign.jax._dense_everywhere = dense
    mesh, arrays = mesh_of_eight(), arguments()
    expected = differentiated(pool, *arrays)
    names = ("RoIs and channels",) if dense else ("RoIs", "channels", "RoIs and channels")
    for shard_map in spellings():
        for checked in (True, False):
            for name in names:
                features, rois, d_output = CUT[name]
                ins = features, rois, rois
                cut = mapped(shard_map, mesh, checked, pool, ins, d_output)
                check(both(cut)(*arrays), expected)
                assert sends_nothing(cut, *arrays[:3])

                def inside(*arrays):
                    output, *gradients = differentiated(pool, *arrays)
                    if not (checked and hasattr(jax, "typeof")):  # or types tell: summed already
                        gradients = map(jax.lax.psum, gradients, sums)
                    return output, *gradients

                sums = [tuple(filter(None, spec)) for spec in (rois, features)]
                outs = d_output, features, rois
                inner = mapped(shard_map, mesh, checked, inside, (*ins, d_output), outs)
                check(jax.jit(inner)(*arrays), expected)

            # data parallel: each device has its images and their RoIs, and counts them from 0
            def local(features, boxes, index):
                return pool(features, boxes, index % 4)

            own = *arrays[:2], jnp.arange(24, dtype=jnp.int32) // 3
            local = mapped(shard_map, mesh, checked, local, (P("x"),) * 3, P("x"))
            check(both(local)(*own, arrays[3]), differentiated(pool, *own, arrays[3]))
            assert sends_nothing(local, *own)


# Explicit axes: shardings are part of the types


def check_explicit():
    if not hasattr(jax, "set_mesh"):
        return  # jax < 0.7
    from jax.sharding import AxisType

    def loss(features, boxes, index, d_output):
        return (pool(features, boxes, index) * d_output).sum()

    arrays = arguments()
    right = pool(*arrays[:3]), *jax.grad(loss, argnums=(0, 1))(*arrays)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    names = "RoIs", "channels", "RoIs and channels", "images and RoIs"
    for name in (*names, "images and RoIs over one axis"):
        with jax.set_mesh(mesh):
            cut = put(mesh, arrays, CUT[name])
            output = jax.jit(pool)(*cut[:3])
            # a sum asks for operands that are cut alike
            d_output = jax.device_put(arrays[3], output.sharding)
            results = jax.jit(jax.grad(loss, argnums=(0, 1)))(*cut[:3], d_output)
        check((output, *results), right)
        for result, given in zip(results, cut[:2], strict=True):
            assert result.sharding.is_equivalent_to(given.sharding, result.ndim)
        if name == "images and RoIs over one axis":  # boxes per image: there nothing is moved

            def per_image(features, boxes, d_output):
                pooled = roialign.roi_align(features, boxes, PROBLEM.size, **PROBLEM.options)
                return (pooled * d_output).sum()

            given = arrays[0], arrays[1].reshape(8, 3, 4)
            given = *given, jnp.ones((8, 3, 16, *PROBLEM.size))
            with jax.set_mesh(mesh):
                cut = jax.device_put(given, NamedSharding(mesh, P("x")))
                results = jax.jit(jax.grad(per_image, argnums=(0, 1)))(*cut)
            check(results, jax.grad(per_image, argnums=(0, 1))(*given))
            assert [jax.typeof(result).sharding.spec[0] for result in results] == ["x", "x"]
    # features alone are placed
    features = jax.device_put(arrays[0], NamedSharding(mesh, P(None, "y")))
    check((jax.jit(pool)(features, *arrays[1:3]),), right[:1])


@pytest.mark.parametrize(
    "check, arguments",
    [
        pytest.param(check_jit, [list(CUT)[:6]], id="jit-one way"),
        pytest.param(check_jit, [list(CUT)[6:]], id="jit-mixed"),
        pytest.param(check_shard_map, [False], id="shard_map"),
        pytest.param(check_shard_map, [True], id="shard_map-dense"),
        pytest.param(check_sampled, [False], id="sampled"),
        pytest.param(check_sampled, [True], id="sampled-dense"),
        *(
            (check, [])
            for check in (check_other_numbers, check_per_image, check_maps, check_explicit)
        ),
    ],
)
def test_over_devices(check, arguments):
    isolated(check, *arguments, env=DEVICES)
