"""Hostile values: finite results by the rule, no crash, no hang, no leak of what is not in the box.

What could crash or hang runs in a process of its own. Shapes, dtypes, sizes and scales that are
refused are in test_errors.py.
"""

from itertools import product

import numpy as np
import pytest

import roialign
from isolation import isolated
from roialign import Convention

CONVENTIONS = (
    "mindspore",
    "mindspore_legacy",
    "asymmetric",
    "half_pixel",
    "openvino_half_pixel",
    "mmdet_legacy",
)
CLAMPED = [name for name in CONVENTIONS if roialign.conventions[name].min_size is not None]
NAN, INF = float("nan"), float("inf")
RNG = np.random.default_rng(13)
GOOD = np.array([[0, 1.25, 0.5, 6.75, 5.0], [1, 0.0, 2.25, 7.5, 6.5], [1, 3.5, 3.25, 4.5, 7.75]])
FEATURES = RNG.standard_normal((2, 17, 9, 10))
SIZE = (3, 2)


def calls(features, rois, size=SIZE, **options):
    """Forward, adjoint and box gradient, each with a `d_output` of ones and into NaN."""
    y = np.full((len(rois), features.shape[1], *size), np.nan, features.dtype)
    d_output = np.ones_like(y)
    dx = np.full(features.shape, np.nan, features.dtype)
    d_rois = np.full(rois.shape, np.nan, rois.dtype)
    roialign.roi_align(features, rois, size, out=y, **options)
    roialign.roi_align_adjoint(d_output, rois, features.shape, out=dx, **options)
    roialign.roi_align_box_gradient(d_output, features, rois, out=d_rois, **options)
    return y, dx, d_rois


def assert_close(actual, expected, what):
    scale = max(1.0, np.abs(expected).max(initial=0))
    atol = 64 * np.finfo(actual.dtype).eps * scale
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=str(what))


def bad_boxes(dtype):
    """Boxes of which at least one coordinate is not finite, or whose size overflows."""
    base = [1.5, 2.0, 6.0, 7.5]
    for value, columns in product(
        (NAN, INF, -INF), ([0], [1], [2], [3], [0, 2], [1, 3], [0, 1], [2, 3], [0, 1, 2, 3])
    ):
        box = list(base)
        for column in columns:
            box[column] = value
        yield box
    yield [-INF, 1, INF, 5]
    yield [INF, 1, -INF, 5]
    yield [NAN, -INF, INF, 5]
    top = float(np.finfo(dtype).max)
    yield [-top, 1, top, 5]
    yield [top, 1, -top, 5]
    yield [top, top, top, top]
    yield [1, -top, 5, top]


def has_a_size(box, name, sampling_ratio):
    """Whether a side of minus infinity is clamped to a size: the rule then has a finite box."""
    x1, y1, x2, y2 = box
    return name in CLAMPED and all(
        np.isfinite(lo) and (hi == -INF or np.isfinite(hi)) for lo, hi in ((x1, x2), (y1, y2))
    )


def check_coordinates_that_are_not_finite(dtype):
    features = FEATURES.astype(dtype)
    good = GOOD.astype(dtype)
    bad = np.array(list(bad_boxes(dtype)), dtype)
    for name, sampling_ratio in product(CONVENTIONS, (0, 2)):
        options = {"convention": name, "sampling_ratio": sampling_ratio}
        boxes = np.array([b for b in bad if not has_a_size(b, name, sampling_ratio)], dtype)
        rois = np.empty((len(boxes) + len(good), 5), dtype)
        rois[: len(boxes), 0] = 1
        rois[: len(boxes), 1:] = boxes
        rois[len(boxes) :] = good
        order = RNG.permutation(len(rois))
        where_good = [int(np.flatnonzero(order == i)[0]) for i in range(len(boxes), len(rois))]
        y, dx, d_rois = calls(features, rois[order], **options)
        zeros = np.delete(y, where_good, 0), np.delete(d_rois, where_good, 0)
        for result in zeros:
            rows = np.flatnonzero((result != 0).reshape(len(result), -1).any(1))
            at = np.delete(rois[order], where_good, 0)[rows]
            np.testing.assert_array_equal(result, 0, err_msg=f"{options} {at}")
        expected = calls(features, good, **options)
        assert_close(y[where_good], expected[0], options)
        assert_close(dx, expected[1], options)
        assert_close(d_rois[where_good], expected[2], options)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_coordinates_that_are_not_finite_give_zero(dtype):
    isolated(check_coordinates_that_are_not_finite, dtype)


@pytest.mark.parametrize("name", CLAMPED)
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_a_side_of_minus_infinity_is_clamped_like_any_other(name, sampling_ratio):
    # size = max(-inf, min_size) is finite, so the rule gives a box; its gradient is 0 all the same
    options = {"convention": name, "sampling_ratio": sampling_ratio}
    ends = [[6.0, -INF], [-INF, 7.5], [-INF, -INF]]
    small = [[6.0, -50.0], [-50.0, 7.5], [-50.0, -50.0]]
    rois, same = (np.array([[1, 1.5, 2.0, *end] for end in e], np.float32) for e in (ends, small))
    y, dx, d_rois = calls(FEATURES.astype(np.float32), rois, **options)
    expected = calls(FEATURES.astype(np.float32), same, **options)
    assert_close(y, expected[0], options)
    assert_close(dx, expected[1], options)
    assert (d_rois == 0).all()


