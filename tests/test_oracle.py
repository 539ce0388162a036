"""Every backend agrees with the oracle, to the error bound; and the oracle with every library, its
own literal form and finite differences."""

from dataclasses import replace

import numpy as np
import pytest

import oracle
import tolerance
from backends import three

STEP = 1e-4


@pytest.mark.backends("values", "bfloat16")
@pytest.mark.parametrize("sampling", [0, 2])
@pytest.mark.parametrize("dtype", tolerance.DTYPES + tolerance.BYTES, ids=str)
def test_three_operations(backend, make_problem, convention, dtype, sampling):
    """And they have the bits of NumPy's, where they come from the same kernels."""
    options = {"convention": convention, "dtype": dtype, "sampling": sampling}
    problem = backend.fair(make_problem(shape=(2, 19, 9, 7), **options))
    g = problem.draw_output()
    given = problem.features, g, *problem.rois
    results = backend.run(three(problem), *given)
    assert [r.dtype for r in results] == [g.dtype, g.dtype, problem.boxes.dtype]
    backend.check(problem, g, *results)
    if "exact" in backend.traits:
        for actual, expected in zip(results, three(problem)(*given), strict=True):
            assert actual.tobytes() == expected.tobytes()


@pytest.mark.backends("values")
@pytest.mark.parametrize("sampling", [0, 2])
def test_channels_in_sixteens(backend, make_problem, sampling):
    """For which GPUs have kernels of their own."""
    problem = backend.fair(
        make_problem(shape=(2, 16, 6, 7), count=4, size=(3, 4), sampling=sampling)
    )
    g = problem.draw_output()
    backend.check(problem, g, *backend.run(three(problem), problem.features, g, *problem.rois))


# The oracle


def test_golden_forward(golden):
    golden.check_forward(oracle.forward(golden.problem))


def test_golden_adjoint(golden_gradient):
    golden_gradient.check_adjoint(oracle.adjoint(golden_gradient.problem, golden_gradient.d_output))


def test_every_sample(golden):
    expected = oracle.forward_by_sample(golden.problem)
    np.testing.assert_allclose(oracle.forward(golden.problem), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("sampling", [0, 3])
def test_transposes(make_problem, convention, sampling):
    problem = make_problem(convention=convention, sampling=sampling)
    rng = np.random.default_rng(1)
    g, v = rng.standard_normal(problem.output_shape), rng.standard_normal(problem.boxes.shape)
    for tangent in (None, v):
        left = np.vdot(g, oracle.forward(problem, tangent))
        right = np.vdot(problem.features, oracle.adjoint(problem, g, tangent))
        np.testing.assert_allclose(left, right, rtol=1e-12)
    np.testing.assert_allclose(left, np.vdot(v, oracle.box_gradient(problem, g)), rtol=1e-12)


@pytest.mark.parametrize("sampling", [0, 2])
def test_tangent_is_the_derivative(make_problem, convention, sampling):
    problem = make_problem(convention=convention, sampling=sampling, count=60, dtype=np.float64)
    boxes = problem.boxes.copy()
    boxes[::3, 2:] = boxes[::3, :2] + 0.3  # under every min_size
    problem = replace(problem, boxes=boxes)
    step = STEP * np.random.default_rng(2).standard_normal(problem.boxes.shape)
    smooth = oracle.smooth(problem, step)
    assert smooth.sum() > 30 and smooth[::3].sum() > 10
    before, after = (replace(problem, boxes=problem.boxes + s * step) for s in (-1, 1))
    expected = (oracle.forward(after) - oracle.forward(before)) / 2
    actual = oracle.forward(problem, step)
    np.testing.assert_allclose(actual[smooth], expected[smooth], rtol=0, atol=1e-13)


@pytest.mark.parametrize("side", [1e4, 1e9, 4e9])  # n: float32, float64 positions, too many
def test_huge_box(make_problem, side):
    problem = make_problem(shape=(1, 1, 6, 8), size=(1, 1), scale=(1, 1), sampling=0)
    problem = replace(problem, boxes=np.float32([[-side, -side, side, side]]), index=np.array([0]))
    problem = replace(problem, features=np.ones_like(problem.features))
    expected = 7 * 9 / (2 * side) ** 2 if side < 2**30 else 0
    np.testing.assert_allclose(oracle.forward(problem), expected, rtol=0.4)


def test_pixel_without_weight_is_not_read(make_problem):
    problem = make_problem(shape=(1, 1, 4, 4), size=(2, 2), scale=(1, 1), sampling=1)
    features = np.full((1, 1, 4, 4), np.nan, np.float32)
    features[..., :2, :2] = 1, 2  # samples at 0 and 1 exactly
    boxes, index = np.float32([[0, 0, 2, 2]]), np.array([0])
    problem = replace(problem, features=features, boxes=boxes, index=index)
    for output in (oracle.forward(problem), oracle.forward_by_sample(problem)):
        np.testing.assert_array_equal(output[0, 0], [[1, 2], [1, 2]])
