"""Bins that are their largest sample ("max"), or its largest weighted pixel ("max_corner")."""

from dataclasses import replace

import numpy as np
import pytest

import oracle
import roialign
import tolerance
from backends import pair

REDUCTIONS = "max", "max_corner"
pytestmark = pytest.mark.backends("reductions")


def bound_of(problem, expected):
    """Of a largest sample: no further off than the worst of the samples, four products and sums."""
    _, unit, least = tolerance.TABLE[problem.features.dtype]
    sums = tolerance.TABLE[tolerance.TABLE[problem.features.dtype][0]][1]
    size = np.abs(problem.features.astype(np.float64)).max(initial=0)
    return 8 * sums * size + unit * np.abs(expected) + least


def run(backend, problem, reduction, g):
    """The results, and the gradients in the features (and in the boxes) if they are floats."""
    shape, options = problem.features.shape, problem.options | {"reduction": reduction}
    has_gradient, size = problem.features.itemsize > 1, problem.size

    def largest(features, boxes, index, g):
        rois = pair(boxes, index)
        results = (roialign.roi_align(features, rois, size, **options),)
        if has_gradient:
            d_features = roialign.roi_align_adjoint(g, rois, shape, features=features, **options)
            results = (*results, d_features)
        if reduction == "max":
            results = (*results, roialign.roi_align_box_gradient(g, features, rois, **options))
        return results

    return backend.run(largest, problem.features, *problem.rois, g)


@pytest.mark.backends("reductions", "fast")
def test_golden(backend, golden_largest):
    problem, clipped = golden_largest.problem, golden_largest.library.startswith("openvino")
    options = problem.options | {"reduction": golden_largest.reduction}
    output = backend.roi_align(
        golden_largest.features, golden_largest.rois, problem.size, **options
    )
    assert output.dtype == golden_largest.features.dtype
    golden_largest.check_forward(output.clip(0) if clipped else output)  # OpenVINO starts at 0
    if golden_largest.differentiates:
        options["features"] = golden_largest.features
        d_features = backend.roi_align_adjoint(
            golden_largest.d_output, golden_largest.rois, golden_largest.features.shape, **options
        )
        at_minus_one = golden_largest.entry["kind"] == "edge_minus_one"
        if not at_minus_one:  # mmcv takes the winner's y of -1 for no winner
            golden_largest.check_adjoint(d_features)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "reversed"])
@pytest.mark.parametrize("channels, sampling", [(1, 3), (5, 0), (45, 1)])
@pytest.mark.parametrize("dtype", [*tolerance.DTYPES, *tolerance.BYTES], ids=str)
def test_definition(backend, make_problem, layouts, dtype, channels, sampling, layout, reduction):
    names = list(roialign.conventions)[:6]
    problem = make_problem(
        channels + sampling, shape=(2, channels, 9, 11), sampling=sampling, dtype=dtype,
        convention=names[(channels + sampling) % 6],
    )  # fmt: skip
    problem = backend.fair(problem)
    winners, expected = oracle.largest(problem, reduction)
    g = problem.draw_output()
    given = replace(problem, features=layouts[layout](problem.features))
    output, *gradients = run(backend, given, reduction, g)
    magnitude = np.abs(problem.features.astype(np.float64)).max()
    bound = backend.bound(problem, bound_of(problem, expected), magnitude)
    tolerance.check(output, expected, bound)
    if dtype in (np.float32, np.float64):  # rounded, several samples are the largest
        sums = oracle.to_winners(problem, winners, g)
        size = oracle.to_winners(problem, winners, abs(g))
        unit = tolerance.TABLE[problem.features.dtype][1]
        bound = backend.bound(problem, 64 * unit * (size + 1e-30), abs(g).sum((0, 2, 3)).max())
        tolerance.check(gradients[0], sums, bound)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("sampling", [0, 2])
def test_features_and_adjoint(backend, make_problem, sampling, reduction):
    """A largest sample grows as the features do: <d_output, forward> is <features, adjoint>."""
    problem = make_problem(sampling=sampling, shape=(2, 20, 9, 11), dtype=np.float64)
    g = problem.draw_output()
    output, d_features, *_ = run(backend, problem, reduction, g)
    assert np.vdot(output, g) == pytest.approx(np.vdot(problem.features, d_features), abs=1e-11)


