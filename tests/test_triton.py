"""The Triton kernels, interpreted, against the oracle, the core and other libraries."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

import oracle
import roialign
import tolerance
from roialign import _conventions
from roialign import numpy as adapter
from test_properties import problems

pytest.importorskip("torch", reason="the interpreter runs on torch tensors")
pytest.importorskip("triton", reason="the kernels need Triton")

from triton.runtime import interpreter

from roialign._triton import launch
from triton_interpreter import adjoint, box_gradient, call, forward, wide_call


def check_forward(problem, tangent=None, **options):
    expected = oracle.forward(problem, tangent)
    bound = tolerance.forward(problem, expected, tangent)
    tolerance.check(forward(problem, tangent, **options), expected, bound)


def check_adjoint(problem, g, tangent=None, **options):
    expected = oracle.adjoint(problem, g, tangent)
    bound = tolerance.adjoint(problem, g, expected, tangent)
    tolerance.check(adjoint(problem, g, tangent, **options), expected, bound)


def check_box_gradient(problem, g, **options):
    expected = oracle.box_gradient(problem, g)
    bound = tolerance.box_gradient(problem, g, expected)
    tolerance.check(box_gradient(problem, g, **options), expected, bound)


def draw_tangent(problem):
    return np.random.default_rng(5).standard_normal(problem.boxes.shape).astype(problem.boxes.dtype)


@pytest.mark.parametrize("dtype", tolerance.DTYPES, ids=str)
def test_oracle(make_problem, dtype):
    problem = make_problem(dtype=dtype, count=4, sampling=0, size=(2, 3))
    g, v = problem.draw_output(), draw_tangent(problem)
    check_forward(problem)
    check_adjoint(problem, g)
    check_box_gradient(problem, g)
    check_forward(problem, v)
    check_adjoint(problem, g, v)


@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=str)
@pytest.mark.parametrize(
    "layout, channels",
    [*[("channels_last", c) for c in (3, 16, 48)], ("sliced", 18), ("transposed", 2)],
)
def test_strides(make_problem, layouts, dtype, layout, channels):
    """Channels innermost, and in sixteens; a block of channels that is full, or not, or several."""
    layout = layouts[layout]
    problem = make_problem(dtype=dtype, count=2, shape=(2, channels, 9, 6), inside=True)
    g = problem.draw_output()
    check_forward(problem, layout=layout)
    check_adjoint(problem, g, layout=layout)
    check_box_gradient(problem, g, layout=layout)


def test_many(make_problem):
    """RoIs in several words, bins in several blocks, a map of several tiles."""
    problem = make_problem(shape=(1, 2, 17, 35), count=40, size=(2, 2), sampling=1, inside=True)
    check_adjoint(problem, problem.draw_output())
    few = replace(problem, boxes=problem.boxes[:2], index=problem.index[:2], size=(9, 8))
    check_forward(few)
    check_box_gradient(few, few.draw_output())


def test_least(make_problem):
    """One RoI, channel, bin and pixel."""
    problem = make_problem(shape=(1, 1, 1, 1), count=1, size=(1, 1), scale=(1, 1))
    problem = replace(problem, boxes=np.float32([[-0.25, 0, 1, 0.5]]))
    g = problem.draw_output()
    check_forward(problem)
    check_adjoint(problem, g)
    check_box_gradient(problem, g)


@settings(max_examples=5)
@given(problem=problems().filter(lambda problem: len(problem.boxes)))
def test_any(problem):
    g = problem.draw_output()
    check_forward(problem)
    check_adjoint(problem, g)
    check_box_gradient(problem, g)


def test_golden(golden_few):
    golden_few.check_forward(forward(golden_few.problem))


def test_golden_adjoint(golden_gradient_few):
    case = golden_gradient_few
    case.check_adjoint(adjoint(case.problem, case.d_output))


# Bad values


BAD_INDEX = np.array([0, -1, 2, 0.5, np.nan, np.inf, 2.0**31, 1])


def test_bad_index(make_problem):
    """Its row is 0, and so are its gradients: as if the RoI were not there."""
    problem = make_problem(count=len(BAD_INDEX), inside=True)
    bad = replace(problem, index=BAD_INDEX)
    g = problem.draw_output()
    good = np.isin(BAD_INDEX, (0, 1))
    there = replace(problem, boxes=problem.boxes[good], index=BAD_INDEX[good].astype(int))
    y, d_boxes = forward(bad), box_gradient(bad, g)
    assert not y[~good].any() and not d_boxes[~good].any()
    np.testing.assert_array_equal(y[good], forward(there))
    np.testing.assert_array_equal(d_boxes[good], box_gradient(there, g[good]))
    g[~good] = np.nan
    np.testing.assert_array_equal(adjoint(bad, g), adjoint(there, g[good]))


@pytest.fixture(scope="module")
def sloped(make_problem):
    """Two RoIs on one image; the second has no slope: p < 0 in x, the last pixel in y."""
    options = {"size": (2, 2), "scale": (1, 1), "convention": "asymmetric"}
    problem = make_problem(shape=(1, 2, 7, 9), count=2, **options)
    boxes = np.float32([[1.2, 2.1, 5.3, 4.9], [-0.9, 6.2, -0.1, 6.6]])
    return replace(problem, boxes=boxes, index=np.zeros(2, int))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_pixels_without_weight(sloped, poison):
    """They are not read, nor are they given anything."""
    tangent = draw_tangent(sloped)
    g = sloped.draw_output()
    for v in (None, tangent):
        reach = oracle.adjoint(sloped, np.ones_like(g), None if v is None else abs(v), bound=True)
        far = np.broadcast_to(reach == 0, sloped.features.shape)
        assert 0.2 < far.mean() < 1
        bad = replace(sloped, features=np.where(far, np.float32(poison), sloped.features))
        np.testing.assert_array_equal(forward(bad, v), forward(sloped, v))
        assert not adjoint(sloped, np.full_like(g, poison), v)[far].any()
    bad_boxes, boxes = box_gradient(bad, g), box_gradient(sloped, g)
    np.testing.assert_array_equal(bad_boxes, boxes)


def test_other_rois(sloped):
    """A RoI's output gradient is its own; one in a bin without samples is nobody's."""
    g = sloped.draw_output()
    g[1] = np.nan
    first = replace(sloped, boxes=sloped.boxes[:1], index=sloped.index[:1])
    np.testing.assert_array_equal(box_gradient(sloped, g)[:1], box_gradient(first, g[:1]))
    outside = replace(sloped, boxes=sloped.boxes + np.float32([[0], [50]]))
    for v in (None, draw_tangent(outside)):
        np.testing.assert_array_equal(adjoint(outside, g, v), adjoint(first, g[:1], v))
    assert not box_gradient(outside, g)[1].any()


def test_boxes_that_are_not_finite(make_problem):
    """With `min_size` an end of -inf makes a box; there is no slope in any."""
    options = {"convention": "mindspore_legacy", "size": (1, 2), "inside": True}
    problem = make_problem(count=9, shape=(1, 2, 8, 11), **options)
    boxes = problem.boxes.copy()
    boxes[np.arange(8), np.arange(8) % 4] = [np.nan] * 4 + [-np.inf] * 4
    problem = replace(problem, boxes=boxes)
    g, v = problem.draw_output(), draw_tangent(problem)
    check_forward(problem)
    check_adjoint(problem, g)
    check_box_gradient(problem, g)
    assert not forward(problem, v)[:8].any()
    assert not box_gradient(problem, g)[:8].any()


def test_tangents_that_are_not_finite(sloped):
    """They count where there is slope: in no RoI without it, as in the core."""
    v = draw_tangent(sloped)
    expected = forward(sloped, v)
    v[1] = np.nan, np.inf, -np.inf, np.nan
    rule = _conventions.rule(**sloped.options)
    core = adapter.forward(sloped.features, *sloped.rois, sloped.size, rule, tangent=v)
    assert np.isfinite(core).all()
    np.testing.assert_array_equal(forward(sloped, v), expected)


def test_subnormal_sizes(make_problem, monkeypatch):
    """NVIDIA's `ceil` takes a subnormal number for 0; that of the rule is 1."""
    builder, given = interpreter.InterpreterBuilder, []

    def flushed(self, number):
        given.append(number.data)
        data = np.where(abs(number.data) < np.finfo(np.float32).tiny, 0, number.data)
        return ceil(self, interpreter.TensorHandle(data.astype(np.float32), number.dtype))

    ceil = builder.create_ceil
    monkeypatch.setattr(builder, "create_ceil", flushed)
    corner = roialign.Convention(pixel_offset=0, end_offset=0, min_size=None, adaptive="ceil")
    problem = make_problem(count=3, size=(1, 1), sampling=0, scale=(1, 1), convention=corner)
    boxes = np.float32([[0, 0, 1e-39, 1e-39], [0, 0, 1e-44, 1], [0, 0, 0, 1]])
    problem = replace(problem, boxes=boxes)
    assert oracle.forward(problem)[:2].all() and not oracle.forward(problem)[2].any()
    check_forward(problem)
    assert given


