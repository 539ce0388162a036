"""The core's entries for XLA and MindSpore: results, and calls that do not fit, which write
nothing."""

from dataclasses import replace

import numpy as np
import pytest

import roialign
from conftest import draw_problem
from entries import (
    FAILED,
    NO_DERIVATIVE,
    OPERATIONS,
    REFUSED,
    arrays_of,
    c_code,
    mindspore,
    numbers_of,
    results_of,
    rule_of,
    xla,
)
from isolation import isolated
from roialign import _core

NAN = float("nan")
CALLS = [*((operation, False) for operation in OPERATIONS), ("forward", True), ("adjoint", True)]


@pytest.fixture(params=[xla, mindspore])
def entry(request):
    return request.param


def tangent_of(problem, wanted=True):
    tangent = np.random.default_rng(4).standard_normal(problem.boxes.shape)
    return tangent.astype(problem.boxes.dtype) if wanted else None


@pytest.mark.parametrize("operation, tangent", CALLS)
def test_maps(entry, make_problem, operation, tangent):
    """Each RoI on the map of its level: the bits of a call for each map."""
    problem = make_problem()
    tangent, maps = tangent_of(problem, tangent), [problem.features]
    maps, scales = [*maps, maps[0][:, :, 2:, 1:].copy()], [problem.scale, (0.25, 0.3)]
    levels = (np.arange(7) % 4 - 1).astype(np.int32)  # -1: none; 2: no level, and so none
    together = arrays_of(problem, operation, tangent, maps, levels)
    assert entry(operation, together, np.ravel(scales), rule_of(problem))
    alone = []
    for i, (features, scale) in enumerate(zip(maps, scales, strict=True)):
        one = arrays_of(problem, operation, tangent, [features])
        one["index"] = np.where(levels == i, one["index"], -1).astype(np.int32)
        assert entry(operation, one, scale, rule_of(problem))
        alone += results_of(operation, one)
        assert alone[-1].any()
    expected = alone if operation == "adjoint" else [alone[0] + alone[1]]
    np.testing.assert_equal(results_of(operation, together), expected)


@pytest.mark.parametrize(
    "operation, tangent, reduction, numbers",
    [
        *((*call, *rule) for call in CALLS for rule in ((1, 4), (0, 5))),
        *(("forward", False, 2, 4), ("adjoint", False, 2, 4)),
    ],
)
def test_reductions_and_turned_boxes(entry, make_problem, operation, tangent, reduction, numbers):
    """The bits of the core's own calls, where other maps choose the samples."""
    problem, turn = make_problem(convention="asymmetric"), float(numbers == 5)
    if turn:
        angles = np.linspace(-3, 3, 7, dtype=np.float32)[:, None]
        problem = replace(problem, boxes=np.hstack([problem.boxes, angles]))
    selectors = () if turn else (np.roll(problem.features, 1, 2),)
    rule = rule_of(problem) | {"reduction": reduction, "turn": turn}
    arrays = arrays_of(problem, operation, tangent_of(problem, tangent), selectors=selectors)
    assert entry(operation, arrays, problem.scale, rule)
    (result,) = results_of(operation, arrays)
    assert result.any()

    rois = arrays["boxes"], arrays["index"]
    given = {
        "forward": ([arrays.get("map 0")],),
        "adjoint": (arrays.get("d_output"),),
        "box_gradient": (arrays.get("d_output"), [arrays.get("map 0")]),
    }[operation]
    along = [] if operation == "box_gradient" else [arrays["tangent"]]
    expected = np.full_like(result, np.nan)
    out = (expected,) if operation == "adjoint" else expected
    call = getattr(_core, operation)
    call(*given, problem.scale, rois, None, *along, tuple(rule.values()), out, 1, selectors or None)
    np.testing.assert_array_equal(result, expected)
    for wrong in [a[:, 1:].copy() for a in selectors]:
        assert not entry(operation, arrays | {"selector 0": wrong}, problem.scale, rule)


@pytest.mark.parametrize("name", _core.rule_names)
def test_any_number_in_the_rule_is_safe(entry, make_problem, name):
    problem = make_problem()
    for value in (NAN, np.inf, -np.inf, 1e300, -1.5):
        arrays = arrays_of(problem, "forward")
        done = entry("forward", arrays, problem.scale, rule_of(problem) | {name: value})
        assert done == (name not in ("sampling_ratio", "reduction", "turn"))
        assert np.isfinite(arrays["output"]).all() == done


