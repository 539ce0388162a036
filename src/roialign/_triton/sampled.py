"""Largest samples on GPUs, docs/spec.md (9): a bin is its largest sample or weighted pixel.

The samples of an axis that can be the largest are listed once: in a table of 2 `room` slots per
RoI, as those of `kernels` in which each pixel has two, the lower pixel and the next one's fraction.
`rows` (K, P + Q, 3) says the first slot of a bin, how many it has, and where there are samples that
are not inside: BEFORE these or AFTER them.

A *winner* is ``slot_y << 33 | slot_x << 2 | corner``, slots of a RoI's own table; or OUTSIDE, a
sample that is not inside; or NONE. The adjoint finds them first. Then one program owns a tile of a
map, and adds what the bins of each RoI that reaches it pass on, in their order.
"""

import math

import triton
import triton.language as tl

from . import kernels, launch
from .geometry import exponent, grid_of, inside, limit, position, tap
from .kernels import ROIS_PER_WORD, divided, ends, kernel, place_of, plus, real, rounded, whole
from .launch import New

BEFORE, AFTER = tl.constexpr(1), tl.constexpr(2)
OUTSIDE, NONE = tl.constexpr(-1), tl.constexpr(-2)
BLOCK = 128  # bins of an axis that one program lists: a lane each
# channels and bins of one program, where channels are innermost in memory and elsewhere
BLOCKS = {True: (32, 8), False: (4, 64)}
CHANNELS = 1  # of a tile, that one program of the adjoint writes: with more, sm_80 spills
REDUCTION = 6  # in the vector of csrc/rule.hpp


