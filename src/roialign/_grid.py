"""Where the bins and the samples of one box lie: the numbers that the kernels compute."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from roialign import _checks, _core
from roialign._rule import Convention

MOST = 2**20  # samples, and bins


class Taps(NamedTuple):
    """The pixels that a bin reads on one axis, and their weights in its mean."""

    pixels: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, eq=False)
class SamplingGrid:
    """What :func:`sampling_grid` found, in NumPy arrays.

    Feature pixels: pixel i of a map is at position i. P and Q are the bins in y and x, S_y and S_x
    the samples of a bin. The shapes in brackets are those of a box with an angle.

    Attributes:
        edges_y, edges_x: where bins begin and end, (P + 1,) and (Q + 1,) [both (P + 1, Q + 1)].
        image_edges_y, image_edges_x: the same in image pixels: those of the box as the rule takes
            it, with what the convention adds at its end and its least size.
        samples_y, samples_x: positions of samples, (P, S_y) and (Q, S_x)
            [both (P, Q, S_y, S_x)].
        inside_y, inside_x: whether these are in [-1, L] on a map of L pixels. A sample that is not
            on both axes adds 0, and is still counted.
        taps_y, taps_x: for each bin the pixels with a weight, and their weights in the mean
            [None: a turned box has no taps of one axis].

    >>> import roialign
    >>> grid = roialign.sampling_grid([2, 2, 6, 6], (8, 8), 2, sampling_ratio=1)
    >>> rows, columns, weights = grid.pixels(0, 1)
    >>> rows, columns
    (array([2, 2, 3, 3]), array([4, 5, 4, 5]))
    """

    edges_y: np.ndarray
    edges_x: np.ndarray
    image_edges_y: np.ndarray
    image_edges_x: np.ndarray
    samples_y: np.ndarray
    samples_x: np.ndarray
    inside_y: np.ndarray
    inside_x: np.ndarray
    taps_y: tuple[Taps, ...] | None
    taps_x: tuple[Taps, ...] | None
    _cells: tuple[np.ndarray, ...] | None = None

    def pixels(self, p: int, q: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows, columns and weights of the pixels whose sum is the mean of bin (p, q)."""
        if self.taps_y is None or self.taps_x is None:
            assert self._cells is not None
            first, rows, columns, weights = self._cells
            bin_ = np.ravel_multi_index((p, q), np.subtract(self.edges_y.shape, 1))
            part = slice(first[bin_], first[bin_ + 1])
            return rows[part], columns[part], weights[part]
        y, x = self.taps_y[p], self.taps_x[q]
        rows, columns = np.meshgrid(y.pixels, x.pixels, indexing="ij")
        return rows.ravel(), columns.ravel(), np.outer(y.weights, x.weights).ravel()


