"""JAX: the same numbers as NumPy's, eagerly and traced, and under every transform."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import oracle
import roialign
import tolerance

jax = pytest.importorskip("jax", reason="the JAX adapter's tests need jax")
import jax.numpy as jnp  # noqa: E402

import roialign.jax  # noqa: E402
from artefacts import make_jax  # noqa: E402
from backends import (  # noqa: E402
    array,
    arrays_of,
    batched,
    named,
    pair,
    per_image,
    three,
)  # fmt: skip
from isolation import isolated, printed  # noqa: E402
from test_sampled_derivatives import KINDS, draw, functions  # noqa: E402
from test_transforms import check_without  # noqa: E402
from tolerance import close  # noqa: E402

VERSION = tuple(map(int, jax.__version__.split(".")[:3]))


JAX = named("jax")
JAX.start(None)


def jax_rois(problem):
    return JAX.array(problem.rois)


def pool(problem, features=None, boxes=None, index=None):
    features = jnp.asarray(problem.features) if features is None else features
    own_boxes, own_index = jax_rois(problem)
    rois = own_boxes if boxes is None else boxes, own_index if index is None else index
    return roialign.roi_align(features, rois, problem.size, **problem.options)


def leaves(problem):
    return jnp.asarray(problem.features), jnp.asarray(problem.boxes)


def same(actual, expected):
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


@pytest.fixture
def dense(monkeypatch):
    """The way of platforms without a kernel, on the CPU."""
    monkeypatch.setattr(roialign.jax, "_dense_everywhere", True)


# Errors

FEATURES = jnp.zeros((2, 3, 8, 9), jnp.float32)
ROIS = jnp.array([[0, 1, 1, 6, 5], [1, 0, 2, 7, 6]], jnp.float32)


@pytest.mark.parametrize("dtype", ["float8_e5m2", "key"])
def test_dtypes_that_are_no_features(dtype):
    features = jax.random.key(0) if dtype == "key" else FEATURES.astype(dtype)
    with pytest.raises(TypeError, match=f"`features` .*{dtype}"):
        roialign.roi_align(features, ROIS, 2)


def test_an_index_at_hand_is_checked_where_features_are_traced():
    bad = ROIS.at[0, 0].set(7)
    for rois in (bad, (bad[:, 1:], bad[:, 0].astype(int))):
        with pytest.raises(IndexError, match="RoI 0"):
            jax.jit(lambda f: roialign.roi_align(f, rois, 2))(FEATURES)


# Arrays of NumPy beside JAX's


@pytest.mark.parametrize("form", [pair, array, per_image, batched])
@pytest.mark.parametrize("traced", [False, True])
def test_arrays_of_numpy(pyramid, form, traced):
    """Any of them, where one is JAX's: eagerly, and closed over or beside what is traced."""
    p = pyramid(np.float32, count=8)
    boxes, _, levels = p.rois
    rois = arrays_of(form, boxes, np.repeat([0, 1], 4))
    own, scales = [p.d_output, *p.maps, levels, *rois], [q.scale for q in p.problems]
    if form is batched:
        own[0], own[3] = (a.reshape(2, 4, *a.shape[1:]) for a in (own[0], own[3]))

    def results(g, fine, coarse, levels, *rois):
        maps, rois, options = (fine, coarse), form(*rois), {"spatial_scales": scales}
        options["levels"] = levels
        shapes = [features.shape for features in maps]
        return (
            roialign.multiscale_roi_align(maps, rois, (3, 2), **options),
            roialign.multiscale_roi_align_adjoint(g, rois, shapes, **options),
            roialign.multiscale_roi_align_box_gradient(g, maps, rois, **options),
            roialign.roi_align(fine, rois, 2),
            roialign.roi_align_adjoint(g, rois, fine.shape, features=fine),
            roialign.roi_align_box_gradient(g, fine, rois),
            roialign.assign_levels(rois, (2, 5)),
        )

    expected = jax.tree.leaves(results(*own))
    which = range(4, len(own)) if form is per_image else range(len(own))  # all take rois
    for i in which:

        def of_one(array, i=i):
            return results(*own[:i], array, *own[i + 1 :])

        found = (jax.jit(of_one) if traced else of_one)(jnp.asarray(own[i]))
        for actual, right in zip(jax.tree.leaves(found), expected, strict=True):
            assert i < 4 or isinstance(actual, jax.Array)
            close(actual, right, 1e-5)


def test_derivatives_beside_arrays_of_numpy(problem):
    features, (boxes, index) = problem.features, problem.rois
    pool = lambda f, b: roialign.roi_align(  # noqa: E731
        f, (b, index), problem.size, **problem.options
    ).sum()
    own = jax.grad(pool, (0, 1))(*leaves(problem))
    close(jax.grad(pool, 0)(features, boxes), own[0])
    close(jax.grad(lambda b: pool(features, b))(boxes), own[1])
    close(jax.jit(jax.grad(lambda f: pool(f, boxes)))(features), own[0])
    layer = roialign.ROIAlign(2, 2, 1.0)
    rows = np.column_stack([index, boxes])
    close(layer(features, jnp.asarray(rows)), layer(features, rows))


