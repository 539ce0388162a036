"""The operations in plain JAX, where no kernel is, RoI after RoI.

A mean along the axes is a product of dense matrices, `_Matrices`. Largest samples, and boxes that
are turned, are sums of weighted pixels, sample after sample, `_Samples`.

The arguments are those of `_triton.launch`. A result is given as its shape and dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


# Samples along one axis: docs/spec.md, equations (1) to (3)


def _whole(real: Any) -> Any:
    """The type of numbers of samples."""
    return jnp.int64 if real == jnp.float64 else jnp.int32


class _Grid(NamedTuple):
    """Of one box."""

    start: Array
    length: Array  # of a bin
    samples: Array  # of a bin, as a real number
    clamped: Array  # by `min_size`

    def edge(self, k: Array) -> Array:
        return self.start + k * self.length

    def position(self, k: Array, i: Array) -> Array:
        middle = i.astype(self.start.dtype) + self.start.dtype.type(0.5)
        return self.edge(k) + (middle * self.length) / self.samples

    def along(self, k: Array, i: Array, bins: int) -> Array:
        """From 0, where the box starts, to 1."""
        middle = i.astype(self.start.dtype) + self.start.dtype.type(0.5)
        return (k + middle / jnp.maximum(self.samples, 1)) / bins

    def parts(self, t: Array) -> tuple[Array, Array]:
        """How far what is at t moves with the start and with the end, without the scale."""
        return jnp.where(self.clamped, 1, 1 - t), jnp.where(self.clamped, 0, t)

    def window(self, k: Array, low: Any, width: int) -> Array:
        """The first of `width` adaptive samples of bin k, of which one or two are below `low`."""
        before = jnp.floor((low - self.edge(k)) / (self.length / self.samples) - 0.5) - 1
        first = jnp.clip(before, 0, self.samples - width)
        return jnp.where(self.samples > width, first, 0).astype(_whole(first.dtype))

    def between(self, k: Array, low: Array, high: Array) -> tuple[Array, Array]:
        """The first sample of each bin that can be there, and the most that a bin has there."""
        step = self.length / self.samples
        ends = [(end - self.edge(k)) / step - 0.5 for end in (low, high)]
        known = (self.samples > 0) & (step != 0)
        first = jnp.where(known, jnp.floor(jnp.minimum(*ends)) - 1, 0).clip(0, self.samples)
        end = jnp.where(known, jnp.ceil(jnp.maximum(*ends)) + 2, self.samples)
        most = (end.clip(0, self.samples) - first).max()
        return first.astype(_whole(first.dtype)), most.astype(jnp.int32)


def _grid(start: Array | None, extent: Array, rule: tuple[float, ...], bins: int) -> _Grid:
    """Without a start the box is around 0."""
    real = extent.dtype.type
    sampling_ratio, _, _, _, min_size, floor, *_ = rule
    most = 2**31 if real == jnp.float64 else 2**22  # samples: positions of more need float64
    clamped = extent < real(min_size)
    extent = jnp.where(clamped, real(min_size), extent)
    length = extent / real(bins)  # XLA may multiply by 1 / bins: a whole quotient shall be whole
    length = jnp.where(jnp.round(length) * real(bins) == extent, jnp.round(length), length)
    if sampling_ratio > 0:
        wanted = real(sampling_ratio)
    else:
        wanted = jnp.maximum(jnp.floor(length), 1) if floor else jnp.ceil(length)
        wanted = jnp.where(extent > 0, wanted, 0)
    samples = jnp.where(jnp.isfinite(extent) & (wanted <= most), wanted, 0)
    return _Grid(-extent / 2 if start is None else start, length, samples, clamped)


def _grid_of_ends(lo: Array, hi: Array, rule: tuple[float, ...], bins: int, scale: float) -> _Grid:
    real = lo.dtype.type
    _, pixel_offset, input_offset, end_offset, *_ = rule
    start = (lo + real(input_offset)) * real(scale) - real(pixel_offset)
    end = (hi + real(input_offset) + real(end_offset)) * real(scale) - real(pixel_offset)
    return _grid(start, end - start, rule, bins)


def _is_inside(position: Array, size: int) -> Array:
    return (position >= -1) & (position <= size)


def _tap(position: Array, size: int) -> tuple[Array, Array, Array]:
    """Of a sample: its lower pixel, the weight of the next, and whether they move with it."""
    p = jnp.maximum(position, 0)
    lower = jnp.minimum(jnp.floor(p), size - 1)
    fraction = jnp.where(lower < size - 1, p - lower, 0)
    return lower, fraction, (position >= 0) & (lower < size - 1)


# Means along the axes


def axis_taps(
    lo: Array, hi: Array, rule: tuple[float, ...], bins: int, size: int, scale: float
) -> tuple[Array, Array]:
    """Taps of one box on one axis: docs/spec.md, equations (1) to (3) and (6).

    The row matrix (P, L) that averages the samples, and its derivatives in ``lo`` and ``hi``
    (2, P, L). Every pixel looks at the few samples that can touch it.
    """
    real = lo.dtype.type
    grid = _grid_of_ends(lo, hi, rule, bins, scale)
    k = jnp.arange(bins, dtype=real)[:, None, None]  # [P, L, samples]
    pixel = jnp.arange(size, dtype=real)[:, None]
    touching = int(rule[0]) or 8
    i = jnp.arange(touching, dtype=_whole(real))
    if not rule[0]:  # samples are more than half a pixel apart: 4 are within 1 of a pixel
        i += grid.window(k, pixel - 1, touching)
    position = grid.position(k, i)
    inside = (i < grid.samples) & _is_inside(position, size)
    lower, fraction, moves = _tap(jnp.where(inside, position, 0), size)
    is_lower, is_upper = inside & (lower == pixel), inside & (lower + 1 == pixel)
    one_over_n = 1 / jnp.maximum(grid.samples, 1)
    values = jnp.where(is_lower, 1 - fraction, 0) + jnp.where(is_upper, fraction, 0)
    values = values.sum(2) * one_over_n

    slope = jnp.where(is_upper & moves, 1, 0) - jnp.where(is_lower & moves, 1, 0)
    slopes = [(slope * part).sum(2) for part in grid.parts(grid.along(k, i, bins))]
    return values, jnp.stack(slopes) * (real(scale) * one_over_n)


# Largest samples, and boxes that are turned: docs/spec.md, (9) and (10)


class _Side(NamedTuple):
    """The samples of a box along one of its sides, of which some count."""

    grid: _Grid
    number: Callable[[Array, Array], Array]  # of bin k's j-th: too large if it has no more
    count: Array  # the most that a bin has


class _Straight:
    """Where samples are, and how they move: of each cell the first and the last of a bin."""

    def __init__(self, box: Array, bins: tuple, size: tuple, scale: tuple, rule: tuple) -> None:
        x1, y1, x2, y2 = box
        ends = zip((y1, x1), (y2, x2), bins, size, scale, strict=True)
        self.scale, self.sides = scale, [_extremes(*numbers, rule) for numbers in ends]

    def place(self, v: Array, u: Array) -> tuple[Array, Array]:
        return v, u

    def motion(self, tangent: Array, _places: tuple, t: tuple) -> list[Array]:
        x1, y1, x2, y2 = tangent
        parts = [side.grid.parts(each) for side, each in zip(self.sides, t, strict=True)]
        each = zip(self.scale, (y1, x1), (y2, x2), parts, strict=True)
        return [scale * (lo * in_lo + hi * in_hi) for scale, lo, hi, (in_lo, in_hi) in each]


def _extremes(lo: Array, hi: Array, bins: int, size: int, scale: float, rule: tuple) -> _Side:
    grid = _grid_of_ends(lo, hi, rule, bins, scale)
    whole = _whole(lo.dtype)
    none, width = jnp.iinfo(whole).max, int(rule[0]) or 2 * size + 12
    k = jnp.arange(bins)[:, None]
    i = jnp.broadcast_to(jnp.arange(width, dtype=whole), (bins, width))
    if not rule[0]:  # more than half a pixel apart: all that are inside, and some on either side
        i += grid.window(k, -2, width)
    position = grid.position(k, i)
    cell = jnp.where(position > size, size, _tap(position, size)[0])
    cell = jnp.where(position < -1, -1, cell)
    cell = jnp.where(i < grid.samples, cell, size + 1)
    changes = cell[:, 1:] != cell[:, :-1]
    is_first = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    is_last = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    kept = (is_first | is_last) & (i < grid.samples)
    numbers = jnp.sort(jnp.where(kept, i, none))
    number = lambda k, j: numbers.at[k, j].get(mode="promise_in_bounds")  # noqa: E731
    return _Side(grid, number, kept.sum(1).max().astype(jnp.int32))


class _Turned:
    """The same of a box that is turned: of all samples that can be inside."""

    def __init__(self, box: Array, bins: tuple, size: tuple, scale: tuple, rule: tuple) -> None:
        real, wide = box.dtype.type, jax.dtypes.canonicalize_dtype(jnp.float64)
        self.turn, self.scale = rule[7], real(scale[0])
        x, y, w, h = box[:4] * self.scale
        self.y, self.x = y - real(rule[1]), x - real(rule[1])
        theta = (box[4].astype(wide) * self.turn).astype(real).astype(wide)
        self.cos, self.sin = jnp.cos(theta).astype(real), jnp.sin(theta).astype(real)
        known = jnp.isfinite(self.y + self.x + self.cos)

        # the corners of the map, from the middle of the box; with room for rounding
        down, right = ([-1 - self.y, size[0] - self.y], [-1 - self.x, size[1] - self.x])
        corners = [self.along(y, x) for y in down for x in right]
        reach = abs(w) + abs(h) + abs(self.y) + abs(self.x) + sum(size)
        room = 1 + 16 * jnp.finfo(real).eps * reach
        self.sides = []
        for side, bins_, ends in zip((h, w), bins, zip(*corners, strict=True), strict=True):
            grid = _grid(None, side, rule, bins_)
            grid = grid._replace(samples=jnp.where(known, grid.samples, 0))
            low, high = jnp.stack(ends).min() - room, jnp.stack(ends).max() + room
            first, most = grid.between(jnp.arange(bins_), low, high)
            self.sides.append(_Side(grid, lambda k, j, first=first: first[k] + j, most))

    def along(self, y: Array, x: Array) -> tuple[Array, Array]:
        return y * self.cos + x * self.sin, x * self.cos - y * self.sin

    def turned(self, v: Array, u: Array) -> tuple[Array, Array]:
        return v * self.cos - u * self.sin, v * self.sin + u * self.cos

    def place(self, v: Array, u: Array) -> tuple[Array, Array]:
        y, x = self.turned(v, u)
        return y + self.y, x + self.x

    def motion(self, tangent: Array, places: tuple, t: tuple) -> list[Array]:
        d_x, d_y, d_w, d_h, d_angle = tangent
        each = zip(self.sides, t, (d_h, d_w), strict=True)
        grown = [jnp.where(side.grid.clamped, 0, (at - 0.5) * d) for side, at, d in each]
        (y, x), (y_grown, x_grown), turn = self.turned(*places), self.turned(*grown), self.turn
        in_y = self.scale * (d_y + y_grown) - x * turn * d_angle
        return [in_y, self.scale * (d_x + x_grown) + y * turn * d_angle]


class _Pixels(NamedTuple):
    """Two by two for each bin: indices and weights that broadcast to (2, 2, C, P, Q). A pixel of
    weight 0 is not read."""

    rows: Array
    columns: Array
    weights: Array

    def of(self, image: Array) -> Array:
        """Their sum in each bin, in the order of (9), of an image (C, H, W)."""
        c = jnp.arange(len(image))[:, None, None]
        pixels = image.at[c, self.rows, self.columns].get(mode="promise_in_bounds")
        terms = jnp.where(self.weights != 0, self.weights * pixels, 0)
        (one, two), (three, four) = terms  # selected: no product is fused with a sum
        return ((one + two) + three) + four

    def added_to(self, image: Array, values: Array) -> Array:
        """The image with weighted values (C, P, Q)."""
        c = jnp.arange(len(image))[:, None, None]
        terms = jnp.where(self.weights != 0, self.weights * values, 0)
        return image.at[c, self.rows, self.columns].add(terms, mode="promise_in_bounds")


def _both_taps(position: Array, size: int) -> tuple[Array, Array, Array]:
    """Of samples: the indices (2, ...) of both pixels, their weights, and the slopes of these."""
    lower, fraction, moves = _tap(position, size)
    pixels = jnp.stack([lower, jnp.minimum(lower + 1, size - 1)]).astype(jnp.int32)
    slopes = jnp.stack([jnp.where(moves, -1, 0), jnp.where(moves, 1, 0)])
    return pixels, jnp.stack([1 - fraction, fraction]), slopes


def _divided(m: Array, by: Any) -> tuple[Array, Array]:
    """Quotient and remainder, of what is not negative."""
    by = jnp.full_like(m, by)
    return lax.div(m, by), lax.rem(m, by)


class _Samples:
    """One RoI. Bins are sums of `_Pixels`: of all samples if the box is turned, else of the one
    that `selector` (C, H, W) chooses."""

    def __init__(
        self, box: Array, bins: tuple, size: tuple, scale: tuple, rule: tuple, selector: Any
    ) -> None:
        self.box, self.bins, self.size, self.is_turned = box, bins, size, bool(rule[7])
        self.corners = 4 if rule[6] == 2 else 1  # of a sample, that are candidates
        self.k = jnp.arange(bins[0])[:, None], jnp.arange(bins[1])
        self.where = (_Turned if self.is_turned else _Straight)(box, bins, size, scale, rule)
        self.count = math.prod(side.count for side in self.where.sides) * self.corners
        self.winner = None if self.is_turned else self._winner(selector)

    def _winner(self, selector: Array) -> Array:
        """(C, P, Q): the number of the first of the largest."""

        def consider(m: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            largest, winner = best
            pixels, exists = self._pixels(m.reshape(1, 1, 1), None)
            value = pixels.of(selector)
            wins = exists & ~(value <= largest) & ~jnp.isnan(largest)
            return jnp.where(wins, value, largest), jnp.where(wins, m, winner)

        shape, axes = (len(selector), *self.bins), manual_axes(self.box)
        start = jnp.full(shape, -jnp.inf, self.box.dtype), jnp.zeros(shape, jnp.int32)
        start = tuple([varying(x, axes) for x in start])
        return lax.fori_loop(0, self.count, consider, start)[1]

    def _pixels(self, m: Array, tangent: Array | None) -> tuple[_Pixels, Array]:
        """Of candidate m (C, P, Q), or of one that broadcasts to that, with the weights of its
        value or of its change along the tangent; and whether a bin has so many."""
        (y, x), (p, q), size = self.where.sides, self.k, self.size
        sample, corner = _divided(m, self.corners)
        j, i = _divided(sample, jnp.maximum(x.count, 1))
        j, i = y.number(p, j), x.number(q, i)
        exists = (j < y.grid.samples) & (i < x.grid.samples)
        places = y.grid.position(p, j), x.grid.position(q, i)
        at_y, at_x = self.where.place(*places)
        inside = exists & _is_inside(at_y, size[0]) & _is_inside(at_x, size[1])
        rows, in_y, y_slopes = _both_taps(jnp.where(inside, at_y, 0), size[0])
        columns, in_x, x_slopes = _both_taps(jnp.where(inside, at_x, 0), size[1])
        if tangent is None:
            weights = in_y[:, None] * in_x
        else:
            t = y.grid.along(p, j, self.bins[0]), x.grid.along(q, i, self.bins[1])
            tangent = jnp.where(jnp.isfinite(self.box).all(), tangent, 0)
            d_y, d_x = self.where.motion(tangent, places, t)
            weights = (d_y * y_slopes)[:, None] * in_x + in_y[:, None] * (d_x * x_slopes)
        if self.corners > 1:
            four = jnp.arange(self.corners).reshape(2, 2, 1, 1, 1)
            weights = jnp.where(corner == four, weights, 0)
        if self.is_turned:
            weights /= y.grid.samples * x.grid.samples
        return _Pixels(rows[:, None], columns, jnp.where(inside, weights, 0)), exists

    def fold(self, add: Callable, start: Array, tangent: Array | None) -> Array:
        """The last result of `add(result, pixels)`, over all that bins are sums of."""
        if not self.is_turned:
            return add(start, self._pixels(self.winner, tangent)[0])
        start = varying(start, manual_axes(self.box))

        def step(m: Array, result: Array) -> Array:
            return add(result, self._pixels(m.reshape(1, 1, 1), tangent)[0])

        return lax.fori_loop(0, self.count, step, start)

    def pooled(self, image: Array, tangent: Array | None) -> Array:
        zeros = jnp.zeros((len(image), *self.bins), self.box.dtype)
        return self.fold(lambda sums, pixels: sums + pixels.of(image), zeros, tangent)

    def spread(self, values: Array, tangent: Array | None) -> Array:
        zeros = jnp.zeros((len(values), *self.size), self.box.dtype)
        return self.fold(lambda sums, pixels: pixels.added_to(sums, values), zeros, tangent)

    def slopes(self, image: Array, values: Array) -> Array:
        def along(tangent: Array) -> Array:
            return (self.pooled(image, tangent) * values).sum()

        return jax.vmap(along)(jnp.eye(len(self.box), dtype=self.box.dtype))


class _Matrices:
    """One RoI whose bins are means along the axes."""

    def __init__(self, box: Array, bins: tuple, size: tuple, scale: tuple, rule: tuple) -> None:
        x1, y1, x2, y2 = box
        each = zip((y1, x1), (y2, x2), bins, size, scale, strict=True)
        y, x = [axis_taps(lo, hi, rule, *numbers) for lo, hi, *numbers in each]
        finite = jnp.isfinite(box).all()
        (self.y, self.x), slopes = zip(y, x, strict=True)
        self.y_slopes, self.x_slopes = (jnp.where(finite, each, 0) for each in slopes)

    def _terms(self, tangent: Array | None) -> list[tuple[Array, Array]]:
        """The pairs Ay, Ax of the sum over Ay . F . Ax^T."""
        if tangent is None:
            return [(self.y, self.x)]
        x1, y1, x2, y2 = tangent
        return [
            (y1 * self.y_slopes[0] + y2 * self.y_slopes[1], self.x),
            (self.y, x1 * self.x_slopes[0] + x2 * self.x_slopes[1]),
        ]

    def pooled(self, image: Array, tangent: Array | None) -> Array:
        return sum(_product("ph,chw,qw->cpq", a, image, b) for a, b in self._terms(tangent))

    def spread(self, values: Array, tangent: Array | None) -> Array:
        return sum(_product("ph,cpq,qw->chw", a, values, b) for a, b in self._terms(tangent))

    def slopes(self, image: Array, values: Array) -> Array:
        y1, y2 = _product("eph,cpq,chw,qw->e", self.y_slopes, values, image, self.x)
        x1, x2 = _product("ph,cpq,chw,eqw->e", self.y, values, image, self.x_slopes)
        return jnp.stack([x1, y1, x2, y2])


# The operations


_Bins = _Matrices | _Samples


def _bins(
    box: Array, bins: tuple, size: tuple, scale: tuple, rule: tuple, selector: Array | None
) -> _Bins:
    """Of one RoI what pools an image (C, H, W) into bins (C, P, Q), spreads these over an image,
    and gives the gradient in the box. With a tangent it pools and spreads by how weights change.
    """
    if rule[6] or rule[7]:  # not a mean, or turned
        return _Samples(box, bins, size, scale, rule, selector)
    return _Matrices(box, bins, size, scale, rule)


def _pairs(scales: tuple[float, ...]) -> list[tuple[float, float]]:
    """y and x of each map."""
    return list(zip(scales[::2], scales[1::2], strict=True))


def _levels(rois: Any) -> Array:
    return jnp.zeros_like(rois.image_index) if rois.levels is None else rois.levels


def _selector(selectors: Sequence | None, level: int, image: Array, box: Array) -> Array | None:
    return None if selectors is None else selectors[level][image].astype(box.dtype)


def _rows(
    row: Callable, maps: Sequence, selectors: Any, rois: Any, scales: tuple, rule: tuple,
    bins: tuple, others: Any, result: Any,
) -> Array:  # fmt: skip
    """``row(the RoI's bins, its image, others)`` of each RoI; 0 of one that is on no map."""
    if 0 in result.shape:
        return jnp.zeros(result.shape, result.dtype)

    def of_level(level: int, box: Array, image: Array, others: Any) -> Array:
        size, scale = maps[level].shape[2:], _pairs(scales)[level]
        roi = _bins(box, bins, size, scale, rule, _selector(selectors, level, image, box))
        return row(roi, maps[level][image].astype(box.dtype), others)

    def one(roi: tuple) -> Array:
        box, image, level, others = roi
        branches = [functools.partial(of_level, level) for level in range(len(maps))]
        values = lax.switch(level, branches, box, image, others)
        good = (image >= 0) & (image < maps[0].shape[0]) & (level >= 0) & (level < len(maps))
        return jnp.where(good, values, 0).astype(result.dtype)

    return lax.map(one, (rois.boxes, rois.image_index, _levels(rois), others))


def forward(maps, rois, tangent, scales, rule, output, selectors=None) -> Array:
    """Gives ``output`` (K, C, P, Q), a shape and dtype."""

    def row(bins: _Bins, image: Array, tangent: Array | None) -> Array:
        return bins.pooled(image, tangent)

    return _rows(row, maps, selectors, rois, scales, rule, output.shape[2:], tangent, output)


def adjoint(d_output, rois, tangent, scales, rule, d_features, selectors=None) -> list[Array]:
    """Gives ``d_features``, a shape and dtype (N, C, H, W) of each map."""

    def of_map(own: int, result: Any, scale: tuple[float, float]) -> Array:
        def add(d_map: Array, roi: tuple) -> tuple[Array, None]:
            box, image, level, d_row, tangent = roi
            numbers = d_output.shape[2:], result.shape[2:], scale, rule
            bins = _bins(box, *numbers, _selector(selectors, own, image, box))
            d_image = bins.spread(d_row.astype(box.dtype), tangent)
            good = (image >= 0) & (image < result.shape[0]) & (level == own)
            return d_map.at[image].add(jnp.where(good, d_image, 0)), None

        zeros = varying(jnp.zeros(result.shape, rois.boxes.dtype), manual_axes(rois.boxes))
        if 0 in (rois.boxes.shape[0], *result.shape):
            return zeros.astype(result.dtype)
        each = rois.boxes, rois.image_index, _levels(rois), d_output, tangent
        return lax.scan(add, zeros, each)[0].astype(result.dtype)

    each = enumerate(zip(d_features, _pairs(scales), strict=True))
    return [of_map(level, *numbers) for level, numbers in each]


def box_gradient(d_output, maps, rois, scales, rule, d_boxes, selectors=None) -> Array:
    """Gives ``d_boxes`` (K, 4), or (K, 5), a shape and dtype."""

    def row(bins: _Bins, image: Array, d_row: Array) -> Array:
        return bins.slopes(image, d_row.astype(image.dtype))

    return _rows(row, maps, selectors, rois, scales, rule, d_output.shape[2:], d_output, d_boxes)


# In a shard_map types tell over which of its axes a value varies: a loop's must not change.


def manual_axes(array: Array) -> frozenset:
    """The axes of a shard_map over which a value varies, where its type says."""
    kind = jax.typeof(array) if hasattr(jax, "typeof") else None
    kind = getattr(kind, "mat", kind)
    return getattr(kind, "varying", getattr(kind, "vma", frozenset()))


def varying(array: Array, axes: frozenset) -> Array:
    """The same value, as one of each device along `axes`; the transpose sums over them."""
    axes = tuple(axes - manual_axes(array))
    if not axes:
        return array
    if hasattr(lax, "pcast"):
        return lax.pcast(array, axes, to="varying")
    return lax.pvary(array, axes)
