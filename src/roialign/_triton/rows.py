"""Forward and box gradient by sorted rows of bins, the adjoint by rows of the map.

Lanes go along channels. Those are innermost in memory, or what is read is packed so. The forward is
two launches. `plan` makes what `gather` needs, each part in programs of its own. In one table of
int64, one after another:

- `entries`, a tap each, as ``weight << 32 | pixel`` with the bits of a float32. A bin of one or two
  samples on an axis has TAPS of them, 4. With TAPS 0, for any other sampling, they are packed from
  a slot on; those of x come in fours. Where a bin has fewer its last tap is repeated, with its
  weight in halves, quarters and so on: the sum is exact, and no load needs a mask or a pixel
  without weight. With SLOPES the same again, whose weights are slopes in the box's start, and in
  its end; there a tap has a weight or a slope.
- `image_of` (K,), as of `axis_taps`.
- `order`: the K * P rows of bins, as ``roi << 32 | p``, sorted by tile of the map, so that programs
  that run together read the same pixels. Nothing else depends on it. Rows on another map are -1, at
  the end.
- `rows` (K, P + Q, 2), with TAPS 0: the first slot of a bin, and how many it has.

And the map (N, C, H, W) as (N, H, W, C), `packed`, unless it is so in memory.

The box gradient is `plan`, `box_rows`, and `sum_blocks` of what that makes; before, `pack` of an
output gradient whose channels are not innermost.

The adjoint is three: `axis_taps` by columns; `columns`, which makes `bits` as `touched` does, of
tiles of one row, `d_output` (K, C, P, Q) as (K, P, Q, C) in `packed`, and

- `pairs` (K, H + W, 2), the first two bins of a pixel, as ``weight << 32 | bin``, or 0;
- `most` (K, 2), of how many bins a pixel has most;

and `scatter`, which adds.

Offsets within an image fit in 31 bits. Steps of the map are given in sixteenths: a product with 16
tells a compiler what a hint does not.
"""

import triton
import triton.language as tl

from .geometry import exponent, grid_of, inside, limit, position, shares, tap
from .kernels import (
    OTHER_MAP,
    ROIS_PER_WORD,
    divided,
    ends,
    image_on,
    index_at,
    kernel,
    place_of,
    reached_by,
    real,
    rounded,
    span_of,
    whole,
)

CLASSES = tl.constexpr(8)  # of bins by their area, with TAPS 0: they share a tile


@triton.jit
def narrow(number):
    """A size as int32, also where a caller has made it a constant."""
    return tl.full((), number, tl.int32)


@triton.jit
def parts_of(table, count, bins_y, bins_x, room, TAPS: tl.constexpr, SLOPES: tl.constexpr):
    """How many `entries` there are of one kind, and where `image_of`, `order` and `rows` begin.

    With TAPS 0, `room` is of a RoI.
    """
    length = count * ((bins_y + bins_x) * TAPS if TAPS > 0 else room)
    image_of = table + (3 * length if SLOPES else length)
    order = image_of + count
    return length, image_of, order, order + count * bins_y


@triton.jit
def entry_of(weight, pixel):
    bits = weight.to(tl.int32, bitcast=True).to(tl.int64)
    return bits << 32 | pixel.to(tl.int64)


@triton.jit
def image_at(image_index, levels, roi, known, images, map, maps, index_stride, levels_stride,
             LEVELS: tl.constexpr):  # fmt: skip
    image = index_at(image_index + roi * index_stride, known, images)
    if LEVELS:
        image = image_on(image, index_at(levels + roi * levels_stride, known, maps), map)
    return image


@triton.jit
def keep(entries, at, count, last, pixel, sums, mean, known):
    """Writes the entry before, if there is one; this one is now the last, if it has weight."""
    weight = (sums * mean).to(tl.float32)
    known = known & (tl.max((weight != 0).to(tl.int32), 1) > 0)
    tl.store(entries + (at + count - 1)[:, None], last, (known & (count > 0))[:, None])
    last = tl.where(known[:, None], entry_of(weight, pixel[:, None]), last)
    return count + known.to(tl.int32), last


