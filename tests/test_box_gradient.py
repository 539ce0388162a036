"""The gradient in the boxes (docs/spec.md), for every convention."""

from dataclasses import replace

import numpy as np
import pytest

import oracle
import roialign
import tolerance

STEP = 1e-4


def box_gradient(problem, d_output, rois=None):
    rois = problem.rois if rois is None else rois
    return roialign.roi_align_box_gradient(d_output, problem.features, rois, **problem.options)


def check(problem, d_output):
    expected = oracle.box_gradient(problem, d_output)
    d_boxes = box_gradient(problem, d_output)
    assert d_boxes.dtype == problem.boxes.dtype
    tolerance.check(d_boxes, expected, tolerance.box_gradient(problem, d_output, expected))
    return d_boxes


def test_golden_boxes(golden):
    """Inverted, outside, empty, huge, on the edge."""
    boxes = golden.problem.boxes.astype(np.promote_types(golden.problem.boxes.dtype, np.float32))
    check(replace(golden.problem, boxes=boxes), golden.problem.draw_output())


@pytest.mark.parametrize("sampling", [0, 2])
def test_central_differences(make_problem, convention, sampling):
    problem = make_problem(convention=convention, sampling=sampling, count=60, dtype=np.float64)
    small = problem.boxes.copy()
    small[::3, 2:] = small[::3, :2] + 0.3  # under every min_size
    problem = replace(problem, boxes=small)

    def forward(boxes):
        rois = boxes, problem.index
        return roialign.roi_align(problem.features, rois, problem.size, **problem.options)

    g = problem.draw_output()
    d_boxes = box_gradient(problem, g)
    for column in range(4):
        step = STEP * np.eye(4)[column]
        smooth = oracle.smooth(problem, step)
        assert smooth.sum() > 30 and smooth[::3].sum() > 10
        before, after = (forward(problem.boxes + s * step) for s in (-1, 1))
        expected = np.einsum("kcpq,kcpq->k", g, after - before) / (2 * STEP)
        np.testing.assert_allclose(d_boxes[smooth, column], expected[smooth], rtol=0, atol=1e-10)


@pytest.mark.parametrize("min_size", [0.0, 1.0, 2.5])
def test_clamped_size(make_problem, min_size):
    """Where min_size holds the size, the end does not count; at that very size it does."""
    convention = roialign.Convention(min_size=min_size)
    problem = make_problem(convention=convention, scale=(1, 1), count=3, shape=(1, 3, 12, 12))
    start = np.float32([[3.3, 4.4], [5.6, 2.7], [4, 4]])
    end = start + np.float32(min_size - 0.25)
    end[2] = start[2] + min_size
    problem = replace(problem, boxes=np.concatenate([start, end], 1))
    d_boxes = check(problem, np.ones(problem.output_shape, np.float32))
    assert not d_boxes[:2, 2:].any() and d_boxes[:2, :2].all() and d_boxes[2, 2:].all()


def test_right_derivative(make_problem):
    """At 0 and at interior pixels the slope is the one to the right; none beyond the last pixel."""
    convention = roialign.Convention()
    problem = make_problem(convention=convention, shape=(1, 1, 6, 6), sampling=1, scale=(1, 1))
    features = np.float32([1, 2, 4, 8, 16, 32]) * np.ones((1, 1, 6, 1), np.float32)
    centre = np.float32([-1, -0.5, 0, 1, 4, 4.5, 5, 6, 6.5])
    boxes = np.stack([centre - 1, 0 * centre + 2, centre + 1, 0 * centre + 3], 1)
    index = np.zeros(len(centre), np.int64)
    problem = replace(problem, features=features, boxes=boxes, index=index, size=(1, 1))
    d_boxes = check(problem, np.ones((len(centre), 1, 1, 1), np.float32))
    slope = np.array([0, 0, 1, 2, 16, 16, 0, 0, 0])
    np.testing.assert_array_equal(d_boxes[:, 0], slope / 2)
    np.testing.assert_array_equal(d_boxes[:, 2], slope / 2)


@pytest.mark.parametrize("sampling", [0, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(make_problem, convention, sampling, bad):
    problem = make_problem(convention=convention, sampling=sampling, count=5, inside=True)
    boxes = problem.boxes.copy()
    boxes[np.arange(4), np.arange(4)] = bad
    problem = replace(problem, boxes=boxes)
    d_boxes = check(problem, problem.draw_output())
    assert not d_boxes[:4].any() and d_boxes[4].all()


@pytest.mark.parametrize("boxes_dtype", [*tolerance.DTYPES, np.dtype(np.int64)], ids=str)
@pytest.mark.parametrize("dtype", tolerance.DTYPES, ids=str)
def test_result_has_the_form_of_rois(make_problem, dtype, boxes_dtype):
    problem = make_problem(dtype=dtype, count=8)
    boxes = np.round(problem.boxes).astype(boxes_dtype)
    index = np.sort(problem.index)
    problem, g = replace(problem, boxes=boxes, index=index), problem.draw_output()
    expected_dtype = np.dtype(np.float32) if boxes_dtype == np.int64 else boxes_dtype
    array = np.concatenate([index[:, None].astype(boxes_dtype), boxes], 1)
    pair, five = box_gradient(problem, g), box_gradient(problem, g, array)
    images = box_gradient(problem, g, [boxes[index == n] for n in range(2)])
    exact = replace(problem, boxes=boxes.astype(np.promote_types(expected_dtype, np.float32)))
    expected = oracle.box_gradient(exact, g)
    bound = tolerance.box_gradient(replace(exact, boxes=boxes.astype(expected_dtype)), g, expected)
    for d_boxes in (pair, five[:, 1:], np.concatenate(images)):
        assert d_boxes.dtype == expected_dtype
        tolerance.check(d_boxes, expected, bound)
    assert five.shape == array.shape and not five[:, 0].any()
    assert isinstance(images, list) and len(images) == 2
