"""Hostile values: finite results by the rule, no crash, no hang, no leak of what is not in the box.

What could crash or hang runs in a process of its own. Shapes, dtypes, sizes and scales that are
refused are in test_errors.py.
"""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import product
from tempfile import TemporaryFile

import numpy as np
import pytest

import oracle
import roialign
from backends import operations, three
from isolation import isolated
from roialign import Convention

NAN, INF = float("nan"), float("inf")
RNG = np.random.default_rng(13)
SIZE = (3, 2)


def hostile(convention, dtype):
    """Boxes of every kind, for a map of 9 x 10."""
    good, end = np.array([1.25, 2.5, 6.75, 7.25]), convention.end_offset
    for value, columns in product((NAN, INF, -INF), product((False, True), repeat=4)):
        yield np.where(columns, value, good)  # -inf as an end is below every min_size
    top = float(np.finfo(dtype).max)
    yield from ([-INF, 1, INF, 5], [INF, 1, -INF, 5], [NAN, -INF, INF, 5])
    yield from ([-top, 1, top, 5], [top, 1, -top, 5], [top] * 4, [1, -top, 5, top])
    for x2, y2 in ((3, 6), (6, 2), (3, 2), (2, 6), (2, 1), (2.5, 1.5), (1.25, 6), (-20, -30)):
        yield [3.25, 2.25, x2 - end, y2 - end]  # a side is 0, or inverted
    yield from ([0.0] * 4, [-0.0, 0, 0, -0.0], [1e-4, -2e-4, 5e-4, 3e-4], [9, 8, 9, 8])
    yield from ([-30, -30, -20, -20], [40, 2, 50, 6], [2, 40, 6, 50])  # outside
    yield from ([-1e30, 0, -1e29, 5], [0, 1e30, 5, 2e30])
    for reach in (1.5e5, 3e6, 1e7, 1e8, 1e9, 1e12, 1e38):
        yield from (
            [-reach, -2.5, reach, 8],
            [-3.25, -reach, 9, reach / 2],
            [0.5, 1.25, *[reach] * 2],
        )


@pytest.mark.backends("values", "-interprets")
@pytest.mark.parametrize(
    "dtype, sampling",
    [(np.float32, 0), (np.float32, 2), (np.float64, 0), (np.float64, 4096), (np.uint8, 2)],
)
def test_boxes(backend, make_problem, convention, dtype, sampling):
    """As the rule says: 0 for what is not finite, empty or outside. Of a box of 2e38 pixels those
    samples are computed that are on the map."""
    coordinate = np.float32 if dtype == np.uint8 else dtype
    boxes = np.array(list(hostile(convention, coordinate)), coordinate)
    boxes = np.concatenate([boxes, boxes[:1]])
    options = {"convention": convention, "dtype": dtype, "sampling": sampling, "scale": (1, 1)}
    problem = make_problem(shape=(2, 17, 9, 10), **options)
    problem = backend.fair(replace(problem, boxes=boxes, index=np.arange(len(boxes)) % 2))
    g = problem.draw_output()
    output, d_features, d_boxes = backend.run(three(problem), problem.features, g, *problem.rois)
    backend.check(problem, g, output, d_features, d_boxes)
    assert not d_boxes[~np.isfinite(problem.boxes).all(1)].any()
    assert output[0].any() and output[-1].any() and d_boxes[-1].any()
    if "exact" in backend.traits:  # a gradient at a box without taps is not read
        assert all(np.isfinite(result).all() for result in (output, d_features, d_boxes))
        g[~np.isfinite(problem.boxes).all(1) & ~output.any((1, 2, 3))] = NAN
        _, again, of_boxes = backend.run(three(problem), problem.features, g, *problem.rois)
        assert np.array_equal(again, d_features) and np.array_equal(of_boxes, d_boxes)


