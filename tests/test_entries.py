"""The core's C entries, as MindSpore calls them: results, and codes for what does not fit."""

import ctypes

import numpy as np
import pytest

import oracle
import tolerance
from conftest import draw_problem
from isolation import isolated
from roialign import _core

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


def rule_of(problem, threads=1.0):
    c = problem.convention
    least = NAN if c.min_size is None else c.min_size
    floor = c.adaptive == "floor"
    offsets = c.pixel_offset, c.input_offset, c.end_offset
    return np.array([*problem.scale, problem.sampling, *offsets, least, floor, threads])


@pytest.fixture
def inputs(make_problem):
    problem = make_problem()
    tangent = np.random.default_rng(4).standard_normal(problem.boxes.shape).astype(np.float32)
    return problem, (problem.boxes, problem.index, tangent, rule_of(problem))


def empty(shape, dtype=np.float32):
    return np.full(shape, NAN, dtype)


@pytest.mark.parametrize("has_tangent", [False, True])
def test_results(inputs, has_tangent):
    problem, (boxes, index, tangent, rule) = inputs
    along, given = (tangent, tangent) if has_tangent else (None, np.zeros(1, np.float32))
    g = problem.draw_output()
    output, d_features = empty(problem.output_shape), empty(problem.features.shape)
    d_boxes = empty(boxes.shape)
    assert call("forward", problem.features, boxes, index, given, rule, output) == DONE
    expected = oracle.forward(problem, along)
    tolerance.check(output, expected, tolerance.forward(problem, expected, along))
    assert call("adjoint", g, boxes, index, given, rule, d_features) == DONE
    expected = oracle.adjoint(problem, g, along)
    tolerance.check(d_features, expected, tolerance.adjoint(problem, g, expected, along))
    assert call("box_gradient", g, problem.features, boxes, index, rule, d_boxes) == DONE
    expected = oracle.box_gradient(problem, g)
    tolerance.check(d_boxes, expected, tolerance.box_gradient(problem, g, expected))


@pytest.mark.parametrize("index", [2, -1, 2**63 - 1, 0.5, NAN])
def test_a_bad_image_index_gives_zeros(inputs, index):
    problem, (boxes, good, _, rule) = inputs
    none, g = np.zeros(1, np.float32), problem.draw_output()
    bad = good.astype(np.float64 if isinstance(index, float) else np.int64)
    bad[3] = index
    output, d_features = empty(problem.output_shape), empty(problem.features.shape)
    d_boxes = empty(boxes.shape)
    assert call("forward", problem.features, boxes, bad, none, rule, output) == DONE
    assert call("adjoint", g, boxes, bad, none, rule, d_features) == DONE
    assert call("box_gradient", g, problem.features, boxes, bad, rule, d_boxes) == DONE
    assert not output[3].any() and not d_boxes[3].any()
    assert output[2].any() and np.isfinite(output).all() and np.isfinite(d_boxes).all()
    g[3] = 0
    expected = empty(problem.features.shape)
    assert call("adjoint", g, boxes, good, none, rule, expected) == DONE
    np.testing.assert_allclose(d_features, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "at, values, code",
    [
        (2, [NAN, -np.inf, 4096], DONE),
        (2, [4097, 2**31, 1e300, np.inf], FAILED),
        (8, [NAN, -np.inf, np.inf], DONE),
    ],
)
def test_any_number_in_the_rule_is_safe(inputs, at, values, code):
    problem, (boxes, index, _, rule) = inputs
    for value in values:
        rule[at] = value
        output = empty(problem.output_shape)
        none = np.zeros(1, np.float32)
        assert call("forward", problem.features, boxes, index, none, rule, output) == code
        assert (np.isfinite if code == DONE else np.isnan)(output).all()


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
    g, rule, d_boxes = problem.draw_output(), rule_of(problem), empty((7, 4))
    output, d_features = empty(problem.output_shape), empty(problem.features.shape)
    n, c, h, w = problem.features.shape
    k, _, p, q = problem.output_shape
    boxes, index, none = problem.boxes, problem.index, np.zeros(1, np.float32)
    for wrong in [{}, *WRONG_SHAPES]:
        s = {"n": n, "c": c, "h": h, "w": w, "k": k, "p": p, "q": q} | wrong
        pixels, bins = [s[i] for i in "nchw"], [s[i] for i in "kcpq"]
        pair, last = [(s["k"], 4), (s["k"],)], (9,)
        codes = [
            call("forward", problem.features, boxes, index, none, rule, output,
                 claimed=[pixels, *pair, (1,), last, bins]),
            call("adjoint", g, boxes, index, none, rule, d_features,
                 claimed=[bins, *pair, (1,), last, pixels]),
            call("box_gradient", g, problem.features, boxes, index, rule, d_boxes,
                 claimed=[bins, pixels, *pair, last, (s["k"], 4)]),
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
    "index": lambda a: [a.astype(np.int32), a[1:], a[:, None]],
    "tangent": lambda a: [a.astype(np.float64), a[1:], a[:, 1:], a[None]],
    "rule": lambda a: [a.astype(np.float32), a[1:], a[None]],
    "output": lambda a: [a.astype(np.float64), a[1:], a[:, 1:], a[0], a[:, :, :0]],
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_fit_is_refused(inputs, name):
    problem, rest = inputs
    names = "features", "boxes", "index", "tangent", "rule", "output"
    given = dict(zip(names, (problem.features, *rest, empty(problem.output_shape)), strict=True))
    for changed in CHANGES[name](given[name]):
        if changed.size == 0:  # no bins: there is nothing to write
            continue
        changed = np.ascontiguousarray(changed)
        code = call("forward", *(given | {name: changed}).values())
        assert code in (REFUSED, FAILED), (changed.shape, changed.dtype)
    for count in (0, 1, 5):
        assert call("forward", *list(given.values())[:count]) == REFUSED
    assert call("forward", *given.values(), rest[-1]) == REFUSED
    assert np.isnan(given["output"]).all()


def test_the_entry_of_an_error():
    assert call("has_no_second_derivative_in_the_boxes") == SECOND_DERIVATIVE
