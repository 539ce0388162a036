"""The Triton kernels of largest samples, interpreted: the core's winners, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest

import oracle
import roialign
import tolerance

pytest.importorskip("torch", reason="the interpreter runs on torch tensors")
pytest.importorskip("triton", reason="the kernels need Triton")

import torch

from backends import named

REDUCTIONS = "max", "max_corner"
pytestmark = pytest.mark.backends("kernels", "-narrow")


def pool(kind, problem, reduction, **options):
    """On NumPy's arrays by the core, on those of a backend by the kernels."""
    given = problem.features, problem.rois
    return kind.run(
        lambda *given: roialign.roi_align(
            *given, problem.size, **problem.options, reduction=reduction, **options
        ),
        *given,
    )


def adjoint(kind, problem, reduction, g):
    return kind.run(
        lambda features, rois, g: roialign.roi_align_adjoint(
            g, rois, features.shape, features=features, **problem.options, reduction=reduction
        ),
        problem.features, problem.rois, g,
    )  # fmt: skip


@pytest.fixture
def core():
    return named("numpy")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "dtype, channels, sampling, layout",
    [
        ("float32", 5, 0, "channels_last"),
        ("float64", 2, 3, "contiguous"),
        ("float16", 1, 1, "contiguous"),
        ("bfloat16", 5, 2, "channels_last"),
    ],
)
def test_core(backend, core, make_problem, layouts, dtype, channels, sampling, layout, reduction):
    """The forward has the core's bits; the adjoint, whose sums have another order, is near."""
    dtype = next(each for each in tolerance.DTYPES if each.name == dtype)
    problem = make_problem(
        shape=(2, channels, 7, 6), sampling=sampling, dtype=dtype, count=3, size=(2, 2)
    )
    problem.boxes[0] = -20, -9, 30, 3
    problem = replace(problem, features=layouts[layout](problem.features))
    expected = pool(core, problem, reduction)
    assert pool(backend, problem, reduction).tobytes() == expected.tobytes()
    if dtype.itemsize > 2:  # rounded, several samples are the largest
        g = problem.draw_output()
        winners, _ = oracle.largest(problem, reduction)
        sums = oracle.to_winners(problem, winners, g)
        size = oracle.to_winners(problem, winners, abs(g))
        bound = 64 * tolerance.TABLE[problem.features.dtype][1] * (size + 1e-30)
        first = adjoint(backend, problem, reduction, g)
        tolerance.check(first, sums, bound)
        assert adjoint(backend, problem, reduction, g).tobytes() == first.tobytes()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_values_that_are_not_finite(backend, core, make_problem, reduction):
    problem = make_problem(shape=(1, 3, 6, 5), sampling=0, count=5, dtype=np.float32)
    problem.features[0, 0, 2:, 1:4] = np.nan
    problem.features[0, 1] = -np.inf
    problem.features[0, 2, 3:] = np.inf
    problem.boxes[:3] = (np.nan, 0, 2, 3), (-1e9, -50, 1e9, 3), (1, 1, 12, 14)
    expected = pool(core, problem, reduction)
    assert np.isnan(expected[:, 0]).any() and np.isinf(expected[:, 1:]).any((0, 2, 3)).all()
    np.testing.assert_array_equal(pool(backend, problem, reduction), expected)


def test_golden(backend, golden_largest):
    problem, clipped = golden_largest.problem, golden_largest.library.startswith("openvino")
    output = backend.roi_align(
        golden_largest.features, golden_largest.rois, problem.size,
        **problem.options, reduction=golden_largest.reduction,
    )  # fmt: skip
    golden_largest.check_forward(output.clip(0) if clipped else output)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_levels_and_selectors(backend, core, reduction):
    """Rows of several maps; the derivative along features is that of the core."""
    rng = np.random.default_rng(0)
    maps = [rng.standard_normal(s).astype("f4") for s in ((1, 2, 8, 7), (1, 2, 4, 5))]
    tangents = [rng.standard_normal(f.shape).astype("f4") for f in maps]
    boxes = np.sort(rng.uniform(-2, 20, (5, 2, 2)), 1).reshape(5, 4).astype("f4")
    levels, index = np.array([0, 1, -1, 1, 0]), np.zeros(5, int)
    options = {"spatial_scales": (0.5, 0.25), "levels": levels, "reduction": reduction}

    def along(*maps):
        return roialign.multiscale_roi_align(
            list(maps), tuple(map(torch.from_numpy, (boxes, index))), 2,
            **options | {"levels": torch.from_numpy(levels)},
        )  # fmt: skip

    given = tuple(map(torch.from_numpy, maps)), tuple(map(torch.from_numpy, tangents))
    values, moved = torch.func.jvp(along, *given)
    expected = roialign.multiscale_roi_align(maps, (boxes, index), 2, **options)
    np.testing.assert_array_equal(values.numpy(), expected)
    assert not expected[2].any()
    step = 2.0**-12
    ends = [
        roialign.multiscale_roi_align(
            [(f + sign * step * t).astype("f8") for f, t in zip(maps, tangents, strict=True)],
            (boxes, index), 2, **options,
        )
        for sign in (1, -1)
    ]  # fmt: skip
    np.testing.assert_allclose(moved.numpy(), (ends[0] - ends[1]) / (2 * step), atol=1e-2)


def test_what_is_not_there(backend, make_problem):
    problem = make_problem(shape=(1, 1, 5, 5), count=1)
    with pytest.raises(NotImplementedError, match="forward and an adjoint"):
        backend.run(
            lambda features, rois, g: roialign.roi_align_box_gradient(
                g, features, rois, reduction="max"
            ),
            problem.features, problem.rois, problem.draw_output(),
        )  # fmt: skip