def check_float64_boxes_that_are_infinite_in_float32():
    # read as float32: no overflow warning, and zero like any infinite coordinate
    features = FEATURES.astype(np.float32)
    rois = np.array([[0, -1e300, 1, 1e300, 5], [1, 1, 2, 1e39, 5], [1, 1, 2, 5, 6]])
    y, dx, d_rois = calls(features, rois, convention="half_pixel", sampling_ratio=2)
    assert (y[:2] == 0).all() and (y[2] != 0).any()
    assert np.isfinite(dx).all() and (dx[0] == 0).all()
    assert (d_rois[:2] == 0).all() and (d_rois[2, 1:] != 0).any()


def test_float64_boxes_that_are_infinite_in_float32():
    isolated(check_float64_boxes_that_are_infinite_in_float32)


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_nan_in_d_output_of_a_box_that_is_not_finite_is_ignored(name, sampling_ratio):
    rois = GOOD.copy()
    rois[1, 3] = NAN
    d_output = np.ones((3, 17, *SIZE))
    d_output[1] = NAN
    options = {"convention": name, "sampling_ratio": sampling_ratio}
    dx = roialign.roi_align_adjoint(d_output, rois, FEATURES.shape, **options)
    expected = roialign.roi_align_adjoint(d_output[[0, 2]], GOOD[[0, 2]], FEATURES.shape, **options)
    assert_close(dx, expected, options)
    d_rois = roialign.roi_align_box_gradient(d_output, FEATURES, rois, **options)
    assert (d_rois[1] == 0).all() and np.isfinite(d_rois).all()


def inside_counts(lo, hi, convention, bins, length, real=np.float32):
    """Samples inside per bin, and samples per bin: the rule, enumerated where it can be inside."""
    a = real(lo) + real(convention.input_offset) - real(convention.pixel_offset)
    b = (
        real(hi)
        + real(convention.input_offset)
        + real(convention.end_offset)
        - real(convention.pixel_offset)
    )
    size = b - a
    bin = size / real(bins)
    n = int(np.ceil(bin)) if convention.adaptive == "ceil" else max(1, int(np.floor(bin)))
    if n > 2**31:
        return np.zeros(bins, int), n
    position_type = real if n <= 2**22 else np.float64
    a, bin, count = position_type(a), position_type(bin), position_type(n)
    counts = []
    for k in range(bins):
        begin = a + position_type(k) * bin
        step = float(bin) / n
        near = [(edge - float(begin)) / step for edge in (-1, length)]
        slack = 2 + 1e-6 * n  # float32 positions of a huge box are coarse
        first = int(np.clip(min(near) - slack, 0, n))
        last = int(np.clip(max(near) + slack, 0, n))
        i = np.arange(first, last).astype(position_type)
        p = begin + ((i + position_type(0.5)) * bin) / count
        counts.append(np.count_nonzero((p >= -1) & (p <= length)))
    return np.array(counts), n


HUGE = (1e5, 3e5, 1e6, 4.1e6, 4.3e6, 1e7, 1e8, 9.9e8, 1.1e9, 2.2e9, 1e10, 1e12, 1e20, 1e38)


def check_huge_adaptive_boxes(name):
    # ones pooled: the share of samples that are inside, by counting
    convention = roialign.conventions[name]
    ones = np.ones((1, 3, 9, 11), np.float32)
    for reach, bins in product(HUGE, (1, 2, 3, 7)):
        box = np.array([[0, -reach, 0.75 - reach, reach + 3, reach]], np.float32)
        columns, n_x = inside_counts(box[0, 1], box[0, 3], convention, bins, 11)
        rows, n_y = inside_counts(box[0, 2], box[0, 4], convention, bins, 9)
        share = np.outer(rows / n_y, columns / n_x)
        y, dx, d_rois = calls(ones, box, (bins, bins), convention=name)
        np.testing.assert_allclose(y[0, 1], share, rtol=1e-5, atol=1e-38, err_msg=f"{reach} {bins}")
        np.testing.assert_allclose(dx[0, 2].sum(dtype=float), share.sum(), rtol=1e-5, atol=1e-38)
        # a constant has no slope: what is left is the rounding of slopes that cancel
        assert np.abs(d_rois).max() <= 3 * 64 * 2.0**-24 * share.sum(), (reach, bins)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_huge_adaptive_boxes(name):
    isolated(check_huge_adaptive_boxes, name)


