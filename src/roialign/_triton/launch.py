"""Which kernels an operation runs, on which grids, with how much private memory.

The same for every framework: it gives a `call`, which launches one kernel::

    call(kernel, grid, inputs, outputs, **constants) -> the outputs

`inputs` are arrays and numbers. An output is an array to write, or a `New` one to make first; the kernel
takes them after the inputs. Nothing here reads a value, so nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import triton.language as tl

from . import kernels

Array = Any

MAX_PROGRAMS = 2**31 - 1  # of one launch
TILE = (8, 16)  # pixels of a map, y and x, that one program of the adjoint writes
WORDS = 8  # of a tile, that one program writes
ROIS_PER_WORD = kernels.ROIS_PER_WORD.value
OPTIONS = {
    "enable_fp_fusion": False
}  # coordinates are defined to the bit; sums say `fma` themselves


class New(NamedTuple):
    """An array to be made: in C order, without values."""

    shape: tuple[int, ...]
    dtype: str


class Taps(NamedTuple):
    """What `axis_taps` makes: docs in `kernels`."""

    image_of: Array
    ranges: Array
    extents: Array
    pixels: Array
    weights: Array
    room: int
    spread: tuple[int, int]


def _strides(array: Array) -> tuple[int, ...]:
    """In elements; an array that has none is in C order."""
    if hasattr(array, "stride"):
        return array.stride()
    shape = array.shape
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _is_double(array: Array) -> bool:
    return str(array.dtype).endswith("float64")


def _power(number: int, most: int) -> int:
    """The least power of two that is not below the number, or `most`."""
    return min(1 << max(number - 1, 0).bit_length(), most)


def _quotient(number: int, by: int) -> int:
    """Rounded up."""
    return -(-number // by)


def _programs(count: int) -> tuple[int]:
    if count > MAX_PROGRAMS:
        raise ValueError(f"a GPU takes at most {MAX_PROGRAMS} programs in a launch, got {count}")
    return (count,)


def _spread(size: int, bins: int, sampling_ratio: int, double: bool) -> int:
    """How many pixels consecutive bins may share, and one: 2, and what rounding moves positions.

    In float32 two ends of a box of B feature pixels are off by at most B / 2^23, and by 2^-22 of the
    map. A box has at most 2^22 samples a bin, or positions are float64: so an adaptive one, with a
    sample in every pixel, has B <= 2^22 bins, and in a fixed one bins stay apart where they have less
    than 2^22 samples together. In float64 that is nothing, short of 2^51 samples together.
    """
    if sampling_ratio * (bins + 1) > (2**51 if double else 2**22):
        return size
    moved = 0 if double else (size >> 20) + (bins // 2 if sampling_ratio <= 0 else 0)
    return min(size, 3 + moved)


def _numbers(rule: tuple) -> tuple[float, ...]:
    """Of the rule, from the samples on, as kernels take them: all but how adaptive sampling rounds."""
    scale_y, scale_x, sampling_ratio, *offsets, min_size, _ = rule
    real = scale_y, scale_x, *offsets, math.nan if min_size is None else min_size
    return (sampling_ratio, *map(float, real))


def _axis_taps(
    call: Callable,
    boxes: Array,
    image_index: Array,
    tangent: Array | None,
    map_shape: tuple[int, int, int],
    bins: tuple[int, int],
    rule: tuple,
    *,
    double: bool,
    parts: int,
    columns: bool,
) -> Taps:
    images, *size = map_shape
    count = boxes.shape[0]
    sampling_ratio, *_ = numbers = _numbers(rule)
    spread = tuple(_spread(length, b, sampling_ratio, double) for length, b in zip(size, bins))
    room = sum(length + s * b for length, s, b in zip(size, spread, bins))
    block_p = _power(max(bins), 64)
    block_k = max(1, 32 // block_p)
    ranges = New((count, sum(size if columns else bins), 2), "int32" if columns else "int64")
    unused = (1,)
    arrays = call(
        kernels.axis_taps,
        _programs(2 * _quotient(count, block_k)),
        (
            boxes,
            image_index,
            boxes if tangent is None else tangent,
            *(count, images, *size, *bins, *spread, *numbers),
            *(*_strides(boxes), *_strides(image_index)),
        ),
        (
            New((count,), "int64"),
            ranges,
            New((count, 2, 3) if columns else unused, "int32"),
            New(unused if columns else (count, room), "int32"),
            New((parts, count, room), "float64" if double else "float32"),
        ),
        REAL=tl.float64 if double else tl.float32,
        PARTS=parts,
        COLUMNS=columns,
        FLOOR=bool(rule[-1]),
        BLOCK_K=block_k,
        BLOCK_P=block_p,
        num_warps=1,
        **OPTIONS,
    )
    return Taps(*arrays, room, spread)


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
    taps = _axis_taps(
        call, boxes, image_index, tangent, (images, *size), tuple(bins), rule,
        double=_is_double(features), parts=parts, columns=False,
    )  # fmt: skip
    share = parts if _is_double(features) else 1
    block = _blocks((features, output), math.prod(bins), share)
    blocks = _quotient(math.prod(bins), block.others) * _quotient(channels, block.channels)
    (output,) = call(
        kernels.forward,
        _programs(count * blocks),
        (
            *(features, taps.image_of, taps.ranges, taps.pixels, taps.weights),
            *(count, channels, *bins, taps.room, *_strides(features), *_strides(output)),
        ),
        (output,),
        PARTS=parts,
        **block.constants,
        BLOCK_C=block.channels,
        BLOCK_B=block.others,
        num_warps=4,
        **OPTIONS,
    )
    return output


class _Blocks(NamedTuple):
    """The channels, and the bins or pixels, of one program, and what its compiler is to know."""

    channels: int
    others: int
    constants: dict[str, bool]


def _blocks(arrays: tuple[Array | New, ...], others: int, share: int = 1) -> _Blocks:
    """Lanes go along what is contiguous in memory: channels if they are so in all of the arrays.

    A kernel that holds many sums takes a share of what others take, so that registers suffice.
    """
    channels = arrays[0].shape[1]
    strides = [_strides(array) for array in arrays]
    innermost = channels > 1 and all(steps[1] == 1 for steps in strides)
    outer = [step for steps in strides for axis, step in enumerate(steps) if axis != 1]
    aligned = innermost and not any(number % 16 for number in (channels, *outer))
    block_c, block_b = (64, 16) if innermost else (16, 64)
    constants = {"INNERMOST": innermost, "ALIGNED": aligned}
    return _Blocks(_power(channels, block_c), _power(others, block_b // share), constants)


def _touched(
    call: Callable,
    image_of: Array,
    extents: Array,
    map_shape: tuple[int, int, int],
    tile: tuple[int, int],
) -> Array:
    """Which RoIs reach each tile: bits (tiles of all maps, words)."""
    images, *size = map_shape
    count = image_of.shape[0]
    words = _quotient(count, ROIS_PER_WORD)
    tiles = images * math.prod(_quotient(length, side) for length, side in zip(size, tile))
    (bits,) = call(
        kernels.touched,
        _programs(tiles * _quotient(words, WORDS)),
        (image_of, extents, count, *size, words),
        (New((tiles, words), "int64"),),
        TILE_Y=tile[0],
        TILE_X=tile[1],
        BLOCK_W=WORDS,
        num_warps=4,
        **OPTIONS,
    )
    return bits


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
    taps = _axis_taps(
        call, boxes, image_index, tangent, (images, *size), tuple(bins), rule,
        double=_is_double(d_output), parts=parts, columns=True,
    )  # fmt: skip
    bits = _touched(call, taps.image_of, taps.extents, (images, *size), TILE)
    tiles, words = bits.shape
    block_c = _power(channels, 16)
    (d_features,) = call(
        kernels.adjoint,
        _programs(tiles * _quotient(channels, block_c)),
        (
            *(d_output, taps.ranges, taps.extents, taps.weights, bits),
            *(count, channels, *size, *bins, *taps.spread, words),
            *(*_strides(d_output), *_strides(d_features)),
        ),
        (d_features,),
        PARTS=parts,
        **_blocks((d_output, d_features), 1).constants,
        BLOCK_C=block_c,
        TILE_Y=TILE[0],
        TILE_X=TILE[1],
        num_warps=4,
        **OPTIONS,
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
    taps = _axis_taps(
        call, boxes, image_index, None, (images, *size), tuple(bins), rule,
        double=_is_double(features), parts=3, columns=False,
    )  # fmt: skip
    share = 4 if _is_double(features) else 2
    block = _blocks((d_output, features), math.prod(bins), share)
    blocks = _quotient(channels, block.channels)
    (partial,) = call(
        kernels.box_gradient,
        _programs(count * blocks),
        (
            *(d_output, features, taps.image_of, taps.ranges, taps.pixels, taps.weights),
            *(count, channels, *bins, taps.room, *_strides(d_output), *_strides(features)),
        ),
        (New((blocks, count, 4), "float64" if _is_double(features) else "float32"),),
        **block.constants,
        BLOCK_C=block.channels,
        BLOCK_B=block.others,
        num_warps=4,
        **OPTIONS,
    )
    return partial