@pytest.mark.parametrize("sampling", [0, 1, 3])
def test_box_gradient(backend, make_problem, sampling):
    """The slope of the winner, by differences where no sample changes its pixels."""
    problem = make_problem(5, sampling=sampling, dtype=np.float64, count=12, inside=True)
    g = problem.draw_output()
    direction = np.random.default_rng(3).standard_normal(problem.boxes.shape)
    step = 1e-7 * direction
    smooth = oracle.smooth(problem, step)
    assert smooth.sum() > 6
    _, _, d_boxes = run(backend, problem, "max", g)
    boxes = np.concatenate([problem.boxes + step, problem.boxes - step])
    rois, options = (boxes, np.tile(problem.index, 2)), problem.options | {"reduction": "max"}
    ends = np.split(backend.roi_align(problem.features, rois, problem.size, **options), 2)
    slopes = np.einsum("kcpq,kcpq->k", ends[0] - ends[1], g) / 2e-7
    along = (d_boxes * direction).sum(1)
    np.testing.assert_allclose(slopes[smooth], along[smooth], atol=1e-5)


def corner(values, boxes, reduction, sampling=2, **options):
    """One bin of a map of one channel, and where its gradient goes."""
    features = np.array(values, np.float32)[None, None]
    rois = np.array([[0, *boxes]], np.float32)
    options |= {"sampling_ratio": sampling, "convention": "asymmetric", "reduction": reduction}
    output = roialign.roi_align(features, rois, 1, **options)
    d_features = roialign.roi_align_adjoint(
        np.ones_like(output), rois, features.shape, features=features, **options
    )
    return output.item(), d_features[0, 0]


@pytest.mark.parametrize(
    "values, boxes, sampling, largest, gradient",
    [
        # positions 0.25 and 0.75 on both axes, all equal: the first
        ([[1, 1], [1, 1]], (0, 0, 1, 1), 2, 1, [[9 / 16, 3 / 16], [3 / 16, 1 / 16]]),
        # x at -1.5, outside, and 0.5: an outside sample comes first, and 0 is not larger
        ([[0, 0]], (-2.5, 0, 1.5, 1), 2, 0, [[0, 0]]),
        ([[-3, -3]], (-2.5, 0, 1.5, 1), 2, 0, [[0, 0]]),
        # x at 0.5 and 2.5, outside: the sample that is inside comes first
        ([[0, 0]], (-0.5, 0, 3.5, 1), 2, 0, [[0.5, 0.5]]),
        ([[-3, -3]], (-0.5, 0, 3.5, 1), 2, 0, [[0, 0]]),
        # the cell between pixels 0 and 1 has eight samples: its extremes are the outermost
        ([[0, 16, 0]], (0, 0, 1, 1), 8, 15, [[1 / 16, 15 / 16, 0]]),
        # backwards the order is too
        ([[1, 1, 1, 1]], (3, 0, 0, 1), 2, 1, None),
        # no sample inside at all, and no sample at all
        ([[5, 5]], (9, 9, 12, 12), 2, 0, [[0, 0]]),
    ],
)
def test_one_bin(backend, values, boxes, sampling, largest, gradient):
    output, d_features = corner(values, boxes, "max", sampling)
    assert output == largest
    if gradient is not None:
        np.testing.assert_allclose(d_features, gradient, atol=1e-6)


def test_largest_corner(backend):
    """On a map of ones, with samples in the middle of pixels, ONNX's maximum is 0.5625."""
    output, d_features = corner([[1, 1], [1, 1]], (0, 0, 1, 1), "max_corner")
    assert output == 0.5625
    np.testing.assert_array_equal(d_features, [[0.5625, 0], [0, 0]])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("channels", [1, 17])
def test_not_numbers(backend, reduction, channels):
    """A NaN among a bin's samples makes it NaN; a pixel without weight is not read."""
    features = np.full((1, channels, 3, 3), -1.0, np.float32)
    features[0, :, 0, 2] = np.nan
    features[0, :, 2] = np.inf
    rois = np.array([[0, 0, 0, 2, 2], [0, 0.5, 0.5, 1.5, 1.5], [0, 1, 1, 1, 1]], np.float32)
    options = {"sampling_ratio": 1, "reduction": reduction, "convention": "asymmetric"}
    output = backend.roi_align(
        features, rois[2:], 1, **options | {"convention": roialign.Convention()}
    )
    assert (output == (-1 if reduction == "max" else 0)).all()  # exactly on pixel (1, 1)
    output = backend.roi_align(features, rois, (2, 2), **options)
    assert np.isnan(output[0, :, 0, 1]).all()
    assert np.isfinite(output[0, :, 0, 0]).all() and np.isposinf(output[0, :, 1]).all()


@pytest.mark.backends("reductions", "-slow")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_larger_than_the_mean(backend, make_problem, reduction):
    problem = make_problem(sampling=0, convention="asymmetric", count=20)
    problem = replace(problem, features=np.abs(problem.features))
    options = problem.options
    mean = backend.roi_align(problem.features, problem.rois, problem.size, **options)
    largest = backend.roi_align(
        problem.features, problem.rois, problem.size, **options, reduction="max"
    )
    corners = backend.roi_align(
        problem.features, problem.rois, problem.size, **options, reduction="max_corner"
    )
    room = 1e-5 * np.abs(problem.features).max()
    assert (largest >= mean - room).all() and (largest >= corners - room).all()


