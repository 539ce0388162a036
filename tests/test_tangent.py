"""Forward and adjoint along a direction in the boxes: forward mode and mixed second order."""

from dataclasses import replace

import numpy as np
import pytest

import oracle
import tolerance
from roialign import _core, _rule, numpy as adapter
from roialign._rois import Rois


def rule(problem):
    return problem.scale, _rule.vector(problem.convention, problem.sampling)


def forward(problem, tangent=None):
    rois = Rois(*problem.rois)
    maps = (problem.features,)
    return adapter.forward(maps, rois, problem.size, *rule(problem), tangent=tangent)


def adjoint(problem, d_output, tangent=None):
    shapes = (problem.features.shape,)
    rois = Rois(*problem.rois)
    return adapter.adjoint(d_output, rois, shapes, *rule(problem), tangent=tangent)[0]


@pytest.fixture
def draw(make_problem):
    """A problem, an output gradient and a direction in the boxes."""

    def draw(**options):
        problem = make_problem(**options)
        v = np.random.default_rng(5).standard_normal(problem.boxes.shape)
        return problem, problem.draw_output(), v.astype(problem.boxes.dtype)

    return draw


@pytest.mark.parametrize("dtype", [*tolerance.DTYPES, np.dtype(np.uint8)], ids=str)
@pytest.mark.parametrize("sampling", [0, 3])
def test_oracle(draw, convention, dtype, sampling):
    options = {"convention": convention, "dtype": dtype, "sampling": sampling}
    problem, g, v = draw(shape=(2, 19, 9, 7), **options)
    y, d_features = forward(problem, v), adjoint(problem, g, v)
    assert y.dtype == d_features.dtype == g.dtype
    expected = oracle.forward(problem, v)
    tolerance.check(y, expected, tolerance.forward(problem, expected, v))
    expected = oracle.adjoint(problem, g, v)
    tolerance.check(d_features, expected, tolerance.adjoint(problem, g, expected, v))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_layouts_of_the_tangent(draw, layouts, count):
    problem, g, v = draw(count=count)
    expected = forward(problem, v), adjoint(problem, g, v)
    row = np.lib.stride_tricks.as_strided(v, v.shape, (v.strides[0] + 4 * (count == 1), 4))
    for other in [row, np.repeat(v, 2, 0)[::2], layouts["unaligned"](v), v.astype(np.float64)]:
        np.testing.assert_array_equal(forward(problem, other), expected[0])
        np.testing.assert_array_equal(adjoint(problem, g, other), expected[1])


def test_a_tangent_beyond_the_coordinate_type(draw):
    """Silent, as of boxes."""
    problem, g, v = draw()
    forward(problem, v.astype(np.float64) * 1e300)
    adjoint(problem, g, v.astype(np.float64) * 1e300)


def test_the_core_reads_no_misaligned_array(draw, layouts):
    problem, g, v = draw()
    scales, vector = rule(problem)
    moved, rois, d_boxes = layouts["unaligned"], problem.rois, np.zeros_like(v)
    for arrays in [(moved(g), v), (g, moved(v))]:
        with pytest.raises(ValueError, match="aligned"):
            _core.adjoint(
                arrays[0], scales, rois, None, arrays[1], vector, np.empty_like(problem.features), 1
            )
    with pytest.raises(ValueError, match="aligned"):
        _core.box_gradient(g, problem.features, scales, rois, None, vector, moved(d_boxes), 1)


def test_not_finite(draw, convention):
    problem, g, v = draw(convention=convention, count=4, inside=True)
    boxes = problem.boxes.copy()
    boxes[:3, 3] = np.nan, np.inf, -np.inf
    problem = replace(problem, boxes=boxes)
    y = forward(problem, v)
    assert not y[:3].any() and y[3].any()
    expected = oracle.adjoint(problem, g, v)
    bound = tolerance.adjoint(problem, g, expected, v)
    tolerance.check(adjoint(problem, g, v), expected, bound)