@kernel("map", "levels_stride")
def extremes(
    boxes, image_index, levels,
    map, maps, count, images, height, width, bins_y, bins_x, spread_y, spread_x,
    scale_y: "fp64", scale_x: "fp64",  # noqa: F821
    boxes_stride, boxes_step, index_stride, levels_stride,
    image_of, rows, extents, pixels, fractions,
    RULE: tl.constexpr, REAL: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each cell on an axis the first and the last sample of a bin. A lane: a bin.

    `image_of` and `extents` are those of `kernels.axis_taps`.
    """
    count, images = whole(count), whole(images)
    height, width, bins_y, bins_x = whole(height), whole(width), whole(bins_y), whole(bins_x)
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b, roi = divided(lane, bins_y + bins_x)
    known = roi < count
    image = kernels.index_at(image_index + roi * index_stride, known, images)
    if LEVELS:
        level = kernels.index_at(levels + roi * levels_stride, known, whole(maps))
        image = kernels.image_on(image, level, map)
    tl.store(image_of + roi, image, known & (b == 0))

    of_x = b >= bins_y
    k, axis = tl.where(of_x, b - bins_y, b), of_x.to(tl.int64)
    bins, size = tl.where(of_x, bins_x, bins_y), tl.where(of_x, width, height)
    spread = tl.where(of_x, whole(spread_x), whole(spread_y))
    scale = tl.where(of_x, real(scale_x), real(scale_y))
    lo, hi, _ = ends(boxes + roi * boxes_stride, boxes_step, axis, known, REAL)
    start, bin, samples, _ = grid_of(lo, hi, scale.to(REAL), bins, RULE)
    samples = tl.where(known & (image >= 0), samples, 0)
    backwards = bin < 0

    # positions ascend with the bins
    last = limit(start, samples, size, True)
    least, most = tl.where(backwards, bins - 1, 0), tl.where(backwards, 0, bins - 1)
    p_low = position(start, bin, samples, least, tl.zeros_like(samples))
    p_high = position(start, bin, samples, most, samples - 1)
    meets = (samples > 0) & (p_high >= -1) & (p_low <= last)
    low, _, _ = tap(p_low, size)
    high, _, _ = tap(tl.minimum(p_high, last), size)
    at = extents + (roi * 2 + axis) * 3
    tl.store(at, tl.where(meets, low, 0), known & (k == 0))
    tl.store(at + 1, tl.where(meets, tl.minimum(high + 1, size - 1), -1), known & (k == 0))
    tl.store(at + 2, backwards, known & (k == 0))

    low, _ = kernels.span_of(start, bin, samples, k, bins, size)
    rank = tl.where(backwards, bins - 1 - k, k)
    x_slot = height + bins_y * spread_y
    room = x_slot + width + bins_x * spread_x
    slot = 2 * (axis * x_slot + low + spread * rank)
    table = roi * (2 * room) + slot
    first, end = inside(start, bin, samples, k, size)
    found = tl.zeros_like(samples).to(tl.int32)
    of_cell, cell, kept = found, tl.zeros_like(samples) - 1, tl.zeros_like(start)
    for i in range(tl.max(end - first)):
        taken = first + i < end
        p = position(start, bin, samples, k, tl.where(backwards, end - 1 - i, first + i))
        pixel, exact, _moves = tap(p, size)
        fraction = exact.to(REAL)
        of_cell = tl.where(pixel == cell, of_cell, 0)
        taken &= (of_cell == 0) | (fraction != kept)
        found += (taken & (of_cell < 2)).to(tl.int32)
        of_cell = tl.where(taken, tl.minimum(of_cell + 1, 2), of_cell)
        cell, kept = tl.where(taken, pixel, cell), tl.where(taken, fraction, kept)
        tl.store(pixels + table + found - 1, pixel, taken)
        tl.store(fractions + table + found - 1, fraction, taken)
    any_inside = end > first
    earlier = tl.where(any_inside, tl.where(backwards, end < samples, first > 0), samples > 0)
    later = any_inside & tl.where(backwards, first > 0, end < samples)
    at = rows + lane * 3
    tl.store(at, slot, known)
    tl.store(at + 1, found, known)
    tl.store(at + 2, tl.where(earlier, BEFORE, 0) + tl.where(later, AFTER, 0), known)


@triton.jit
def weight_of(f, g, corner: tl.constexpr):
    """Of one of the four pixels of a sample with these fractions in y and in x."""
    in_y = f if corner >= 2 else 1 - f
    in_x = g if corner % 2 else 1 - g
    return in_y * in_x


@triton.jit
def pixel_of(upper, lower, left, right, f, g, known, corner: tl.constexpr):
    """A weighted pixel of a sample; one without weight is not read."""
    line = lower if corner >= 2 else upper
    w = weight_of(f, g, corner)
    value = tl.load(line + (right if corner % 2 else left), known & (w != 0), other=0)
    return w * as_real(value, f.dtype)


@triton.jit
def as_real(value, REAL: tl.constexpr):
    if value.dtype == tl.bfloat16:
        return value.to(tl.float32).to(REAL)
    else:
        return value.to(REAL)


@triton.jit
def chosen(number, value, id, candidate, candidate_value, candidate_id, known):
    """The largest so far, what is taken there, and its id, after one more candidate."""
    wins = known & ((id == NONE) | (~(candidate <= number) & (number == number)))
    number = tl.where(wins, candidate, number)
    return number, tl.where(wins, candidate_value, value), tl.where(wins, candidate_id, id)


@kernel("count", "output_q")
def largest(
    features, selectors, image_of, rows, pixels, fractions,
    count, channels, bins_y, bins_x, room,
    features_n, features_c, features_h, features_w,
    selectors_n, selectors_c, selectors_h, selectors_w,
    output_k, output_c, output_p, output_q,
    before, output,
    CORNER: tl.constexpr, SELECTS: tl.constexpr, WINNERS: tl.constexpr, INNERMOST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Bins: their largest samples, those that `selectors` choose, or (WINNERS) which they are."""
    count, bins_y, bins_x, room = whole(count), whole(bins_y), whole(bins_x), whole(room)
    features_n, features_c, features_h, features_w = kernels.steps(
        features_n, features_c, features_h, features_w, INNERMOST, False
    )
    selectors_n, selectors_c, selectors_h, selectors_w = kernels.steps(
        selectors_n, selectors_c, selectors_h, selectors_w, False, False
    )
    output_k, output_c, output_p, output_q = kernels.steps(
        output_k, output_c, output_p, output_q, INNERMOST, False
    )
    block, rest = divided(tl.program_id(0), tl.cdiv(bins_y * bins_x, BLOCK_B))
    roi, c_block = divided(rest, count)
    image = tl.load(image_of + roi)
    b = block * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    exists = b < tl.where(image == kernels.OTHER_MAP, 0, bins_y * bins_x)
    q, p = divided(b, bins_x)
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    has_channel = c < whole(channels)
    at_y = rows + (roi * (bins_y + bins_x) + p) * 3
    at_x = rows + (roi * (bins_y + bins_x) + bins_y + q) * 3
    slot_y, slot_x = tl.load(at_y, exists, other=0), tl.load(at_x, exists, other=0)
    many_y, many_x = tl.load(at_y + 1, exists, other=0), tl.load(at_x + 1, exists, other=0)
    beyond_y, beyond_x = tl.load(at_y + 2, exists, other=0), tl.load(at_x + 2, exists, other=0)
    # before so many rows of samples comes the first that is not inside
    outside = tl.where(beyond_y == AFTER, many_y, -1)
    outside = tl.where(beyond_x == AFTER, tl.minimum(many_y, 1), outside)
    outside = tl.where(((beyond_y | beyond_x) & BEFORE) != 0, 0, outside)
    table = roi * (2 * room)
    image = tl.maximum(image, 0)
    plane = features + image * features_n + c * features_c
    choosing = selectors + image * selectors_n + c * selectors_c

    REAL: tl.constexpr = fractions.dtype.element_ty
    value = tl.zeros((BLOCK_C, BLOCK_B), REAL)
    number, id = value, tl.zeros((BLOCK_C, BLOCK_B), tl.int64) + NONE
    for i in range(tl.max(many_y) + 1):
        number, value, id = chosen(number, value, id, 0.0, 0.0, OUTSIDE, outside == i)
        in_y = i < many_y
        y = tl.load(pixels + table + slot_y + i, in_y, other=0).to(tl.int64)
        f = tl.load(fractions + table + slot_y + i, in_y, other=0)
        upper, lower = plane + y * features_h, plane + (y + 1) * features_h
        above, below = choosing + y * selectors_h, choosing + (y + 1) * selectors_h
        for j in range(tl.max(tl.where(in_y, many_x, 0))):
            known = in_y & (j < many_x)
            x = tl.load(pixels + table + slot_x + j, known, other=0).to(tl.int64)
            g = tl.load(fractions + table + slot_x + j, known, other=0)
            left, right = x * features_w, (x + 1) * features_w
            at = ((slot_y + i).to(tl.int64) << 33) | ((slot_x + j).to(tl.int64) << 2)
            read = known & has_channel
            v0 = pixel_of(upper, lower, left, right, f, g, read, 0)
            v1 = pixel_of(upper, lower, left, right, f, g, read, 1)
            v2 = pixel_of(upper, lower, left, right, f, g, read, 2)
            v3 = pixel_of(upper, lower, left, right, f, g, read, 3)
            s0, s1, s2, s3 = v0, v1, v2, v3
            if SELECTS:
                left, right = x * selectors_w, (x + 1) * selectors_w
                s0 = pixel_of(above, below, left, right, f, g, read, 0)
                s1 = pixel_of(above, below, left, right, f, g, read, 1)
                s2 = pixel_of(above, below, left, right, f, g, read, 2)
                s3 = pixel_of(above, below, left, right, f, g, read, 3)
            if CORNER:
                number, value, id = chosen(number, value, id, s0, v0, at, known)
                number, value, id = chosen(number, value, id, s1, v1, at + 1, known)
                number, value, id = chosen(number, value, id, s2, v2, at + 2, known)
                number, value, id = chosen(number, value, id, s3, v3, at + 3, known)
            else:
                v, s = ((v0 + v1) + v2) + v3, ((s0 + s1) + s2) + s3
                number, value, id = chosen(number, value, id, s, v, at, known)
    at = output + roi * output_k + c * output_c + p * output_p + q * output_q
    if WINNERS:
        tl.store(at, id, exists & has_channel)
    else:
        tl.store(at, rounded(value, output.dtype.element_ty), exists & has_channel)


@triton.jit
def reached(rows, pixels, table, bin, first, side):
    """Whether samples of a bin have pixels among `side` from `first` on."""
    at, many = tl.load(rows + bin * 3), tl.load(rows + bin * 3 + 1)
    one = tl.load(pixels + table + at, many > 0, other=-2)
    other = tl.load(pixels + table + at + many - 1, many > 0, other=-2)
    return (tl.minimum(one, other) < first + side) & (tl.maximum(one, other) + 1 >= first)


@kernel("count", "d_features_w")
def adjoint_of_winners(
    d_output, winners, rows, pixels, fractions, bits,
    count, channels, height, width, bins_y, bins_x, room, words,
    d_output_k, d_output_c, d_output_p, d_output_q,
    d_features_n, d_features_c, d_features_h, d_features_w,
    d_features,
    CORNER: tl.constexpr,
    BLOCK_C: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """What the winners pass on to a tile of a map. One program: some channels of it."""
    height, width, words, room = whole(height), whole(width), whole(words), whole(room)
    bins_y, bins_x, channels = whole(bins_y), whole(bins_x), whole(channels)
    d_output_k, d_output_c, d_output_p, d_output_q = kernels.steps(
        d_output_k, d_output_c, d_output_p, d_output_q, False, False
    )
    d_features_n, d_features_c, d_features_h, d_features_w = kernels.steps(
        d_features_n, d_features_c, d_features_h, d_features_w, False, False
    )
    c_block, tile = divided(tl.program_id(0), tl.cdiv(channels, BLOCK_C))
    image, tile_y, tile_x = place_of(tile, height, width, TILE_Y, TILE_X)
    lane = tl.arange(0, TILE_Y * TILE_X)[None, :]
    y, x = tile_y * TILE_Y + lane // TILE_X, tile_x * TILE_X + lane % TILE_X
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    has_channel = c < channels
    REAL: tl.constexpr = fractions.dtype.element_ty
    total = tl.zeros((BLOCK_C, TILE_Y * TILE_X), REAL)
    for word in range(words):
        rest = tl.load(bits + tile * words + word)
        while rest != 0:
            lowest = rest & -rest
            rest -= lowest
            roi = word * ROIS_PER_WORD + exponent(lowest)
            table, first_bin = roi * (2 * room), roi * (bins_y + bins_x)
            for p in range(bins_y):
                in_y = reached(rows, pixels, table, first_bin + p, tile_y * TILE_Y, TILE_Y)
                for q in range(tl.where(in_y, bins_x, 0)):
                    bin = first_bin + bins_y + q
                    if reached(rows, pixels, table, bin, tile_x * TILE_X, TILE_X):
                        at = ((roi * channels + c) * bins_y + p) * bins_x + q
                        winner = tl.load(winners + at, has_channel, other=-1)
                        won = winner >= 0
                        slot_y = table + (winner >> 33)
                        slot_x = table + ((winner >> 2) & 0x7FFFFFFF)
                        step_y = y - tl.load(pixels + slot_y, won, other=-2)
                        step_x = x - tl.load(pixels + slot_x, won, other=-2)
                        f = tl.load(fractions + slot_y, won, other=0)
                        g = tl.load(fractions + slot_x, won, other=0)
                        w_y = tl.where(step_y == 0, 1 - f, tl.where(step_y == 1, f, 0))
                        w_x = tl.where(step_x == 0, 1 - g, tl.where(step_x == 1, g, 0))
                        w = tl.where(won, w_y * w_x, 0)
                        if CORNER:
                            w = tl.where(2 * step_y + step_x == (winner & 3), w, 0)
                        at = roi * d_output_k + c * d_output_c + p * d_output_p + q * d_output_q
                        d = as_real(tl.load(d_output + at, won, other=0), REAL)
                        total = plus(total, w, d)
    at = d_features + image * d_features_n + c * d_features_c + y * d_features_h + x * d_features_w
    tl.store(
        at, rounded(total, d_features.dtype.element_ty), (y < height) & (x < width) & has_channel
    )


def _only(tangent) -> None:
    if tangent is not None:
        box_gradient()


def _extremes(job: launch.Job, level: int) -> tuple:
    """The table of one of the maps, and the slots of half a RoI's."""
    count, _, *bins = job.pooled.shape
    spread = job.spread(level)
    sides = zip(job.maps[level].shape[2:], spread, bins, strict=True)
    room = sum(side + s * b for side, s, b in sides)
    made = job.call(
        extremes,
        launch.programs(launch.quotient(count * sum(bins), BLOCK)),
        (*job.arrays, *job.numbers(level, *spread)),
        (
            New((count,), "int64"),
            New((count, sum(bins), 3), "int32"),
            New((count, 2, 3), "int32"),
            New((count, 2 * room), "int32"),
            New((count, 2 * room), "float64" if job.is_double else "float32"),
        ),
        RULE=job.rule,
        REAL=tl.float64 if job.is_double else tl.float32,
        LEVELS=job.rois.levels is not None,
        BLOCK=BLOCK,
        **launch.OPTIONS,
    )
    return *made, room


def _largest(job: launch.Job, made: tuple, features, selectors, output, *, winners: bool):
    image_of, rows, _, pixels, fractions, room = made
    count, channels, *bins = output.shape
    steps = launch.strides(features), launch.strides(output)
    innermost = channels > 1 and all(step[1] == 1 for step in steps)
    block_c, block_b = BLOCKS[innermost]
    blocks = launch.quotient(math.prod(bins), block_b) * launch.quotient(channels, block_c)
    deciding = features if selectors is None else selectors
    (output,) = job.call(
        largest,
        launch.programs(count * blocks),
        (
            *(features, deciding, image_of, rows, pixels, fractions),
            *(count, channels, *bins, room, *steps[0], *launch.strides(deciding), *steps[1]),
            launch.before(output, features),
        ),
        (output,),
        CORNER=job.rule[REDUCTION] == 2,
        SELECTS=selectors is not None,
        WINNERS=winners,
        INNERMOST=innermost,
        BLOCK_C=block_c,
        BLOCK_B=block_b,
        **launch.OPTIONS,
    )
    return output


def forward(call, maps, selectors, rois, tangent, scales, rule, output):
    """Writes ``output`` (K, C, P, Q). With selectors, of the samples that they choose."""
    _only(tangent)
    job = launch.Job(call, maps, output, rois, None, scales, rule)
    if job.is_empty:
        return output.zero_()
    for level, features in enumerate(maps):
        deciding = selectors[level] if selectors else None
        output = _largest(job, _extremes(job, level), features, deciding, output, winners=False)
    return output


def adjoint(call, d_output, selectors, rois, tangent, scales, rule, d_features):
    """Writes each of ``d_features`` (N, C, H, W)."""
    _only(tangent)
    job = launch.Job(call, d_features, d_output, rois, None, scales, rule)
    if job.is_empty:
        return [d_map.zero_() for d_map in d_features]
    count, channels, *bins = d_output.shape
    results = []
    for level, (d_map, deciding) in enumerate(zip(d_features, selectors, strict=True)):
        made = _extremes(job, level)
        image_of, rows, extents, pixels, fractions, room = made
        winners = New(tuple(d_output.shape), "int64")
        winners = _largest(job, made, deciding, None, winners, winners=True)
        bits = launch.touched(call, image_of, extents, d_map.shape, launch.TILE)
        tiles, words = bits.shape
        results += call(
            adjoint_of_winners,
            launch.programs(tiles * launch.quotient(channels, CHANNELS)),
            (
                *(d_output, winners, rows, pixels, fractions, bits),
                *(count, channels, *d_map.shape[2:], *bins, room, words),
                *(*launch.strides(d_output), *launch.strides(d_map)),
            ),
            (d_map,),
            CORNER=rule[REDUCTION] == 2,
            BLOCK_C=CHANNELS,
            TILE_Y=launch.TILE[0],
            TILE_X=launch.TILE[1],
            **launch.OPTIONS,
        )
    return results


def box_gradient(*given):
    raise NotImplementedError(
        "on GPUs largest samples have a forward and an adjoint: for gradients in boxes, and "
        "tangents of them, take `reduction` 'mean', or arrays on the CPU"
    )
