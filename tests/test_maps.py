"""Several maps and a level per RoI: the rows of single calls, bit for bit, in the RoIs' order."""

from dataclasses import replace

import numpy as np
import pytest

import oracle
import tolerance
from roialign import _core, _rule, get_num_threads, numpy as adapter, set_num_threads
from roialign._rois import Rois

SIZES = ((24, 31), (9, 11), (5, 40))
SCALES = (1.0, 0.8, 0.5, 0.4, 0.21, 1.3)


@pytest.fixture
def pyramid(make_problem):
    """Maps, RoIs with levels (-1 for none), and the arguments of a call."""

    def pyramid(dtype=np.float32, sampling=2, convention="half_pixel", count=60, channels=19):
        options = {"dtype": dtype, "sampling": sampling, "convention": convention}
        problem = make_problem(3, shape=(2, channels, *SIZES[0]), count=count, **options)
        maps = tuple(
            make_problem(4 + m, shape=(2, channels, *size), **options).features
            for m, size in enumerate(SIZES)
        )
        levels = np.random.default_rng(5).integers(-1, len(maps), count)
        rule = _rule.vector(problem.convention, sampling)
        return maps, Rois(*problem.rois, levels), problem, rule

    return pyramid


def singles(maps, rois):
    """(map, its scales, its rows, its RoIs) of the single calls that it takes instead."""
    for m, features in enumerate(maps):
        rows = np.flatnonzero(rois.levels == m)
        yield (
            features,
            SCALES[2 * m : 2 * m + 2],
            rows,
            Rois(rois.boxes[rows], rois.image_index[rows]),
        )


def last(array):
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("layout", [np.ascontiguousarray, last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", tolerance.DTYPES, ids=str)
@pytest.mark.parametrize("sampling", [0, 2])
def test_rows_are_those_of_single_calls(pyramid, dtype, sampling, layout):
    maps, rois, problem, rule = pyramid(dtype, sampling)
    maps, v = tuple(map(layout, maps)), problem.draw_output()
    tangent = np.random.default_rng(6).standard_normal(rois.boxes.shape)
    for t in (None, tangent):
        output = adapter.forward(maps, rois, problem.size, SCALES, rule, tangent=t)
        d_maps = adapter.adjoint(v, rois, [m.shape for m in maps], SCALES, rule, tangent=t)
        for m, (features, scales, rows, own) in enumerate(singles(maps, rois)):
            along = None if t is None else t[rows]
            expected = adapter.forward((features,), own, problem.size, scales, rule, tangent=along)
            np.testing.assert_array_equal(output[rows], expected)
            (expected,) = adapter.adjoint(
                v[rows], own, [features.shape], scales, rule, tangent=along
            )
            np.testing.assert_array_equal(d_maps[m], expected)
        assert not output[rois.levels < 0].any() and output[rois.levels >= 0].any()
    d_boxes = adapter.box_gradient(v, maps, rois, SCALES, rule)
    for features, scales, rows, own in singles(maps, rois):
        expected = adapter.box_gradient(v[rows], (features,), own, scales, rule)
        np.testing.assert_array_equal(d_boxes[rows], expected)
    assert not d_boxes[rois.levels < 0].any()


def test_each_map_has_its_scale(pyramid):
    maps, rois, problem, rule = pyramid()
    output = adapter.forward(maps, rois, problem.size, SCALES, rule)
    for features, scales, rows, own in singles(maps, rois):
        on_map = replace(
            problem, features=features, boxes=own.boxes, index=own.image_index, scale=scales
        )
        expected = oracle.forward(on_map)
        tolerance.check(output[rows], expected, tolerance.forward(on_map, expected))


def test_bits_do_not_depend_on_threads(pyramid):
    maps, rois, problem, rule = pyramid(count=600, channels=40)
    before, results = get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            set_num_threads(threads)
            v = problem.draw_output()
            results.append(
                (
                    adapter.forward(maps, rois, problem.size, SCALES, rule),
                    *adapter.adjoint(v, rois, [m.shape for m in maps], SCALES, rule),
                    adapter.box_gradient(v, maps, rois, SCALES, rule),
                )
            )
    finally:
        set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "float32", "float16"])
def test_dtypes_of_levels(pyramid, dtype):
    maps, rois, problem, rule = pyramid()
    expected = adapter.forward(maps, rois, problem.size, SCALES, rule)
    rois = rois._replace(levels=rois.levels.astype(dtype))
    np.testing.assert_array_equal(adapter.forward(maps, rois, problem.size, SCALES, rule), expected)


@pytest.mark.parametrize(
    "level", [3, -2, np.int64(2**40), np.uint64(2**64 - 1), np.float32(0.5), np.float64("nan")]
)
def test_any_other_level_is_an_error(pyramid, level):
    maps, rois, problem, rule = pyramid()
    levels = np.zeros(len(rois.boxes), type(level) if isinstance(level, np.generic) else int)
    levels[7] = level
    rois, output = rois._replace(levels=levels), np.full(problem.output_shape, np.nan, np.float32)
    with pytest.raises(IndexError, match=r"`levels` of RoI 7 must be an integer in \[-1, 3\), got"):
        adapter.forward(maps, rois, problem.size, SCALES, rule, out=output)
    assert np.isnan(output).all()


def test_maps_that_do_not_fit_are_refused(pyramid):
    maps, rois, problem, rule = pyramid()
    first, second, third = maps
    for wrong in (
        (first, second[:1], third),
        (first, second[:, :4], third),
        (first, second.astype(np.float64), third),
        (first, second[:, :, :0], third),
    ):
        with pytest.raises(ValueError, match="roialign"):
            adapter.forward(wrong, rois, problem.size, SCALES, rule)
    for scales, levels in ((SCALES[:-1], rois.levels), (SCALES, None), (SCALES, rois.levels[1:])):
        with pytest.raises(ValueError):
            adapter.forward(maps, rois._replace(levels=levels), problem.size, scales, rule)


def test_no_rois(pyramid):
    maps, _, problem, rule = pyramid(count=0)
    none = Rois(np.zeros((0, 4), np.float32), np.zeros(0, int), np.zeros(0, int))
    v = np.zeros((0, 19, *problem.size), np.float32)
    assert adapter.forward(maps, none, problem.size, SCALES, rule).shape == v.shape
    for d, m in zip(
        adapter.adjoint(v, none, [m.shape for m in maps], SCALES, rule), maps, strict=True
    ):
        assert d.shape == m.shape and not d.any()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64", "uint64"])
def test_an_index_is_read_as_it_is(dtype):
    """Indices of any integer dtype and stride are checked where they lie."""
    index = np.arange(12, dtype=dtype)[::2]
    _core.check_index("image_index", index, 11)
    with pytest.raises(IndexError, match=r"`image_index` of RoI 4 .*\[0, 8\), got 8$"):
        _core.check_index("image_index", index, 8)
