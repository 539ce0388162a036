"""Which kernels an operation runs, on which grids, with how much private memory.

The same for every framework: it gives a `call`, which launches one kernel::

    call(kernel, grid, inputs, outputs, **constants) -> the outputs

`inputs` are arrays and numbers. An output is an array to write, or a `New` one to make first; the
kernel takes them after the inputs. Nothing here reads a value, so nothing waits for the device.

`rois` are boxes, image index and levels (`roialign._rois.Rois`). Several maps are as many launches,
which write the same output, each its own rows: from the second on it is an array, and the last
input as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import triton.language as tl

from . import geometry, kernels

if TYPE_CHECKING:
    from roialign._rois import Rois

Array = Any

MAX_PROGRAMS = 2**31 - 1  # of one launch: CUDA's grids have no more on their first axis
TILE = (8, 16)  # pixels of a map, y and x, that one program of the adjoint writes: a lane each
WORDS = 8  # of a tile, that one program writes: with the bits of a word, 256 lanes
BOXES = 128  # whose sums one program adds: a lane each
ROIS_PER_WORD = kernels.ROIS_PER_WORD.value
FLOATS = ("float16", "bfloat16", "float32", "float64")
# coordinates are defined to the bit; sums say `fma` themselves
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


class New(NamedTuple):
    """An array to be made: in C order, without values."""

    shape: tuple[int, ...]
    dtype: str


def strides(array: Array | New) -> tuple[int, ...]:
    """In elements; an array that has none is in C order."""
    if hasattr(array, "stride"):
        return array.stride()
    shape = array.shape
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def dtype_of(array: Array | New) -> str:
    """Its name, without that of a framework."""
    return str(array.dtype).rpartition(".")[2]


def power(number: int, most: int) -> int:
    """The least power of two that is not below the number, or `most`."""
    return min(1 << max(number - 1, 0).bit_length(), most)


def quotient(number: int, by: int) -> int:
    """Rounded up."""
    return -(-number // by)


def programs(count: int) -> tuple[int]:
    if count > MAX_PROGRAMS:
        raise ValueError(f"a GPU takes at most {MAX_PROGRAMS} programs in a launch, got {count}")
    return (count,)


def before(output: Array | New, other: Array) -> Array:
    """The last input of launches that write in turn; with no output yet, another array."""
    return other if isinstance(output, New) else output


@dataclass(frozen=True)
class Job:
    """What an operation is given; `maps` or `pooled` (K, C, P, Q) may be its result.

    Raises where shapes or dtypes disagree: kernels trust them, and operators take any arrays.
    """

    call: Callable
    maps: Sequence[Array | New]
    pooled: Array | New
    rois: Rois
    tangent: Array | None
    scales: tuple[float, ...]
    rule: tuple[float, ...]

    def __post_init__(self) -> None:
        geometry.check(self.rule)
        maps, pooled, rois = self.maps, self.pooled, self.rois
        count, sides = tuple(pooled.shape[:1]), [side for each in maps for side in each.shape[2:]]
        vectors = [array for array in rois[1:] if array is not None]
        rows = [array for array in (rois.boxes, self.tangent) if array is not None]
        fits = (
            all(len(array.shape) == 4 for array in (*maps, pooled))
            and all(array.shape[0] == maps[0].shape[0] for array in maps)
            and all(array.shape[1] == pooled.shape[1] for array in maps)
            and all(tuple(array.shape) == count for array in vectors)
            and all(tuple(array.shape) == (*count, 4) for array in rows)
            and 0 < 2 * len(maps) == len(self.scales)
            and (len(maps) == 1 or rois.levels is not None)
            and not (0 in sides and count[0])
        )
        if not fits:
            raise ValueError("the maps, the RoIs and the pooled array do not fit")
        dtypes = {dtype_of(array) for array in (*maps, pooled)}
        if len(dtypes) > 1 or not dtypes.issubset(FLOATS):
            raise TypeError(f"maps and the pooled array must be of one float dtype, got {dtypes}")

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to add: no RoI, image, channel or bin."""
        return 0 in (self.maps[0].shape[0], *self.pooled.shape)

    @property
    def is_double(self) -> bool:
        return dtype_of(self.pooled) == "float64"

    @property
    def tables(self) -> int:
        """Of weights, where no slope is asked for."""
        return 1 if self.tangent is None else 2

    def taps(
        self, kernel: Any, grid: tuple[int], level: int, outputs: tuple, *spread: int, **constants
    ) -> list[Array]:
        """What a kernel makes for one of the maps. Any array stands for one that is none."""
        boxes, index, levels = self.rois
        levels = index if levels is None else levels
        images, _, *size = self.maps[level].shape
        count, _, *bins = self.pooled.shape
        inputs = (
            *(boxes, index, levels, boxes if self.tangent is None else self.tangent),
            *(level, len(self.maps), count, images, *size, *bins, *spread),
            *(*self.scales[2 * level :][:2], *strides(boxes), *strides(index), *strides(levels)),
        )
        constants |= {"RULE": self.rule, "LEVELS": self.rois.levels is not None}
        return self.call(kernel, grid, inputs, outputs, **constants)


