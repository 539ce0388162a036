"""The operations in plain JAX, where no kernel is: products of dense matrices, RoI after RoI.

The arguments are those of `_triton.launch`. A result is given as its shape and dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def axis_taps(
    lo: Array, hi: Array, rule: tuple[float, ...], bins: int, size: int, scale: float
) -> tuple[Array, Array]:
    """Taps of one box on one axis: docs/spec.md, equations (1) to (3) and (6).

    The row matrix (P, L) that averages the samples, and its derivatives in ``lo`` and ``hi``
    (2, P, L). Every pixel looks at the few samples that can touch it.
    """
    real, whole = lo.dtype.type, jnp.int64 if lo.dtype == jnp.float64 else jnp.int32
    sampling_ratio, pixel_offset, input_offset, end_offset, min_size, floor, *_ = rule
    scale = real(scale)
    most = 2**31 if lo.dtype == jnp.float64 else 2**22  # samples: positions of more need float64

    start = (lo + real(input_offset)) * scale - real(pixel_offset)
    end = (hi + real(input_offset) + real(end_offset)) * scale - real(pixel_offset)
    extent = end - start
    clamped = extent < real(min_size)
    extent = jnp.where(clamped, real(min_size), extent)
    length = extent / real(bins)  # XLA may multiply by 1 / bins: a whole quotient shall be whole
    length = jnp.where(jnp.round(length) * real(bins) == extent, jnp.round(length), length)
    if sampling_ratio > 0:
        wanted, touching = real(sampling_ratio), int(sampling_ratio)
    else:
        wanted, touching = jnp.maximum(jnp.floor(length), 1) if floor else jnp.ceil(length), 8
        wanted = jnp.where(extent > 0, wanted, 0)
    n = jnp.where(jnp.isfinite(extent) & (wanted <= most), wanted, 0)

    k = jnp.arange(bins, dtype=lo.dtype)[:, None, None]  # [P, L, samples]
    pixel = jnp.arange(size, dtype=lo.dtype)[:, None]
    first = start + k * length
    i = jnp.arange(touching, dtype=whole)
    if sampling_ratio <= 0:  # samples are more than half a pixel apart: 4 are within 1 of a pixel
        before = jnp.floor((pixel - 1 - first) / (length / n) - real(0.5)) - 1
        i += jnp.where(n > touching, jnp.clip(before, 0, n - touching), 0).astype(whole)
    along = i.astype(lo.dtype) + real(0.5)
    position = first + (along * length) / n
    inside = (i < n) & (position >= -1) & (position <= size)
    p = jnp.where(inside, jnp.maximum(position, 0), 0)
    lower = jnp.minimum(jnp.floor(p), size - 1)
    fraction = jnp.where(lower < size - 1, p - lower, 0)
    is_lower, is_upper = inside & (lower == pixel), inside & (lower + 1 == pixel)
    one_over_n = 1 / jnp.maximum(n, 1)
    values = jnp.where(is_lower, 1 - fraction, 0) + jnp.where(is_upper, fraction, 0)
    values = values.sum(2) * one_over_n

    moves = (position >= 0) & (lower < size - 1)
    slope = jnp.where(is_upper & moves, 1, 0) - jnp.where(is_lower & moves, 1, 0)
    t = (k + along / jnp.maximum(n, 1)) / real(bins)
    in_lo, in_hi = jnp.where(clamped, 1, 1 - t), jnp.where(clamped, 0, t)
    slopes = jnp.stack([(slope * in_lo).sum(2), (slope * in_hi).sum(2)]) * (scale * one_over_n)
    return values, slopes


# Row matrices of an axis, and their derivatives in the box's ends
_Taps = tuple[Array, Array]


def _taps(
    box: Array, bins: Sequence[int], size: Sequence[int], scale: Sequence[float], rule: tuple
) -> list[_Taps]:
    """Of y and x."""
    x1, y1, x2, y2 = box
    axes = zip((y1, x1), (y2, x2), bins, size, scale, strict=True)
    y, x = [axis_taps(lo, hi, rule, *numbers) for lo, hi, *numbers in axes]
    finite = jnp.isfinite(box).all()
    return [(values, jnp.where(finite, slopes, 0)) for values, slopes in (y, x)]


def _terms(y: _Taps, x: _Taps, tangent: Array | None) -> list[tuple[Array, Array]]:
    """The pairs Ay, Ax of the sum over Ay . F . Ax^T."""
    if tangent is None:
        return [(y[0], x[0])]
    x1, y1, x2, y2 = tangent
    return [
        (y1 * y[1][0] + y2 * y[1][1], x[0]),
        (y[0], x1 * x[1][0] + x2 * x[1][1]),
    ]


def _pairs(scales: tuple[float, ...]) -> list[tuple[float, float]]:
    """y and x of each map."""
    return list(zip(scales[::2], scales[1::2], strict=True))


def _levels(rois: Any) -> Array:
    return jnp.zeros_like(rois.image_index) if rois.levels is None else rois.levels


def _rows(
    row: Callable, maps: Sequence, scales: tuple, rois: Any, others: Any, result: Any
) -> Array:
    """``row(map, its scale, box, image, others)`` of each RoI; 0 of one that is on no map."""
    if 0 in result.shape:
        return jnp.zeros(result.shape, result.dtype)
    branches = [functools.partial(row, *each) for each in zip(maps, _pairs(scales), strict=True)]

    def one(roi: tuple) -> Array:
        box, image, level, others = roi
        values = lax.switch(level, branches, box, image, others)
        good = (image >= 0) & (image < maps[0].shape[0]) & (level >= 0) & (level < len(maps))
        return jnp.where(good, values, 0).astype(result.dtype)

    return lax.map(one, (rois.boxes, rois.image_index, _levels(rois), others))


def forward(maps, rois, tangent, scales, rule, output) -> Array:
    """Gives ``output`` (K, C, P, Q), a shape and dtype."""

    def row(map_, scale, box, image, tangent) -> Array:
        y, x = _taps(box, output.shape[2:], map_.shape[2:], scale, rule)
        features = map_[image].astype(box.dtype)
        return sum(_product("ph,chw,qw->cpq", a, features, b) for a, b in _terms(y, x, tangent))

    return _rows(row, maps, scales, rois, tangent, output)


def adjoint(d_output, rois, tangent, scales, rule, d_features) -> list[Array]:
    """Gives ``d_features``, a shape and dtype (N, C, H, W) of each map."""

    def of_map(own: int, result: Any, scale: tuple[float, float]) -> Array:
        def add(d_map: Array, roi: tuple) -> tuple[Array, None]:
            box, image, level, d_row, tangent = roi
            y, x = _taps(box, d_output.shape[2:], result.shape[2:], scale, rule)
            d_row = d_row.astype(box.dtype)
            d_image = sum(_product("ph,cpq,qw->chw", a, d_row, b) for a, b in _terms(y, x, tangent))
            good = (image >= 0) & (image < result.shape[0]) & (level == own)
            return d_map.at[image].add(jnp.where(good, d_image, 0)), None

        zeros = varying(jnp.zeros(result.shape, rois.boxes.dtype), manual_axes(rois.boxes))
        if 0 in (rois.boxes.shape[0], *result.shape):
            return zeros.astype(result.dtype)
        each = rois.boxes, rois.image_index, _levels(rois), d_output, tangent
        return lax.scan(add, zeros, each)[0].astype(result.dtype)

    each = enumerate(zip(d_features, _pairs(scales), strict=True))
    return [of_map(level, *numbers) for level, numbers in each]


def box_gradient(d_output, maps, rois, scales, rule, d_boxes) -> Array:
    """Gives ``d_boxes`` (K, 4), a shape and dtype."""

    def row(map_, scale, box, image, d_row) -> Array:
        (y, y_slopes), (x, x_slopes) = _taps(box, d_output.shape[2:], map_.shape[2:], scale, rule)
        d_row, features = d_row.astype(box.dtype), map_[image].astype(box.dtype)
        y1, y2 = _product("eph,cpq,chw,qw->e", y_slopes, d_row, features, x)
        x1, x2 = _product("ph,cpq,chw,eqw->e", y, d_row, features, x_slopes)
        return jnp.stack([x1, y1, x2, y2])

    return _rows(row, maps, scales, rois, d_output, d_boxes)


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