@triton.jit
def next_sample(
    entries, at, count, last, pixel, value, after, p, take, size, mean, share, kind,
):  # fmt: skip
    """Adds a sample to the two pixels at hand; those that it leaves behind are kept.

    `value` and `after` [BLOCK, kinds] are their weight, and slopes: the sample's `share`.
    """
    lo, fraction, moves = tap(p, size)
    lo, fraction = lo.to(tl.int32), fraction[:, None]
    count, last = keep(entries, at, count, last, pixel, value, mean, take & (lo > pixel))
    count, last = keep(entries, at, count, last, pixel + 1, after, mean, take & (lo > pixel + 1))
    first, second = (lo == pixel)[:, None], (lo == pixel + 1)[:, None]
    before = tl.where(first, value, tl.where(second, after, 0))
    rest = tl.where(first, after, 0)
    slope = tl.where(moves[:, None], share, 0)
    value = tl.where(take[:, None], before + tl.where(kind == 0, 1 - fraction, -slope), value)
    after = tl.where(take[:, None], rest + tl.where(kind == 0, fraction, slope), after)
    return count, last, tl.where(take, lo, pixel), value, after


@triton.jit
def share_of(bin, samples, bins, k, j, clamped, kind):
    """How far a sample follows the start of its box, of kind 1, and its end."""
    in_lo, in_hi = shares(bin, samples, bins, k, j, clamped, tl.float64)
    return tl.where(kind == 1, in_lo[:, None], in_hi[:, None])