@pytest.mark.backends("reductions", "-slow")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_threads(backend, make_problem, layouts, layout, reduction):
    problem = make_problem(shape=(3, 40, 30, 31), count=400, sampling=0, scale=(1.0, 1.0))
    problem = replace(problem, features=layouts[layout](problem.features))
    results = []
    for threads in (1, 2, 5):
        with backend.threads(threads):
            results.append(run(backend, problem, reduction, problem.draw_output()))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.backends("reductions", "pyramids")
def test_pyramid(backend, layout, reduction):
    """Each row is the one of a call of its map; levels of -1 are 0."""
    rng = np.random.default_rng(0)
    shapes = [(2, 12, 13, 4), (2, 6, 7, 4)] if layout == "NHWC" else [(2, 4, 12, 13), (2, 4, 6, 7)]
    maps = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    boxes = np.sort(rng.uniform(-2, 30, (2, 5, 2, 2)), 2).reshape(2, 5, 4).astype(np.float32)
    levels = rng.integers(-1, 2, (2, 5))
    scales, options = (1 / 2, 1 / 4), {"layout": layout, "reduction": reduction}
    several = options | {"spatial_scales": scales}
    pooled = (2, 5, 3, 3, 4) if layout == "NHWC" else (2, 5, 4, 3, 3)
    g = rng.standard_normal(pooled).astype(np.float32)

    def largest(fine, coarse, boxes, levels, g):
        maps = fine, coarse
        output = roialign.multiscale_roi_align(maps, boxes, 3, levels=levels, **several)
        gradients = roialign.multiscale_roi_align_adjoint(
            g, boxes, shapes, feature_maps=maps, levels=levels, **several
        )
        d_boxes = ()
        if reduction == "max":
            d_boxes = roialign.multiscale_roi_align_box_gradient(
                g, maps, boxes, levels=levels, **several
            )
        return output, gradients, d_boxes

    output, gradients, d_boxes = backend.run(largest, *maps, boxes, levels, g)
    assert not output[levels < 0].any()
    for level, (features, scale, gradient) in enumerate(zip(maps, scales, gradients, strict=True)):
        alone = roialign.roi_align(features, boxes, 3, spatial_scale=scale, **options)
        here = levels == level
        tolerance.close(output[here], alone[here], 0 if "exact" in backend.traits else 1e-5)
        d_here = np.where(here[..., None, None, None], g, 0)
        expected = roialign.roi_align_adjoint(
            d_here, boxes, features.shape, spatial_scale=scale, features=features, **options
        )
        np.testing.assert_allclose(gradient, expected, atol=1e-5)
    if reduction == "max":
        assert d_boxes.shape == boxes.shape and not d_boxes[levels < 0].any()


def test_hostile_boxes(backend):
    """Any box: in time and memory bounded by the map, and the same in each way."""
    ends = [0, -1, 3.5, 1e9, -1e9, 3e38, -3e38, np.inf, -np.inf, np.nan]
    boxes = np.array(np.meshgrid(*[ends] * 4)).reshape(4, -1).T[::7].astype(np.float32)
    features = np.random.default_rng(0).standard_normal((1, 3, 6, 7)).astype(np.float32)
    index = np.zeros(len(boxes), np.int64)
    for sampling in (0, 3):
        for reduction in REDUCTIONS:
            options = {"sampling_ratio": sampling, "reduction": reduction}
            output = backend.roi_align(features, (boxes, index), 2, **options)
            assert np.isfinite(output).all()
            assert not output[~np.isfinite(boxes).all(1) & np.isnan(boxes).any(1)].any()


def test_errors(backend):
    features, rois = np.ones((1, 2, 4, 4), np.float32), np.array([[0, 0, 0, 2, 2]], np.float32)
    d_output = np.ones((1, 2, 1, 1), np.float32)
    with pytest.raises(TypeError, match="`features` must be given for reduction 'max'"):
        roialign.roi_align_adjoint(d_output, rois, features.shape, reduction="max")
    with pytest.raises(TypeError, match="`feature_maps` must be given"):
        roialign.multiscale_roi_align_adjoint(
            d_output, rois, [features.shape], spatial_scales=[1], reduction="max"
        )
    with pytest.raises(ValueError, match="feature_maps"):
        roialign.multiscale_roi_align_adjoint(
            d_output, rois, [features.shape], spatial_scales=[1], reduction="max",
            feature_maps=[features] * 2,
        )  # fmt: skip
    with pytest.raises(NotImplementedError, match="max_corner"):
        roialign.roi_align_box_gradient(d_output, features, rois, reduction="max_corner")
    with pytest.raises(ValueError, match="overlap"):
        roialign.roi_align_adjoint(
            d_output, rois, features.shape, reduction="max", features=features, out=features
        )
