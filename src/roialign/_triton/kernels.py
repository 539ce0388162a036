"""The kernels: the taps of a call, and the three operations that add over them.

*Taps* are the matrices A of docs/spec.md (3), y and x of each RoI, in a *table* of `room` slots per
RoI: those of y, from `x_slot` on those of x. A matrix is a band, because positions ascend with the
bins: entry (bin, pixel) is in slot ``pixel + spread * rank``, where `rank` counts the bins along
the axis and `spread` is more than consecutive bins share. So bins and pixels find their entries
without a search, and a table is as long as the map's sides and the bins.

- By *rows*, for a sum over pixels: the entries of a bin that count, packed from its first slot on,
  their pixels beside them; `rows` (K, P + Q, 2) says the first slot and how many.
- By *columns*, for a sum over bins: all slots of the band; `columns` (K, H + W, 2) says the first
  and the last rank that reach a pixel, `extents` (K, 2, 3) the first and the last pixel that are
  reached, and whether ranks count the bins backwards.

The weights of an entry are in one to three tables, one after another: value; or value and
derivative along a box tangent; or value and slopes in the box's start and end.

A launch is for one map. A RoI of no image, or on no map or another one, has no taps (`image_of`).
No size and no stride is specialised: INNERMOST and ALIGNED say what a compiler is to know of
strides.

What the launches of several maps write in turn is also their last input, `before`, and not read: a
framework whose arrays are made once gives the memory of an input to an output.
"""

import inspect
from collections.abc import Callable

import triton
import triton.language as tl

from .geometry import exponent, grid_of, inside, limit, position, shares, tap

ROIS_PER_WORD = tl.constexpr(32)  # the low half of an int64: no sign
NO_IMAGE = tl.constexpr(-1)  # of a RoI that is on no map, or on this one with a bad image index
OTHER_MAP = tl.constexpr(-2)  # of a RoI whose results another launch writes


def kernel(first: str, last: str, but: str = "") -> Callable:
    """Compiles a kernel of whose numbers, parameters from `first` to `last`, none is specialised.

    `but`: one that is.
    """

    def compiled(function: Callable) -> triton.JITFunction:
        names = list(inspect.signature(function).parameters)
        numbers = names[names.index(first) : names.index(last) + 1]
        return triton.jit(do_not_specialize=[n for n in numbers if n != but])(function)

    return compiled


@triton.jit
def whole(number):
    """A size as int64, also where a caller has made it a constant."""
    return tl.full((), number, tl.int64)


INTERPRETED = tl.constexpr(not isinstance(whole, triton.JITFunction))


@triton.jit
def real(number):
    return tl.full((), number, tl.float64)


@triton.jit
def stride(number, INNERMOST: tl.constexpr, ALIGNED: tl.constexpr):
    """An axis's step in elements, 1 or a multiple of 16 where a compiler is to know it."""
    if INNERMOST:
        return tl.full((), 1, tl.int64)
    if ALIGNED:
        return tl.multiple_of(whole(number), 16)
    return whole(number)


@triton.jit
def steps(n, c, h, w, INNERMOST: tl.constexpr, ALIGNED: tl.constexpr):
    """The steps of an array's four axes, the second of which may be its innermost."""
    n, c = stride(n, False, ALIGNED), stride(c, INNERMOST, False)
    return n, c, stride(h, False, ALIGNED), stride(w, False, ALIGNED)


@triton.jit
def divided(number, by):
    """Remainder and quotient of what fits in 31 bits: division of 64 is slow."""
    number, by = number.to(tl.int32), by.to(tl.int32)
    quotient = number // by
    return (number - quotient * by).to(tl.int64), quotient.to(tl.int64)