# Laws


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_adjoint_is_the_transpose(make_problem, dtype):
    problem = make_problem(dtype=dtype, count=4, sampling=0)
    g, y = problem.draw_output(), forward(problem)
    d_features = adjoint(problem, g)
    left = np.vdot(g.astype(np.float64), y)
    right = np.vdot(problem.features.astype(np.float64), d_features)
    slack = np.sum(abs(g) * tolerance.forward(problem, y))
    slack += np.sum(abs(problem.features) * tolerance.adjoint(problem, g, d_features))
    assert abs(left - right) <= slack


def test_linear(make_problem):
    problem = make_problem(shape=(1, 3, 8, 11), count=2, inside=True)
    g, v = problem.draw_output(), draw_tangent(problem)
    quadruple = replace(problem, features=4 * problem.features)
    np.testing.assert_array_equal(forward(quadruple), 4 * forward(problem))
    np.testing.assert_array_equal(adjoint(problem, 4 * g), 4 * adjoint(problem, g))
    np.testing.assert_array_equal(box_gradient(quadruple, g), 4 * box_gradient(problem, g))
    np.testing.assert_array_equal(forward(problem, 4 * v), 4 * forward(problem, v))
    np.testing.assert_array_equal(adjoint(problem, g, 4 * v), 4 * adjoint(problem, g, v))


