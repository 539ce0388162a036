"""The functions of `roialign._triton.launch` as matrix products; there is no float64."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl

from roialign._triton.launch import (
    Array,
    Job,
    New,
    before,
    power,
    programs,
    quotient,
    strides,
    sum_blocks,
    touched,
)

from . import products

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


def _axis_weights(job: Job, level: int, tables: int) -> _Weights:
    """Of one of the maps, in so many tables."""
    count, _, *bins = job.pooled.shape
    room = sum(length * b for length, b in zip(job.maps[level].shape[2:], bins, strict=True))
    block = max(LEAST_BINS, power(max(bins), 2**31))
    made = job.taps(
        products.axis_weights,
        _grid(2 * count),
        level,
        (
            New((count,), "int64"),
            New((count, 2, 3), "int32"),
            New((tables, count, room), "float32"),
        ),
        TABLES=tables,
        BLOCK_P=block,
        SIDE=max(1, LANES // block),
    )
    return _Weights(*made, min(block, MAX_BINS))


def forward(call, maps, rois, tangent, scales, rule, output) -> Array:
    job = Job(call, maps, output, rois, tangent, scales, rule)
    if job.is_empty:
        return output.zero_()
    count, channels, *bins = output.shape
    for level, features in enumerate(maps):
        made = _axis_weights(job, level, job.tables)
        (output,) = call(
            products.forward,
            _grid(count * channels),
            (
                *(features, made.image_of, made.extents, made.weights),
                *(count, channels, *features.shape[2:], *bins),
                *(*strides(features), *strides(output), before(output, features)),
            ),
            (output,),
            TABLES=job.tables,
            BLOCK_P=made.block,
            SIDE=SIDE,
        )
    return output


def adjoint(call, d_output, rois, tangent, scales, rule, d_features) -> list[Array]:
    job = Job(call, d_features, d_output, rois, tangent, scales, rule)
    if job.is_empty:
        return [d_map.zero_() for d_map in d_features]
    count, channels, *bins = d_output.shape
    results = []
    for level, d_map in enumerate(d_features):
        images, _, *size = d_map.shape
        made = _axis_weights(job, level, job.tables)
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
            TABLES=job.tables,
            BLOCK_P=made.block,
            SIDE=SIDE,
        )
    return results


def box_gradient(call, d_output, maps, rois, scales, rule, d_boxes) -> Array:
    job = Job(call, maps, d_output, rois, None, scales, rule)
    if job.is_empty:
        return d_boxes.zero_()
    count, channels, *bins = d_output.shape
    blocks = quotient(channels, BLOCK_C)
    for level, features in enumerate(maps):
        made = _axis_weights(job, level, 3)
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