@pytest.mark.backends("values", "-interprets")
@pytest.mark.parametrize("shape", [(2, 18, 1, 1), (2, 18, 1, 9), (2, 18, 9, 1), (2, 18, 2, 2)])
def test_maps_of_one_pixel(backend, make_problem, convention, shape):
    """A row of one pixel has both taps on it."""
    problem = backend.fair(make_problem(shape=shape, convention=convention, scale=(1, 1), count=9))
    g = problem.draw_output()
    results = backend.run(three(problem), problem.features, g, *problem.rois)
    backend.check(problem, g, *results)
    assert all(result.any() for result in results[:2])


def test_numbers_beyond_float32():
    """Scales that are positive and finite as given; a size that is finite in float64 alone."""
    features, boxes = np.ones((1, 2, 8, 8), np.float32), np.array([[1.0, 1, 6, 6], [0, 0, 6, 6]])
    problem = oracle.Problem(features, boxes, np.zeros(2, int), (2, 2), convention=Convention())
    d_output = problem.draw_output()
    for scale, sampling in product((1e-300, 1e300, 3e38), (0, 2)):
        extreme = replace(problem, scale=(scale, scale), sampling=sampling)
        for result in three(extreme)(features, d_output, *problem.rois):
            assert np.isfinite(result).all()
    boxes[0] = -1e300, 1, 1e300, 5  # infinite in float32, without a warning
    for result in three(replace(problem, boxes=boxes))(features, d_output, *problem.rois):
        assert np.isfinite(result).all() and (len(result) == 1 or not result[0].any())
    features = features.astype(np.float64)
    boxes[0] = -1e300, -1e300, 1e300, 1e300
    wide = replace(problem, features=features, boxes=boxes, size=(1, 1), sampling=1)
    output, *_ = three(wide)(features, np.ones((2, 2, 1, 1)), *problem.rois)
    assert (output[0] == 1).all()  # its one sample is at 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_both_ends_of_the_map_are_inside(dtype):
    # at -1 and at L a sample counts in full, one ulp further it does not
    map_ = np.full((1, 1, 6, 6), 2.0, dtype)
    eps = np.finfo(dtype).eps
    for x, value in ((-1.0, 2), (-1 - 2 * eps, 0), (6.0, 2), (6 + 8 * eps, 0), (5.5, 2), (0.0, 2)):
        boxes = np.array([[0, x, 2.0, x, 3.0]], dtype)
        y = roialign.roi_align(map_, boxes, 1, convention=Convention(), sampling_ratio=1)
        assert y.item() == value, x