def test_the_same_bits(make_problem, monkeypatch):
    """In every run; for forward and adjoint, however the work is cut.

    `call` and `wide_call` differ in the RoIs of a program of `axis_taps`.
    """
    problem = make_problem(shape=(1, 3, 8, 18), count=2, inside=True)
    g = problem.draw_output()
    results = [operation() for operation in (lambda: forward(problem), lambda: adjoint(problem, g))]
    d_boxes = box_gradient(problem, g)
    np.testing.assert_array_equal(box_gradient(problem, g, call=call), d_boxes)

    def smaller(kernel, grid, inputs, outputs, **constants):
        if kernel is launch.kernels.forward:
            channels, bins = problem.output_shape[1], np.prod(problem.size)
            constants |= {"BLOCK_C": 1, "BLOCK_B": 4}
            grid = (len(problem.boxes) * channels * -(-int(bins) // 4),)
        return wide_call(kernel, grid, inputs, outputs, **constants)

    np.testing.assert_array_equal(forward(problem, call=smaller), results[0])
    monkeypatch.setattr(launch, "TILE", (4, 8))
    np.testing.assert_array_equal(adjoint(problem, g), results[1])


# Sizes


def test_offsets_beyond_31_bits(make_problem):
    """Strides of memory of which a few pages are touched."""
    problem = make_problem(shape=(2, 2, 3, 4), count=2, size=(2, 2), dtype=np.float16)
    boxes = np.float32([[0.2, 0.7, 2.4, 1.9], [0.6, 0.1, 1.8, 1.5]])
    problem = replace(problem, boxes=boxes, scale=(1, 1), index=np.array([1, 0]))
    g = problem.draw_output()

    def far(array):
        """Two images or RoIs, 4 GiB apart."""
        steps = 2**31 + 6, *np.array(array[0].strides) // array.itemsize
        memory = np.empty(steps[0] + array[0].size, array.dtype)
        strides = [step * array.itemsize for step in steps]
        view = np.lib.stride_tricks.as_strided(memory, array.shape, strides)
        view[...] = array
        return view

    check_forward(problem, layout=far)
    check_adjoint(problem, g, layout=far)
    check_box_gradient(problem, g, layout=far)