def check_huge_adaptive_boxes_against_the_oracle(dtype):
    import oracle

    dtype = np.dtype(dtype)
    features = RNG.uniform(1, 2, (1, 2, 9, 11)).astype(dtype)  # positive: errors stay relative
    for name, reach in product(("half_pixel", "mindspore"), (1e5, 3e6, 1e7, 1e9)):
        convention = roialign.conventions[name]
        boxes = np.array(
            [
                [-reach, -2.5, reach, 8.0],
                [-3.25, -reach, 9.0, 0.5 * reach],
                [0.5, 1.25, reach, reach],
            ],
            dtype,
        )
        problem = oracle.Problem(features, boxes, np.zeros(3, int), SIZE, convention=convention)
        d_output = RNG.uniform(1, 2, problem.output_shape).astype(dtype)
        rois = (boxes, np.zeros(3, int))
        eps = np.finfo(dtype).eps
        y = roialign.roi_align(features, rois, SIZE, convention=convention)
        np.testing.assert_allclose(y, oracle.forward(problem), rtol=64 * eps)
        dx = roialign.roi_align_adjoint(d_output, rois, features.shape, convention=convention)
        np.testing.assert_allclose(dx, oracle.adjoint(problem, d_output), rtol=64 * eps)
        d_rois = roialign.roi_align_box_gradient(d_output, features, rois, convention=convention)
        bound = 512 * eps * oracle.box_gradient(problem, d_output, bound=True)
        assert (np.abs(d_rois - oracle.box_gradient(problem, d_output)) <= bound).all()
        assert (y != 0).any() and (dx != 0).any() and (d_rois != 0).any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_huge_adaptive_boxes_against_the_oracle(dtype):
    isolated(check_huge_adaptive_boxes_against_the_oracle, dtype)


def check_boxes_at_the_end_of_float64():
    # finite in float64, with a size that is too: n > 2^31, and one sample of a fixed grid at 0
    features = np.ones((1, 3, 9, 11))
    box = np.array([[0, -1e300, -1e300, 1e300, 1e300]])
    for result in calls(features, box):
        assert (result == 0).all()
    y, dx, d_rois = calls(features, box, (1, 1), convention=Convention(), sampling_ratio=1)
    assert (y == 1).all() and (dx[..., 0, 0] == 1).all() and dx.sum() == 3
    assert np.isfinite(d_rois).all()


def test_boxes_at_the_end_of_float64():
    isolated(check_boxes_at_the_end_of_float64)


def check_many_huge_boxes():
    # memory and time of the map, not of the box: 500 boxes of 2e9 px, each 7 x 7 bins
    features = np.ones((1, 1, 16, 16), np.float32)
    rois = np.zeros((500, 5), np.float32)
    rois[:, 1:] = [-1e9, -1e9, 1e9, 1e9]
    y, dx, d_rois = calls(features, rois, (7, 7))
    assert (y == y[0]).all() and y[0, 0, 3, 3] > 0 and y[0, 0, 0, 0] == 0
    assert np.isfinite(dx).all() and np.abs(d_rois).max() < 1e-6


def test_many_huge_boxes():
    isolated(check_many_huge_boxes, timeout=30)


def check_extreme_sampling_ratio():
    # a ramp: the mean over the samples of a bin is its centre, however many there are
    ramp = np.broadcast_to(np.arange(12, dtype=np.float32), (1, 2, 10, 12)).copy()
    box = np.array([[0, 1.5, 2.0, 9.5, 8.0]], np.float32)
    for n in (1000, 4096):
        y, dx, d_rois = calls(ramp, box, (1, 2), convention=Convention(), sampling_ratio=n)
        np.testing.assert_allclose(y[0, 0], [[3.5, 7.5]], rtol=1e-5, err_msg=str(n))
        np.testing.assert_allclose(dx.sum((2, 3), dtype=float), 2, rtol=1e-5)
        # d/dx1 of the centres' sum: 3/4 + 1/4, for both channels
        np.testing.assert_allclose(d_rois[0, 1:], [2, 0, 2, 0], rtol=1e-4, atol=1e-4)
    adaptive = calls(ramp, box, sampling_ratio=0)
    for n in (-1, -(2**31) - 1, -(2**63), -(2**63) - 1, -(10**5000)):
        for a, b in zip(calls(ramp, box, sampling_ratio=n), adaptive, strict=True):
            assert (a == b).all(), n


def test_extreme_sampling_ratio():
    isolated(check_extreme_sampling_ratio)


def check_scales_beyond_float32():
    # positive and finite as given; 0 or infinite in float32
    features = np.ones((1, 2, 8, 8), np.float32)
    box = np.array([[0, 1, 1, 6, 6], [0, 0, 0, 6, 6]], np.float32)
    for scale, sampling_ratio in product((1e-300, 1e300, 3e38), (0, 2)):
        for result in calls(features, box, spatial_scale=scale, sampling_ratio=sampling_ratio):
            assert np.isfinite(result).all()
    y = roialign.roi_align(features, box, 2, spatial_scale=1e300, sampling_ratio=2)
    assert (y == 0).all()


def test_scales_beyond_float32():
    isolated(check_scales_beyond_float32)


ZERO_AREA = [
    [3.0, 2.0, 3.0, 6.0],
    [3.0, 2.0, 6.0, 2.0],
    [3.0, 2.0, 3.0, 2.0],
    [0.0] * 4,
    [-0.0, 0.0, 0.0, -0.0],
    [1e-4, -2e-4, 5e-4, 3e-4],
    [9.0, 8.0, 9.0, 8.0],
]


