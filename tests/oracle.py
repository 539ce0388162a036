"""RoIAlign by definition (docs/spec.md): every sample, float64 sums, no code of the package.

Coordinates have the kernels' type and order of operations; everything after them is float64.
Box and tangent columns are x1, y1, x2, y2 in image pixels.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

MOST_SAMPLES = 2**31  # per bin and axis; beyond, the output is 0
MOST_NARROW = 2**22  # up to here i + 1/2 is exact in float32


@dataclass(frozen=True)
class Problem:
    """Everything but the dtype of a call: the arguments, and the samples that they mean."""

    features: np.ndarray  # [N, C, H, W]
    boxes: np.ndarray  # [K, 4]
    index: np.ndarray  # [K], integers
    size: tuple[int, int]  # P, Q
    scale: tuple[float, float] = (1.0, 1.0)  # y, x
    sampling: int = 0
    convention: Any = None

    @property
    def rois(self):
        return self.boxes, self.index

    @property
    def options(self):
        return {
            "spatial_scale": self.scale,
            "sampling_ratio": self.sampling,
            "convention": self.convention,
        }

    @cached_property
    def axes(self):
        """The (y, x) axes of every RoI."""
        T = np.float64 if self.features.dtype == np.float64 else np.float32
        with np.errstate(over="ignore"):  # a float64 coordinate may be an infinite float32
            boxes = np.asarray(self.boxes).astype(T)
        return [
            tuple(
                Axis(box[d], box[d + 2], T(scale), length, bins, self.sampling, self.convention)
                for d, scale, length, bins in zip(
                    (1, 0), self.scale, self.features.shape[2:], self.size, strict=True
                )
            )
            for box in boxes
        ]

    @property
    def output_shape(self):
        return (len(self.boxes), self.features.shape[1], *self.size)

    def draw_output(self, seed=1):
        """A random d_output."""
        values = np.random.default_rng(seed).standard_normal(self.output_shape)
        return values.astype(np.float32 if self.features.itemsize == 1 else self.features.dtype)


@dataclass(frozen=True)
class Samples:
    """The samples of one bin that are inside, on one axis."""

    lo: np.ndarray  # lower pixel
    fraction: np.ndarray  # weight of pixel lo + 1; 0 at the last pixel
    slope: np.ndarray  # whether the value moves with the position
    t: np.ndarray  # place in the box, from 0 (start) to 1 (end)


class Axis:
    """One box on one axis: `n` samples in each of the `bins`."""

    @np.errstate(all="ignore")
    def __init__(self, start, end, scale, length, bins, sampling, convention):
        T = type(start)
        self.scale, self.length, self.bins = scale, length, bins
        input_offset, pixel_offset = T(convention.input_offset), T(convention.pixel_offset)
        a = (start + input_offset) * scale - pixel_offset
        b = (end + input_offset + T(convention.end_offset)) * scale - pixel_offset
        size = b - a
        self.finite = bool(np.isfinite(start) and np.isfinite(end))
        self.clamped = convention.min_size is not None and bool(size < T(convention.min_size))
        if self.clamped:  # a NaN stays a NaN
            size = T(convention.min_size)
        self.a, self.bin = a, size / T(bins)
        self.n = self._count(size, sampling, convention.adaptive)
        if self.n > MOST_NARROW:
            self.a, self.bin = np.float64(a), np.float64(self.bin)

    def _count(self, size, sampling, adaptive):
        if not np.isfinite(size) or (sampling <= 0 and size <= 0):
            return 0
        if sampling > 0:
            n = sampling
        elif adaptive == "ceil":
            n = int(np.ceil(self.bin))
        else:
            n = max(1, int(np.floor(self.bin)))
        return n if n <= MOST_SAMPLES else 0

    @np.errstate(all="ignore")
    def position(self, k, i):
        """p(k, i), for one index or an array of them."""
        T = type(self.a)
        i = np.asarray(i, T)
        return self.a + T(k) * self.bin + ((i + T(0.5)) * self.bin) / T(self.n)

    def inside(self, k):
        """The range of i with -1 <= p(k, i) <= length; p is monotone in i, as rounding is."""
        sign = -1 if self.bin < 0 else 1
        low, high = sorted((-sign, sign * self.length))
        i = range(self.n)
        first = bisect_left(i, low, key=lambda i: sign * self.position(k, i))
        return range(first, bisect_right(i, high, key=lambda i: sign * self.position(k, i)))

    @cached_property
    def samples(self):
        """The `Samples` of each bin."""
        bins = []
        for k in range(self.bins):
            i = np.array(self.inside(k), np.float64)
            raw = self.position(k, i)
            p = np.maximum(raw, 0)
            lo = np.minimum(np.floor(p), self.length - 1)
            last = lo == self.length - 1
            fraction = np.where(last, 0, p - lo).astype(np.float64)
            t = (k + (i + 0.5) / max(self.n, 1)) / self.bins
            bins.append(Samples(lo.astype(np.int64), fraction, (raw >= 0) & ~last, t))
        return bins

    @cached_property
    def weights(self):
        """[bins, length]: what each pixel counts in the sum of each bin."""
        rows = np.zeros((self.bins, self.length))
        for row, s in zip(rows, self.samples, strict=True):
            upper = s.fraction > 0
            np.add.at(row, s.lo, 1 - s.fraction)
            np.add.at(row, s.lo[upper] + 1, s.fraction[upper])
        return rows

    def slopes(self, bound=False):
        """[2, bins, length]: derivatives of `weights` in start and end (bound: >= their size)."""
        rows = np.zeros((2, self.bins, self.length))
        for k, s in enumerate(self.samples):
            lo, t = s.lo[s.slope], s.t[s.slope]
            if self.clamped:  # the size is constant
                start_end = np.ones_like(t), np.zeros_like(t)
            else:
                start_end = (np.ones_like(t),) * 2 if bound else (1 - t, t)
            for row, d in zip(rows[:, k], start_end, strict=True):
                np.add.at(row, lo + 1, d * float(self.scale))
                np.add.at(row, lo, (1 if bound else -1) * d * float(self.scale))
        return rows


def forward(problem, tangent=None, bound=False):
    """[K, C, P, Q]: the mean over samples; with a tangent [K, 4], its derivative along that."""
    out = np.zeros(problem.output_shape)
    features = problem.features.astype(np.float64)
    for k, rows, cols in _terms(problem, tangent, bound):
        out[k] += _gather(rows, features[problem.index[k]], cols)
    return out


def adjoint(problem, d_output, tangent=None, bound=False):
    """[N, C, H, W]: the transpose of `forward` (of its derivative along the tangent)."""
    out = np.zeros(problem.features.shape)
    d_output = d_output.astype(np.float64)
    for k, rows, cols in _terms(problem, tangent, bound):
        image = out[problem.index[k]]
        for p, q, r, c in _bins(rows, cols):
            weight = np.outer(rows[p, r], cols[q, c])
            image[:, r[:, None], c] += d_output[k, :, p, q, None, None] * weight
    return out


def box_gradient(problem, d_output, bound=False):
    """[K, 4]: the gradient of <d_output, forward> in the boxes (bound: >= its terms)."""
    out = np.zeros((len(problem.boxes), 4))
    features, d_output = problem.features.astype(np.float64), d_output.astype(np.float64)
    for k, (y, x) in enumerate(problem.axes):
        if y.finite and x.finite:
            image = features[problem.index[k]]
            derivatives = [_gather(y_slope, image, x.weights) for y_slope in y.slopes(bound)]
            derivatives += [_gather(y.weights, image, x_slope) for x_slope in x.slopes(bound)]
            y1, y2, x1, x2 = [np.vdot(d_output[k], d) / _count(y, x) for d in derivatives]
            out[k] = x1, y1, x2, y2
    return out


def forward_by_sample(problem):
    """`forward` with one loop more and no row matrix: the rule, word for word."""
    out = np.zeros(problem.output_shape)
    for k, (y, x) in enumerate(problem.axes):
        image = problem.features[problem.index[k]].astype(np.float64)
        for p, q in np.ndindex(*problem.size):
            for j, i in np.ndindex(y.n, x.n):
                v, u = y.position(p, j), x.position(q, i)
                if -1 <= v <= y.length and -1 <= u <= x.length:
                    for r, w_r in _taps(v, y.length):
                        for c, w_c in _taps(u, x.length):
                            out[k, :, p, q] += w_r * w_c * image[:, r, c] / _count(y, x)
    return out


def largest(problem, reduction):
    """`winners` and their values [K, C, P, Q]: the first of the largest candidates of each bin.

    A winner is a list of (row, column, weight), empty for a sample that is not inside; it is
    (k, c, p, q) that has it.
    """
    out, winners = np.zeros(problem.output_shape), {}
    for k, (y, x) in enumerate(problem.axes):
        image = problem.features[problem.index[k]].astype(np.float64)
        for p, q in np.ndindex(*problem.size):
            candidates = list(_candidates(y, x, p, q, reduction))
            if not candidates:
                continue
            values = np.array([_at(image, candidate) for candidate in candidates])
            for c, best in enumerate(values.argmax(0)):  # of NaN and the largest, the first
                out[k, c, p, q] = values[best, c]
                winners[k, c, p, q] = candidates[best]
    return winners, out


def _candidates(y, x, p, q, reduction):
    for j, i in np.ndindex(y.n, x.n):
        v, u = y.position(p, j), x.position(q, i)
        if not (-1 <= v <= y.length and -1 <= u <= x.length):
            yield []
            continue
        pixels = [
            (r, c, w_r * w_c) for r, w_r in _taps(v, y.length) for c, w_c in _taps(u, x.length)
        ]
        if reduction == "max":
            yield pixels
        else:
            yield from ([pixel] for pixel in pixels)
            yield from [[]] * (len(pixels) < 4)  # a corner without weight


def _at(image, pixels):
    """[C]: the sum of weighted pixels."""
    return sum((w * image[:, r, c] for r, c, w in pixels), np.zeros(len(image)))


def rotated(features, boxes, index, size, scale, sampling, convention, turn):
    """[K, C, P, Q], and for each RoI its bins [P, Q]: lists of (row, column, weight).

    Boxes are (x, y, width, height, angle); `turn`: radians in a unit of the angle.
    """
    T = np.float64 if features.dtype == np.float64 else np.float32
    out = np.zeros((len(boxes), features.shape[1], *size))
    pixels = []
    for k, box in enumerate(np.asarray(boxes, T)):
        x, y, *sides = box[:4] * T(scale)
        centre = y - T(convention.pixel_offset), x - T(convention.pixel_offset)
        theta = T(np.float64(box[4]) * turn)
        c, s = (T(f(np.float64(theta))) for f in (np.cos, np.sin))
        if convention.min_size is not None:
            sides = [max(side, T(convention.min_size)) for side in sides]
        lengths = sides[::-1], size  # y first
        steps = [side / T(count) for side, count in zip(*lengths, strict=True)]
        n = [sampling or max(0, int(np.ceil(step))) for step in steps]
        pixels.append([])
        for p, q in np.ndindex(*size):
            pixels[k].append([])
            for j, i in np.ndindex(*n):
                v, u = (
                    (-side / T(2) + T(bin_) * step) + ((T(sample) + T(0.5)) * step) / T(count)
                    for side, bin_, step, sample, count in zip(
                        sides[::-1], (p, q), steps, (j, i), n, strict=True
                    )
                )
                at = (v * c - u * s) + centre[0], (v * s + u * c) + centre[1]
                shape = features.shape[2:]
                if not all(-1 <= a <= length for a, length in zip(at, shape, strict=True)):
                    continue
                for r, w_r in _taps(at[0], shape[0]):
                    for col, w_c in _taps(at[1], shape[1]):
                        pixels[k][-1].append((r, col, w_r * w_c / (n[0] * n[1])))
            image = features[index[k]].astype(np.float64)
            out[k, :, p, q] = _at(image, pixels[k][-1])
    return out, pixels


def to_winners(problem, winners, d_output):
    """[N, C, H, W]: every gradient at its winner's pixels."""
    out = np.zeros(problem.features.shape)
    for (k, c, p, q), pixels in winners.items():
        for row, column, weight in pixels:
            out[problem.index[k], c, row, column] += weight * float(d_output[k, c, p, q])
    return out