def test_what_jax_has_not(problem):
    features, (boxes, index) = leaves(problem)[0], problem.rois
    for dtype in (">f8", object, "U5", complex, np.longdouble):
        with pytest.raises(TypeError, match="`boxes` must be a jax.Array, got numpy.ndarray"):
            roialign.roi_align(features, (boxes.astype(dtype), index), 2)
    bad = index + 2**40
    with pytest.raises(IndexError, match="`image_index` of RoI 0"):
        roialign.roi_align(features, (boxes, bad), 2)
    with pytest.raises(TypeError, match="`out` must be None"):
        roialign.roi_align(problem.features, (jnp.asarray(boxes), index), 2, out=bad)


# Transforms


def test_tangents_of_integers_and_linearize(problem):
    """An image index has no tangent; a linearized function is the derivative."""
    features, boxes = leaves(problem)
    u, index = jnp.cos(features), jnp.asarray(problem.index)
    no_tangent = np.zeros(index.shape, jax.dtypes.float0)
    given, tangents = (features, index), (u, no_tangent)
    _, along = jax.jvp(lambda f, i: pool(problem, f, index=i), given, tangents)
    same(along, pool(problem, u))
    v = jnp.sin(boxes)
    _, linear = jax.linearize(lambda b: pool(problem, features, b), boxes)
    _, along = jax.jvp(lambda b: pool(problem, features, b), (boxes,), (v,))
    same(linear(v), along)


def test_held_boxes_have_no_second_order(problem):
    features, boxes = leaves(problem)

    def loss(b):
        return (pool(problem, features, b) ** 2).sum()

    held = jax.grad(lambda b: jax.grad(loss)(jax.lax.stop_gradient(b)).sum() + loss(b))
    close(held(boxes), jax.grad(loss)(boxes))


def test_donated_buffers(make_problem):
    problem = make_problem(shape=(4, 8, 3, 3), count=4, size=(3, 3))
    expected = pool(problem)
    donating = jax.jit(lambda f: pool(problem, f) + 1, donate_argnums=0)
    for _ in range(3):
        same(donating(jnp.array(problem.features)), expected + 1)


@pytest.mark.parametrize("kind", ["mean", *KINDS])
def test_export(kind):
    """Stored, with derivatives; of any number of RoIs, and any map."""
    pytest.importorskip("jax.export", reason="that module needs absl in older versions of JAX")
    pytest.importorskip("flatbuffers", reason="jax.export stores with flatbuffers")
    features, boxes, index = JAX.array(draw(kind)[:3])
    k, h, w = jax.export.symbolic_shape("k, h, w")
    shapes = (*features.shape[:2], h, w), (k, boxes.shape[1]), (k,)
    dtypes = features.dtype, boxes.dtype, index.dtype
    shaped = map(jax.ShapeDtypeStruct, shapes, dtypes)
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in make_jax.CALLS]

    def pool(features, boxes, index):  # the boxes of a largest corner have no gradient
        boxes = jax.lax.stop_gradient(boxes) if kind == "max_corner" else boxes
        return functions(kind)[0](features, boxes, index)

    made = jax.export.export(jax.jit(pool), disabled_checks=checks)(*shaped)
    loaded = jax.export.deserialize(made.serialize(vjp_order=1))
    for count in (1, 3):

        def results(function):
            some = boxes[:count], index[:count]
            output, pull = jax.vjp(lambda f, b: function(f, b, some[1]), features, some[0])
            return output, *pull(jnp.sin(output))

        for actual, right in zip(*map(results, (loaded.call, pool)), strict=True):
            same(actual, right)


def stored(name):
    pytest.importorskip("jax.export", reason="that module needs absl in older versions of JAX")
    pytest.importorskip("flatbuffers", reason="jax.export stores with flatbuffers")
    path = Path(__file__).parent / "artefacts" / f"jax-{name}.bin"
    return jax.export.deserialize(bytearray(path.read_bytes()))


@pytest.mark.parametrize("name", make_jax.POOLS)
def test_an_export_of_roialign_0_2(name):
    expected = make_jax.with_gradients(make_jax.POOLS[name])(*make_jax.arguments())
    results = stored(f"0.2.0-{name}").call(*make_jax.arguments())
    for actual, right in zip(*map(jax.tree.leaves, (results, expected)), strict=True):
        same(actual, right)
    assert results[0].any() and results[1][0].any() and results[2].any()


def test_an_export_of_roialign_0_1():
    loaded = stored("0.1.0-one_map")
    with pytest.raises(RuntimeError, match=r"exported by roialign 0\.1: export it again"):
        jax.block_until_ready(loaded.call(*make_jax.arguments()))


