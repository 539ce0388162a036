"""`sampling_grid`: the definition's samples, to the last bit, and the pixels that kernels read."""

import math

import numpy as np
import pytest

import oracle
import roialign

BOXES = [
    [3.3, 2.1, 17.9, 12.6],
    [-9, -7, 4, 6.5],
    [20, 10, 90, 70],
    [5, 5, 5.2, 5.1],
    [8, 9, 3, 2],
    [4, 4, 4, 4],
    [math.nan, 0, 5, 5],
]
TURNED = [[10, 8, 9, 5, 30], [3, 2, 30, 1.5, -75.5], [12, 7, 6, 6, 90], [6, 6, 0, 3, 10]]
SIZE, BINS, SCALE = (9, 12), (3, 2), (0.5, 0.75)
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])
samplings = pytest.mark.parametrize("sampling", [0, 1, 3])


@dtypes
@samplings
def test_samples_are_those_of_the_definition(convention, sampling, dtype):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((1, 2, *SIZE)).astype(dtype)
    boxes = np.array(BOXES, dtype)
    options = {"spatial_scale": SCALE, "sampling_ratio": sampling, "convention": convention}
    index = np.zeros(len(boxes), int)
    problem = oracle.Problem(features, boxes, index, BINS, SCALE, sampling, convention)
    pooled = roialign.roi_align(features, problem.rois, BINS, **options)
    for box, axes, output in zip(boxes, problem.axes, pooled, strict=True):
        grid = roialign.sampling_grid(box, SIZE, BINS, dtype=dtype, **options)
        for letter, axis in zip("yx", axes, strict=True):
            samples, inside, edges, taps = (
                getattr(grid, f"{name}_{letter}") for name in ("samples", "inside", "edges", "taps")
            )
            expected = [axis.position(k, range(axis.n)) for k in range(axis.bins)]
            assert samples.dtype == edges.dtype == dtype
            np.testing.assert_array_equal(samples, np.reshape(expected, samples.shape))
            if axis.n:
                bins = np.arange(axis.bins + 1, dtype=dtype)
                np.testing.assert_array_equal(edges, axis.a + bins * axis.bin)
            for k, (pixels, weights) in enumerate(taps):
                row = np.zeros(axis.length)
                row[pixels] = weights
                assert set(np.flatnonzero(inside[k])) == set(axis.inside(k))
                expected = axis.weights[k] / max(axis.n, 1)
                np.testing.assert_allclose(row, expected, atol=4 * np.finfo(dtype).eps)
        check_pixels(grid, features[0], output, dtype)


@dtypes
@samplings
@pytest.mark.parametrize("convention", ["half_pixel", "asymmetric"])
def test_samples_of_a_turned_box(convention, sampling, dtype):
    features = np.random.default_rng(0).standard_normal((1, 2, *SIZE)).astype(dtype)
    boxes, options = np.array(TURNED, dtype), {"sampling_ratio": sampling, "spatial_scale": 0.75}
    rois = boxes, np.zeros(len(boxes), int)
    named = options | {"convention": convention}
    pooled = roialign.roi_align_rotated(features, rois, BINS, **named)
    for box, output in zip(boxes, pooled, strict=True):
        grid = roialign.sampling_grid(box, SIZE, BINS, angle="degrees", dtype=dtype, **named)
        assert grid.samples_y.shape == grid.samples_x.shape == grid.inside_y.shape
        check_pixels(grid, features[0], output, dtype)
        # all samples by hand
        weights, inside = np.zeros((*BINS, *SIZE)), grid.inside_y & grid.inside_x
        for (p, q, *_), y, x in zip(
            np.argwhere(inside), grid.samples_y[inside], grid.samples_x[inside], strict=True
        ):
            for r, w_r in oracle._taps(y, SIZE[0]):
                for c, w_c in oracle._taps(x, SIZE[1]):
                    weights[p, q, r, c] += w_r * w_c / math.prod(grid.samples_y.shape[2:])
        expected = np.einsum("pqrc,mrc->mpq", weights, features[0])
        np.testing.assert_allclose(output, expected, atol=32 * np.finfo(dtype).eps)


def check_pixels(grid, image, output, dtype):
    for p, q in np.ndindex(*BINS):
        rows, columns, weights = grid.pixels(p, q)
        value = image[:, rows, columns].astype(float) @ weights.astype(float)
        if grid.samples_y.size and grid.samples_x.size:
            np.testing.assert_allclose(value, output[:, p, q], atol=32 * np.finfo(dtype).eps)


def test_edges_of_the_image():
    """Those of the box, as the rule takes it."""
    options = {"spatial_scale": 0.5, "convention": "mindspore"}
    grid = roialign.sampling_grid([4, 6, 12, 20], (32, 32), 1, **options)
    assert [*grid.image_edges_y, *grid.image_edges_x] == [6, 21, 4, 13]
    grid = roialign.sampling_grid([4, 6, 12, 20], (32, 32), 1, convention="openvino_half_pixel")
    assert [*grid.image_edges_y, *grid.image_edges_x] == [6, 20, 4, 12]


def test_a_turned_box_has_corners():
    grid = roialign.sampling_grid([8, 8, 6, 4, 90], (16, 16), (1, 1), angle="degrees")
    np.testing.assert_allclose(grid.image_edges_x, [[6, 6], [10, 10]], atol=1e-5)
    np.testing.assert_allclose(grid.image_edges_y, [[11, 5], [11, 5]], atol=1e-5)


@pytest.mark.parametrize(
    "error, words, box, size, bins, options",
    [
        (ValueError, "`box` must have 4 numbers", [1, 2, 3], (8, 8), 1, {}),
        (ValueError, "`box` must have 5 numbers", [0, 0, 1, 1], (8, 8), 1, {"angle": "degrees"}),
        (TypeError, "`box` must be a tuple", 3.0, (8, 8), 1, {}),
        (TypeError, "`box` must be of real numbers", [0, "1", 2, 3], (8, 8), 1, {}),
        (TypeError, "`map_size` must be a tuple", [0, 0, 1, 1], 8, 1, {}),
        (ValueError, "`map_size` must be", [0, 0, 1, 1], (8, 0), 1, {}),
        (ValueError, "`dtype` must be", [0, 0, 1, 1], (8, 8), 1, {"dtype": "float16"}),
        (ValueError, "at most 1048576 bins", [0, 0, 1, 1], (8, 8), 2000, {}),
        (ValueError, "at most 1048576 samples", [0, 0, 1e9, 1], (2**31 - 1,) * 2, 1, {}),
        (
            ValueError,
            "at most 1048576 samples",
            [0, 0, 9e3, 9e3, 1],
            (9, 9),
            2,
            {"angle": "degrees"},
        ),
    ],
)
def test_errors(error, words, box, size, bins, options):
    with pytest.raises(error, match=words):
        roialign.sampling_grid(box, size, bins, **options)
