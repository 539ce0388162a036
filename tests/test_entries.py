"""The core's C entries, as MindSpore calls them: results, and codes for what does not fit."""

import ctypes

import numpy as np
import pytest

import oracle
import tolerance
from conftest import draw_problem
from isolation import isolated
from roialign import _core, _rule

LIBRARY = ctypes.CDLL(_core.__file__)
DONE, REFUSED, FAILED, SECOND_DERIVATIVE = range(4)
NAN = float("nan")


def call(name, *arrays, claimed=None):
    """The code that an entry returns; it writes the last array. `claimed`: other shapes to pass."""
    count = len(arrays)
    names = [{tolerance.BFLOAT16: "bfloat16"}.get(a.dtype, a.dtype.name).encode() for a in arrays]
    shapes = claimed or [a.shape for a in arrays]
    shapes = [(ctypes.c_int64 * max(len(shape), 1))(*shape) for shape in shapes]
    return getattr(LIBRARY, f"roialign_{name}")(
        count,
        (ctypes.c_void_p * count)(*(a.ctypes.data for a in arrays)),
        (ctypes.c_int * count)(*(a.ndim for a in arrays)),
        (ctypes.POINTER(ctypes.c_int64) * count)(*shapes),
        (ctypes.c_char_p * count)(*names),
        None,
        None,
    )


def numbers_of(problem, threads=1.0):
    rule = _rule.vector(problem.convention, problem.sampling)
    return np.array([threads, 1, *problem.scale, *rule])


@pytest.fixture
def inputs(make_problem):
    problem = make_problem()
    tangent = np.random.default_rng(4).standard_normal(problem.boxes.shape).astype(np.float32)
    return problem, numbers_of(problem), (problem.boxes, problem.index, tangent)


def empty(shape, dtype=np.float32):
    return np.full(shape, NAN, dtype)


@pytest.mark.parametrize("has_tangent", [False, True])
def test_results(inputs, has_tangent):
    problem, numbers, (boxes, index, tangent) = inputs
    along, given = (tangent, tangent) if has_tangent else (None, np.zeros(1, np.float32))
    g = problem.draw_output()
    output, d_features = empty(problem.output_shape), empty(problem.features.shape)
    d_boxes = empty(boxes.shape)
    assert call("forward", numbers, problem.features, boxes, index, given, output) == DONE
    expected = oracle.forward(problem, along)
    tolerance.check(output, expected, tolerance.forward(problem, expected, along))
    assert call("adjoint", numbers, g, boxes, index, given, d_features) == DONE
    expected = oracle.adjoint(problem, g, along)
    tolerance.check(d_features, expected, tolerance.adjoint(problem, g, expected, along))
    assert call("box_gradient", numbers, g, problem.features, boxes, index, d_boxes) == DONE
    expected = oracle.box_gradient(problem, g)
    tolerance.check(d_boxes, expected, tolerance.box_gradient(problem, g, expected))


