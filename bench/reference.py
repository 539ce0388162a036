"""RoIAlign as Out = Ay F Ax^T with dense rows of weights, in float64, for a part of the channels.

Coordinates are float32 in the order that the specification states; this checks every
implementation before it is timed.
"""

from dataclasses import dataclass

import numpy as np

RULES = {  # pixel_offset, end_offset, min_size, adaptive
    "asymmetric": (0.0, 0.0, 1.0, np.ceil),
    "half_pixel": (0.5, 0.0, None, np.ceil),
    "mindspore": (0.0, 1.0, None, lambda size: max(1.0, np.floor(size)) if size > 0 else 0.0),
}


@dataclass(frozen=True)
class Axis:
    """Weights of one box on one axis, over the window of pixels that it touches."""

    pixels: np.ndarray  # [V], the pixels with a weight
    weights: np.ndarray  # [P, V]
    start_slope: np.ndarray  # [P, V], d weights / d start of the box
    end_slope: np.ndarray


def axis(start, end, bins, length, scale, sampling, convention):
    f = np.float32
    pixel_offset, end_offset, min_size, adaptive = RULES[convention]
    scale = f(scale)
    a = f(start) * scale - f(pixel_offset)
    b = (f(end) + f(end_offset)) * scale - f(pixel_offset)
    size = b - a
    clamped = min_size is not None and size < min_size
    if clamped:
        size = f(min_size)
    n = sampling if sampling > 0 else int(adaptive(size / f(bins)))
    k, i = np.repeat(np.arange(bins), n), np.tile(np.arange(n), bins)  # [P * n]
    step = size / f(bins)
    p = a + k.astype(f) * step + ((i.astype(f) + f(0.5)) * step) / f(max(n, 1))
    inside = (p >= -1) & (p <= length)
    k, i, p = k[inside], i[inside], p[inside].astype(np.float64)
    fixed = (p < 0) | (p >= length - 1)
    p = p.clip(0, length - 1)
    low = np.floor(p).astype(int)
    high = np.minimum(low + 1, length - 1)
    toward_end = 0.0 if clamped else (k + (i + 0.5) / max(n, 1)) / bins
    slope = np.where(fixed, 0.0, float(scale)) / max(n, 1)

    weights, start_slope, end_slope = np.zeros((3, bins, length))
    np.add.at(weights, (k, low), (1 - (p - low)) / max(n, 1))
    np.add.at(weights, (k, high), (p - low) / max(n, 1))
    for matrix, part in ((start_slope, 1 - toward_end), (end_slope, toward_end)):
        np.add.at(matrix, (k, high), part * slope)
        np.add.at(matrix, (k, low), -part * slope)
    pixels = np.unique(np.concatenate([low, high]))
    return Axis(pixels, weights[:, pixels], start_slope[:, pixels], end_slope[:, pixels])


def axes(rois, shape, output_size, scale, sampling, convention):
    """The (y, x) axes of every RoI."""
    return [
        (
            axis(y1, y2, output_size[0], shape[2], scale, sampling, convention),
            axis(x1, x2, output_size[1], shape[3], scale, sampling, convention),
        )
        for _, x1, y1, x2, y2 in rois
    ]


def forward(features, rois, axes):
    """[K, C, P, Q]"""
    return np.stack(
        [
            y.weights @ window(features, image, y, x) @ x.weights.T
            for image, (y, x) in zip(rois[:, 0].astype(int), axes, strict=True)
        ]
    )


def adjoint(d_output, rois, axes, shape):
    """[N, C, H, W]"""
    d_features = np.zeros((shape[0], d_output.shape[1], *shape[2:]))
    for d, image, (y, x) in zip(d_output, rois[:, 0].astype(int), axes, strict=True):
        part = d_features[image]
        part[:, y.pixels[:, None], x.pixels] += y.weights.T @ d.astype(np.float64) @ x.weights
    return d_features


def box_gradient(d_output, features, rois, axes):
    """[K, 5], the first column 0."""
    d_rois = np.zeros((len(rois), 5))
    for row, d, image, (y, x) in zip(d_rois, d_output, rois[:, 0].astype(int), axes, strict=True):
        F = window(features, image, y, x)
        rows, columns = y.weights @ F, F @ x.weights.T  # [C, P, w], [C, h, Q]
        row[1] = (d * (rows @ x.start_slope.T)).sum()
        row[2] = (d * (y.start_slope @ columns)).sum()
        row[3] = (d * (rows @ x.end_slope.T)).sum()
        row[4] = (d * (y.end_slope @ columns)).sum()
    return d_rois


def window(features, image, y, x):
    return features[image][:, y.pixels[:, None], x.pixels].astype(np.float64)  # [C, h, w]