@pytest.mark.parametrize("missing", [1, 2, 5])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_rule_of_an_earlier_version(entry, make_problem, operation, missing):
    """What it did not know has its default."""
    problem, results = make_problem(convention=roialign.Convention()), []
    rule = rule_of(problem)
    for known in (rule, dict(list(rule.items())[:-missing])):
        arrays = arrays_of(problem, operation)
        assert entry(operation, arrays, problem.scale, known)
        results += results_of(operation, arrays)
    np.testing.assert_array_equal(*results)


# Arrays that do not fit


def integers(a):
    return np.ones_like(a, np.int32)


def columns(a):
    return [a[1:], a[:, None], a.astype(np.complex64)]


def rows(a):
    return [a[None], a[:, 1:], a[1:], integers(a), a.astype(np.float64)]


WRONG = {  # array: others in its place
    "boxes": lambda a: [a[0], *rows(a)[:-1]],
    "tangent": rows,
    "index": columns,
    "levels": columns,
    "map 0": lambda a: [a[0], a[:, 1:], integers(a), a.astype(np.float16)],
    "map 1": lambda a: [a[:1], a[:, 1:], integers(a), a.astype(np.float64)],
    "d_output": lambda a: [a[0], *rows(a)],
    "output": lambda a: [a[0], *rows(a)],
    "d_boxes": lambda a: [a[0], *rows(a)],
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("maps", [1, 2])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_arrays_that_do_not_fit(entry, make_problem, operation, maps, name):
    problem = make_problem()
    tangent, levels = tangent_of(problem), np.zeros(7, np.int32)
    given = arrays_of(problem, operation, tangent, [problem.features] * maps, levels[maps == 1 :])
    if maps == 1:
        del given["levels"]
    if name not in given:
        pytest.skip("takes none")
    wrong = [given | {name: np.ascontiguousarray(a)} for a in WRONG[name](given[name])]
    if name == "tangent":  # which may be missing, but not be four numbers
        wrong.append(given | {name: given[name][0].copy()})
    else:
        wrong.append({other: a for other, a in given.items() if other != name})
    for arrays in wrong:
        assert not entry(operation, arrays, problem.scale * maps, rule_of(problem))
        for result in results_of(operation, arrays):
            assert result.dtype.kind == "i" or np.isnan(result).all()


# The letters of a call's shapes that a caller can get wrong: n c h w k p q
WRONG_SHAPES = [
    *({letter: value} for letter in "nchwkpq" for value in (-1, -(2**63), 2**62, 2**63 - 1)),
    {"k": -2, "c": 0},  # what would be filled with zeros: -32 bytes
    {"k": 2**60, "c": 0},
    {"n": -1, "c": -1},
    {"n": 0, "h": -1},
    {"n": 2**32, "c": 2**32},
    {"n": 2**59, "h": 1, "w": 1, "c": 1},
    {"p": 2**32, "q": 2**32},
]
LETTERS = {"map 0": "nchw", "d_output": "kcpq", "output": "kcpq", "boxes": "k4", "d_boxes": "k4",
           "index": "k"}  # fmt: skip


def check_wrong_shapes(name):
    entry, problem = {"xla": xla, "mindspore": mindspore}[name], draw_problem()
    right = dict(zip("nchwkpq4", (*problem.features.shape, 7, *problem.size, 4), strict=True))
    for operation in OPERATIONS:
        arrays = arrays_of(problem, operation)
        (result,) = results_of(operation, arrays)
        for wrong in [*WRONG_SHAPES, {}]:
            sizes = right | wrong
            claimed = {key: [sizes[i] for i in LETTERS[key]] for key in arrays if key in LETTERS}
            done = entry(operation, arrays, problem.scale, rule_of(problem), claimed)
            assert done == (not wrong) == np.isfinite(result).all(), (operation, wrong)


def test_wrong_shapes(entry):
    isolated(check_wrong_shapes, entry.__name__)


# MindSpore's alone


def test_numbers_and_counts_that_do_not_fit(make_problem):
    problem = make_problem()
    arrays = arrays_of(problem, "forward", tangent_of(problem))
    given, numbers = list(arrays.values()), numbers_of(problem.scale, rule_of(problem))
    wrong = [[a, *given] for a in (numbers.astype(np.float32), numbers[1:].copy(), numbers[None],
                                   numbers[:3].copy(), np.append(numbers, 0))]  # fmt: skip
    wrong += [[numbers, *given][:count] for count in (0, 1, 5)] + [[numbers, *given, numbers]]
    assert {c_code("forward", *each) for each in wrong} <= {REFUSED, FAILED}
    assert np.isnan(arrays["output"]).all()


@pytest.mark.parametrize(
    "name",
    ["has_no_second_derivative_in_the_boxes", "max_corner_has_no_gradient_in_the_boxes"],
)
def test_the_entries_of_errors(name):
    assert c_code(name) == NO_DERIVATIVE
