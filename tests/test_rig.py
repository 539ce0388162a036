"""The tests themselves: a wrong number, a wrong oracle or an unwritten output is seen."""

from dataclasses import replace

import numpy as np
import pytest

import oracle
import roialign
import tolerance

FIELDS = {
    "pixel_offset": lambda value: value + 0.25,
    "input_offset": lambda value: value + 0.25,
    "end_offset": lambda value: value + 0.25,
    "min_size": lambda value: 1.0 if value is None else None,
    "adaptive": {"ceil": "floor", "floor": "ceil"}.get,
}
MEASURED = ["mindspore", "mindspore_legacy", "asymmetric", "half_pixel", "openvino_half_pixel"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", MEASURED)
def test_golden_sees_a_changed_convention(golden_by_convention, name, field):
    convention = roialign.conventions[name]
    wrong = replace(convention, **{field: FIELDS[field](getattr(convention, field))})
    with pytest.raises(AssertionError):
        for case in golden_by_convention[convention]:
            problem = replace(case.problem, convention=wrong)
            case.check_forward(
                roialign.roi_align(problem.features, problem.rois, problem.size, **problem.options)
            )


def half_a_pixel_off(axis, k, i, position=oracle.Axis.position):
    return position(axis, k, i) + type(axis.a)(0.5)


def open_borders(axis, k, inside=oracle.Axis.inside):
    low, high = type(axis.a)(-1), type(axis.a)(axis.length)
    return [i for i in inside(axis, k) if low < axis.position(k, i) < high]


@pytest.mark.parametrize(
    "method, mutant", [("position", half_a_pixel_off), ("inside", open_borders)]
)
def test_golden_sees_a_wrong_oracle(golden_by_convention, monkeypatch, method, mutant):
    monkeypatch.setattr(oracle.Axis, method, mutant)
    cases = [case for cases in golden_by_convention.values() for case in cases]
    with pytest.raises(AssertionError):
        for case in cases:  # a copy, as a problem keeps its axes
            case.check_forward(oracle.forward(replace(case.problem)))


def test_bound_sees_double_coordinates(make_problem):
    rng = np.random.default_rng(0)
    corners = rng.integers(-12, 24, (300, 2, 2))  # many samples at -1 or at the map's size
    boxes = np.concatenate([corners.min(1), corners.max(1) + 1], 1)
    options = {"size": (7, 7), "sampling": 3, "convention": "asymmetric"}
    problem = make_problem(shape=(1, 1, 9, 11), count=300, scale=(1, 1), **options)
    problem = replace(problem, boxes=boxes.astype(np.float32))
    output = roialign.roi_align(problem.features, problem.rois, problem.size, **problem.options)
    expected = oracle.forward(problem)
    bound = tolerance.forward(problem, expected)
    tolerance.check(output, expected, bound)
    wrong = oracle.forward(replace(problem, features=problem.features.astype(np.float64)))
    with pytest.raises(AssertionError):
        tolerance.check(output, wrong, bound)