@pytest.mark.parametrize("name", CONVENTIONS)
def test_zero_size_adaptive_is_empty(name):
    # made to be of size <= 0 after end_offset
    convention = roialign.conventions[name]
    end = convention.end_offset
    boxes = np.array(
        [
            [3.0, 2.0, 3.0 - end, 6.0],
            [3.0, 2.0, 6.0, 2.0 - end],
            [3.0, 2.0, 3.0 - end, 2.0 - end],
            [5.0, 2.0, 4.0 - end, 6.0],
            [5.0, 6.0, 4.0 - end, 1.0 - end],
        ]
    )
    rois = np.column_stack([np.ones(len(boxes)), boxes])
    results = calls(FEATURES, rois, convention=name)
    if convention.min_size == 1:
        # a side of 1 where it is not longer
        ends = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        same = np.column_stack([np.ones(len(boxes)), boxes[:, :2], ends])
        y, dx, _ = calls(FEATURES, same, convention=name)
        assert_close(results[0], y, name)
        assert_close(results[1], dx, name)
        assert (results[0] != 0).any()
    else:
        for result in results:
            assert (result == 0).all()


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("box", ZERO_AREA)
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
def test_small_boxes_are_the_rule(name, box, sampling_ratio):
    # MindSpore leaves the row of |x1|, |x2| < 1e-3 unwritten
    import oracle
    import tolerance

    for dtype in (np.float32, np.float64):
        problem = oracle.Problem(
            FEATURES.astype(dtype),
            np.array([box], dtype),
            np.array([1]),
            SIZE,
            sampling=sampling_ratio,
            convention=roialign.conventions[name],
        )
        rois = np.array([[1, *box]], dtype)
        y, dx, d_rois = calls(
            problem.features, rois, convention=name, sampling_ratio=sampling_ratio
        )
        d_output = np.ones(problem.output_shape, dtype)
        expected = oracle.forward(problem)
        tolerance.check(y, expected, tolerance.forward(problem, expected))
        expected = oracle.adjoint(problem, d_output)
        tolerance.check(dx, expected, tolerance.adjoint(problem, d_output, expected))
        expected = oracle.box_gradient(problem, d_output)
        tolerance.check(
            d_rois[:, 1:], expected, tolerance.box_gradient(problem, d_output, expected)
        )


INVERTED = np.array(
    [[1, 6.75, 5.0, 1.25, 0.5], [0, 7.5, 2.25, 0.0, 6.5], [1, 1.5, 7.75, 4.5, 3.25]]
)
MIRRORED = {"half_pixel": 0.0, "openvino_half_pixel": 0.0, "mindspore": 1.0}


@pytest.mark.parametrize("name", MIRRORED)
@pytest.mark.parametrize("sampling_ratio", [1, 2, 3])
def test_inverted_boxes_are_mirrored_on_a_fixed_grid(name, sampling_ratio):
    end = roialign.conventions[name].end_offset
    options = {"convention": name, "sampling_ratio": sampling_ratio}
    # the same interval, walked from the other end
    x = INVERTED[:, 1] > INVERTED[:, 3] + end
    y = INVERTED[:, 2] > INVERTED[:, 4] + end
    upright = INVERTED.copy()
    upright[x, 1], upright[x, 3] = INVERTED[x, 3] + end, INVERTED[x, 1] - end
    upright[y, 2], upright[y, 4] = INVERTED[y, 4] + end, INVERTED[y, 2] - end

    def turned(output):
        output = output.copy()
        output[x] = output[x][..., ::-1]
        output[y] = output[y][..., ::-1, :]
        return output

    assert x.any() and y.any() and not (x & y).all()
    pooled = roialign.roi_align(FEATURES, INVERTED, SIZE, **options)
    assert_close(pooled, turned(roialign.roi_align(FEATURES, upright, SIZE, **options)), options)
    d_output = RNG.standard_normal(pooled.shape)
    assert_close(
        roialign.roi_align_adjoint(d_output, INVERTED, FEATURES.shape, **options),
        roialign.roi_align_adjoint(turned(d_output), upright, FEATURES.shape, **options),
        options,
    )
    swapped = roialign.roi_align_box_gradient(turned(d_output), FEATURES, upright, **options)
    swapped[np.ix_(x, [1, 3])] = swapped[np.ix_(x, [3, 1])]
    swapped[np.ix_(y, [2, 4])] = swapped[np.ix_(y, [4, 2])]
    assert_close(
        roialign.roi_align_box_gradient(d_output, FEATURES, INVERTED, **options), swapped, options
    )


