"""The operations as matrix products: the functions of `launch`, for float16, bfloat16 and float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import products
from .launch import Array, New, _numbers, _power, _programs, _quotient, _strides, _touched

MAX_PROGRAMS = 65535  # of a launch that takes turns: no more than an Ascend device takes
SIDE = 32  # of a tile of a map
LEAST_BINS, MAX_BINS = 16, 64  # on a side of a tile of bins
LANES = 512  # of a program that makes weights: bins times pixels
BLOCK_C = 16  # channels that one program of the box gradient adds


class _Weights(NamedTuple):
    """What `axis_weights` makes, and how many bins a tile has on a side."""

    image_of: Array
    extents: Array
    weights: Array
    block: int


def _grid(turns: int) -> tuple[int]:
    (turns,) = _programs(turns)
    return (min(turns, MAX_PROGRAMS),)


def _axis_weights(
    call: Callable,
    boxes: Array,
    image_index: Array,
    tangent: Array | None,
    map_shape: tuple[int, int, int],
    bins: tuple[int, int],
    rule: tuple,
    parts: int,
) -> _Weights:
    images, *size = map_shape
    count = boxes.shape[0]
    room = sum(length * b for length, b in zip(size, bins))
    block = max(LEAST_BINS, _power(max(bins), 2**31))
    arrays = call(
        products.axis_weights,
        _grid(2 * count),
        (
            boxes,
            image_index,
            boxes if tangent is None else tangent,
            *(count, images, *size, *bins, *_numbers(rule)),
            *(*_strides(boxes), *_strides(image_index)),
        ),
        (
            New((count,), "int64"),
            New((count, 2, 3), "int32"),
            New((parts, count, room), "float32"),
        ),
        PARTS=parts,
        FLOOR=bool(rule[-1]),
        BLOCK_P=block,
        SIDE=max(1, LANES // block),
    )
    return _Weights(*arrays, min(block, MAX_BINS))


def forward(
    call: Callable,
    features: Array,
    boxes: Array,
    image_index: Array,
    tangent: Array | None,
    rule: tuple,
    output: Array | New,
) -> Array:
    """Writes ``output`` (K, C, P, Q)."""
    count, channels, *bins = output.shape
    images, _, *size = features.shape
    parts = 1 if tangent is None else 2
    made = _axis_weights(
        call, boxes, image_index, tangent, (images, *size), tuple(bins), rule, parts
    )
    (output,) = call(
        products.forward,
        _grid(count * channels),
        (
            *(features, made.image_of, made.extents, made.weights),
            *(count, channels, *size, *bins, *_strides(features), *_strides(output)),
        ),
        (output,),
        PARTS=parts,
        BLOCK_P=made.block,
        SIDE=SIDE,
    )
    return output


def adjoint(
    call: Callable,
    d_output: Array,
    boxes: Array,
    image_index: Array,
    tangent: Array | None,
    rule: tuple,
    d_features: Array | New,
) -> Array:
    """Writes ``d_features`` (N, C, H, W)."""
    count, channels, *bins = d_output.shape
    images, _, *size = d_features.shape
    parts = 1 if tangent is None else 2
    made = _axis_weights(
        call, boxes, image_index, tangent, (images, *size), tuple(bins), rule, parts
    )
    bits = _touched(call, made.image_of, made.extents, (images, *size), (SIDE, SIDE))
    tiles, words = bits.shape
    (d_features,) = call(
        products.adjoint,
        _grid(tiles * channels),
        (
            *(d_output, made.extents, made.weights, bits),
            *(count, channels, images, *size, *bins, words),
            *(*_strides(d_output), *_strides(d_features)),
        ),
        (d_features,),
        PARTS=parts,
        BLOCK_P=made.block,
        SIDE=SIDE,
    )
    return d_features


def box_gradient(
    call: Callable,
    d_output: Array,
    features: Array,
    boxes: Array,
    image_index: Array,
    rule: tuple,
) -> Array:
    """Gives the partial sums (channel blocks, K, 4) of the gradient in the boxes."""
    count, channels, *bins = d_output.shape
    images, _, *size = features.shape
    made = _axis_weights(call, boxes, image_index, None, (images, *size), tuple(bins), rule, 3)
    blocks = _quotient(channels, BLOCK_C)
    (partial,) = call(
        products.box_gradient,
        _grid(count * blocks),
        (
            *(d_output, features, made.image_of, made.extents, made.weights),
            *(count, channels, *size, *bins, *_strides(d_output), *_strides(features)),
        ),
        (New((blocks, count, 4), "float32"),),
        BLOCK_C=BLOCK_C,
        BLOCK_P=made.block,
        SIDE=SIDE,
    )
    return partial