def smooth(problem, direction):
    """[K]: whether every sample keeps its pixels from -direction to +direction ([K, 4] or [4])."""
    ends = [replace(problem, boxes=problem.boxes + sign * direction) for sign in (-1, 1)]
    pairs = zip(*(map(_cells, p.axes) for p in (problem, *ends)), strict=True)
    return np.array([here == before == after for here, before, after in pairs], bool)


def _cells(axes):
    samples = [[(*map(tuple, (s.lo, s.slope, s.t)),) for s in axis.samples] for axis in axes]
    return [(axis.n, axis.clamped) for axis in axes], samples


def _taps(p, length):
    """The (pixel, weight) pairs of a sample at p."""
    p = max(p, 0)
    lo = int(np.floor(p))
    if lo >= length - 1:
        return [(length - 1, 1.0)]
    fraction = float(p - lo)
    return [(lo, 1 - fraction), (lo + 1, fraction)] if fraction > 0 else [(lo, 1.0)]


def _count(y, x):
    return max(y.n * x.n, 1)


def _terms(problem, tangent, bound):
    """(k, rows [P, H], cols [Q, W]) of every product rows . F . cols^T in the result."""
    for k, (y, x) in enumerate(problem.axes):
        if tangent is None:
            yield k, y.weights / _count(y, x), x.weights
        elif y.finite and x.finite:
            x1, y1, x2, y2 = np.asarray(tangent[k], np.float64)
            yield k, np.tensordot([y1, y2], y.slopes(bound), 1) / _count(y, x), x.weights
            yield k, y.weights / _count(y, x), np.tensordot([x1, x2], x.slopes(bound), 1)


def _bins(rows, cols):
    """(p, q, the rows and the columns that count in that bin)."""
    for p, row in enumerate(rows):
        for q, col in enumerate(cols):
            yield p, q, row.nonzero()[0], col.nonzero()[0]


def _gather(rows, image, cols):
    """[C, P, Q]: rows . image . cols^T; a pixel of weight 0 is never read."""
    out = np.zeros((len(image), len(rows), len(cols)))
    for p, q, r, c in _bins(rows, cols):
        out[:, p, q] = np.einsum("r,mrc,c", rows[p, r], image[:, r[:, None], c], cols[q, c])
    return out