@pytest.mark.parametrize("name", CONVENTIONS)
def test_inverted_boxes_are_empty_or_clamped_on_an_adaptive_grid(name):
    rois = INVERTED - [0, 0, 0, 2, 0]  # below the end_offset as well
    rois[2] = [1, 6.0, 7.75, 1.5, 3.25]
    results = calls(FEATURES, rois, convention=name)
    if roialign.conventions[name].min_size == 1:
        ends = np.maximum(rois[:, 3:], rois[:, 1:3] + 1)
        expected = calls(FEATURES, np.column_stack([rois[:, :3], ends]), convention=name)
        assert_close(results[0], expected[0], name)
        assert_close(results[1], expected[1], name)
    else:
        for result in results:
            assert (result == 0).all()


@pytest.mark.parametrize("name", CLAMPED)
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_a_clamped_size_moves_with_the_start_only(name, sampling_ratio):
    rois = np.array([[1, 6.63, 4.81, 1.25, 0.5]])  # no sample on a pixel
    d_output = RNG.standard_normal((1, 17, *SIZE))
    options = {"convention": name, "sampling_ratio": sampling_ratio}
    d_rois = roialign.roi_align_box_gradient(d_output, FEATURES, rois, **options)[0]
    assert d_rois[3] == 0 and d_rois[4] == 0
    if name == "mmdet_legacy" and sampling_ratio == 0:
        assert (d_rois == 0).all()  # size 0: no sample
        return
    step = 1e-6
    for column in (1, 2):
        ends = []
        for sign in (1, -1):
            moved = rois.copy()
            moved[0, column] += sign * step
            ends.append(np.vdot(d_output, roialign.roi_align(FEATURES, moved, SIZE, **options)))
        np.testing.assert_allclose(d_rois[column], (ends[0] - ends[1]) / (2 * step), rtol=1e-6)
        assert abs(d_rois[column]) > 1e-3


@pytest.mark.parametrize("sampling_ratio", [1, 2])
def test_inverted_gradients_are_consistent(sampling_ratio):
    for name in CONVENTIONS:
        options = {"convention": name, "sampling_ratio": sampling_ratio}
        y = roialign.roi_align(FEATURES, INVERTED, SIZE, **options)
        d_output = RNG.standard_normal(y.shape)
        dx = roialign.roi_align_adjoint(d_output, INVERTED, FEATURES.shape, **options)
        np.testing.assert_allclose(np.vdot(d_output, y), np.vdot(dx, FEATURES), rtol=1e-11)


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize(
    "box",
    [
        [-30, -30, -20, -20],
        [40, 2, 50, 6],
        [2, 40, 6, 50],
        [-1e30, 0, -1e29, 5],
        [0, 1e30, 5, 2e30],
    ],
)
def test_boxes_wholly_outside_give_zero(name, box):
    rois = np.array([[0, *box], GOOD[1]], np.float32)
    features = FEATURES.astype(np.float32)
    for sampling_ratio in (0, 2):
        y, dx, d_rois = calls(features, rois, convention=name, sampling_ratio=sampling_ratio)
        assert (y[0] == 0).all() and (dx[0] == 0).all() and (d_rois[0] == 0).all()
        assert (y[1] != 0).any() and (dx[1] != 0).any() and (d_rois[1] != 0).any()


def test_samples_outside_are_counted():
    # asymmetric: of 4 columns of samples, at -1.5, -0.5, 0.5 and 1.5, three are inside
    ones = np.ones((1, 1, 8, 8), np.float32)
    rois = np.array([[0, -2, 0, 2, 4]], np.float32)
    y = roialign.roi_align(ones, rois, 1, convention="asymmetric", sampling_ratio=4)
    assert y.item() == 0.75


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_both_ends_of_the_map_are_inside(dtype):
    # at -1 and at L a sample counts in full, one ulp further it does not
    map_ = np.full((1, 1, 6, 6), 2.0, dtype)
    eps = np.finfo(dtype).eps
    for x, value in ((-1.0, 2), (-1 - 2 * eps, 0), (6.0, 2), (6 + 8 * eps, 0), (5.5, 2), (0.0, 2)):
        boxes = np.array([[0, x, 2.0, x, 3.0]], dtype)
        y = roialign.roi_align(map_, boxes, 1, convention=Convention(), sampling_ratio=1)
        assert y.item() == value, x


def weights(rois, height, width, size, **options):
    """[K, P, Q, H, W]: what each pixel counts in each bin, from maps with a single one."""
    pixels = np.eye(height * width, dtype=np.float32).reshape(1, -1, height, width)
    y = roialign.roi_align(pixels, rois.astype(np.float32), size, **options)
    return y.transpose(0, 2, 3, 1).reshape(len(rois), *size, height, width)


