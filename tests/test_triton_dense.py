"""The kernels of matrix products, under Triton's interpreter."""

from dataclasses import replace

import numpy as np
import pytest

import oracle
import roialign
import tolerance

torch = pytest.importorskip("torch", reason="the kernels run on torch tensors")
pytest.importorskip("triton", reason="the kernels are Triton's")

from roialign._triton import dense, launch  # noqa: E402
from triton_interpreter import call, rule, tensor  # noqa: E402

NARROW = [dtype for dtype in tolerance.DTYPES if dtype != np.float64]


def array(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(tolerance.BFLOAT16)
    return tensor.numpy()


def new(shape, dtype):
    return launch.New(shape, dtype.name)


def arguments(problem, tangent):
    tangent = None if tangent is None else tensor(tangent)
    return *map(tensor, problem.rois), tangent, rule(problem)


def forward(problem, tangent=None):
    output = new(problem.output_shape, problem.features.dtype)
    inputs = tensor(problem.features), *arguments(problem, tangent), output
    return array(dense.forward(call, *inputs))


def adjoint(problem, d_output, tangent=None):
    d_features = new(problem.features.shape, d_output.dtype)
    return array(dense.adjoint(call, tensor(d_output), *arguments(problem, tangent), d_features))


def box_gradient(problem, d_output):
    inputs = tensor(d_output), tensor(problem.features), *map(tensor, problem.rois)
    partial = dense.box_gradient(call, *inputs, rule(problem))
    return partial.numpy().sum(0, np.float64).astype(np.float32)


def check(problem, tangent=None):
    """All three operations against the oracle."""
    g = problem.draw_output()
    expected = oracle.forward(problem, tangent)
    bound = tolerance.forward(problem, expected, tangent, narrow=True)
    tolerance.check(forward(problem, tangent), expected, bound)
    expected = oracle.adjoint(problem, g, tangent)
    bound = tolerance.adjoint(problem, g, expected, tangent, narrow=True)
    tolerance.check(adjoint(problem, g, tangent), expected, bound)
    if tangent is None:
        expected = oracle.box_gradient(problem, g)
        bound = tolerance.box_gradient(problem, g, expected, narrow=True)
        tolerance.check(box_gradient(problem, g), expected, bound)


def test_conventions(make_problem, convention):
    check(make_problem(count=2, shape=(2, 1, 9, 11), sampling=0, convention=convention))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_dtypes(make_problem, dtype):
    check(make_problem(shape=(2, 2, 9, 11), count=4, dtype=dtype, inside=True))


def test_tangent(make_problem):
    v = np.random.default_rng(5).standard_normal((3, 4)).astype(np.float32)
    check(make_problem(count=3, shape=(2, 1, 9, 11)), v)


def test_several_tiles(make_problem, monkeypatch):
    # of pixels and of bins; the first box covers the map
    monkeypatch.setattr(dense, "SIDE", 16)
    monkeypatch.setattr(dense, "MAX_BINS", 16)
    monkeypatch.setattr(dense, "LANES", 32 * 16)
    problem = make_problem(shape=(1, 1, 35, 21), count=2, size=(18, 3), scale=(1, 1), inside=True)
    problem.boxes[0] = 0, 0, 21, 35
    v = np.random.default_rng(5).standard_normal((2, 4)).astype(np.float32)
    check(problem)
    check(problem, v)


def test_channels(make_problem, monkeypatch):
    # of one program of the box gradient, and a last one with fewer
    monkeypatch.setattr(dense, "BLOCK_C", 2)
    check(make_problem(shape=(2, 3, 9, 11), count=2, inside=True))


def test_turns(make_problem, monkeypatch):
    problem = make_problem(shape=(2, 2, 9, 11), count=3, inside=True)
    g = problem.draw_output()
    many = forward(problem), adjoint(problem, g), box_gradient(problem, g)
    monkeypatch.setattr(dense, "MAX_PROGRAMS", 3)
    few = forward(problem), adjoint(problem, g), box_gradient(problem, g)
    for a, b in zip(many, few, strict=True):
        np.testing.assert_array_equal(a, b)


def test_strides(make_problem, layouts):
    problem = make_problem(shape=(2, 2, 9, 11), count=2, inside=True)
    g = problem.draw_output()
    expected = forward(problem), adjoint(problem, g), box_gradient(problem, g)
    for layout in map(layouts.get, ("channels_last", "sliced")):
        moved = replace(problem, features=layout(problem.features))
        np.testing.assert_array_equal(forward(moved), expected[0])
        np.testing.assert_array_equal(adjoint(moved, layout(g)), expected[1])
        np.testing.assert_array_equal(box_gradient(moved, layout(g)), expected[2])


def test_core(make_problem):
    problem = make_problem(count=4, shape=(2, 2, 9, 11))
    core = roialign.roi_align(problem.features, problem.rois, problem.size, **problem.options)
    bounds = [tolerance.forward(problem, core, narrow=narrow) for narrow in (False, True)]
    tolerance.check(forward(problem), core.astype(np.float64), sum(bounds))


@pytest.mark.parametrize(
    "index", [np.array([0, -1, 2, 2**40]), np.array([0, 0.5, np.nan, 2], np.float32)], ids=str
)
def test_an_image_that_is_none(make_problem, index):
    problem = make_problem(shape=(2, 1, 9, 11), count=4, inside=True)
    problem = replace(problem, index=index)
    first = replace(problem, boxes=problem.boxes[:1], index=np.zeros(1, np.int64))
    g = problem.draw_output()
    for actual, expected in [
        (forward(problem), forward(first)),
        (box_gradient(problem, g), box_gradient(first, g[:1])),
    ]:
        np.testing.assert_array_equal(actual[0], expected[0])
        assert not actual[1:].any()
    np.testing.assert_array_equal(adjoint(problem, g), adjoint(first, g[:1]))


def test_boxes_that_are_not_finite(make_problem):
    problem = make_problem(shape=(2, 1, 9, 11), count=3, convention="asymmetric")
    problem.boxes[0, 2], problem.boxes[1, 1] = np.nan, np.inf
    problem.boxes[2, 3] = -np.inf  # clamped by min_size: a box, without a gradient
    check(problem)


def test_a_pixel_that_is_not_finite_stays_in_its_window(make_problem):
    problem = make_problem(shape=(1, 1, 9, 11), count=2, scale=(1, 1))
    problem.boxes[:] = (0, 0, 4, 4), (6, 4, 10, 8)
    g = problem.draw_output()
    expected = forward(problem), adjoint(problem, g), box_gradient(problem, g)
    problem.features[0, 0, 5:, 7] = np.nan, np.inf, -np.inf, 1e30
    g[1, 0, 1, 0] = np.nan
    y, d_features, d_boxes = forward(problem), adjoint(problem, g), box_gradient(problem, g)
    assert np.isnan(y[1]).any() and np.isnan(d_features).any() and np.isnan(d_boxes[1]).all()
    np.testing.assert_array_equal(y[0], expected[0][0])
    np.testing.assert_array_equal(d_boxes[0], expected[2][0])
    np.testing.assert_array_equal(d_features[..., :5, :5], expected[1][..., :5, :5])
    assert not np.isnan(d_features[..., :3, :]).any() and not np.isnan(d_features[..., :5]).any()


def test_more_samples_than_float32_counts(make_problem):
    problem = make_problem(shape=(1, 1, 9, 11), count=2, size=(2, 2), sampling=0, scale=(1, 1))
    problem.boxes[:] = (-1e8, 0, 1e8, 8), (-3e7, -5e8, 2e9, 4e8)
    # docs/ascend.md: on an axis of L pixels and P bins, ((L + 3) + 4 P) / 2^22 of the largest pixel
    bound = (11 + 3 + 4 * 2) / 2**22 * np.abs(problem.features).max()
    tolerance.check(forward(problem), oracle.forward(problem), np.full(problem.output_shape, bound))
