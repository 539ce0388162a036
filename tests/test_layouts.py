"""Channels last by shape, boxes of all images as one array, NumPy's integers: the same numbers."""

from dataclasses import replace

import numpy as np
import pytest

import roialign
import tolerance
from backends import array, arrays_of, batched, pair, per_image, three
from test_out import bytes_outside, poison

LAST = (0, 2, 3, 1)


@pytest.fixture
def problem(make_problem):
    """As many RoIs on each image, in their order."""
    return replace(make_problem(count=8, shape=(2, 5, 9, 11)), index=np.repeat([0, 1], 4))


# Layouts


def three_of(problem, form, layout):
    """All three operations, of features, d_output and the arrays of rois."""
    shape, options = problem.features.shape, problem.options | {"layout": layout}
    shape = tuple(shape[i] for i in LAST) if layout == "NHWC" else shape
    size = problem.size

    def call(features, d_output, *rois):
        rois = form(*rois)
        output = roialign.roi_align(features, rois, size, **options)
        d_features = roialign.roi_align_adjoint(d_output, rois, shape, **options)
        d_rois = roialign.roi_align_box_gradient(d_output, features, rois, **options)
        return output, d_features, d_rois

    return call


@pytest.mark.backends("nhwc")
@pytest.mark.parametrize("form", [pair, array, per_image])
@pytest.mark.parametrize("dtype", tolerance.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 9, 11), (2, 1, 4, 3), (2, 3, 1, 1), (2, 0, 4, 4)])
def test_channels_last(backend, make_problem, form, dtype, shape):
    """Against the oracle; NumPy's results are contiguous."""
    problem = make_problem(shape=shape, dtype=dtype)
    problem = replace(problem, index=np.sort(problem.index))
    g = problem.draw_output()
    given = [np.ascontiguousarray(a.transpose(LAST)) for a in (problem.features, g)]
    rois = arrays_of(form, *problem.rois)
    output, d_features, d_rois = backend.run(three_of(problem, form, "NHWC"), *given, *rois)
    d_boxes = np.concatenate(d_rois) if form is per_image else d_rois[:, -4:]
    results = output.transpose(0, 3, 1, 2), d_features.transpose(0, 3, 1, 2), d_boxes
    backend.check(problem, g, *results)
    if backend.family == "numpy":
        assert output.flags.c_contiguous and d_features.flags.c_contiguous


@pytest.mark.backends("nhwc", "strided", "exact")
def test_any_strides(backend, problem, layouts):
    """Those of channels first in the same memory."""
    for change in layouts.values():
        given = [change(a.transpose(LAST)) for a in (problem.features, problem.draw_output())]
        expected = three(problem)(*[a.transpose(0, 3, 1, 2) for a in given], *problem.rois)
        output, d_features, d_boxes = three_of(problem, pair, "NHWC")(*given, *problem.rois)
        results = output.transpose(0, 3, 1, 2), d_features.transpose(0, 3, 1, 2), d_boxes
        for actual, right in zip(results, expected, strict=True):
            tolerance.close(actual, right, 1e-5)


def test_nothing_is_copied():
    """The map would not fit into memory."""
    features = np.broadcast_to(np.float32(2), (1, 30_000, 40_000, 64))
    rois = np.array([[0, 5, 5, 20, 20]], np.float32)
    output = roialign.roi_align(features, rois, 2, layout="NHWC")
    assert output.shape == (1, 2, 2, 64) and (output == 2).all()
    listed = roialign.multiscale_roi_align(
        [features, features[:, ::2, ::2]], rois, 2, spatial_scales=(1, 1 / 2), layout="NHWC"
    )
    assert np.array_equal(listed, output)


# Boxes of all images as one array