# positions on pixels (a weight of 0 beside a weight of 1), at both borders, and between
TOUCHING = np.array(
    [
        [0, 0.5, 0.5, 3.5, 3.5],
        [0, -2.0, -1.5, 1.0, 0.5],
        [0, 4.5, 5.5, 7.5, 8.5],
        [0, 1.25, 0.75, 5.5, 4.25],
        [0, 1.0, 1.0, 2.0, 2.0],
    ]
)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("channels", [1, 16, 35])
@pytest.mark.parametrize("sampling_ratio", [1, 2, 0])
def test_a_pixel_without_weight_never_enters(bad, last, channels, sampling_ratio):
    height, width, size = 6, 7, (3, 3)
    options = {"convention": Convention(), "sampling_ratio": sampling_ratio}
    counted = weights(TOUCHING, height, width, size, **options) != 0
    clean = RNG.standard_normal((1, channels, height, width)).astype(np.float32)
    rois = TOUCHING.astype(np.float32)
    expected = roialign.roi_align(clean, rois, size, **options)
    zero_beside_one = 0
    for h, w in np.ndindex(height, width):
        features = clean.copy()
        features[0, -1, h, w] = bad
        if last:
            features = np.ascontiguousarray(features.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        y = roialign.roi_align(features, rois, size, **options)
        enters = counted[..., h, w]
        assert not np.isfinite(y[:, -1][enters]).any(), (h, w)
        np.testing.assert_allclose(y[:, -1][~enters], expected[:, -1][~enters], atol=1e-5)
        np.testing.assert_allclose(y[:, :-1], expected[:, :-1], atol=1e-5)
        zero_beside_one += enters.any() and not enters.all()
    assert zero_beside_one


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("channels", [1, 16, 35])
@pytest.mark.parametrize("sampling_ratio", [1, 2])
def test_a_d_output_without_weight_never_enters(bad, last, channels, sampling_ratio):
    height, width, size = 6, 7, (3, 3)
    options = {"convention": Convention(), "sampling_ratio": sampling_ratio}
    counted = weights(TOUCHING, height, width, size, **options) != 0
    rois = TOUCHING.astype(np.float32)
    shape = (1, channels, height, width)
    clean = RNG.standard_normal((len(rois), channels, *size)).astype(np.float32)
    for k, p, q in np.ndindex(len(rois), *size):
        d_output, without = clean.copy(), clean.copy()
        d_output[k, -1, p, q], without[k, -1, p, q] = bad, 0
        if last:
            d_output = np.ascontiguousarray(d_output.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        dx = roialign.roi_align_adjoint(d_output, rois, shape, **options)
        expected = roialign.roi_align_adjoint(without, rois, shape, **options)
        enters = counted[k, p, q]
        assert not np.isfinite(dx[0, -1][enters]).any()
        np.testing.assert_allclose(dx[0, -1][~enters], expected[0, -1][~enters], atol=1e-5)
        np.testing.assert_allclose(dx[:, :-1], expected[:, :-1], atol=1e-5)


def test_only_zero_weights_are_left_out():
    # the rig of the two tests above: there are positions on pixels, and between them
    counted = weights(TOUCHING, 6, 7, (3, 3), convention=Convention(), sampling_ratio=1)
    assert (counted[0] == 1).sum() == 9  # every bin of the first box reads one pixel
    assert ((counted[3] > 0) & (counted[3] < 1)).any()


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_nan_far_away_enters_no_box_gradient(sampling_ratio):
    features = FEATURES.copy()
    expected = roialign.roi_align_box_gradient(
        np.ones((1, 17, *SIZE)),
        features,
        np.array([[0, 2.25, 2.5, 4.5, 4.75]]),
        sampling_ratio=sampling_ratio,
    )
    features[0, :, 7:] = features[0, :, :, 7:] = features[1] = NAN
    features[0, :, 0] = features[0, :, :, 0] = INF
    d_rois = roialign.roi_align_box_gradient(
        np.ones((1, 17, *SIZE)),
        features,
        np.array([[0, 2.25, 2.5, 4.5, 4.75]]),
        sampling_ratio=sampling_ratio,
    )
    assert_close(d_rois, expected, sampling_ratio)


def test_nan_in_one_row_of_d_output_stays_in_its_row():
    d_output = np.ones((3, 17, *SIZE))
    expected = roialign.roi_align_box_gradient(d_output, FEATURES, GOOD)
    d_output[1, 16, 2, 1] = NAN
    d_rois = roialign.roi_align_box_gradient(d_output, FEATURES, GOOD)
    assert np.isnan(d_rois[1, 1:]).all() and d_rois[1, 0] == 0
    assert_close(d_rois[[0, 2]], expected[[0, 2]], "")


def test_nan_in_one_image_stays_in_its_image():
    features = FEATURES.copy()
    features[0] = NAN
    y = roialign.roi_align(features, GOOD, SIZE)
    assert np.isnan(y[0]).all() and np.isfinite(y[1:]).all()
    d_output = np.ones((3, 17, *SIZE))
    d_output[0] = INF
    dx = roialign.roi_align_adjoint(d_output, GOOD, FEATURES.shape)
    assert not np.isfinite(dx[0]).all() and np.isfinite(dx[1]).all()


def check_every_element_is_written(dtype):
    # results of fresh memory: poison what the allocator will hand out again
    import ml_dtypes

    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rois = np.array(
        [
            [0, 1, 1, 6, 5],
            [1, NAN, 1, 2, 3],
            [1, 500, 1, 600, 3],
            [1, 2, 2, 2, 2],
            [0, 0, 0, 9, 8],
            [1, -5, -5, 20, 20],
            [1, 1e-4, 1e-4, 5e-4, 5e-4],
        ],
        np.float32,
    )
    for channels, last, name in product((1, 16, 21, 128), (False, True), CONVENTIONS):
        shape = (3, channels, 9, 10)  # no box is on image 2
        features = np.ones(shape, dtype)
        d_output = np.ones((len(rois), channels, *SIZE), dtype)
        if last:
            features, d_output = (
                np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
                for a in (features, d_output)
            )
        for sampling_ratio in (0, 2):
            options = {"convention": name, "sampling_ratio": sampling_ratio}
            for _ in range(2):
                results = (
                    roialign.roi_align(features, rois, SIZE, **options),
                    roialign.roi_align_adjoint(d_output, rois, shape, **options),
                    roialign.roi_align_box_gradient(d_output, features, rois, **options),
                )
                for result in results:
                    assert np.isfinite(result.astype(np.float32)).all()
                assert (results[1][2] == 0).all()
                for result in results:
                    result[...] = NAN
                del results, result


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_element_is_written(dtype):
    isolated(check_every_element_is_written, dtype)


def check_every_element_of_a_large_result_is_written():
    # 4 MiB and more come from the library's own cache
    features = np.ones((2, 130, 40, 52), np.float32)
    rois = np.tile(
        np.array([[0, 1, 1, 46, 35], [0, NAN, 1, 2, 3], [0, 500, 1, 600, 3]], np.float32), (60, 1)
    )
    for _ in range(3):
        y = roialign.roi_align(features, rois, 7)
        dx = roialign.roi_align_adjoint(np.ones_like(y), rois, (5, *features.shape[1:]))
        assert y.nbytes > 2**22 < dx.nbytes
        assert np.isfinite(y).all() and (y[1::3] == 0).all() and (y[2::3] == 0).all()
        assert np.isfinite(dx).all() and (dx[1:] == 0).all() and (dx[0] != 0).any()
        y[...] = dx[...] = NAN
        del y, dx


def test_every_element_of_a_large_result_is_written():
    isolated(check_every_element_of_a_large_result_is_written)


def check_offsets_beyond_32_bits(folder):
    # a sparse file: 2.5e9 pixels of which a few are on disk
    side = 50_000
    features = np.memmap(f"{folder}/map", np.float32, "w+", shape=(1, 1, side, side))
    patch = RNG.standard_normal((1, 1, 9, 10)).astype(np.float32)
    features[:, :, -9:, -10:] = patch
    box = np.array([[0, 1.25, 2.5, 7.0, 8.5]], np.float32)
    far = box + np.float32([0, side - 10, side - 9, side - 10, side - 9])
    options = {"convention": Convention(), "sampling_ratio": 2}
    d_output = RNG.standard_normal((1, 1, 3, 2)).astype(np.float32)
    y = roialign.roi_align(features, far, SIZE, **options)
    # positions near 5e4 are multiples of 2^-8: a ramp of 2^-8 times the slope
    np.testing.assert_allclose(y, roialign.roi_align(patch, box, SIZE, **options), atol=0.05)
    d_rois = roialign.roi_align_box_gradient(d_output, features, far, **options)
    np.testing.assert_allclose(
        d_rois, roialign.roi_align_box_gradient(d_output, patch, box, **options), atol=0.5
    )


def test_offsets_beyond_32_bits(tmp_path):
    isolated(check_offsets_beyond_32_bits, str(tmp_path))


def check_strides_beyond_32_bits(folder):
    # small arrays whose strides reach 2^33 bytes, in and out
    raw = np.memmap(f"{folder}/wide", np.uint8, "w+", shape=(3 * 2**33 + 2**20,))

    def wide(shape, offset):
        strides = [2**33, 2**16, 4 * shape[3], 4]
        return np.lib.stride_tricks.as_strided(raw[offset:].view(np.float32), shape, strides)

    features = FEATURES[:, :2].astype(np.float32)
    laid = wide(features.shape, 0)
    laid[...] = features
    rois = GOOD.astype(np.float32)
    y = roialign.roi_align(features, rois, SIZE)
    out = wide(y.shape, 2**12)
    assert roialign.roi_align(laid, rois, SIZE, out=out) is out
    assert_close(np.array(out), y, "forward")
    dx = wide(features.shape, 2**13)
    roialign.roi_align_adjoint(out, rois, features.shape, out=dx)
    assert_close(np.array(dx), roialign.roi_align_adjoint(y, rois, features.shape), "adjoint")


def test_strides_beyond_32_bits(tmp_path):
    isolated(check_strides_beyond_32_bits, str(tmp_path))


def check_broadcast_maps_beyond_32_bits():
    # 2^32 elements and more, of stride 0: constant maps pool to their constant
    three = np.float32(3)
    box = np.array([[0, 1, 1, 5, 5]], np.float32)
    for shape, index in (
        ((1, 2**18, 128, 129), 0),
        ((2**20 + 3, 16, 16, 17), 2**20 + 2),
        ((1, 1, 2**16, 2**16 + 1), 0),
        ((40, 4, 2, 2**24), 39),
        ((40, 4, 2**24, 2), 39),
    ):
        features = np.broadcast_to(three, shape)
        assert features.size > 2**32
        y = roialign.roi_align(features, (box[:, 1:], np.array([index])), 1)
        assert y.shape == (1, shape[1], 1, 1)
        # samples at 1, 2, 3, 4 (half_pixel): on an axis of two pixels, 3 and 4 are outside
        share = 1 if min(shape[2:]) > 5 else 0.5
        np.testing.assert_allclose(y, 3 * share, rtol=1e-5, err_msg=str(shape))


def test_broadcast_maps_beyond_32_bits():
    isolated(check_broadcast_maps_beyond_32_bits)


def check_many_rois_beyond_32_bits():
    # K * C * P * Q > 2^31 in d_output, of stride 0, onto one small map
    count, channels = 2**15, 2**10
    d_output = np.broadcast_to(np.float32(1), (count, channels, 8, 9))
    assert d_output.size > 2**31
    outside = np.zeros((count, 5), np.float32)
    outside[:, 1:] = [90, 90, 95, 95]
    outside[-1, 1:] = [1, 1, 5, 5]
    dx = roialign.roi_align_adjoint(d_output, outside, (1, channels, 8, 8), sampling_ratio=1)
    np.testing.assert_allclose(dx.sum((2, 3), dtype=float), 72, rtol=1e-5)


def test_many_rois_beyond_32_bits():
    isolated(check_many_rois_beyond_32_bits)


def check_empty_arrays_of_large_shape():
    big = 2**33
    none = np.zeros((0, 5), np.float32)
    features = np.broadcast_to(np.float32(1), (big, 2, 5, 6))
    assert roialign.roi_align(features, none, 3).shape == (0, 2, 3, 3)
    d_output = np.zeros((0, 2, 3, 3), np.float32)
    assert roialign.roi_align_box_gradient(d_output, features, none).shape == (0, 5)
    rois = np.array([[0, 1, 1, 5, 5]], np.float32)
    for shape in ((1, 0, 2**24, 4), (1, 0, 4, 2**24), (3, 0, 2**17, 2**17)):
        features = np.broadcast_to(np.float32(1), shape)
        assert roialign.roi_align(features, rois, 3).shape == (1, 0, 3, 3)
        d_output = np.zeros((1, 0, 3, 3), np.float32)
        assert roialign.roi_align_adjoint(d_output, rois, shape).shape == shape
        assert (roialign.roi_align_box_gradient(d_output, features, rois) == 0).all()


def test_empty_arrays_of_large_shape():
    isolated(check_empty_arrays_of_large_shape)


def check_results_too_large_to_allocate():
    features = np.ones((1, 2, 8, 8), np.float32)
    rois = np.array([[0, 1, 1, 5, 5]], np.float32)
    for size in (2**31, (2**62, 2**62), 2**63, 10**30):
        try:
            roialign.roi_align(features, rois, size)
        except (MemoryError, ValueError, OverflowError):
            continue
        raise AssertionError(size)
    for shape in ((1, 2, 2**31, 2**31), (1, 2, 2**62, 2**62), (10**30, 2, 3, 3)):
        try:
            roialign.roi_align_adjoint(np.ones((1, 2, 3, 3), np.float32), rois, shape)
        except (MemoryError, ValueError, OverflowError):
            continue
        raise AssertionError(shape)
    assert np.isfinite(roialign.roi_align(features, rois, 2)).all()


def test_results_too_large_to_allocate():
    isolated(check_results_too_large_to_allocate)


def test_what_numpy_cannot_allocate_is_a_memory_error():
    # an address range that cannot be backed would end in the system's killing the process
    from roialign.numpy import empty

    for side in (2**19, 2**21, 2**22):  # 1 TiB, 16 TiB, 64 TiB
        shape = (1, 1, side, side)
        try:
            np.empty(shape, np.float32)
        except MemoryError:
            with pytest.raises(MemoryError):
                empty(shape, np.dtype(np.float32), False)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (9, 1), (2, 2)])
@pytest.mark.parametrize("name", CONVENTIONS)
def test_maps_of_one_pixel(height, width, name):
    # a row of one pixel has both taps on it
    features = RNG.uniform(1, 2, (1, 18, height, width))
    rois = np.array(
        [[0, -0.5, -0.5, 0.5, 0.5], [0, 0, 0, 1, 1], [0, -1, -1, 0.9, 0.9], [0, 0, 0, 9, 9]]
    )
    for sampling_ratio in (0, 1, 2):
        y, dx, d_rois = calls(features, rois, convention=name, sampling_ratio=sampling_ratio)
        ones = roialign.roi_align(
            np.ones_like(features), rois, SIZE, convention=name, sampling_ratio=sampling_ratio
        )
        if (height, width) == (1, 1):
            assert_close(y, ones * features[:, :, :1, :1], name)
            assert (d_rois == 0).all()
        assert (y >= ones * features.min() - 1e-12).all()
        assert (y <= ones * features.max() + 1e-12).all()
        np.testing.assert_allclose(dx.sum(), ones.sum(), rtol=1e-11)