class Taps(NamedTuple):
    """What `axis_taps` makes: docs in `kernels`."""

    image_of: Array
    ranges: Array
    extents: Array
    pixels: Array
    weights: Array
    room: int
    spread: tuple[int, int]


def axis_taps(job: Job, level: int, tables: int, *, columns: bool) -> Taps:
    """Of one of the maps, for weights in so many tables."""
    count, _, *bins = job.pooled.shape
    size, double = job.maps[level].shape[2:], job.is_double
    spread = tuple(
        geometry.spread_of(job.rule, n, b, double) for n, b in zip(size, bins, strict=True)
    )
    room = sum(length + s * b for length, s, b in zip(size, spread, bins, strict=True))
    block_p = power(max(bins), 64)
    block_k = max(1, 32 // block_p)
    ranges = New((count, sum(size if columns else bins), 2), "int32" if columns else "int64")
    unused = (1,)
    made = job.taps(
        kernels.axis_taps,
        programs(2 * quotient(count, block_k)),
        level,
        (
            New((count,), "int64"),
            ranges,
            New((count, 2, 3) if columns else unused, "int32"),
            New(unused if columns else (count, room), "int32"),
            New((tables, count, room), "float64" if double else "float32"),
        ),
        *spread,
        REAL=tl.float64 if double else tl.float32,
        TABLES=tables,
        COLUMNS=columns,
        BLOCK_K=block_k,
        BLOCK_P=block_p,
        **OPTIONS | {"num_warps": 1},
    )
    return Taps(*made, room, spread)


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
    steps = [strides(array) for array in arrays]
    innermost = channels > 1 and all(each[1] == 1 for each in steps)
    outer = [step for each in steps for axis, step in enumerate(each) if axis != 1]
    aligned = innermost and not any(number % 16 for number in (channels, *outer))
    # 8 sums in each of the 128 lanes of four warps: what no target spills, in any dtype
    block_c, block_b = (64, 16) if innermost else (16, 64)
    constants = {"INNERMOST": innermost, "ALIGNED": aligned}
    return _Blocks(power(channels, block_c), power(others, block_b // share), constants)


def touched(
    call: Callable, image_of: Array, extents: Array, map_shape: tuple, tile: tuple[int, int]
) -> Array:
    """Which RoIs reach each tile of a map (N, C, H, W): bits (tiles of all images, words)."""
    images, _, *size = map_shape
    count = image_of.shape[0]
    words = quotient(count, ROIS_PER_WORD)
    tiles = images * math.prod(map(quotient, size, tile))
    (bits,) = call(
        kernels.touched,
        programs(tiles * quotient(words, WORDS)),
        (image_of, extents, count, *size, words),
        (New((tiles, words), "int64"),),
        TILE_Y=tile[0],
        TILE_X=tile[1],
        BLOCK_W=WORDS,
        **OPTIONS,
    )
    return bits


def sum_blocks(
    call: Callable, partial: Array, image_of: Array, d_boxes: Array | New, real: tl.dtype
) -> Array:
    """Writes the RoIs of this map: their sums over blocks of channels, added up in `real`."""
    blocks, count, _ = partial.shape
    (d_boxes,) = call(
        kernels.sum_blocks,
        programs(quotient(count, BOXES)),
        (partial, image_of, count, blocks, before(d_boxes, partial)),
        (d_boxes,),
        REAL=real,
        BLOCK_K=BOXES,
        **OPTIONS,
    )
    return d_boxes


def forward(call, maps, rois, tangent, scales, rule, output) -> Array:
    """Writes ``output`` (K, C, P, Q)."""
    job = Job(call, maps, output, rois, tangent, scales, rule)
    if job.is_empty:
        return output.zero_()
    count, channels, *bins = output.shape
    for level, features in enumerate(maps):
        taps = axis_taps(job, level, job.tables, columns=False)
        block = _blocks((features, output), math.prod(bins), job.tables if job.is_double else 1)
        blocks = quotient(math.prod(bins), block.others) * quotient(channels, block.channels)
        (output,) = call(
            kernels.forward,
            programs(count * blocks),
            (
                *(features, taps.image_of, taps.ranges, taps.pixels, taps.weights),
                *(count, channels, *bins, taps.room, *strides(features), *strides(output)),
                before(output, features),
            ),
            (output,),
            TABLES=job.tables,
            **block.constants,
            BLOCK_C=block.channels,
            BLOCK_B=block.others,
            **OPTIONS,
        )
    return output


def adjoint(call, d_output, rois, tangent, scales, rule, d_features) -> list[Array]:
    """Writes each of ``d_features`` (N, C, H, W)."""
    job = Job(call, d_features, d_output, rois, tangent, scales, rule)
    if job.is_empty:
        return [d_map.zero_() for d_map in d_features]
    count, channels, *bins = d_output.shape
    block_c = power(channels, 16)
    results = []
    for level, d_map in enumerate(d_features):
        taps = axis_taps(job, level, job.tables, columns=True)
        bits = touched(call, taps.image_of, taps.extents, d_map.shape, TILE)
        tiles, words = bits.shape
        results += call(
            kernels.adjoint,
            programs(tiles * quotient(channels, block_c)),
            (
                *(d_output, taps.ranges, taps.extents, taps.weights, bits),
                *(count, channels, *d_map.shape[2:], *bins, *taps.spread, words),
                *(*strides(d_output), *strides(d_map)),
            ),
            (d_map,),
            TABLES=job.tables,
            **_blocks((d_output, d_map), 1).constants,
            BLOCK_C=block_c,
            TILE_Y=TILE[0],
            TILE_X=TILE[1],
            **OPTIONS,
        )
    return results


def box_gradient(call, d_output, maps, rois, scales, rule, d_boxes) -> Array:
    """Writes ``d_boxes`` (K, 4), in C order and of the coordinates' dtype."""
    job = Job(call, maps, d_output, rois, None, scales, rule)
    if job.is_empty:
        return d_boxes.zero_()
    count, channels, *bins = d_output.shape
    for level, features in enumerate(maps):
        taps = axis_taps(job, level, 3, columns=False)
        block = _blocks((d_output, features), math.prod(bins), 4 if job.is_double else 2)
        blocks = quotient(channels, block.channels)
        (partial,) = call(
            kernels.box_gradient,
            programs(count * blocks),
            (
                *(d_output, features, taps.image_of, taps.ranges, taps.pixels, taps.weights),
                *(count, channels, *bins, taps.room, *strides(d_output), *strides(features)),
            ),
            (New((blocks, count, 4), "float64" if job.is_double else "float32"),),
            **block.constants,
            BLOCK_C=block.channels,
            BLOCK_B=block.others,
            **OPTIONS,
        )
        d_boxes = sum_blocks(call, partial, taps.image_of, d_boxes, tl.float64)
    return d_boxes