@triton.jit
def bin_taps(
    program, boxes, image_index, levels,
    map, maps, count, images, height, width, bins_y, bins_x, spread_y, spread_x, scale_y, scale_x,
    boxes_stride, boxes_step, index_stride, levels_stride,
    image_of, entries, length, rows,
    RULE: tl.constexpr, LEVELS: tl.constexpr, TAPS: tl.constexpr, SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A lane is a bin of an axis. Its sums are those of `axis_taps`, in the same order."""
    KINDS: tl.constexpr = 4 if SLOPES else 1  # of weights: three, the last of them twice
    kind = tl.minimum(tl.arange(0, KINDS), 2)[None, :]
    lane = program * BLOCK + tl.arange(0, BLOCK)
    b, roi = divided(lane, bins_y + bins_x)
    known = roi < count
    image = image_at(image_index, levels, roi, known, images, map, maps,
                     index_stride, levels_stride, LEVELS)  # fmt: skip
    tl.store(image_of + roi, image, known & (b == 0))
    of_x = b >= bins_y
    k, axis = tl.where(of_x, b - bins_y, b), of_x.to(tl.int64)
    bins, size = tl.where(of_x, bins_x, bins_y), tl.where(of_x, width, height)
    scale = tl.where(of_x, scale_x, scale_y)
    scale = scale.to(tl.float32)
    lo, hi, finite = ends(boxes + roi * boxes_stride, boxes_step, axis, known, tl.float32)
    start, bin, samples, clamped = grid_of(lo, hi, scale, bins, RULE)
    samples = tl.where(known & (image >= 0), samples, 0)
    mean = (1 / tl.maximum(samples, 1).to(tl.float64))[:, None]
    if SLOPES:
        slope_factor = tl.where(finite, scale.to(tl.float64), 0)[:, None]
        mean = tl.where(kind == 0, mean, mean * slope_factor)

    found = tl.zeros_like(start).to(tl.int32)
    value = tl.zeros((BLOCK, KINDS), tl.float64)
    last, pixel, after, share = value.to(tl.int64), found - 2, value, value
    to = entries + kind * length
    if TAPS > 0:
        sampling_ratio: tl.constexpr = int(tl.constexpr(RULE).value[0])
        at = lane.to(tl.int64) * TAPS
        for j in tl.static_range(sampling_ratio):
            p = position(start, bin, samples, k, tl.zeros_like(k) + j)
            take = (j < samples) & (p >= -1) & (p <= limit(start, samples, size, True))
            if SLOPES:
                share = share_of(bin, samples, bins, k, tl.zeros_like(k) + j, clamped, kind)
            found, last, pixel, value, after = next_sample(
                to, at, found, last, pixel, value, after, p, take, size, mean, share, kind
            )
    else:
        low, _ = span_of(start, bin, samples, k, bins, size)
        rank = tl.where(bin < 0, bins - 1 - k, k)
        x_slot = height + bins_y * spread_y
        spread = tl.where(of_x, spread_x, spread_y)
        at = roi * (x_slot + width + bins_x * spread_x) + axis * x_slot + low + spread * rank
        j, end = inside(start, bin, samples, k, size)
        for _ in range(tl.max(end - j)):
            p = position(start, bin, samples, k, j)
            if SLOPES:
                share = share_of(bin, samples, bins, k, j, clamped, kind)
            found, last, pixel, value, after = next_sample(
                to, at, found, last, pixel, value, after, p, j < end, size, mean, share, kind
            )
            j += 1
    found, last = keep(to, at, found, last, pixel, value, mean, known)
    found, last = keep(to, at, found, last, pixel + 1, after, mean, known)
    if TAPS > 0:
        extra = TAPS - found
    else:
        extra = tl.where(of_x, -found & 3, 0)
        tl.store(rows + lane * 2, at, known)
        tl.store(rows + lane * 2 + 1, found + tl.where(found > 0, extra, 0), known)
    weight = (last >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    pixel = (last & 0x7FFFFFFF).to(tl.int32)
    first = tl.maximum(found - 1, 0)
    extra = tl.where(found > 0, extra, extra - 1)
    part = weight
    for i in tl.static_range(TAPS if TAPS > 0 else 4):
        part = tl.where((i < extra)[:, None], part * 0.5, part)
        written = known & (i <= extra) & ((found > 0) | (TAPS > 0))
        tl.store(to + (at + first + i)[:, None], entry_of(part, pixel), written[:, None])


@triton.jit
def tile_of(position, size, TILE: tl.constexpr):
    """The tile of a pixel; of one that is not on the map any."""
    return tl.where((position >= 0) & (position < size), position, 0).to(tl.int32) // TILE


@triton.jit
def rows_above(tile, above, factor, bins, tiles, TILE: tl.constexpr):
    """How many rows of a RoI lie above a row of tiles: none of the first, all of one too many."""
    rows = ((tile * TILE).to(tl.float32) - above) * factor + 0.5
    rows = tl.minimum(tl.where(rows > 0, rows, 0), bins.to(tl.float32)).to(tl.int32)
    return tl.where(tile == 0, 0, tl.where(tile == tiles, bins, rows))


@triton.jit
def sorted_rows(
    tile, boxes, image_index, levels,
    map, maps, count, images, height, width, bins_y, bins_x, scale_y, scale_x,
    boxes_stride, boxes_step, index_stride, levels_stride,
    order,
    LEVELS: tl.constexpr, CLASSIFY: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows of one tile, behind those of all tiles before. After the last: of other maps.

    In float32, and for inverted boxes wrong: any place will do, if all programs find the same.
    """
    bins_y, height, width = bins_y.to(tl.int32), height.to(tl.int32), width.to(tl.int32)
    tiles_y, tiles_x = tl.cdiv(height, TILE_Y), tl.cdiv(width, TILE_X)
    if CLASSIFY:
        tiles_x *= CLASSES
    tile = tile.to(tl.int32)
    image_here, rest = tile // (tiles_y * tiles_x), tile % (tiles_y * tiles_x)
    y_here, x_here = rest // tiles_x, rest % tiles_x
    x_here = tl.where(y_here % 2 == 1, tiles_x - 1 - x_here, x_here)  # in snakes
    at = tl.zeros((), tl.int64)
    for writes in tl.static_range(2):
        before = tl.zeros((BLOCK,), tl.int32)
        for block in range(0, count, BLOCK):
            roi = block + tl.arange(0, BLOCK).to(tl.int64)
            known = roi < count
            image = image_at(image_index, levels, roi, known, images, map, maps,
                             index_stride, levels_stride, LEVELS).to(tl.int32)  # fmt: skip
            elsewhere = image == OTHER_MAP
            image = tl.where(elsewhere, images.to(tl.int32), tl.maximum(image, 0))
            y1, y2, _ = ends(boxes + roi * boxes_stride, boxes_step, 0, known, tl.float32)
            x1, x2, _ = ends(boxes + roi * boxes_stride, boxes_step, 1, known, tl.float32)
            y1, y2 = y1 * scale_y.to(tl.float32), y2 * scale_y.to(tl.float32)
            x1, x2 = x1 * scale_x.to(tl.float32), x2 * scale_x.to(tl.float32)
            factor = bins_y.to(tl.float32) / tl.maximum(y2 - y1, 1e-6)
            above = rows_above(y_here, y1, factor, bins_y, tiles_y, TILE_Y)
            through = rows_above(y_here + 1, y1, factor, bins_y, tiles_y, TILE_Y)
            x = tile_of((x1 + x2) * 0.5, width, TILE_X)
            if CLASSIFY:
                area = (x2 - x1) * (y2 - y1) / (bins_y * bins_x.to(tl.int32)).to(tl.float32)
                x = x * CLASSES + tl.minimum(tl.maximum(exponent(area), 0), CLASSES - 1)
            above, through = tl.where(elsewhere, 0, above), tl.where(elsewhere, bins_y, through)
            x = tl.where(elsewhere, 0, x)
            here = known & (image == image_here)
            if writes == 0:
                earlier = tl.where(y_here % 2 == 1, x > x_here, x < x_here)
                found = tl.where(here, above + tl.where(earlier, through - above, 0), 0)
                before += tl.where(known & (image < image_here), bins_y, found)
            else:
                rows = tl.where(here & (x == x_here), through - above, 0)
                to = order + at + tl.cumsum(rows, 0) - rows
                for row in range(tl.max(rows)):
                    unit = roi << 32 | (above + row).to(tl.int64)
                    tl.store(to + row, tl.where(elsewhere, -1, unit), row < rows)
                at += tl.sum(rows)
        if writes == 0:
            at += tl.sum(before)


@triton.jit
def packed_tile(
    program, source, channels, pixels, source_n, source_c, target,
    BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Some pixels and channels, (N, C, H * W) to (N, H * W, C)."""
    x_block, rest = divided(program, tl.cdiv(pixels, BLOCK_X))
    c_block, image = divided(rest, tl.cdiv(channels, BLOCK_C))
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)
    x = x_block * BLOCK_X + tl.arange(0, BLOCK_X)
    at = source + image * source_n + c[:, None] * source_c + x[None, :]
    value = tl.load(at, (c < channels)[:, None] & (x < pixels)[None, :], other=0)
    to = target + (image * pixels + x[:, None]) * channels + c[None, :]
    tl.store(to, tl.trans(value), (x < pixels)[:, None] & (c < channels)[None, :])


@kernel("map", "source_c")
def plan(
    boxes, image_index, levels, features,
    map, maps, count, images, height, width, bins_y, bins_x, spread_y, spread_x,
    scale_y: "fp64", scale_x: "fp64",  # noqa: F821
    boxes_stride, boxes_step, index_stride, levels_stride,
    sixteenths, source_n, source_c,
    table, packed,
    RULE: tl.constexpr, LEVELS: tl.constexpr, TAPS: tl.constexpr, SLOPES: tl.constexpr,
    PACK: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """All that `gather` and `box_rows` need, of one map; `sixteenths` are of its channels."""
    maps, count, images, height, width = (
        whole(maps), whole(count), whole(images), whole(height), whole(width)
    )  # fmt: skip
    bins_y, bins_x = whole(bins_y), whole(bins_x)
    scale_y, scale_x = real(scale_y), real(scale_x)
    spread_y, spread_x = whole(spread_y), whole(spread_x)
    room = height + bins_y * spread_y + width + bins_x * spread_x
    length, image_of, order, rows = parts_of(table, count, bins_y, bins_x, room, TAPS, SLOPES)
    tiles = images * tl.cdiv(height, TILE_Y) * tl.cdiv(width, TILE_X)
    if TAPS == 0:
        tiles *= CLASSES
    if LEVELS:
        tiles += 1
    of_taps = tl.cdiv(count * (bins_y + bins_x), BLOCK)
    program = tl.program_id(0).to(tl.int64)
    if program < of_taps:
        bin_taps(
            program, boxes, image_index, levels, map, maps, count, images, height, width,
            bins_y, bins_x, spread_y, spread_x, scale_y, scale_x,
            boxes_stride, boxes_step, index_stride, levels_stride, image_of, table, length, rows,
            RULE, LEVELS, TAPS, SLOPES, BLOCK,
        )  # fmt: skip
    elif program < of_taps + tiles:
        sorted_rows(
            program - of_taps, boxes, image_index, levels, map, maps, count, images, height, width,
            bins_y, bins_x, scale_y, scale_x, boxes_stride, boxes_step, index_stride,
            levels_stride, order, LEVELS, TAPS == 0, TILE_Y, TILE_X, BLOCK,
        )  # fmt: skip
    elif PACK:
        packed_tile(
            program - of_taps - tiles, features, whole(sixteenths) * 16, height * width,
            whole(source_n), whole(source_c), packed, BLOCK_C, BLOCK_X,
        )  # fmt: skip


@triton.jit
def entry_at(entries, at, known, step):
    """The offset of a pixel, and its weight."""
    both = tl.load(entries + at) if known is None else tl.load(entries + at, known, other=0)
    weight = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return (both & 0x7FFFFFFF).to(tl.int32) * step, weight


@triton.jit
def four(entries, at, known, step):
    """Those of four entries that follow each other."""
    x0, w0 = entry_at(entries, at, known, step)
    x1, w1 = entry_at(entries, at + 1, known, step)
    x2, w2 = entry_at(entries, at + 2, known, step)
    x3, w3 = entry_at(entries, at + 3, known, step)
    return x0, w0, x1, w1, x2, w2, x3, w3


@triton.jit
def bin_at(rows, bin):
    """The first slot of a bin, and how many it has."""
    return tl.load(rows + bin * 2).to(tl.int32), tl.load(rows + bin * 2 + 1).to(tl.int32)


@triton.jit
def widened(value):
    """As float32; bfloat16 by one instruction."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def plus_four(total, line, w, known, x0, w0, x1, w1, x2, w2, x3, w3):
    """total plus four pixels of a line, whose weights are the products with its own."""
    if known is None:
        v0, v1 = tl.load(line + x0), tl.load(line + x1)
        v2, v3 = tl.load(line + x2), tl.load(line + x3)
    else:
        v0, v1 = tl.load(line + x0, known, other=0), tl.load(line + x1, known, other=0)
        v2, v3 = tl.load(line + x2, known, other=0), tl.load(line + x3, known, other=0)
    total = tl.fma(w * w0, widened(v0), total)
    total = tl.fma(w * w1, widened(v1), total)
    total = tl.fma(w * w2, widened(v2), total)
    return tl.fma(w * w3, widened(v3), total)


@triton.jit
def row_at(order, place, units, LEVELS: tl.constexpr):
    """The RoI and the row of bins at a place, and whether there is one; if not, another."""
    unit = tl.load(order + tl.minimum(place, units - 1))
    exists = place < units
    if LEVELS:
        exists &= unit >= 0
        unit = tl.maximum(unit, 0)
    return (unit >> 32).to(tl.int32), unit.to(tl.int32), exists


@kernel("count", "output_q")
def gather(
    features, table,
    count, sixteenths, bins_y, bins_x, room, steps,
    features_n, features_h, features_w,
    output_k, output_c, output_p, output_q,
    before, output,
    TAPS: tl.constexpr, LEVELS: tl.constexpr, LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, ROWS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """docs/spec.md (4). One program: `steps` times ROWS rows of bins that follow in `order`.

    BLOCK_C divides the channels. Steps of `features` are sixteenths, and those of `output` if its
    channels are innermost (LAST).
    """
    step_h, step_w = narrow(features_h) * 16, narrow(features_w) * 16
    bins_y, bins_x = narrow(bins_y), narrow(bins_x)
    _, image_of, order, rows = parts_of(
        table, whole(count), bins_y, bins_x, whole(room), TAPS, False
    )
    units = narrow(count) * bins_y
    c_block, chunk = divided(tl.program_id(0), narrow(sixteenths) * 16 // BLOCK_C)
    c = c_block.to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    first = chunk.to(tl.int32) * (narrow(steps) * ROWS)
    lane = tl.arange(0, ROWS * BINS)[:, None]
    q = tl.minimum(lane % BINS, bins_x - 1)
    for step in range(steps):
        roi, p, exists = row_at(order, first + step * ROWS + lane // BINS, units, LEVELS)
        exists &= lane % BINS < bins_x
        of_y = roi * (bins_y + bins_x) + p
        of_x = roi * (bins_y + bins_x) + bins_y + q
        image = tl.maximum(tl.load(image_of + roi), 0)
        plane = features + image * (whole(features_n) * 16) + c
        total = tl.zeros((ROWS * BINS, BLOCK_C), tl.float32)
        if TAPS > 0:
            x0, w0, x1, w1, x2, w2, x3, w3 = four(table, of_x * TAPS, None, step_w)
            y0, v0, y1, v1, y2, v2, y3, v3 = four(table, of_y * TAPS, None, step_h)
            total = plus_four(total, plane + y0, v0, None, x0, w0, x1, w1, x2, w2, x3, w3)
            total = plus_four(total, plane + y1, v1, None, x0, w0, x1, w1, x2, w2, x3, w3)
            total = plus_four(total, plane + y2, v2, None, x0, w0, x1, w1, x2, w2, x3, w3)
            total = plus_four(total, plane + y3, v3, None, x0, w0, x1, w1, x2, w2, x3, w3)
            total = tl.where(v0 * w0 == 0, 0, total)  # without taps: its pixels were any
        else:
            at_y, taps_y = bin_at(rows, of_y)
            at_x, taps_x = bin_at(rows, of_x)
            most_y = tl.max(taps_y)
            for j in range(0, tl.max(taps_x), 4):
                x0, w0, x1, w1, x2, w2, x3, w3 = four(table, at_x + j, j < taps_x, step_w)
                ends_y = tl.where(j < taps_x, taps_y, 0)
                for i in range(most_y):
                    known = i < ends_y
                    y, w = entry_at(table, at_y + i, known, step_h)
                    total = plus_four(total, plane + y, w, known, x0, w0, x1, w1, x2, w2, x3, w3)
        at = roi.to(tl.int64) * whole(output_k)
        if LAST:
            at = output + at * 16 + (p * narrow(output_p) + q * narrow(output_q)) * 16 + c
        else:
            at = output + at + (p * narrow(output_p) + q * narrow(output_q)) + c * narrow(output_c)
        tl.store(at, rounded(total, output.dtype.element_ty), exists)


@triton.jit
def weighed(weights, products):
    """The sum over pairs of taps; a product that is not finite counts where there is weight."""
    return tl.sum(tl.where(weights != 0, weights * products, 0), 0)


@triton.jit
def of_rows(sums, ROWS: tl.constexpr):
    """Those of the bins of a row, added."""
    return tl.sum(tl.reshape(sums, (ROWS, sums.numel // ROWS)), 1)


@triton.jit
def sloped(table, at, known, step, length):
    """The offset of a pixel, its weight, and its slopes in the start and in the end of the box."""
    pixel, weight = entry_at(table, at, known, step)
    _, in_lo = entry_at(table + length, at, known, step)
    _, in_hi = entry_at(table + 2 * length, at, known, step)
    return pixel, weight, in_lo, in_hi


@kernel("sixteenths", "source_c")
def pack(
    source, sixteenths, pixels, source_n, source_c, packed,
    BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """An array with its channels innermost."""
    packed_tile(
        tl.program_id(0), source, whole(sixteenths) * 16, whole(pixels), whole(source_n),
        whole(source_c), packed, BLOCK_C, BLOCK_X,
    )  # fmt: skip


@kernel("count", "d_output_q")
def box_rows(
    d_output, features, table,
    count, sixteenths, bins_y, bins_x, room, steps,
    features_n, features_h, features_w,
    d_output_k, d_output_p, d_output_q,
    partial,
    TAPS: tl.constexpr, LEVELS: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """docs/spec.md (7). One program: CHANNELS, of `steps` times ROWS rows that follow in `order`.

    The product of each bin and each pixel is added over the channels first, and then with the
    weights and slopes of the box: x1, y1, x2, y2 of a row, in `partial` (blocks of channels and
    rows of bins, K, 4). Steps are sixteenths.
    """
    step_h, step_w = narrow(features_h) * 16, narrow(features_w) * 16
    bins_y, bins_x, count = narrow(bins_y), narrow(bins_x), narrow(count)
    length, image_of, order, rows = parts_of(
        table, whole(count), bins_y, bins_x, whole(room), TAPS, True
    )
    units = count * bins_y
    c_block, chunk = divided(tl.program_id(0), narrow(sixteenths) * 16 // CHANNELS)
    first = chunk.to(tl.int32) * (narrow(steps) * ROWS)
    first_c = c_block.to(tl.int32) * CHANNELS
    lane, pair = tl.arange(0, ROWS * BINS)[None, :], tl.arange(0, 16)[:, None]
    q = tl.minimum(lane % BINS, bins_x - 1)
    # a thread has four channels of any dtype, in both arrays: nothing waits for other warps
    lane_c = tl.max_contiguous(tl.arange(0, BLOCK_C)[None, None, :], [1, 1, 4])
    for step in range(steps):
        roi, p, exists = row_at(order, first + step * ROWS + lane // BINS, units, LEVELS)
        exists &= lane % BINS < bins_x
        of_y = roi * (bins_y + bins_x) + p
        of_x = roi * (bins_y + bins_x) + bins_y + q
        image = tl.maximum(tl.load(image_of + roi), 0)
        plane = features + image * (whole(features_n) * 16)
        bin = d_output + roi.to(tl.int64) * (whole(d_output_k) * 16)
        bin = (bin + (p * narrow(d_output_p) + q * narrow(d_output_q)) * 16)[:, :, None]
        if TAPS > 0:
            at_y, at_x = of_y * TAPS, of_x * TAPS
            taps_y, taps_x = tl.full((1, 1), TAPS, tl.int32), tl.full((1, 1), TAPS, tl.int32)
        else:
            at_y, taps_y = bin_at(rows, of_y)
            at_x, taps_x = bin_at(rows, of_x)
        x1 = tl.zeros((ROWS * BINS,), tl.float32)
        y1, x2, y2 = x1, x1, x1
        most_x = tl.max(taps_x)
        for i in range(0, tl.max(taps_y), 4):
            for j in range(0, most_x, 4):
                i_y, j_x = i + pair // 4, j + pair % 4
                known = exists & (i_y < taps_y) & (j_x < taps_x)
                y, w_y, lo_y, hi_y = sloped(table, at_y + i_y, known, step_h, length)
                x, w_x, lo_x, hi_x = sloped(table, at_x + j_x, known, step_w, length)
                pixel = (plane + (y + x))[:, :, None]
                products = tl.zeros((16, ROWS * BINS, BLOCK_C), tl.float32)
                for block in range(first_c, first_c + CHANNELS, BLOCK_C):
                    c = block + lane_c
                    g, value = tl.load(bin + c), tl.load(pixel + c)
                    products = tl.fma(widened(g), widened(value), products)
                product = tl.sum(products, 2)
                x1, y1 = x1 + weighed(w_y * lo_x, product), y1 + weighed(lo_y * w_x, product)
                x2, y2 = x2 + weighed(w_y * hi_x, product), y2 + weighed(hi_y * w_x, product)
        place = first + step * ROWS + tl.arange(0, ROWS)
        roi, p, exists = row_at(order, place, units, LEVELS)
        at = partial + ((c_block * bins_y + p) * whole(count) + roi) * 4
        tl.store(at, of_rows(x1, ROWS), exists)
        tl.store(at + 1, of_rows(y1, ROWS), exists)
        tl.store(at + 2, of_rows(x2, ROWS), exists)
        tl.store(at + 3, of_rows(y2, ROWS), exists)


@triton.jit
def pairs_of(
    program, ranges, extents, weights, height, width, bins_y, bins_x, spread_y, spread_x,
    pairs, most, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a RoI on an axis: the first two bins of each pixel, and the most that a pixel has."""
    axis, roi = divided(program, whole(2))
    x_slot = height + bins_y * spread_y
    room = x_slot + width + bins_x * spread_x
    of_x = axis == 1
    size, bins = tl.where(of_x, width, height), tl.where(of_x, bins_x, bins_y)
    spread = tl.where(of_x, spread_x, spread_y)
    first = roi * (height + width) + tl.where(of_x, height, 0)
    table = weights + roi * room + tl.where(of_x, x_slot, 0)
    low, high = tl.load(extents + program * 3), tl.load(extents + program * 3 + 1)
    backwards = tl.load(extents + program * 3 + 2) != 0
    widest = tl.zeros((), tl.int32)
    for block in range(low // BLOCK * BLOCK, high + 1, BLOCK):
        pixel = block + tl.arange(0, BLOCK)
        reached = (pixel >= low) & (pixel <= high)
        at = (first + pixel) * 2
        rank = tl.load(ranges + at, reached, other=0)
        last = tl.load(ranges + at + 1, reached, other=-1)
        widest = tl.maximum(widest, tl.max(last - rank + 1))
        for i in tl.static_range(2):
            weight = tl.load(table + pixel + spread * (rank + i), rank + i <= last, other=0)
            bin = tl.where(backwards, bins - 1 - rank - i, rank + i)
            entry = tl.where(weight != 0, entry_of(weight, bin), 0)
            tl.store(pairs + at + i, entry, pixel < size)
    tl.store(most + program, widest)


@kernel("count", "source_c")
def columns(
    image_of, ranges, extents, weights, d_output,
    count, height, width, bins_y, bins_x, spread_y, spread_x, words, sixteenths, source_k, source_c,
    bits, pairs, most, packed,
    PACK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """All that `scatter` needs besides what `axis_taps` makes; BLOCK is some tiles."""
    count, height, width, words = whole(count), whole(height), whole(width), whole(words)
    bins_y, bins_x = whole(bins_y), whole(bins_x)
    of_pairs, program = count * 2, tl.program_id(0).to(tl.int64)
    if program < of_pairs:
        pairs_of(
            program, ranges, extents, weights, height, width, bins_y, bins_x,
            whole(spread_y), whole(spread_x), pairs, most, BLOCK,
        )  # fmt: skip
    else:
        program -= of_pairs
        to_pack = tl.zeros((), tl.int64)
        channels, bins = whole(sixteenths) * 16, bins_y * bins_x
        if PACK:
            to_pack = count * tl.cdiv(channels, BLOCK_C) * tl.cdiv(bins, BLOCK_X)
        if program >= to_pack:
            reached_by(
                program - to_pack, image_of, extents, count, height, width, words, bits,
                1, TILE, BLOCK_W,
            )  # fmt: skip
        elif PACK:
            packed_tile(
                program, d_output, channels, bins, whole(source_k), whole(source_c), packed,
                BLOCK_C, BLOCK_X,
            )  # fmt: skip


@triton.jit
def plus_two(total, row, w, x0, w0, x1, w1):
    """total plus two bins of a row, where they have weight."""
    if w != 0:
        v0, v1 = tl.load(row + x0, w0 != 0, other=0), tl.load(row + x1, w1 != 0, other=0)
        total = tl.fma(w * w0, widened(v0), total)
        total = tl.fma(w * w1, widened(v1), total)
    return total


@kernel("sixteenths", "d_features_w")
def scatter(
    d_output, pairs, most, ranges, extents, weights, bits,
    sixteenths, height, width, bins_y, bins_x, spread_y, spread_x, words,
    d_output_k, d_output_p, d_output_q,
    d_features_n, d_features_c, d_features_h, d_features_w,
    d_features,
    LAST: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """docs/spec.md (5). One program: TILE pixels of a row of the map, BLOCK_C channels.

    It adds the RoIs that reach them, in their order, and their bins in the order of the axes. The
    bins of y are scalars, so what has no weight on the row is skipped. A RoI that has more than two
    bins on a pixel goes through its band. Steps of `d_output` are sixteenths, and those of
    `d_features` too if its channels are innermost (LAST); if not, its pixels are.
    """
    step_p, step_q = narrow(d_output_p) * 16, narrow(d_output_q) * 16
    height, width, words = narrow(height), narrow(width), whole(words)
    bins_y, bins_x = narrow(bins_y), narrow(bins_x)
    spread_y, spread_x = narrow(spread_y), narrow(spread_x)
    x_slot = height + bins_y * spread_y
    room = (x_slot + width + bins_x * spread_x).to(tl.int64)
    c_block, tile = divided(tl.program_id(0), narrow(sixteenths) * 16 // BLOCK_C)
    image, line, tile_x = place_of(tile, height, width, 1, TILE)
    line = line.to(tl.int32)
    x = tile_x.to(tl.int32) * TILE + tl.arange(0, TILE)[:, None]
    c = c_block.to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    at_y, at_x = line * 2, (height + tl.minimum(x, width - 1)) * 2
    # for sm_80: unrolled it spills in 16 bits, and else in float32
    UNROLL: tl.constexpr = 2 if d_output.dtype.element_ty == tl.float32 else 1
    total = tl.zeros((TILE, BLOCK_C), tl.float32)
    for word in range(words):
        rest = tl.load(bits + tile * words + word)
        while rest != 0:
            lowest = rest & -rest
            rest -= lowest
            roi = word * ROIS_PER_WORD + exponent(lowest)
            at = roi * (height + width) * 2
            of_pairs, of_ranges = pairs + at, ranges + at
            rows = d_output + roi * (whole(d_output_k) * 16)
            most_x = tl.load(most + roi * 2 + 1)
            if (tl.load(most + roi * 2) <= 2) & (most_x <= 2):
                y0, v0 = entry_at(of_pairs, at_y, None, step_p)
                y1, v1 = entry_at(of_pairs, at_y + 1, None, step_p)
                if (v0 != 0) | (v1 != 0):
                    x0, w0 = entry_at(of_pairs, at_x, None, step_q)
                    x1, w1 = entry_at(of_pairs, at_x + 1, None, step_q)
                    for i in tl.range(0, 2, loop_unroll_factor=UNROLL):
                        y, w = tl.where(i == 0, y0, y1), tl.where(i == 0, v0, v1)
                        total = plus_two(total, rows + y + c, w, x0, w0, x1, w1)
            else:
                extent = extents + roi * 6
                back_y, back_x = tl.load(extent + 2) != 0, tl.load(extent + 5) != 0
                in_x = (x >= tl.load(extent + 3)) & (x <= tl.load(extent + 4))
                rank_x = tl.load(of_ranges + at_x, in_x, other=0)
                last_x = tl.load(of_ranges + at_x + 1, in_x, other=-1)
                table = weights + roi * room
                for rank in range(tl.load(of_ranges + at_y), tl.load(of_ranges + at_y + 1) + 1):
                    w = tl.load(table + line + spread_y * rank)
                    if w != 0:
                        row = rows + tl.where(back_y, bins_y - 1 - rank, rank) * step_p
                        for j in range(most_x):
                            r = rank_x + j
                            v = tl.load(table + (x_slot + x + spread_x * r), r <= last_x, other=0)
                            q = tl.where(back_x, bins_x - 1 - r, r)
                            value = tl.load(row + (q * step_q + c), v != 0, other=0)
                            total = tl.fma(w * v, widened(value), total)
    at = image * whole(d_features_n)
    if LAST:
        at = (
            d_features + at * 16 + (line * narrow(d_features_h) + x * narrow(d_features_w)) * 16 + c
        )
    else:
        at = d_features + at + (line * narrow(d_features_h) + x) + c * narrow(d_features_c)
    tl.store(at, rounded(total, d_features.dtype.element_ty), x < width)
