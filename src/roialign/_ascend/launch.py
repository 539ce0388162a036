"""The functions of `roialign._triton.launch` as matrix products; there is no float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import triton.language as tl

from roialign._triton.launch import (
    Array,
    New,
    before,
    check_fit,
    is_empty,
    power,
    programs,
    quotient,
    rois_of,
    strides,
    sum_blocks,
    touched,
)

from . import products

if TYPE_CHECKING:
    from roialign._rois import Rois

MAX_PROGRAMS = 65535  # of a launch that takes turns: no more than an Ascend device takes
SIDE = 32  # of a tile of a map: 4 KiB of float32, so those of a product fit into a core's buffers
LEAST_BINS, MAX_BINS = 16, 64  # on a side of a tile of bins: matrix units take 16 at least
LANES = 512  # of a program that makes weights: bins times pixels
BLOCK_C = 16  # channels that one program of the box gradient adds


class _Weights(NamedTuple):
    """What `axis_weights` makes, and how many bins a tile has on a side."""

    image_of: Array
    extents: Array
    weights: Array
    block: int


def _grid(turns: int) -> tuple[int]:
    (turns,) = programs(turns)
    return (min(turns, MAX_PROGRAMS),)


def _axis_weights(
    call: Callable,
    maps: Sequence[Array | New],
    level: int,
    bins: tuple[int, int],
    rois: Rois,
    tangent: Array | None,
    scales: tuple[float, ...],
    rule: tuple[float, ...],
    tables: int,
) -> _Weights:
    images, _, *size = maps[level].shape
    count = rois.boxes.shape[0]
    room = sum(length * b for length, b in zip(size, bins, strict=True))
    block = max(LEAST_BINS, power(max(bins), 2**31))
    arrays, numbers, steps = rois_of(rois, tangent, level, maps)
    made = call(
        products.axis_weights,
        _grid(2 * count),
        (
            *(*arrays, *numbers, count, images, *size, *bins),
            *(*scales[2 * level :][:2], *steps),
        ),
        (
            New((count,), "int64"),
            New((count, 2, 3), "int32"),
            New((tables, count, room), "float32"),
        ),
        RULE=rule,
        TABLES=tables,
        LEVELS=rois.levels is not None,
        BLOCK_P=block,
        SIDE=max(1, LANES // block),
    )
    return _Weights(*made, min(block, MAX_BINS))


def forward(
    call: Callable,
    maps: Sequence[Array],
    rois: Rois,
    tangent: Array | None,
    scales: tuple[float, ...],
    rule: tuple[float, ...],
    output: Array | New,
) -> Array:
    """Writes ``output`` (K, C, P, Q)."""
    check_fit(maps, output, rois, tangent, scales, rule)
    if is_empty(maps, output):
        return output.zero_()
    count, channels, *bins = output.shape
    tables = 1 if tangent is None else 2
    for level, features in enumerate(maps):
        made = _axis_weights(call, maps, level, tuple(bins), rois, tangent, scales, rule, tables)
        (output,) = call(
            products.forward,
            _grid(count * channels),
            (
                *(features, made.image_of, made.extents, made.weights),
                *(count, channels, *features.shape[2:], *bins),
                *(*strides(features), *strides(output), before(output, features)),
            ),
            (output,),
            TABLES=tables,
            BLOCK_P=made.block,
            SIDE=SIDE,
        )
    return output


def adjoint(
    call: Callable,
    d_output: Array,
    rois: Rois,
    tangent: Array | None,
    scales: tuple[float, ...],
    rule: tuple[float, ...],
    d_features: Sequence[Array | New],
) -> list[Array]:
    """Writes each of ``d_features`` (N, C, H, W)."""
    check_fit(d_features, d_output, rois, tangent, scales, rule)
    if is_empty(d_features, d_output):
        return [d_map.zero_() for d_map in d_features]
    count, channels, *bins = d_output.shape
    tables = 1 if tangent is None else 2
    results = []
    for level, d_map in enumerate(d_features):
        images, _, *size = d_map.shape
        made = _axis_weights(
            call, d_features, level, tuple(bins), rois, tangent, scales, rule, tables
        )
        bits = touched(call, made.image_of, made.extents, d_map.shape, (SIDE, SIDE))
        tiles, words = bits.shape
        results += call(
            products.adjoint,
            _grid(tiles * channels),
            (
                *(d_output, made.extents, made.weights, bits),
                *(count, channels, images, *size, *bins, words),
                *(*strides(d_output), *strides(d_map)),
            ),
            (d_map,),
            TABLES=tables,
            BLOCK_P=made.block,
            SIDE=SIDE,
        )
    return results


def box_gradient(
    call: Callable,
    d_output: Array,
    maps: Sequence[Array],
    rois: Rois,
    scales: tuple[float, ...],
    rule: tuple[float, ...],
    d_boxes: Array | New,
) -> Array:
    """Writes ``d_boxes`` (K, 4), in C order and float32."""
    check_fit(maps, d_output, rois, None, scales, rule)
    if is_empty(maps, d_output):
        return d_boxes.zero_()
    count, channels, *bins = d_output.shape
    blocks = quotient(channels, BLOCK_C)
    for level, features in enumerate(maps):
        made = _axis_weights(call, maps, level, tuple(bins), rois, None, scales, rule, 3)
        (partial,) = call(
            products.box_gradient,
            _grid(count * blocks),
            (
                *(d_output, features, made.image_of, made.extents, made.weights),
                *(count, channels, *features.shape[2:], *bins),
                *(*strides(d_output), *strides(features)),
            ),
            (New((blocks, count, 4), "float32"),),
            BLOCK_C=BLOCK_C,
            BLOCK_P=made.block,
            SIDE=SIDE,
        )
        d_boxes = sum_blocks(call, partial, made.image_of, d_boxes, tl.float32)
    return d_boxes
