"""The ways through the engine, packed, by rows, bins or samples: no result depends on the way.

Shared bodies run on each (`numpy.packed`, `numpy.rows`, ... in backends.py)."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

import roialign
import tolerance
from roialign import _core

SHAPES = {  # of maps, and what is peculiar in reading them
    (2, 5, 9, 11): "rows shorter than a vector",
    (2, 3, 40, 83): "runs of columns, with a rest; colours",
    (1, 37, 20, 33): "channels beyond a block",
    (1, 1, 30, 400): "columns far apart are read one by one",
}


CANONICAL = dict.fromkeys(roialign.conventions.values())


@pytest.fixture
def by_way():
    """Each way's results of a call: packed, by rows, by bins, by samples."""

    def call(operation, *args, **options):
        results = []
        for way in (1, 2, 3, 4):
            _core.force_way(way)
            results.append(operation(*args, **options))
        _core.force_way(0)
        return results

    yield call
    _core.force_way(0)


@pytest.fixture
def odd_problem(make_problem):
    """One with an inverted box and one that is not finite."""

    def make(seed, shape, sampling, convention, dtype):
        options = {"sampling": sampling, "convention": convention, "dtype": dtype}
        problem = make_problem(seed, shape=shape, count=6, size=(5, 3), **options)
        problem.boxes[3] = problem.boxes[3, [2, 3, 0, 1]]
        problem.boxes[4] = np.inf
        return problem

    return make


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8])
@pytest.mark.parametrize("sampling", [0, 1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_they_agree(shape, sampling, dtype, odd_problem, layouts, by_way):
    """The forward bit for bit: it adds the same products in the same order. The others are sums in
    another order."""
    for seed, convention in enumerate(CANONICAL):
        problem = odd_problem(seed, shape, sampling, convention, dtype)
        g, rois, bounds = problem.draw_output(), problem.rois, {}
        for layout in ("contiguous", "channels_last", "transposed", "reversed", "sliced"):
            x, dy = layouts[layout](problem.features), layouts[layout](g)
            one, *others = by_way(roialign.roi_align, x, rois, problem.size, **problem.options)
            for other in others:
                assert np.array_equal(one, other)
            assert one.any()
            sums = {
                "adjoint": by_way(roialign.roi_align_adjoint, dy, rois, shape, **problem.options),
                "box_gradient": by_way(
                    roialign.roi_align_box_gradient, dy, x, rois, **problem.options
                ),
            }
            for name, (one, *others) in sums.items():
                expected = one.astype(np.float64)
                if name not in bounds:
                    bounds[name] = 2 * getattr(tolerance, name)(problem, g, expected)
                for other in others:
                    tolerance.check(other, expected, bounds[name])
                assert one.any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8])
@pytest.mark.parametrize("reduction", ["max", "max_corner"])
@pytest.mark.parametrize("shape", SHAPES)
def test_largest_samples_agree(shape, reduction, dtype, odd_problem, layouts, by_way):
    """Bit for bit, with zeros of both signs, infinities and NaNs among the pixels."""
    rng = np.random.default_rng(5)
    for seed, (convention, sampling) in enumerate(product(CANONICAL, (1, 2))):
        problem = odd_problem(seed, shape, sampling, convention, dtype)
        x = problem.features
        if dtype != np.uint8:
            odd = rng.random(x.shape)
            x[odd < 0.3], x[odd < 0.2], x[odd < 0.02], x[odd < 0.01] = 0.0, -0.0, np.inf, np.nan
        for layout in ("contiguous", "channels_last", "transposed", "reversed", "sliced"):
            one, *others = by_way(
                roialign.roi_align, layouts[layout](x), problem.rois, problem.size,
                reduction=reduction, **problem.options,
            )  # fmt: skip
            for other in others:
                np.testing.assert_array_equal(one, other)
                assert np.array_equal(np.signbit(one[one == 0]), np.signbit(other[other == 0]))
        assert (one != 0).any()


@pytest.mark.parametrize("sampling", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_infinite_pixel_with_weight(layout, sampling, layouts, by_way):
    """By samples it is no NaN where bins have fewer taps than others; other channels stay."""
    features = np.random.default_rng(0).standard_normal((1, 17, 8, 9), np.float32)
    features[0, 0, 3, 4] = np.inf
    boxes = np.float32([[0, 3, 2, 5, 4], [0, 4, 3, 4, 3]])  # one whole pixel: one tap, or two
    packed, *_, by_samples = by_way(
        roialign.roi_align, layouts[layout](features), boxes, 1, sampling_ratio=sampling,
        convention="asymmetric",
    )  # fmt: skip
    assert (by_samples[:, 0] == np.inf).all()
    assert np.array_equal(by_samples[:, 1:], packed[:, 1:])


def test_the_way_is_a_matter_of_the_image_alone(make_problem):
    """Many boxes on a small map are packed, few on a large one are not: one call has both, and any
    number of threads gives the bits of single calls, in the box gradient too."""
    few = make_problem(1, shape=(1, 4, 32, 40), count=1, size=(7, 7), sampling=1)
    many = make_problem(2, shape=(1, 4, 32, 40), count=200, size=(7, 7), sampling=1)
    together = replace(
        few,
        features=np.concatenate([few.features, many.features]),
        boxes=np.concatenate([few.boxes, many.boxes]),
        index=np.repeat([0, 1], [1, 200]),
    )
    g = together.draw_output()

    def gradients(d_output, problem):
        return roialign.roi_align_box_gradient(
            d_output, problem.features, problem.rois, **problem.options
        )

    expected = np.concatenate([gradients(g[:1], few), gradients(g[1:], many)])
    threads = roialign.get_num_threads()
    try:
        for count in (1, 2, 3):
            roialign.set_num_threads(count)
            assert np.array_equal(gradients(g, together), expected)
    finally:
        roialign.set_num_threads(threads)
    _core.force_way(1)
    packed = gradients(g[:1], few), gradients(g[1:], many)
    _core.force_way(2)
    rows = gradients(g[:1], few), gradients(g[1:], many)
    _core.force_way(0)
    # The bits tell the ways apart, and which was taken.
    assert not np.array_equal(packed[0], rows[0])
    assert np.array_equal(expected[:1], rows[0]) and np.array_equal(expected[1:], packed[1])
