"""The Triton kernels of boxes that are turned, interpreted: against the definition and the core."""

import math

import numpy as np
import pytest

import oracle
import roialign
import tolerance
from roialign import _rule

pytest.importorskip("torch", reason="the interpreter runs on torch tensors")
pytest.importorskip("triton", reason="the kernels need Triton")

import torch

from backends import named
from test_rotated import draw, gradient

pytestmark = pytest.mark.backends("kernels", "-narrow")
SIZE = (3, 2)


def run(backend, features, boxes, index, g, **options):
    """The result and its gradient in the features."""

    def operations(features, boxes, index, g):
        rois = boxes, index
        output = roialign.roi_align_rotated(features, rois, g.shape[2:], **options)
        return output, roialign.roi_align_rotated_adjoint(g, rois, features.shape, **options)

    return backend.run(operations, features, boxes, index, g)


@pytest.mark.parametrize(
    "dtype, channels, sampling, convention, layout",
    [
        ("float32", 5, 0, "asymmetric", "channels_last"),
        ("float64", 2, 2, "half_pixel", "contiguous"),
        ("float16", 1, 2, "half_pixel", "contiguous"),
        ("bfloat16", 9, 1, "half_pixel", "channels_last"),
    ],
)
def test_definition(backend, layouts, dtype, channels, sampling, convention, layout):
    dtype = next(each for each in tolerance.DTYPES if each.name == dtype)
    features, boxes, index = draw(channels, dtype, channels, count=3, shape=(2, 6, 9))
    boxes[0, 2:4] *= -1 if sampling else 1  # mirrored
    options = {"spatial_scale": 0.75, "sampling_ratio": sampling, "convention": convention}
    given = features, boxes, index, SIZE, 0.75, sampling, roialign.conventions[convention]
    expected, pixels = oracle.rotated(*given, math.pi / 180)
    g = gradient(len(boxes), channels, dtype)
    features = layouts[layout](features)
    output, d_features = run(backend, features, boxes, index, g, **options)
    d_expected, magnitude = np.zeros(features.shape), np.zeros(features.shape)
    for k, each in enumerate(pixels):
        for bin, (p, q) in zip(each, np.ndindex(*SIZE), strict=True):
            for row, column, weight in bin:
                d = g[k, :, p, q].astype(float)
                d_expected[index[k], :, row, column] += weight * d
                magnitude[index[k], :, row, column] += weight * abs(d)
    assert expected.any() and d_expected.any()
    sums, unit, least = tolerance.TABLE[dtype]
    rounding = 64 * tolerance.TABLE[sums][1]
    bound = rounding * abs(features.astype(float)).max() + unit * abs(expected) + least
    tolerance.check(output, expected, bound)
    bound = rounding * magnitude + unit * abs(d_expected) + least
    tolerance.check(d_features, d_expected, bound)


def test_hostile_boxes(backend):
    """As the core has them, in the time of others; in every run with the same bits."""
    boxes = [
        (np.nan, 3, 4, 5, 30),
        (3, 3, np.inf, 5, 30),
        (3, 3, -np.inf, 5, 30),
        (3, 3, 4, 5, np.nan),
        (3, 3, 4, 5, 1e30),
        (3, 3, 2e4, 2e4, 45),
        (1e9, 3, 3e9, 3, 90),
        (3, 3, 3e38, 3e38, 10),
        (3, -3e38, 5, 3, 0),
        (3, 3, 0, 0, 20),
        (3, 2, -4, 3, 20),
        (3, 2, 4, 3, 20),
    ]
    boxes, index = np.array(boxes, np.float32), np.zeros(len(boxes), np.int64)
    features = draw(0, np.float32, 2, shape=(1, 5, 6))[0]
    g = gradient(len(boxes), 2, np.float32, (1, 2))
    for options in ({}, {"sampling_ratio": 2, "convention": "asymmetric"}):
        expected = run(named("numpy"), features, boxes, index, g, **options)
        results = run(backend, features, boxes, index, g, **options)
        for result, each in zip(results, expected, strict=True):
            np.testing.assert_allclose(result, each, atol=1e-4)
        assert expected[0].any((1, 2, 3)).sum() >= 3
    again = run(backend, features, boxes, index, g, **options)
    for one, two in zip(results, again, strict=True):
        assert one.tobytes() == two.tobytes()


def test_values_that_are_not_finite(backend):
    """They reach bins and pixels with weight there; a bad image index has neither."""
    features, _, _ = draw(2, np.float32, 2, shape=(2, 5, 6))
    features[0, 0, 3, 2] = np.nan
    boxes = np.array([(2, 2, 3, 3, 30), (9, 9, 3, 3, 30), (2, 2, 3, 3, 30)], np.float32)
    g = gradient(3, 2, np.float32, (2, 2))
    g[1, 0], g[0, 1, 0, 0] = np.inf, np.nan
    output, d_features = run(backend, features, boxes, np.array([0, 0, 2]), g)
    expected = run(named("numpy"), features, boxes[:2], np.zeros(2, int), g[:2])
    np.testing.assert_allclose(output[:2], expected[0], atol=1e-5)
    np.testing.assert_allclose(d_features, expected[1], atol=1e-5)
    assert np.isnan(output[0, 0]).any() and not np.isnan(output[0]).all()
    assert not output[2].any() and not d_features[1].any()


def test_levels(backend):
    """Rows of several maps, as the operators take them."""
    rng = np.random.default_rng(0)
    maps = [rng.standard_normal(s).astype("f4") for s in ((1, 2, 7, 6), (1, 2, 4, 5))]
    boxes = np.array([(5, 6, 9, 5, 30)] * 3, np.float32)
    levels, index, scales = np.array([1, -1, 0]), np.zeros(3, int), (0.5, 0.5, 0.25, 0.25)
    rule = _rule.turned(_rule.of("half_pixel", 2, "mean"), math.pi / 180)
    rois = [torch.from_numpy(each) for each in (boxes, index, levels)]
    given = list(map(torch.from_numpy, maps)), *rois, None
    output = torch.ops.roialign.forward(*given, [2, 2], scales, rule).numpy()
    g = gradient(3, 2, np.float32, (2, 2))
    shapes = [number for each in maps for number in each.shape]
    d_maps = torch.ops.roialign.adjoint(torch.from_numpy(g), *given[1:], shapes, scales, rule)
    for row, level in ((0, 1), (2, 0)):
        one = boxes[[row]], index[[row]]
        options = {"spatial_scale": scales[2 * level], "sampling_ratio": 2}
        expected = run(named("numpy"), maps[level], *one, g[[row]], **options)
        np.testing.assert_allclose(output[[row]], expected[0], atol=1e-5)
        np.testing.assert_allclose(d_maps[level].numpy(), expected[1], atol=1e-5)
    assert not output[1].any()


def test_autograd_and_what_is_not_there(backend):
    features, boxes, index = (torch.from_numpy(each) for each in draw(1, count=2, shape=(1, 4, 5)))
    features.requires_grad_()
    loss = roialign.roi_align_rotated(features, (boxes, index * 0), 1, sampling_ratio=1).sum()
    (d_features,) = torch.autograd.grad(loss, features)
    torch.testing.assert_close((d_features * features).sum(), loss)
    boxes.requires_grad_()
    loss = roialign.roi_align_rotated(features, (boxes, index * 0), 1, sampling_ratio=1).sum()
    with pytest.raises(NotImplementedError, match="boxes that turn have a forward and an adjoint"):
        loss.backward()