@pytest.mark.parametrize("kind", ["mean", *KINDS])
def test_each_platform_has_its_own_way(kind):
    traced = jax.jit(functions(kind)[0]).trace(*JAX.array(draw(kind)[:3]))
    texts = {
        name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu", "cuda")
    }
    assert "roialign_forward" in texts["cpu"]
    for name in ("tpu", "cuda"):
        assert "roialign_forward" not in texts[name] and "stablehlo.while" in texts[name]
        assert ("dot_general" in texts[name]) == (kind == "mean")


def test_without_64_bits(make_problem):
    problem = make_problem()
    expected = roialign.roi_align(problem.features, problem.rois, problem.size, **problem.options)
    switch = jax.enable_x64 if VERSION >= (0, 8) else jax.experimental.enable_x64
    with switch(False):
        rois = jax_rois(problem)
        assert rois[1].dtype == jnp.int32
        features = jnp.asarray(problem.features)
        output = roialign.roi_align(features, rois, problem.size, **problem.options)
        same(output, expected)
        d_boxes = jax.grad(lambda b: pool(problem, features, b).sum())(rois[0])
        explicit = roialign.roi_align_box_gradient(
            jnp.ones_like(output), features, rois, **problem.options
        )
        same(d_boxes, explicit)


@pytest.mark.parametrize("form", [pair, batched])
def test_channels_last_are_not_moved(make_problem, form):
    """The custom calls take and give the caller's arrays, as they are."""
    problem = make_problem(shape=(2, 5, 9, 11), count=6)
    problem = replace(problem, index=np.repeat([0, 1], 3))
    features = jnp.asarray(problem.features).transpose(0, 2, 3, 1)
    boxes, *index = JAX.array(arrays_of(form, *problem.rois))

    def loss(features, boxes):
        rois, options = form(boxes, *index), problem.options | {"layout": "NHWC"}
        return (roialign.roi_align(features, rois, problem.size, **options) ** 2).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(features, boxes).compile()
    text = re.sub(r"metadata={[^}]*}", "", compiled.as_text())
    assert "f32[2,9,11,5]{3,2,1,0}" in text
    assert not re.search(r"transpose|copy|f32\[2,5,9,11\]", text)
    wanted = {"roialign_forward_maps", "roialign_adjoint_maps", "roialign_box_gradient_maps"}
    assert set(re.findall(r"roialign_\w+_maps", text)) == wanted


# Plain JAX, where there is no kernel


def test_dense_boxes_of_whole_pixels(dense, make_problem, convention):
    """Where sizes are multiples of the bins: the number of samples is that of the rule."""
    rng = np.random.default_rng(0)
    for bins in (3, 5, 7, 11, 14):
        start = rng.integers(0, 9, (60, 2))
        boxes = np.concatenate([start, start + bins * rng.integers(1, 4, (60, 2))], 1)
        problem = make_problem(shape=(1, 1, 60, 60), count=60, sampling=0, size=(bins, bins),
                               scale=(1.0, 1.0), convention=convention)  # fmt: skip
        problem = replace(problem, boxes=boxes.astype(np.float32))
        expected = oracle.forward(problem)
        size, bound = np.abs(problem.features).max(), tolerance.forward(problem, expected)
        bound = named("jax.dense").bound(problem, bound, size)
        tolerance.check(pool(problem), expected, bound)


@pytest.mark.parametrize("side", [1e5, 1e7, 1e9, 1e12, 1e30])
def test_dense_gigantic_boxes(dense, make_problem, side):
    """Time and memory are those of the map. Means over so many samples vanish."""
    problem = make_problem(shape=(1, 2, 24, 31), count=1, sampling=0, scale=(1.0, 1.0))
    problem = replace(problem, boxes=np.array([[-side, -side, side, side]], np.float32))
    g = problem.draw_output()
    results = JAX.run(three(problem), problem.features, g, *problem.rois)
    output, d_features, d_boxes = results
    close(output, oracle.forward(problem), atol=40 / 2**22 * np.abs(problem.features).max())
    assert np.isfinite(d_features).all() and np.isfinite(d_boxes).all()


# The module


def test_without_what_is_private_to_jax():
    """It only cuts the operations over devices."""
    name = "prim_requires_devices_during_lowering"
    isolated(check_without, "jax", "jax._src.dispatch", name)


def test_an_older_jax_is_refused():
    code = (
        "import jax; jax.__version_info__, jax.__version__ = (0, 4, 37), '0.4.37'\n"
        "try:\n    import roialign.jax\n"
        "except ImportError as error:\n    assert 'jax >= 0.4.38, got 0.4.37' in str(error)\n"
        "else:\n    raise AssertionError('it was imported')"
    )
    printed("-c", code)