@pytest.mark.parametrize("index", [2, -1, 2**63 - 1, 0.5, NAN])
def test_a_bad_image_index_gives_zeros(inputs, index):
    problem, numbers, (boxes, good, _) = inputs
    none, g = np.zeros(1, np.float32), problem.draw_output()
    bad = good.astype(np.float64 if isinstance(index, float) else np.int64)
    bad[3] = index
    output, d_features = empty(problem.output_shape), empty(problem.features.shape)
    d_boxes = empty(boxes.shape)
    assert call("forward", numbers, problem.features, boxes, bad, none, output) == DONE
    assert call("adjoint", numbers, g, boxes, bad, none, d_features) == DONE
    assert call("box_gradient", numbers, g, problem.features, boxes, bad, d_boxes) == DONE
    assert not output[3].any() and not d_boxes[3].any()
    assert output[2].any() and np.isfinite(output).all() and np.isfinite(d_boxes).all()
    g[3] = 0
    expected = empty(problem.features.shape)
    assert call("adjoint", numbers, g, boxes, good, none, expected) == DONE
    np.testing.assert_allclose(d_features, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", _core.rule_names)
def test_any_number_in_the_rule_is_safe(inputs, name):
    problem, numbers, (boxes, index, _) = inputs
    for value in (NAN, np.inf, -np.inf, 1e300, -1.5):
        given = numbers.copy()
        given[4 + _core.rule_names.index(name)] = value
        output, none = empty(problem.output_shape), np.zeros(1, np.float32)
        code = call("forward", given, problem.features, boxes, index, none, output)
        assert code == (FAILED if name == "sampling_ratio" else DONE)
        assert np.isfinite(output).all() == (code == DONE)


@pytest.mark.parametrize("missing", [1, 2])
def test_a_shorter_rule_has_the_defaults(inputs, missing):
    problem, numbers, (boxes, index, _) = inputs  # half_pixel: its last numbers are the defaults
    none, outputs = np.zeros(1, np.float32), []
    for given in (numbers, numbers[:-missing].copy()):
        outputs.append(empty(problem.output_shape))
        assert call("forward", given, problem.features, boxes, index, none, outputs[-1]) == DONE
    np.testing.assert_array_equal(*outputs)


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


def check_wrong_shapes():
    problem = draw_problem()
    g, numbers, d_boxes = problem.draw_output(), numbers_of(problem), empty((7, 4))
    output, d_features = empty(problem.output_shape), empty(problem.features.shape)
    n, c, h, w = problem.features.shape
    k, _, p, q = problem.output_shape
    boxes, index, none = problem.boxes, problem.index, np.zeros(1, np.float32)
    for wrong in [{}, *WRONG_SHAPES]:
        s = {"n": n, "c": c, "h": h, "w": w, "k": k, "p": p, "q": q} | wrong
        pixels, bins = [s[i] for i in "nchw"], [s[i] for i in "kcpq"]
        pair, first = [(s["k"], 4), (s["k"],)], (len(numbers),)
        codes = [
            call("forward", numbers, problem.features, boxes, index, none, output,
                 claimed=[first, pixels, *pair, (1,), bins]),
            call("adjoint", numbers, g, boxes, index, none, d_features,
                 claimed=[first, bins, *pair, (1,), pixels]),
            call("box_gradient", numbers, g, problem.features, boxes, index, d_boxes,
                 claimed=[first, bins, pixels, *pair, (s["k"], 4)]),
        ]  # fmt: skip
        if not wrong:
            assert codes == [DONE] * 3
            for result in (output, d_features, d_boxes):
                assert np.isfinite(result).all()
                result[...] = NAN
            continue
        assert all(code in (REFUSED, FAILED) for code in codes), (wrong, codes)
        assert all(np.isnan(result).all() for result in (output, d_features, d_boxes)), wrong


def test_wrong_shapes():
    isolated(check_wrong_shapes)


CHANGES = {
    "features": lambda a: [a.astype(np.int64), a.astype(np.int32), a[0], a[:, 1:]],
    "boxes": lambda a: [a.astype(np.int64), a[:, 1:], a[1:], a.ravel()],
    "index": lambda a: [a.astype(bool), a[1:], a[:, None]],
    "tangent": lambda a: [a.astype(np.float64), a[1:], a[:, 1:], a[None]],
    "numbers": lambda a: [a.astype(np.float32), a[1:], a[None], a[:3], np.append(a, 0)],
    "output": lambda a: [a.astype(np.float64), a[1:], a[:, 1:], a[0], a[:, :, :0]],
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_fit_is_refused(inputs, name):
    problem, numbers, rest = inputs
    names = "numbers", "features", "boxes", "index", "tangent", "output"
    arrays = numbers, problem.features, *rest, empty(problem.output_shape)
    given = dict(zip(names, arrays, strict=True))
    for changed in CHANGES[name](given[name]):
        if changed.size == 0:  # no bins: there is nothing to write
            continue
        changed = np.ascontiguousarray(changed)
        code = call("forward", *(given | {name: changed}).values())
        assert code in (REFUSED, FAILED), (changed.shape, changed.dtype)
    for count in (0, 1, 5):
        assert call("forward", *list(given.values())[:count]) == REFUSED
    assert call("forward", *given.values(), numbers) == REFUSED
    assert np.isnan(given["output"]).all()


def test_the_entry_of_an_error():
    assert call("has_no_second_derivative_in_the_boxes") == SECOND_DERIVATIVE
