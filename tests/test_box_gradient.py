"""The gradient in the boxes (docs/spec.md), for every convention."""

from dataclasses import replace

import numpy as np
import pytest

import oracle
import roialign
import tolerance
from backends import operations


def check(problem, d_output):
    _, _, box_gradient = operations(problem)
    d_boxes = box_gradient(problem.features, d_output, *problem.rois)
    expected = oracle.box_gradient(problem, d_output)
    tolerance.check(d_boxes, expected, tolerance.box_gradient(problem, d_output, expected))
    return d_boxes


def test_golden_boxes(golden):
    """Inverted, outside, empty, huge, on the edge."""
    boxes = golden.problem.boxes.astype(np.promote_types(golden.problem.boxes.dtype, np.float32))
    check(replace(golden.problem, boxes=boxes), golden.problem.draw_output())


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