def check_many_huge_boxes():
    # memory and time of the map, not of the box: 500 boxes of 2e9 px, each 7 x 7 bins
    features, g = np.ones((1, 1, 16, 16), np.float32), np.ones((500, 1, 7, 7), np.float32)
    boxes = np.tile(np.float32([[-1e9, -1e9, 1e9, 1e9]]), (500, 1))
    problem = oracle.Problem(features, boxes, np.zeros(500, int), (7, 7), convention=Convention())
    y, d_features, d_boxes = three(problem)(features, g, *problem.rois)
    # of the n samples of bin 3 on an axis, those from -1 to 16
    n = -(-2 * 10**9 // 7)
    step = Fraction(2 * 10**9, 7 * n)
    first = 3 * n * step + step / 2 - 10**9
    inside = math.floor((16 - first) / step) - math.ceil((-1 - first) / step) + 1
    np.testing.assert_allclose(y[0, 0, 3, 3], (inside / n) ** 2, rtol=1e-6)
    assert (y == y[0]).all() and y[0, 0, 0, 0] == 0
    assert np.isfinite(d_features).all() and np.abs(d_boxes).max() < 1e-6


# positions on pixels (a weight of 0 beside a weight of 1), at both borders, and between
TOUCHING = np.float32(
    [[0.5, 0.5, 3.5, 3.5], [-2, -1.5, 1, 0.5], [4.5, 5.5, 7.5, 8.5], [1.25, 0.75, 5.5, 4.25]]
)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [1, 16, 35])
@pytest.mark.parametrize("sampling", [0, 1, 2])
def test_what_has_no_weight_never_enters(layouts, channels, layout, bad, sampling):
    """A pixel or a gradient that is not finite enters exactly where it counts, in its channel."""
    shape, index = (1, channels, 6, 7), np.zeros(len(TOUCHING), int)
    features = RNG.standard_normal(shape).astype(np.float32)
    problem = oracle.Problem(features, TOUCHING, index, (3, 3), (1.0, 1.0), sampling, Convention())
    rows, columns = zip(*[(y.weights != 0, x.weights != 0) for y, x in problem.axes], strict=True)
    counts = np.einsum("kph,kqw->kpqhw", rows, columns)
    g = problem.draw_output()
    forward, adjoint, _ = operations(problem)
    for operation, given, at in ((forward, features, (3, 4)), (adjoint, g, (0, 1, 2))):
        for place in np.ndindex(tuple(counts.shape[i] for i in at)):
            image = (0,) if given is features else place[:1]
            poisoned, clean = given.copy(), given.copy()
            cell = (*image, -1, *place[-2:])
            poisoned[cell], clean[cell] = bad, 0
            result, expected = (
                operation(layouts[layout](each), layouts[layout](each), *problem.rois)
                for each in (poisoned, clean)
            )
            enters = counts[(..., *place)] if given is features else counts[place][None]
            assert np.array_equal(np.isfinite(result[:, -1]), ~enters)
            result[:, -1][enters] = expected[:, -1][enters]
            np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)
    beside = [counts[0].sum((2, 3)) == 1, counts[3].sum((2, 3)) > 1]
    assert sampling != 1 or all(each.all() for each in beside)  # on pixels, and between


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


def check_offsets_beyond_32_bits():
    # a sparse file: 2.5e9 pixels of which a few are on disk
    side = 50_000
    with TemporaryFile() as file:
        features = np.memmap(file, np.float32, "w+", shape=(1, 1, side, side))
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


def check_strides_beyond_32_bits():
    # small arrays whose strides reach 2^33 bytes, in and out
    with TemporaryFile() as file:
        raw = np.memmap(file, np.uint8, "w+", shape=(3 * 2**33 + 2**20,))

    def wide(shape, offset):
        strides = [2**33, 2**16, 4 * shape[3], 4]
        return np.lib.stride_tricks.as_strided(raw[offset:].view(np.float32), shape, strides)

    features = RNG.standard_normal((2, 2, 9, 10)).astype(np.float32)
    laid = wide(features.shape, 0)
    laid[...] = features
    rois = np.float32([[0, 1.25, 0.5, 6.75, 5], [1, 0, 2.25, 7.5, 6.5], [1, 3.5, 3.25, 4.5, 7.75]])
    y = roialign.roi_align(features, rois, SIZE)
    out = wide(y.shape, 2**12)
    assert roialign.roi_align(laid, rois, SIZE, out=out) is out
    np.testing.assert_allclose(out, y, rtol=0, atol=1e-5)
    dx = wide(features.shape, 2**13)
    roialign.roi_align_adjoint(out, rois, features.shape, out=dx)
    expected = roialign.roi_align_adjoint(y, rois, features.shape)
    np.testing.assert_allclose(dx, expected, rtol=0, atol=1e-5)


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


@pytest.mark.parametrize(
    "check",
    [
        check_many_huge_boxes,
        check_every_element_of_a_large_result_is_written,
        check_offsets_beyond_32_bits,
        check_strides_beyond_32_bits,
        check_broadcast_maps_beyond_32_bits,
        check_many_rois_beyond_32_bits,
        check_empty_arrays_of_large_shape,
    ],
)
def test_in_a_process_of_its_own(check):
    isolated(check)


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