@triton.jit
def place_of(tile, height, width, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """The image of a tile, and which of the image's it is in y and in x."""
    tile_x, rest = divided(tile, tl.cdiv(width, TILE_X))
    tile_y, image = divided(rest, tl.cdiv(height, TILE_Y))
    return image, tile_y, tile_x


@triton.jit
def rounded(sums, dtype: tl.constexpr):
    """To the nearest, ties to even: Triton's interpreter would cut float32 to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = sums.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(sums == sums, bits, 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return sums.to(dtype)


@triton.jit
def plus(total, weight, value):
    """total + weight * value, where the value may not be finite if the weight is 0."""
    return tl.where(weight != 0, tl.fma(weight, value, total), total)


@triton.jit
def coordinate(pointer, known, REAL: tl.constexpr):
    """A number of any dtype as REAL; from bfloat16 by the one way that the interpreter has too."""
    number = tl.load(pointer) if known is None else tl.load(pointer, known, other=0)
    if number.dtype == tl.bfloat16:
        number = number.to(tl.float32)
    return number.to(REAL)


@triton.jit
def ends(box, step, axis, known, REAL: tl.constexpr):
    """A box's start and end on an axis, and whether those of both axes are finite."""
    lo = coordinate(box + (1 - axis) * step, known, REAL)
    hi = coordinate(box + (3 - axis) * step, known, REAL)
    other_lo = coordinate(box + axis * step, known, REAL)
    other_hi = coordinate(box + (2 + axis) * step, known, REAL)
    # a difference of a number and itself is 0 unless it is not finite
    finite = (lo - lo == 0) & (hi - hi == 0)
    return lo, hi, finite & (other_lo - other_lo == 0) & (other_hi - other_hi == 0)


@triton.jit
def index_of(number, end):
    """The index in [0, end) that a number of any dtype is, or -1."""
    if number.dtype.is_floating():
        valid = (number >= 0) & (number < end) & (number == tl.floor(number))
        index = tl.where(valid, number, 0).to(tl.int64)
    else:
        index = number.to(tl.int64)
        valid = (index >= 0) & (index < end)
    return tl.where(valid, index, -1)


@triton.jit
def index_at(pointer, known, end):
    if pointer.dtype.element_ty.is_floating():
        return index_of(coordinate(pointer, known, tl.float64), end)
    else:
        return index_of(tl.load(pointer, known, other=-1), end)


@triton.jit
def image_on(image, level, map):
    """The image of a RoI on a level as a map sees it; the first map has those on no map."""
    elsewhere = tl.where((level < 0) & (map == 0), NO_IMAGE, OTHER_MAP)
    return tl.where(level == map, image, elsewhere)


@triton.jit
def span_of(start, bin, samples, k, bins, size):
    """The pixels [low, high] from the first sample of bin k to its last; high < low off the map.

    They ascend with the bins, as p(k, i) does for each i; those of the samples inside need not.
    """
    first = tl.zeros_like(samples + k)
    last = limit(start, samples, size, True)
    p_low = position(start, bin, samples, k, first)
    p_high = position(start, bin, samples, k, first + samples - 1)
    meets = (k >= 0) & (k < bins) & (samples > 0) & (p_high >= -1) & (p_low <= last)
    low, _, _ = tap(p_low, size)
    high, _, _ = tap(tl.minimum(p_high, last), size)
    return tl.where(meets, low, 0), tl.where(meets, tl.minimum(high + 1, size - 1), -1)


@kernel("map", "levels_stride")
def axis_taps(
    boxes, image_index, levels, tangent,
    map, maps, count, images, height, width, bins_y, bins_x, spread_y, spread_x,
    scale_y: "fp64", scale_x: "fp64",  # noqa: F821
    boxes_stride, boxes_step, index_stride, levels_stride,
    image_of, ranges, extents, pixels, weights,
    RULE: tl.constexpr, REAL: tl.constexpr, TABLES: tl.constexpr, LEVELS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Fills the tables. One program: an axis of some RoIs; lanes are their bins.

    `ranges` is `rows`, or `columns` if COLUMNS (then there are `extents`, and no `pixels`). TABLES:
    1, or 2 with a tangent, or 3. `image_of` (K,) gets the image, or NO_IMAGE, or OTHER_MAP. There
    are `levels` if LEVELS, and a `tangent` if TABLES is 2.
    """
    count, images = whole(count), whole(images)
    height, width, bins_y, bins_x = whole(height), whole(width), whole(bins_y), whole(bins_x)
    axis, block = divided(tl.program_id(0), whole(2))  # 0: y, 1: x
    roi = block * BLOCK_K + tl.arange(0, BLOCK_K)
    known = roi < count

    image = index_at(image_index + roi * index_stride, known, images)
    if LEVELS:
        image = image_on(image, index_at(levels + roi * levels_stride, known, whole(maps)), map)
    if axis == 0:
        tl.store(image_of + roi, image, known)

    x_slot = height + bins_y * spread_y
    room = x_slot + width + bins_x * spread_x
    if axis == 0:
        size, bins, spread, scale = height, bins_y, whole(spread_y), real(scale_y)
        first_slot, first_bin, first_pixel = whole(0), whole(0), whole(0)
    else:
        size, bins, spread, scale = width, bins_x, whole(spread_x), real(scale_x)
        first_slot, first_bin, first_pixel = x_slot, bins_y, height

    lo, hi, finite = ends(boxes + roi * boxes_stride, boxes_step, axis, known, REAL)
    if TABLES == 2:
        v_lo = tl.load(tangent + roi * 4 + 1 - axis, known, other=0).to(tl.float64)[:, None]
        v_hi = tl.load(tangent + roi * 4 + 3 - axis, known, other=0).to(tl.float64)[:, None]

    start, bin, samples, clamped = grid_of(lo, hi, scale.to(REAL), bins, RULE)
    samples = tl.where(known & (image >= 0), samples, 0)
    mean = 1 / tl.maximum(samples, 1).to(tl.float64)
    slope_factor = mean * scale.to(REAL).to(tl.float64)
    backwards = bin < 0

    start, bin, samples, clamped = start[:, None], bin[:, None], samples[:, None], clamped[:, None]
    mean, slope_factor, finite = mean[:, None], slope_factor[:, None], finite[:, None]
    row = roi[:, None]
    table = row * room + first_slot
    next_table = count * room
    lowest, highest = tl.full((BLOCK_K,), 2**62, tl.int64), tl.full((BLOCK_K,), -1, tl.int64)

    for block in range(0, bins, BLOCK_P):
        k = (block + tl.arange(0, BLOCK_P)).to(tl.int64)[None, :]
        rank = tl.where(backwards[:, None], bins - 1 - k, k)
        low, high = span_of(start, bin, samples, k, bins, size)
        j, end = inside(start, bin, tl.where(k < bins, samples, 0), k, size)
        used = (high >= low) & known[:, None]
        slot = low + spread * rank
        last = high
        if COLUMNS:
            step = tl.where(bin < 0, -1, 1)
            _, before = span_of(start, bin, samples, k - step, bins, size)
            after, after_high = span_of(start, bin, samples, k + step, bins, size)
            after = tl.where(after_high < after, high + 1, after)
            last = tl.maximum(high, after - 1)  # and the pixels that no bin reaches
            lowest = tl.minimum(lowest, tl.min(tl.where(used, low, 2**62), 1))
            highest = tl.maximum(highest, tl.max(tl.where(used, high, -1), 1))

        # in ascending order, so a sample adds to the pixel at hand and to the next
        pixel = low
        entries = tl.zeros_like(rank)
        value = tl.zeros((BLOCK_K, BLOCK_P), tl.float64)
        next_value, slope_lo, slope_hi, next_lo, next_hi = value, value, value, value, value
        lo_pixel, fraction, moves = tap(position(start, bin, samples, k, j), size)
        for _ in range(tl.max(tl.where(used, last - low + 1, 0))):
            take = used & (j < end) & (lo_pixel == pixel)
            while tl.max(take.to(tl.int32)) > 0:
                value += tl.where(take, 1 - fraction, 0)
                next_value += tl.where(take, fraction, 0)
                if TABLES > 1:
                    in_lo, in_hi = shares(bin, samples, bins, k, j, clamped, tl.float64)
                    counted = take & moves & finite
                    slope_lo -= tl.where(counted, in_lo, 0)
                    slope_hi -= tl.where(counted, in_hi, 0)
                    next_lo += tl.where(counted, in_lo, 0)
                    next_hi += tl.where(counted, in_hi, 0)
                j += take.to(tl.int64)
                lo_pixel, fraction, moves = tap(position(start, bin, samples, k, j), size)
                take = used & (j < end) & (lo_pixel == pixel)

            in_band = used & (pixel <= high)
            weight = (value * mean).to(REAL)
            counts = weight != 0
            if TABLES > 1:
                weight_lo = (slope_lo * slope_factor).to(REAL)
                weight_hi = (slope_hi * slope_factor).to(REAL)
                if TABLES == 2:
                    moved = weight_lo.to(tl.float64) * v_lo + weight_hi.to(tl.float64) * v_hi
                    sloped = (weight_lo != 0) | (weight_hi != 0)
                    weight_lo = tl.where(sloped, moved, 0).to(REAL)
                    counts = counts | (weight_lo != 0)
                else:
                    counts = counts | (weight_lo != 0) | (weight_hi != 0)
            if COLUMNS:
                at = ranges + (row * (height + width) + first_pixel + pixel) * 2
                # the first bin that reaches this pixel writes so, and the last; or that none does
                in_gap = used & (pixel > high) & (pixel <= last)
                tl.store(at, tl.where(in_gap, 1, rank), (in_band & (pixel > before)) | in_gap)
                tl.store(at + 1, tl.where(in_gap, 0, rank), (in_band & (pixel < after)) | in_gap)
                to = table + pixel + spread * rank
                written = in_band
            else:
                to = table + slot + entries
                written = in_band & counts
                tl.store(pixels + to, pixel, written)
                entries += written.to(tl.int64)
            tl.store(weights + to, weight, written)
            if TABLES > 1:
                tl.store(weights + next_table + to, weight_lo, written)
            if TABLES > 2:
                tl.store(weights + 2 * next_table + to, weight_hi, written)
            pixel += 1
            value, next_value = next_value, tl.zeros_like(value)
            slope_lo, next_lo = next_lo, tl.zeros_like(value)
            slope_hi, next_hi = next_hi, tl.zeros_like(value)

        if not COLUMNS:
            at = ranges + (row * (bins_y + bins_x) + first_bin + k) * 2
            exists = known[:, None] & (k < bins)
            tl.store(at, first_slot + slot, exists)
            tl.store(at + 1, entries, exists)

    if COLUMNS:
        at = extents + (roi * 2 + axis) * 3
        tl.store(at, tl.where(highest < 0, 0, lowest), known)
        tl.store(at + 1, highest, known)
        tl.store(at + 2, backwards, known)


@triton.jit
def reached_by(
    program, image_of, extents, count, height, width, words, bits,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Which RoIs reach a tile of a map: some words of one tile.

    In `bits` (images, tiles, words) the first RoI is the lowest bit.
    """
    block, tile = divided(program, tl.cdiv(words, BLOCK_W))
    image, tile_y, tile_x = place_of(tile, height, width, TILE_Y, TILE_X)
    y, x = tile_y * TILE_Y, tile_x * TILE_X
    word = block * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    bit = tl.arange(0, ROIS_PER_WORD)[None, :]
    roi = word * ROIS_PER_WORD + bit
    known = roi < count
    at = extents + roi * 6
    hit = known & (tl.load(image_of + roi, known, other=-1) == image)
    hit &= tl.load(at, known, other=0) < y + TILE_Y
    hit &= tl.load(at + 1, known, other=-1) >= y
    hit &= tl.load(at + 3, known, other=0) < x + TILE_X
    hit &= tl.load(at + 4, known, other=-1) >= x
    found = tl.sum(hit.to(tl.int64) << bit.to(tl.int64), 1)
    word = block * BLOCK_W + tl.arange(0, BLOCK_W)
    tl.store(bits + tile * words + word, found, word < words)


@kernel("count", "words")
def touched(
    image_of, extents,
    count, height, width, words,
    bits,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Which RoIs reach the tiles of a map."""
    reached_by(
        tl.program_id(0), image_of, extents, whole(count), whole(height), whole(width),
        whole(words), bits, TILE_Y, TILE_X, BLOCK_W,
    )  # fmt: skip


@kernel("count", "output_q")
def forward(
    features, image_of, rows, pixels, weights,
    count, channels, bins_y, bins_x, room,
    features_n, features_c, features_h, features_w,
    output_k, output_c, output_p, output_q,
    before, output,
    TABLES: tl.constexpr, INNERMOST: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """docs/spec.md (4), with TABLES 2 its derivative (8). One program: bins, channels of a RoI."""
    count, bins_y, bins_x, room = whole(count), whole(bins_y), whole(bins_x), whole(room)
    features_n, features_c, features_h, features_w = steps(
        features_n, features_c, features_h, features_w, INNERMOST, ALIGNED
    )
    output_k, output_c, output_p, output_q = steps(
        output_k, output_c, output_p, output_q, INNERMOST, ALIGNED
    )
    block, rest = divided(tl.program_id(0), tl.cdiv(bins_y * bins_x, BLOCK_B))
    roi, c_block = divided(rest, count)
    image = tl.load(image_of + roi)
    b = block * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    exists = b < tl.where(image == OTHER_MAP, 0, bins_y * bins_x)
    q, p = divided(b, bins_x)
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    has_channel = c < stride(channels, False, ALIGNED)
    at_y = rows + (roi * (bins_y + bins_x) + p) * 2
    at_x = rows + (roi * (bins_y + bins_x) + bins_y + q) * 2
    taps_y, taps_x = tl.load(at_y + 1, exists, other=0), tl.load(at_x + 1, exists, other=0)
    slot_y = roi * room + tl.load(at_y, exists, other=0)
    slot_x = roi * room + tl.load(at_x, exists, other=0)
    next_table = count * room
    plane = features + tl.maximum(image, 0) * features_n + c * features_c

    REAL: tl.constexpr = weights.dtype.element_ty
    total = tl.zeros((BLOCK_C, BLOCK_B), REAL)
    for i in range(tl.max(taps_y)):
        in_y = i < taps_y
        y = tl.load(pixels + slot_y + i, in_y, other=0).to(tl.int64)
        w_y = tl.load(weights + slot_y + i, in_y, other=0)
        line = plane + y * features_h
        along = tl.zeros((BLOCK_C, BLOCK_B), REAL)
        if TABLES == 2:
            v_y = tl.load(weights + next_table + slot_y + i, in_y, other=0)
            v_along = tl.zeros((BLOCK_C, BLOCK_B), REAL)
        for j in range(tl.max(taps_x)):
            in_x = j < taps_x
            x = tl.load(pixels + slot_x + j, in_x, other=0).to(tl.int64)
            w_x = tl.load(weights + slot_x + j, in_x, other=0)
            value = tl.load(line + x * features_w, in_y & in_x & has_channel, other=0).to(REAL)
            if TABLES == 2:
                v_x = tl.load(weights + next_table + slot_x + j, in_x, other=0)
                along = plus(along, w_x, value)
                v_along = plus(v_along, v_x, value)
            else:
                along = tl.fma(w_x, value, along)
        if TABLES == 2:
            total = plus(plus(total, v_y, along), w_y, v_along)
        else:
            total = tl.fma(w_y, along, total)
    at = output + roi * output_k + c * output_c + p * output_p + q * output_q
    tl.store(at, rounded(total, output.dtype.element_ty), exists & has_channel)


@kernel("count", "d_features_w")
def adjoint(
    d_output, columns, extents, weights, bits,
    count, channels, height, width, bins_y, bins_x, spread_y, spread_x, words,
    d_output_k, d_output_c, d_output_p, d_output_q,
    d_features_n, d_features_c, d_features_h, d_features_w,
    d_features,
    TABLES: tl.constexpr, INNERMOST: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_C: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """docs/spec.md (5), with TABLES 2 its derivative (8). One program: channels of a map's tile.

    It adds the RoIs that reach the tile, in their order, and writes each pixel once.
    """
    count, height, width, words = whole(count), whole(height), whole(width), whole(words)
    bins_y, bins_x = whole(bins_y), whole(bins_x)
    d_output_k, d_output_c, d_output_p, d_output_q = steps(
        d_output_k, d_output_c, d_output_p, d_output_q, INNERMOST, ALIGNED
    )
    d_features_n, d_features_c, d_features_h, d_features_w = steps(
        d_features_n, d_features_c, d_features_h, d_features_w, INNERMOST, ALIGNED
    )
    x_slot = height + bins_y * spread_y
    room = x_slot + width + bins_x * spread_x
    next_table = count * room
    channels = stride(channels, False, ALIGNED)
    c_block, tile = divided(tl.program_id(0), tl.cdiv(channels, BLOCK_C))
    image, tile_y, tile_x = place_of(tile, height, width, TILE_Y, TILE_X)
    lane = tl.arange(0, TILE_Y * TILE_X)[None, :]
    y, x = tile_y * TILE_Y + lane // TILE_X, tile_x * TILE_X + lane % TILE_X
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    has_channel = c < channels

    REAL: tl.constexpr = weights.dtype.element_ty
    total = tl.zeros((BLOCK_C, TILE_Y * TILE_X), REAL)
    for word in range(words):
        rest = tl.load(bits + tile * words + word)
        while rest != 0:
            lowest = rest & -rest
            rest -= lowest
            roi = word * ROIS_PER_WORD + exponent(lowest)
            extent = extents + roi * 6
            in_y = (y >= tl.load(extent)) & (y <= tl.load(extent + 1))
            in_x = (x >= tl.load(extent + 3)) & (x <= tl.load(extent + 4))
            at_y = columns + (roi * (height + width) + y) * 2
            at_x = columns + (roi * (height + width) + height + x) * 2
            rank_y, rank_x = tl.load(at_y, in_y, other=0), tl.load(at_x, in_x, other=0)
            bins_of_y = tl.load(at_y + 1, in_y, other=-1) - rank_y + 1
            bins_of_x = tl.load(at_x + 1, in_x, other=-1) - rank_x + 1
            backwards_y, backwards_x = tl.load(extent + 2) != 0, tl.load(extent + 5) != 0
            taps_y = weights + roi * room + y
            taps_x = weights + roi * room + x_slot + x
            rows = d_output + roi * d_output_k + c * d_output_c
            for i in range(tl.max(bins_of_y)):
                rank = (rank_y + i).to(tl.int64)
                p = tl.where(backwards_y, bins_y - 1 - rank, rank)
                w_y = tl.load(taps_y + spread_y * rank, i < bins_of_y, other=0)
                counts_y = w_y != 0
                along = tl.zeros((BLOCK_C, TILE_Y * TILE_X), REAL)
                if TABLES == 2:
                    v_y = tl.load(taps_y + spread_y * rank + next_table, i < bins_of_y, other=0)
                    counts_y = counts_y | (v_y != 0)
                    v_along = tl.zeros((BLOCK_C, TILE_Y * TILE_X), REAL)
                for j in range(tl.max(bins_of_x)):
                    rank = (rank_x + j).to(tl.int64)
                    q = tl.where(backwards_x, bins_x - 1 - rank, rank)
                    w_x = tl.load(taps_x + spread_x * rank, j < bins_of_x, other=0)
                    counts = counts_y & (w_x != 0)
                    if TABLES == 2:
                        v_x = tl.load(taps_x + spread_x * rank + next_table, j < bins_of_x, other=0)
                        counts = counts_y & ((w_x != 0) | (v_x != 0))
                    at = rows + p * d_output_p + q * d_output_q
                    value = tl.load(at, counts & has_channel, other=0).to(REAL)
                    if TABLES == 2:
                        along, v_along = plus(along, w_x, value), plus(v_along, v_x, value)
                    else:
                        along = tl.fma(w_x, value, along)
                if TABLES == 2:
                    total = plus(plus(total, v_y, along), w_y, v_along)
                else:
                    total = tl.fma(w_y, along, total)
    at = d_features + image * d_features_n + c * d_features_c + y * d_features_h + x * d_features_w
    tl.store(
        at, rounded(total, d_features.dtype.element_ty), (y < height) & (x < width) & has_channel
    )


@triton.jit
def store_sums(at, x1, y1, x2, y2):
    tl.store(at, tl.sum(x1))
    tl.store(at + 1, tl.sum(y1))
    tl.store(at + 2, tl.sum(x2))
    tl.store(at + 3, tl.sum(y2))


@kernel("count", "features_w")
def box_gradient(
    d_output, features, image_of, rows, pixels, weights,
    count, channels, bins_y, bins_x, room,
    d_output_k, d_output_c, d_output_p, d_output_q,
    features_n, features_c, features_h, features_w,
    partial,
    INNERMOST: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """docs/spec.md (7), of some channels of a RoI: x1, y1, x2, y2 in `partial` (blocks, K, 4)."""
    count, bins_y, bins_x, room = whole(count), whole(bins_y), whole(bins_x), whole(room)
    d_output_k, d_output_c, d_output_p, d_output_q = steps(
        d_output_k, d_output_c, d_output_p, d_output_q, INNERMOST, ALIGNED
    )
    features_n, features_c, features_h, features_w = steps(
        features_n, features_c, features_h, features_w, INNERMOST, ALIGNED
    )
    roi, c_block = divided(tl.program_id(0), count)
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    has_channel = c < stride(channels, False, ALIGNED)
    next_table = count * room
    image = tl.maximum(tl.load(image_of + roi), 0)
    plane = features + image * features_n + c * features_c

    REAL: tl.constexpr = weights.dtype.element_ty
    none = tl.zeros((BLOCK_C, BLOCK_B), REAL)
    x1, y1, x2, y2 = none, none, none, none
    for block in range(0, bins_y * bins_x, BLOCK_B):
        b = block + tl.arange(0, BLOCK_B)[None, :].to(tl.int64)
        exists = b < bins_y * bins_x
        q, p = divided(b, bins_x)
        at_y = rows + (roi * (bins_y + bins_x) + p) * 2
        at_x = rows + (roi * (bins_y + bins_x) + bins_y + q) * 2
        taps_y, taps_x = tl.load(at_y + 1, exists, other=0), tl.load(at_x + 1, exists, other=0)
        slot_y = roi * room + tl.load(at_y, exists, other=0)
        slot_x = roi * room + tl.load(at_x, exists, other=0)
        in_x1, in_y1, in_x2, in_y2 = none, none, none, none
        never = b < 0
        holds_y, moves_y, holds_x, moves_x = never, never, never, never
        for i in range(tl.max(taps_y)):
            in_y = i < taps_y
            y = tl.load(pixels + slot_y + i, in_y, other=0).to(tl.int64)
            w_y = tl.load(weights + slot_y + i, in_y, other=0)
            lo_y = tl.load(weights + next_table + slot_y + i, in_y, other=0)
            hi_y = tl.load(weights + 2 * next_table + slot_y + i, in_y, other=0)
            holds_y, moves_y = holds_y | (w_y != 0), moves_y | (lo_y != 0) | (hi_y != 0)
            line = plane + y * features_h
            along, along_lo, along_hi = none, none, none
            for j in range(tl.max(taps_x)):
                in_x = j < taps_x
                x = tl.load(pixels + slot_x + j, in_x, other=0).to(tl.int64)
                w_x = tl.load(weights + slot_x + j, in_x, other=0)
                lo_x = tl.load(weights + next_table + slot_x + j, in_x, other=0)
                hi_x = tl.load(weights + 2 * next_table + slot_x + j, in_x, other=0)
                holds_x, moves_x = holds_x | (w_x != 0), moves_x | (lo_x != 0) | (hi_x != 0)
                value = tl.load(line + x * features_w, in_y & in_x & has_channel, other=0).to(REAL)
                along = plus(along, w_x, value)
                along_lo, along_hi = plus(along_lo, lo_x, value), plus(along_hi, hi_x, value)
            in_y1, in_y2 = plus(in_y1, lo_y, along), plus(in_y2, hi_y, along)
            in_x1, in_x2 = plus(in_x1, w_y, along_lo), plus(in_x2, w_y, along_hi)
        at = d_output + roi * d_output_k + c * d_output_c + p * d_output_p + q * d_output_q
        d_y = tl.load(at, moves_y & holds_x & has_channel, other=0).to(REAL)
        d_x = tl.load(at, holds_y & moves_x & has_channel, other=0).to(REAL)
        x1, x2 = tl.fma(d_x, in_x1, x1), tl.fma(d_x, in_x2, x2)
        y1, y2 = tl.fma(d_y, in_y1, y1), tl.fma(d_y, in_y2, y2)
    store_sums(partial + (c_block * count + roi) * 4, x1, y1, x2, y2)


@kernel("first", "blocks")
def sum_blocks(
    partial, image_of,
    first, count, blocks,
    before, d_boxes,
    REAL: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds `partial` (blocks, K, 4) over blocks, in order, as REAL. One program: some RoIs.

    `image_of` is an array from the element `first` on.
    """
    count = whole(count)
    roi = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
    at = roi * 4 + tl.arange(0, 4)[None, :]
    known = roi < count
    total = tl.zeros((BLOCK_K, 4), REAL)
    for block in range(blocks):
        total += tl.load(partial + whole(block) * count * 4 + at, known, other=0).to(REAL)
    image = tl.load(image_of + whole(first) + roi, known, other=0)
    written = known & (image != OTHER_MAP)
    tl.store(d_boxes + at, total.to(d_boxes.dtype.element_ty), written)
