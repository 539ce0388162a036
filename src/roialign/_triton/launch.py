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

from . import geometry, kernels, rows

if TYPE_CHECKING:
    from roialign._rois import Rois

Array = Any

MAX_PROGRAMS = 2**31 - 1  # of one launch: CUDA's grids have no more on their first axis
TILE = (8, 16)  # pixels of a map, y and x, that one program of the adjoint writes: a lane each
WORDS = 8  # of a tile, that one program writes: with the bits of a word, 256 lanes
BOXES = 128  # whose sums one program adds: a lane each
# the forward by sorted rows, `rows`
FEW = 4  # taps of a bin on an axis, of one or two samples
LANES = 128, 64  # of a step: bins, each with a block of channels; of few taps in float32, others
SORTED = (8, 8), (16, 16)  # pixels of a tile by which rows are sorted: of few taps, others
SLOPED = 16  # bins of a step, for the box gradient
SHARES = 128, 512  # channels of one of its programs at most: of few taps, others
STEPS, ENOUGH = 8, 400  # of a program at most; programs that keep a GPU busy
MOST_PLACES = 2**24  # RoIs times tiles: each tile's program looks at each RoI
# the adjoint by rows of the map
TILE_OF_ROW = 8  # pixels of a row that one program writes
MOST_BITS = 2**27  # RoIs times tiles: a bit each
PACKED = (32, 128)  # channels and pixels that one program packs
ROIS_PER_WORD = kernels.ROIS_PER_WORD.value
TURN = 7  # in the vector of csrc/rule.hpp: not 0 where boxes have an angle
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
        numbers = 5 if any(self.rule[TURN:]) else 4  # of a box
        fits = (
            all(len(array.shape) == 4 for array in (*maps, pooled))
            and all(array.shape[0] == maps[0].shape[0] for array in maps)
            and all(array.shape[1] == pooled.shape[1] for array in maps)
            and all(tuple(array.shape) == count for array in vectors)
            and all(tuple(array.shape) == (*count, numbers) for array in rows)
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
    def has_few_taps(self) -> bool:
        return 1 <= self.rule[0] <= 2

    @property
    def tables(self) -> int:
        """Of weights, where no slope is asked for."""
        return 1 if self.tangent is None else 2

    def taps(
        self, kernel: Any, grid: tuple[int], level: int, outputs: tuple, *spread: int, **constants
    ) -> list[Array]:
        """What a kernel makes for one of the maps."""
        boxes = self.rois.boxes
        inputs = *self.arrays, boxes if self.tangent is None else self.tangent
        inputs += self.numbers(level, *spread)
        constants |= {"RULE": self.rule, "LEVELS": self.rois.levels is not None}
        return self.call(kernel, grid, inputs, outputs, **constants)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Boxes, index, levels; any array stands for one that is none."""
        boxes, index, levels = self.rois
        return boxes, index, index if levels is None else levels

    def numbers(self, level: int, *spread: int) -> tuple[float, ...]:
        """What kernels that read boxes are told of one of the maps, from `map` on."""
        boxes, index, levels = self.arrays
        images, _, *size = self.maps[level].shape
        count, _, *bins = self.pooled.shape
        return (
            *(level, len(self.maps), count, images, *size, *bins, *spread),
            *(*self.scales[2 * level :][:2], *strides(boxes), *strides(index), *strides(levels)),
        )

    def spread(self, level: int) -> list[int]:
        """Of the bins of y and of x."""
        sides = zip(self.maps[level].shape[2:], self.pooled.shape[2:], strict=True)
        return [geometry.spread_of(self.rule, *side, self.is_double) for side in sides]


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
    spread = job.spread(level)
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
    return Taps(*made, room, tuple(spread))


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
    call: Callable, partial: Array, image_of: Array, d_boxes: Array | New, real: tl.dtype,
    first: int = 0,
) -> Array:  # fmt: skip
    """Writes the RoIs of this map: their sums over blocks, added up in `real`.

    `image_of` is an array from the element `first` on.
    """
    blocks, count, _ = partial.shape
    (d_boxes,) = call(
        kernels.sum_blocks,
        programs(quotient(count, BOXES)),
        (partial, image_of, first, count, blocks, before(d_boxes, partial)),
        (d_boxes,),
        REAL=real,
        BLOCK_K=BOXES,
        **OPTIONS,
    )
    return d_boxes


def has_sixteens(steps: Sequence[int]) -> bool:
    """Whether channels are innermost in memory, and all else is multiples of 16 apart."""
    n, c, h, w = steps
    return c == 1 and not any(step % 16 for step in (n, h, w))


def reach(array: Array) -> int:
    """How far offsets go in one image or RoI."""
    return sum(s * side for s, side in zip(strides(array)[1:], array.shape[1:], strict=True))


def by_rows(job: Job, features: Array) -> bool:
    """Whether the forward from this map goes by sorted rows of bins; the shapes alone say so.

    It takes channels in sixteens, and float32 sums of values. It packs a map only where the RoIs
    have about as many samples as the map has pixels: then its pixels are read again and again.
    """
    images, channels, height, width = features.shape
    count, _, *bins = job.pooled.shape
    n, c, h, w = strides(features)
    of_output = strides(job.pooled)
    if c == 1:
        fits = not any(step % 16 for step in (n, h, w))
    else:
        fits = (h, w) == (width, 1) and 4 * count * math.prod(bins) >= images * height * width
    if of_output[1] == 1:
        fits = fits and not any(step % 16 for step in (of_output[0], *of_output[2:]))
    tile_y, tile_x = SORTED[not job.has_few_taps]
    places = count * images * quotient(height, tile_y) * quotient(width, tile_x)
    return (
        fits
        and not (channels % 16 or job.is_double)
        and job.tangent is None
        and bins[1] <= min(LANES)
        and places <= MOST_PLACES
        # kernels count these in 31 bits
        and max(channels * height * width, h * height, reach(job.pooled), 16 * count * sum(bins))
        < 2**31
    )


class Plan(NamedTuple):
    """What `rows.plan` makes of a map, and what its kernels are told of that."""

    packed: Array
    table: Array
    room: int
    steps: tuple[int, int, int]  # of images, rows and pixels, in sixteenths
    constants: dict[str, Any]


def _plan(job: Job, level: int, *, slopes: bool) -> Plan:
    features = job.maps[level]
    images, channels, *size = features.shape
    count, _, *bins = job.pooled.shape
    many = not job.has_few_taps
    spread = [number + 3 for number in job.spread(level)]  # entries of x come in fours
    room = sum(side + s * b for side, s, b in zip(size, spread, bins, strict=True))
    room, rest = (room, 2 * sum(bins)) if many else (sum(bins) * FEW, 0)
    n, c, h, w = strides(features)
    pack, levels = c != 1, job.rois.levels is not None
    tile, pixels = SORTED[many], math.prod(size)
    tiles = images * math.prod(map(quotient, size, tile)) * (rows.CLASSES.value if many else 1)
    grid = quotient(count * sum(bins), 128) + tiles + levels
    grid += images * quotient(channels, PACKED[0]) * quotient(pixels, PACKED[1]) if pack else 0
    packed = New((images, *size, channels), dtype_of(features)) if pack else features
    constants = {"TAPS": 0 if many else FEW, "LEVELS": levels}
    table, packed = job.call(
        rows.plan,
        programs(grid),
        (*job.arrays, features, *job.numbers(level, *spread), channels // 16, n, c),
        (New((count * ((3 if slopes else 1) * room + 1 + bins[0] + rest),), "int64"), packed),
        RULE=job.rule,
        SLOPES=slopes,
        PACK=pack,
        TILE_Y=tile[0],
        TILE_X=tile[1],
        BLOCK=128,
        BLOCK_C=PACKED[0],
        BLOCK_X=PACKED[1],
        **constants,
        **OPTIONS,
    )
    if pack:
        n, h, w = pixels * channels, size[1] * channels, channels
    return Plan(packed, table, room, (n // 16, h // 16, w // 16), constants)


def _cut(job: Job, lanes: int, share: int) -> tuple[int, int, int, int]:
    """Of a kernel that takes so many lanes of bins at once, and a share of the channels.

    How many programs; how often each takes rows, how many, and how long they are.
    """
    count, channels, *bins = job.pooled.shape
    row = power(bins[1], lanes)
    parts = channels // share
    turns = max(1, min(STEPS, quotient(count * bins[0], lanes // row) * parts // ENOUGH))
    return quotient(count * bins[0], lanes // row * turns) * parts, turns, lanes // row, row


def _gather(job: Job, level: int, output: Array | New) -> Array:
    """The forward from one of the maps, by sorted rows of bins."""
    plan, (count, channels, *bins) = _plan(job, level, slopes=False), output.shape
    short = job.has_few_taps and dtype_of(output) != "float32"
    lanes = LANES[short or not job.has_few_taps]
    block_c = math.gcd(channels, 64 if short else 32)
    grid, turns, height, width = _cut(job, lanes, block_c)
    steps = strides(output)
    last = steps[1] == 1
    (output,) = job.call(
        rows.gather,
        programs(grid),
        (
            *(plan.packed, plan.table, count, channels // 16, *bins, plan.room, turns),
            *(*plan.steps, *(step // 16 if last and step != 1 else step for step in steps)),
            before(output, plan.packed),
        ),
        (output,),
        **plan.constants,
        LAST=last,
        BLOCK_C=block_c,
        ROWS=height,
        BINS=width,
        **OPTIONS | {"num_warps": lanes // 16},
    )
    return output


def _innermost(job: Job) -> Array:
    """The pooled array with its channels innermost: itself, or a copy."""
    pooled = job.pooled
    count, channels, *bins = pooled.shape
    k, c, *_ = strides(pooled)
    if c == 1:
        return pooled
    block_x = power(math.prod(bins), PACKED[1])
    tiles = quotient(channels, PACKED[0]) * quotient(math.prod(bins), block_x)
    (packed,) = job.call(
        rows.pack,
        programs(count * tiles),
        (pooled, channels // 16, math.prod(bins), k, c),
        (New((count, *bins, channels), dtype_of(pooled)),),
        BLOCK_C=PACKED[0],
        BLOCK_X=block_x,
        **OPTIONS,
    )
    return packed


def by_box_rows(job: Job, features: Array) -> bool:
    """Whether the box gradient from this map goes by sorted rows of bins, as `by_rows`.

    But a row fits in a step, and 16 bits have few taps: with more, sm_100 spills.
    """
    fits = job.pooled.shape[3] <= SLOPED and can_pack(job.pooled)
    short = dtype_of(features) != "float32"
    return fits and by_rows(job, features) and not (short and not job.has_few_taps)


def _box_rows(job: Job, level: int, d_output: Array, d_boxes: Array | New) -> Array:
    """The box gradient from one of the maps, by sorted rows of bins of `d_output` (K, P, Q, C)."""
    plan, (count, channels, *bins) = _plan(job, level, slopes=True), job.pooled.shape
    k, c, p, q = strides(d_output)
    if d_output is not job.pooled:  # a copy
        k, p, q = k, c, p
    share = math.gcd(channels, SHARES[not job.has_few_taps])
    grid, turns, height, width = _cut(job, SLOPED, share)
    (partial,) = job.call(
        rows.box_rows,
        programs(grid),
        (
            *(d_output, plan.packed, plan.table, count, channels // 16, *bins, plan.room, turns),
            *(*plan.steps, k // 16, p // 16, q // 16),
        ),
        (New((channels // share * bins[0], count, 4), "float32"),),
        **plan.constants,
        CHANNELS=share,
        BLOCK_C=math.gcd(channels, 32),
        ROWS=height,
        BINS=width,
        **OPTIONS,
    )
    image_of = 3 * count * plan.room
    return sum_blocks(job.call, partial, plan.table, d_boxes, tl.float64, image_of)


def can_pack(array: Array) -> bool:
    """Whether it has channels in sixteens and innermost, or can be packed so."""
    steps = strides(array)
    return has_sixteens(steps) or steps[2:] == (array.shape[3], 1)


def by_map_rows(job: Job, level: int) -> bool:
    """Whether the adjoint to this map goes by its rows; the shapes alone say so."""
    d_map = job.maps[level]
    images, channels, height, width = d_map.shape
    count, _, *bins = job.pooled.shape
    places = count * images * height * quotient(width, TILE_OF_ROW)
    spread = job.spread(level)
    room = height + width + sum(s * b for s, b in zip(spread, bins, strict=True))
    return (
        can_pack(d_map)
        and can_pack(job.pooled)
        and not (channels % 16 or job.is_double)
        and job.tangent is None
        and places <= MOST_BITS
        # kernels count these in 31 bits
        and max(room, reach(d_map), reach(job.pooled), channels * math.prod(bins)) < 2**31
    )


def _scatter(job: Job, level: int) -> Array:
    """The adjoint to one of the maps, by its rows."""
    d_output, d_map = job.pooled, job.maps[level]
    images, channels, *size = d_map.shape
    count, _, *bins = d_output.shape
    taps = axis_taps(job, level, 1, columns=True)
    words = quotient(count, ROIS_PER_WORD)
    tiles = images * size[0] * quotient(size[1], TILE_OF_ROW)
    k, c, p, q = strides(d_output)
    pack, last = not has_sixteens((k, c, p, q)), has_sixteens(strides(d_map))
    block_x = power(math.prod(bins), PACKED[1])
    grid = tiles * quotient(words, WORDS) + 2 * count
    if pack:
        grid += count * quotient(channels, PACKED[0]) * quotient(math.prod(bins), block_x)
    bits, pairs, most, packed = job.call(
        rows.columns,
        programs(grid),
        (
            *(taps.image_of, taps.ranges, taps.extents, taps.weights, d_output),
            *(count, *size, *bins, *taps.spread, words, channels // 16, k, c),
        ),
        (
            New((tiles, words), "int64"),
            New((count, sum(size), 2), "int64"),
            New((count, 2), "int32"),
            New((count, *bins, channels) if pack else (1,), dtype_of(d_output)),
        ),
        PACK=pack,
        TILE=TILE_OF_ROW,
        BLOCK=128,
        BLOCK_W=WORDS,
        BLOCK_C=PACKED[0],
        BLOCK_X=block_x,
        **OPTIONS,
    )
    if pack:
        k, p, q = math.prod(bins) * channels, bins[1] * channels, channels
    steps = [step // 16 if last and step != 1 else step for step in strides(d_map)]
    block_c = math.gcd(channels, 256)
    (d_map,) = job.call(
        rows.scatter,
        programs(tiles * (channels // block_c)),
        (
            *(packed if pack else d_output, pairs, most),
            *(taps.ranges, taps.extents, taps.weights, bits),
            *(channels // 16, *size, *bins, *taps.spread, words, k // 16, p // 16, q // 16, *steps),
        ),
        (d_map,),
        LAST=last,
        TILE=TILE_OF_ROW,
        BLOCK_C=block_c,
        **OPTIONS | {"num_warps": max(1, block_c // 128)},
    )
    return d_map


def forward(call, maps, rois, tangent, scales, rule, output) -> Array:
    """Writes ``output`` (K, C, P, Q)."""
    job = Job(call, maps, output, rois, tangent, scales, rule)
    if job.is_empty:
        return output.zero_()
    count, channels, *bins = output.shape
    for level, features in enumerate(maps):
        if by_rows(job, features):
            output = _gather(job, level, output)
            continue
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
        if by_map_rows(job, level):
            results.append(_scatter(job, level))
            continue
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
    innermost = None
    for level, features in enumerate(maps):
        if by_box_rows(job, features):
            innermost = _innermost(job) if innermost is None else innermost
            d_boxes = _box_rows(job, level, innermost, d_boxes)
            continue
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