@pytest.mark.backends("batched")
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int32"])
def test_boxes_of_all_images(backend, problem, dtype):
    """The results of the pair, in their shape; the boxes' gradient has their dtype."""
    boxes, index = problem.boxes.astype(dtype), problem.index
    given = problem.features, problem.draw_output()
    expected = backend.run(three(replace(problem, boxes=boxes)), *given, boxes, index)
    g = given[1].reshape(2, 4, *given[1].shape[1:])
    call = three_of(problem, batched, "NCHW")
    output, d_features, d_boxes = backend.run(call, given[0], g, boxes.reshape(2, 4, 4))
    assert output.shape == g.shape and d_boxes.shape == (2, 4, 4)
    assert d_boxes.dtype == (np.float32 if dtype == "int32" else dtype)
    for actual, right in zip((output, d_features, d_boxes), expected, strict=True):
        assert np.array_equal(actual.reshape(right.shape), right) and right.any()


@pytest.mark.backends("batched")
def test_padding(backend, problem):
    """A box of NaNs: its row and its gradients are 0, and nothing else changes."""
    boxes, features = problem.boxes.reshape(2, 4, 4).copy(), problem.features
    g = problem.draw_output().reshape(2, 4, 5, *problem.size)
    call = three_of(problem, batched, "NCHW")
    padded = boxes.copy()
    padded[0, 2], padded[1, 3] = np.nan, np.nan
    silent = g.copy()
    silent[0, 2] = silent[1, 3] = 0
    output, _, d_boxes = backend.run(call, features, g, boxes)
    results = backend.run(call, features, g, padded)
    for actual, right in zip((results[0], results[2]), (output, d_boxes), strict=True):
        right = right.copy()
        right[0, 2] = right[1, 3] = 0
        assert np.array_equal(actual, right)
    _, d_features, _ = backend.run(call, features, silent, boxes)
    tolerance.close(results[1], d_features, 1e-5)


@pytest.mark.backends("batched")
@pytest.mark.parametrize("shape", [(2, 0, 4), (0, 3, 4), (0, 0, 4)])
def test_no_boxes(backend, shape):
    features = np.ones((shape[0], 3, 4, 5), np.float32)
    pool = lambda features, boxes: roialign.roi_align(features, boxes, (2, 1))  # noqa: E731
    output = backend.run(pool, features, np.zeros(shape, np.float32))
    assert output.shape == (*shape[:2], 3, 2, 1)


# out=


@pytest.mark.backends("out", "batched", "nhwc", "pyramids")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("form", [array, batched])
def test_out(backend, pyramid, layouts, layout, form):
    """Any strides are filled, and nothing else is."""
    p = pyramid(np.float32, count=8)
    options = {"spatial_scales": [q.scale for q in p.problems], "layout": layout}
    order = LAST if layout == "NHWC" else (0, 1, 2, 3)
    maps = [np.ascontiguousarray(m.transpose(order)) for m in p.maps]
    (rois,) = arrays_of(form, p.problems[0].boxes, np.repeat([0, 1], 4))
    lead = (2, 4) if form is batched else (8,)
    options["levels"] = np.resize([1, 0, -1], lead)
    g = np.ascontiguousarray(p.d_output.transpose(order))
    g = g.reshape(*lead, *g.shape[1:])
    maps, rois, g, options["levels"] = map(backend.array, (maps, rois, g, options["levels"]))
    calls = (
        lambda **out: roialign.multiscale_roi_align(maps, rois, (3, 2), **options, **out),
        lambda **out: roialign.multiscale_roi_align_adjoint(
            g, rois, [tuple(m.shape) for m in maps], **options, **out
        ),
        lambda **out: roialign.multiscale_roi_align_box_gradient(g, maps, rois, **options, **out),
    )
    for call in calls:
        expected = call()
        several = isinstance(expected, list)
        arrays = backend.numpy(expected if several else [expected])
        for name in layouts.keys() - {"read_only"} if backend.family == "numpy" else ["sliced"]:
            outs = [layouts[name](np.zeros_like(a)) for a in arrays]
            bases = [poison(out) for out in outs]
            own = backend.array(outs)
            given = own if several else own[0]
            assert call(out=given) is given
            for mine, out, base, right in zip(own, outs, bases, arrays, strict=True):
                tolerance.close(backend.numpy(mine), right, 1e-6)
                assert mine is not out or (bytes_outside(out, base) == 0xFF).all()