def sampling_grid(
    box: Any,
    map_size: Sequence[int],
    output_size: int | Sequence[int],
    *,
    spatial_scale: float | tuple[float, float] = 1.0,
    sampling_ratio: int = 0,
    convention: str | Convention = "half_pixel",
    angle: str | None = None,
    clockwise: bool = False,
    dtype: Any = "float32",
) -> SamplingGrid:
    """Where the bins and the samples of one box lie on a map, and which pixels they read.

    The numbers are those of the kernels, to the last bit.

    Args:
        box: 4 numbers (x1, y1, x2, y2) in image pixels; with an angle 5 (x, y, width, height,
            angle), as in :func:`roi_align_rotated`.
        map_size: (H, W) of the map.
        output_size, spatial_scale, sampling_ratio, convention: as in :func:`roi_align`.
        angle: the unit of a box's angle, "degrees" or "radians". None: the box has none.
        clockwise: how a box turns, as in :func:`roi_align_rotated`.
        dtype: of the coordinates: "float64", that of float64 features, or "float32", that of all
            others.

    Returns:
        A :class:`SamplingGrid`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number, name or shape is wrong, or there are more than 2**20 samples or bins.

    >>> import roialign
    >>> grid = roialign.sampling_grid([2, 2, 6, 6], (8, 8), 2, sampling_ratio=1)
    >>> grid.edges_x, grid.samples_x.ravel()
    (array([1.5, 3.5, 5.5], dtype=float32), array([2.5, 4.5], dtype=float32))
    >>> grid.taps_x[0]
    Taps(pixels=array([2, 3]), weights=array([0.5, 0.5], dtype=float32))
    """
    numbers = box.tolist() if isinstance(box, np.ndarray) else box
    _checks.sequence("box", "or array of numbers", numbers)
    _checks.sequence("map_size", "(height, width)", map_size)
    numbers = [_checks.real("box", number, "of real numbers") for number in numbers]
    sides = _checks.integers("map_size", map_size)
    bins = _checks.integers("output_size", output_size)
    given = spatial_scale, sampling_ratio, convention
    if angle is None:
        scales, rule = _checks.rule(*given, "mean")
    else:
        scales, rule = _checks.rotated_rule(*given, angle, clockwise, "NCHW")
    bins = _checks.bins("output_size", bins)
    real = _coordinate(dtype)
    if len(numbers) != (4 if angle is None else 5):
        wanted = "4 numbers (x1, y1, x2, y2)" if angle is None else "5 numbers, the last its angle"
        raise ValueError(f"`box` must have {wanted}, got {len(numbers)}")
    if len(sides) != 2 or not all(1 <= side <= _checks.MAX_SIDE for side in sides):
        raise ValueError(
            f"`map_size` must be (height, width), both at least 1, got {_checks.shown(sides)}"
        )
    if bins[0] * bins[1] > MOST:
        raise ValueError(f"`output_size` must have at most {MOST} bins here, got {bins}")
    found = _core.sampling_grid(numbers, bins, sides, scales, rule, real == np.float64, MOST)
    counts, edges, positions, pixels = found
    p, q, n = *bins, np.array(counts)
    straight = angle is None
    total = (np.array(bins) * n).sum() if straight else p * q * n[0] * n[1]
    if total > MOST:
        raise ValueError(f"`box` must have at most {MOST} samples here, got {total}")
    shapes = ((p, n[0]), (q, n[1])) if straight else ((p, q, *n),) * 2
    ends = ((p + 1,), (q + 1,)) if straight else ((p + 1, q + 1),) * 2
    lines = [np.array(e, real).reshape(shape) for e, shape in zip(edges, ends)]
    samples = [np.array(at, real).reshape(shape) for at, shape in zip(positions, shapes)]
    inside = [(at >= -1) & (at <= real.type(side)) for at, side in zip(samples, sides)]
    move = dict(zip(_core.rule_names, rule))
    image = [
        (line + real.type(move["pixel_offset"])) / real.type(scale)
        - real.type(move["input_offset"])
        for line, scale in zip(lines, scales)
    ]
    taps_y, taps_x, cells = None, None, None
    if straight:
        taps_y, taps_x = [_taps_of(real, *taps) for taps in pixels]
    else:
        ((first, *at, weights),) = pixels
        cells = *(np.array(each, np.int64) for each in (first, *at)), np.array(weights, real)
    return SamplingGrid(
        *(lines[0], lines[1], image[0], image[1]),
        *(samples[0], samples[1], inside[0], inside[1]),
        *(taps_y, taps_x, cells),
    )


def _coordinate(dtype: Any) -> np.dtype:
    for real in (np.float32, np.float64):
        if isinstance(dtype, (str, type, np.dtype)) and dtype in (real.__name__, np.dtype(real)):
            return np.dtype(real)
    raise ValueError(f"`dtype` must be float32 or float64, got {_checks.shown(dtype)}")


def _taps_of(
    real: np.dtype, first: list[int], index: list[int], weight: list[float]
) -> tuple[Taps, ...]:
    pixels, weights = np.array(index, np.int64), np.array(weight, real)
    return tuple([Taps(pixels[a:b], weights[a:b]) for a, b in itertools.pairwise(first)])