# NumPy's integers beside other arrays


@pytest.mark.backends("mixed index")
def test_integers_of_numpy(backend, pyramid):
    """Of any integer dtype that the library computes with."""
    p = pyramid(np.float32)
    boxes, index, levels = p.rois
    scales = [q.scale for q in p.problems]

    def pool(dtype):
        def call(boxes, *maps):
            options = {"spatial_scales": scales, "levels": np.abs(levels).astype(dtype)}
            rois = boxes, index.astype(dtype)
            return roialign.multiscale_roi_align(maps, rois, 2, **options)

        return call

    expected = pool("int64")(boxes, *p.maps)
    assert expected.any()
    for dtype in backend.integers:
        tolerance.close(backend.run(pool(dtype), boxes, *p.maps), expected, 1e-6)
    if "raises" in backend.traits:
        features, boxes = backend.array((p.maps[0], boxes[:2]))
        with pytest.raises(IndexError, match="`image_index` of RoI 1"):
            roialign.roi_align(features, (boxes, np.array([0, 2**40])), 2)


# Errors


FEATURES, ROIS = np.ones((2, 3, 8, 9), np.float32), np.zeros((2, 5), np.float32)
BOXES, INDEX = np.zeros((2, 4), np.float32), np.zeros(2, int)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"layout": None}, TypeError, "`layout` must be a str, got NoneType"),
        ({"layout": "CHWN"}, ValueError, "`layout` must be one of 'NCHW', 'NHWC', got 'CHWN'"),
        ({"layout": "nhwc"}, ValueError, "`layout` .* got 'nhwc'"),
        ({"features": FEATURES[0], "layout": "NHWC"}, ValueError, r"`features` .*\(N, H, W, C\)"),
        ({"features": FEATURES[:, :, :0], "layout": "NHWC"}, ValueError, r"got \(2, 3, 0, 9\)"),
        ({"rois": (BOXES, BOXES)}, TypeError, "`image_index` .*float32: .*pass a list"),
        ({"rois": (BOXES, BOXES.astype(int))}, ValueError, r"`image_index` .*\(2, 4\): .*a list"),
        ({"rois": (BOXES,) * 3}, ValueError, "`rois` .*3 items: .*pass a list"),
        ({"rois": BOXES[None]}, ValueError, r"`rois` .*\(2, M, 4\), got \(1, 2, 4\)"),
        ({"rois": ROIS[None]}, ValueError, r"`rois` .*\(K, 5\) or .*got \(1, 2, 5\)"),
    ],
)
def test_errors(changed, error, message):
    arguments = {"features": FEATURES, "rois": ROIS, "output_size": 2} | changed
    with pytest.raises(error, match=message):
        roialign.roi_align(**arguments)


def test_shapes_in_the_layout_that_was_given():
    adjoint, g = roialign.roi_align_adjoint, np.zeros((2, 2, 2, 3), np.float32)
    assert adjoint(g, ROIS, (2, 8, 9, 3), layout="NHWC").shape == (2, 8, 9, 3)
    with pytest.raises(ValueError, match=r"`d_output` .*\(2, P, Q, 4\), got \(2, 2, 2, 3\)"):
        adjoint(g, ROIS, (2, 8, 9, 4), layout="NHWC")
    with pytest.raises(ValueError, match=r"`feature_shape` must be \(N, H, W, C\), got \(8, 9\)"):
        adjoint(g, ROIS, (8, 9), layout="NHWC")
    with pytest.raises(ValueError, match=r"`d_output` .*\(2, 1, 3, P, Q\), got \(2, 2, 2, 3\)"):
        adjoint(g, BOXES.reshape(2, 1, 4), (2, 3, 8, 9))


def test_the_layer_takes_rows_alone():
    with pytest.raises(ValueError, match=r"`rois` must have shape \(K, 5\), got \(2, 1, 4\)"):
        roialign.ROIAlign(2, 2, 1.0)(FEATURES, BOXES.reshape(2, 1, 4))
