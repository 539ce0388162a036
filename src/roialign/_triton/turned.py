"""Boxes that are turned on GPUs, docs/spec.md (10): a bin is the mean of its samples.

A box has NUMBERS numbers, see `frames`. Its axes v and u are those along which bins and samples
ascend: of a mirrored box the unit vectors have the other sign. So a rectangle of the map is a range
of v and of u, and the samples that can be in it are a range on each. Samples in these are tried one
by one; nothing is listed.

The forward takes the map as the rectangle. One program of the adjoint owns a tile of a map: lanes
are pixels, and the rectangle of a pixel is what it shares with its neighbours.
"""

import math

import triton
import triton.language as tl

from . import kernels, launch
from .geometry import exponent, position, sides_of, tap
from .kernels import ROIS_PER_WORD, coordinate, divided, kernel, place_of, plus, rounded, whole
from .launch import New
from .sampled import as_real, pixel_of

NUMBERS = tl.constexpr(12)
BLOCK = 128  # boxes of one program: a lane each
# channels and bins of one program, where channels are innermost in memory and elsewhere
BLOCKS = {True: (32, 8), False: (8, 64)}
CHANNELS = 8  # of a tile, that one program of the adjoint writes; of float64 half
TILE = (4, 8)  # pixels of it: a lane of one warp each, so nothing waits for others


@triton.jit
def around(low, high, size):
    """The pixels [first, last] of an axis for samples from low to high, and if any is inside."""
    first, _, _ = tap(low, size)
    last, _, _ = tap(tl.minimum(high, size.to(high.dtype)), size)
    meets = (high >= -1) & (low <= size.to(low.dtype))
    return first, tl.minimum(last + 1, size - 1), meets


@triton.jit
def ends_of(v0, v1, u0, u1, in_v, in_u, centre):
    """The least and the largest position on an axis of the map: those of a corner."""
    a, b = (v0 * in_v + u0 * in_u) + centre, (v0 * in_v + u1 * in_u) + centre
    c, d = (v1 * in_v + u0 * in_u) + centre, (v1 * in_v + u1 * in_u) + centre
    low, high = tl.minimum(tl.minimum(a, b), c), tl.maximum(tl.maximum(a, b), c)
    known = (a == a) & (b == b) & (c == c) & (d == d)
    low, high = tl.minimum(low, d), tl.maximum(high, d)
    return tl.where(known, low, -1.0), tl.where(known, high, float("inf"))


@kernel("map", "levels_stride")
def frames(
    boxes, image_index, levels,
    map, maps, count, images, height, width, bins_y, bins_x,
    scale_y: "fp64", scale_x: "fp64",  # noqa: F821
    boxes_stride, boxes_step, index_stride, levels_stride,
    image_of, numbers, samples, extents,
    RULE: tl.constexpr, REAL: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The numbers of each box. A lane: a RoI.

    `numbers` (K, NUMBERS): the centre's y and x; how v and how u move y and x; of v and of u where
    bins start and how long they are; how far rounding may move a position, with room; and how many
    samples a bin has. `samples` (K, 2): those in v and in u, 0 where none is inside.
    `extents` (K, 2, 3): of y and of x the first and the last pixel that samples can have.
    """
    pixel_offset: tl.constexpr = tl.constexpr(RULE).value[1]
    turn: tl.constexpr = tl.constexpr(RULE).value[7]
    count, images = whole(count), whole(images)
    height, width, bins_y, bins_x = whole(height), whole(width), whole(bins_y), whole(bins_x)
    roi = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = roi < count
    image = kernels.index_at(image_index + roi * index_stride, known, images)
    if LEVELS:
        level = kernels.index_at(levels + roi * levels_stride, known, whole(maps))
        image = kernels.image_on(image, level, map)
    tl.store(image_of + roi, image, known)

    scale, shift = kernels.real(scale_y).to(REAL), tl.full((), pixel_offset, REAL)
    box = boxes + roi * boxes_stride
    x = coordinate(box, known, REAL) * scale - shift
    y = coordinate(box + boxes_step, known, REAL) * scale - shift
    w, bin_u, many_u, _ = sides_of(
        coordinate(box + 2 * boxes_step, known, REAL) * scale, bins_x, RULE
    )
    h, bin_v, many_v, _ = sides_of(
        coordinate(box + 3 * boxes_step, known, REAL) * scale, bins_y, RULE
    )
    angle = coordinate(box + 4 * boxes_step, known, REAL).to(tl.float64)
    theta = (angle * tl.full((), turn, tl.float64)).to(REAL).to(tl.float64)
    theta = tl.where(tl.abs(theta) < float("inf"), theta, float("nan"))
    c, z = tl.cos(theta).to(REAL), tl.sin(theta).to(REAL)
    # exact: of a side below 0 all positions are those of the side without its sign, negated
    y_v, x_v = tl.where(h < 0, -c, c), tl.where(h < 0, -z, z)
    y_u, x_u = tl.where(w < 0, z, -z), tl.where(w < 0, -c, c)
    h, w, bin_v, bin_u = tl.abs(h), tl.abs(w), tl.abs(bin_v), tl.abs(bin_u)
    start_v, start_u = -h / 2, -w / 2

    none = tl.zeros_like(roi)
    v0 = position(start_v, bin_v, many_v, none, none, False)
    u0 = position(start_u, bin_u, many_u, none, none, False)
    v1 = position(start_v, bin_v, many_v, none + bins_y - 1, many_v - 1, False)
    u1 = position(start_u, bin_u, many_u, none + bins_x - 1, many_u - 1, False)
    low_y, high_y = ends_of(v0, v1, u0, u1, y_v, y_u, y)
    low_x, high_x = ends_of(v0, v1, u0, u1, x_v, x_u, x)
    first_y, last_y, in_y = around(low_y, high_y, height)
    first_x, last_x, in_x = around(low_x, high_x, width)
    # a difference of a number and itself is 0 unless it is not finite
    meets = (y - y == 0) & (x - x == 0) & (theta == theta) & in_y & in_x
    meets = meets & (many_v > 0) & (many_u > 0) & (image >= 0)

    at = extents + roi * 6
    tl.store(at, tl.where(meets, first_y, 0), known)
    tl.store(at + 1, tl.where(meets, last_y, -1), known)
    tl.store(at + 3, tl.where(meets, first_x, 0), known)
    tl.store(at + 4, tl.where(meets, last_x, -1), known)
    tl.store(samples + roi * 2, tl.where(meets, many_v, 0), known)
    tl.store(samples + roi * 2 + 1, tl.where(meets, many_u, 0), known)
    eps: tl.constexpr = 2.0**-52 if y.dtype == tl.float64 else 2.0**-23
    # rounding of what (10) computes: 2 eps of the sides and 3 of `far`; of the ranges: 3 and 4
    far = tl.abs(y) + tl.abs(x) + (height + width).to(REAL)
    at = numbers + roi * NUMBERS
    tl.store(at, y, known)
    tl.store(at + 1, x, known)
    tl.store(at + 2, y_v, known)
    tl.store(at + 3, x_v, known)
    tl.store(at + 4, y_u, known)
    tl.store(at + 5, x_u, known)
    tl.store(at + 6, start_v, known)
    tl.store(at + 7, bin_v, known)
    tl.store(at + 8, start_u, known)
    tl.store(at + 9, bin_u, known)
    tl.store(at + 10, eps * (5 * (h + w) + 8 * far), known)
    tl.store(at + 11, many_v.to(REAL) * many_u.to(REAL), known)


@triton.jit
def range_of(numbers, axis: tl.constexpr, y, x, half_y, half_x):
    """The range of v, or (axis 1) u, of a rectangle about (y, x): from the first bin's start on."""
    in_y, in_x = tl.load(numbers + 2 + 2 * axis), tl.load(numbers + 3 + 2 * axis)
    middle = (y - tl.load(numbers)) * in_y + (x - tl.load(numbers + 1)) * in_x
    half = half_y * tl.abs(in_y) + half_x * tl.abs(in_x) + tl.load(numbers + 10)
    middle -= tl.load(numbers + 6 + 2 * axis)
    return middle - half, middle + half


@triton.jit
def parts(low, high, step, count, LENGTH: tl.constexpr):
    """Which of `count` parts meet [low, high]: the first, and how many.

    Parts are of LENGTH steps, bins, or of 0, samples, which are in the middle of their step.
    """
    real: tl.constexpr = step.dtype
    step = tl.maximum(
        step, tl.full((), 1e-30, real)
    )  # what is less moves no sample beyond the room
    most = count.to(real)
    shift: tl.constexpr = (1 - LENGTH) / 2
    first, end = tl.ceil(low / step - (shift + LENGTH)), tl.floor(high / step - shift) + 1
    # NaN, where numbers are too large, leaves all
    first = tl.where(first > 0, tl.where(first < most, first, most), 0).to(tl.int64)
    end = tl.where(end < most, tl.where(end > 0, end, 0), most).to(tl.int64)
    return first, tl.maximum(end - first, 0)


@triton.jit
def sample(numbers, v, u, height, width):
    """Of a sample the lower pixels, the weights of the next ones, and whether it is inside."""
    y = (v * tl.load(numbers + 2) + u * tl.load(numbers + 4)) + tl.load(numbers)
    x = (v * tl.load(numbers + 3) + u * tl.load(numbers + 5)) + tl.load(numbers + 1)
    inside = (y >= -1) & (y <= height.to(y.dtype)) & (x >= -1) & (x <= width.to(x.dtype))
    low_y, f, _ = tap(y, height)
    low_x, g, _ = tap(x, width)
    return low_y, low_x, f, g, inside


@kernel("count", "output_q")
def forward_of_turned(
    features, image_of, numbers, samples,
    count, channels, height, width, bins_y, bins_x,
    features_n, features_c, features_h, features_w,
    output_k, output_c, output_p, output_q,
    before, output,
    INNERMOST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Means of samples. One program: bins, channels of a RoI."""
    count, bins_y, bins_x = whole(count), whole(bins_y), whole(bins_x)
    height, width = whole(height), whole(width)
    features_n, features_c, features_h, features_w = kernels.steps(
        features_n, features_c, features_h, features_w, INNERMOST, False
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
    plane = features + tl.maximum(image, 0) * features_n + c * features_c

    REAL: tl.constexpr = numbers.dtype.element_ty
    numbers += roi * NUMBERS
    many_v, many_u = tl.load(samples + roi * 2), tl.load(samples + roi * 2 + 1)
    start_v, bin_v = tl.load(numbers + 6), tl.load(numbers + 7)
    start_u, bin_u = tl.load(numbers + 8), tl.load(numbers + 9)
    half_y, half_x = (height + 1).to(REAL) / 2, (width + 1).to(REAL) / 2
    low_v, high_v = range_of(numbers, 0, half_y - 1, half_x - 1, half_y, half_x)
    low_u, high_u = range_of(numbers, 1, half_y - 1, half_x - 1, half_y, half_x)
    from_v, from_u = p.to(REAL) * bin_v, q.to(REAL) * bin_u
    step_v, step_u = bin_v / many_v.to(REAL), bin_u / many_u.to(REAL)
    first_v, rows = parts(low_v - from_v, high_v - from_v, step_v, many_v, 0)
    first_u, columns = parts(low_u - from_u, high_u - from_u, step_u, many_u, 0)
    most_columns = tl.max(columns)
    total = tl.zeros((BLOCK_C, BLOCK_B), REAL)
    for i in range(tl.max(rows)):
        v = position(start_v, bin_v, many_v, p, first_v + i, False)
        along = tl.zeros((BLOCK_C, BLOCK_B), REAL)
        for j in range(most_columns):
            u = position(start_u, bin_u, many_u, q, first_u + j, False)
            y, x, f, g, inside = sample(numbers, v, u, height, width)
            read = inside & (i < rows) & (j < columns) & exists & has_channel
            upper, lower = plane + y * features_h, plane + (y + 1) * features_h
            left, right = x * features_w, (x + 1) * features_w
            v0 = pixel_of(upper, lower, left, right, f, g, read, 0)
            v1 = pixel_of(upper, lower, left, right, f, g, read, 1)
            v2 = pixel_of(upper, lower, left, right, f, g, read, 2)
            v3 = pixel_of(upper, lower, left, right, f, g, read, 3)
            along += ((v0 + v1) + v2) + v3
        total += along
    total = tl.where(many_v * many_u > 0, total / tl.load(numbers + 11), 0)
    at = output + roi * output_k + c * output_c + p * output_p + q * output_q
    tl.store(at, rounded(total, output.dtype.element_ty), exists & has_channel)


@triton.jit
def weight_at(low, fraction, pixel):
    """Of one pixel of an axis, in a sample."""
    step = pixel - low
    return tl.where(step == 0, 1 - fraction, tl.where(step == 1, fraction, 0))


@kernel("count", "d_features_w")
def adjoint_of_turned(
    d_output, numbers, samples, bits,
    count, channels, height, width, bins_y, bins_x, words,
    d_output_k, d_output_c, d_output_p, d_output_q,
    d_features_n, d_features_c, d_features_h, d_features_w,
    d_features,
    BLOCK_C: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """The adjoint. One program: some channels of a map's tile.

    It adds the RoIs that reach the tile, in their order, and writes each pixel once.
    """
    height, width, words = whole(height), whole(width), whole(words)
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
    REAL: tl.constexpr = numbers.dtype.element_ty
    total = tl.zeros((BLOCK_C, TILE_Y * TILE_X), REAL)
    for word in range(words):
        rest = tl.load(bits + tile * words + word)
        while rest != 0:
            lowest = rest & -rest
            rest -= lowest
            roi = word * ROIS_PER_WORD + exponent(lowest)
            box = numbers + roi * NUMBERS
            many_v, many_u = tl.load(samples + roi * 2), tl.load(samples + roi * 2 + 1)
            start_v, bin_v = tl.load(box + 6), tl.load(box + 7)
            start_u, bin_u = tl.load(box + 8), tl.load(box + 9)
            step_v, step_u = bin_v / many_v.to(REAL), bin_u / many_u.to(REAL)
            low_v, high_v = range_of(box, 0, y.to(REAL), x.to(REAL), 1.0, 1.0)
            low_u, high_u = range_of(box, 1, y.to(REAL), x.to(REAL), 1.0, 1.0)
            first_p, in_y = parts(low_v, high_v, bin_v, bins_y, 1)
            first_q, in_x = parts(low_u, high_u, bin_u, bins_x, 1)
            for a in range(tl.max(in_y)):
                p = first_p + a
                from_v = p.to(REAL) * bin_v
                first_v, rows = parts(low_v - from_v, high_v - from_v, step_v, many_v, 0)
                rows = tl.where(a < in_y, rows, 0)
                most_rows = tl.max(rows)
                for b in range(tl.max(in_x)):
                    q = first_q + b
                    from_u = q.to(REAL) * bin_u
                    first_u, columns = parts(low_u - from_u, high_u - from_u, step_u, many_u, 0)
                    columns = tl.where(b < in_x, columns, 0)
                    weight = tl.zeros((1, TILE_Y * TILE_X), REAL)
                    most_columns = tl.max(columns)
                    for i in range(most_rows):
                        v = position(start_v, bin_v, many_v, p, first_v + i, False)
                        for j in range(most_columns):
                            u = position(start_u, bin_u, many_u, q, first_u + j, False)
                            low_y, low_x, f, g, inside = sample(box, v, u, height, width)
                            known = inside & (i < rows) & (j < columns)
                            w = weight_at(low_y, f, y) * weight_at(low_x, g, x)
                            weight += tl.where(known, w, 0)
                    weight = weight / tl.load(box + 11)
                    at = d_output + roi * d_output_k + c * d_output_c
                    at += p * d_output_p + q * d_output_q
                    d = tl.load(at, (weight != 0) & has_channel, other=0)
                    total = plus(total, weight, as_real(d, REAL))
    at = d_features + image * d_features_n + c * d_features_c + y * d_features_h + x * d_features_w
    tl.store(
        at, rounded(total, d_features.dtype.element_ty), (y < height) & (x < width) & has_channel
    )


def _frames(job: launch.Job, level: int) -> tuple:
    """The image, numbers and samples of each RoI, and the pixels that it reaches of a map."""
    if job.tangent is not None:
        box_gradient()
    count = job.pooled.shape[0]
    return job.call(
        frames,
        launch.programs(launch.quotient(count, BLOCK)),
        (*job.arrays, *job.numbers(level)),
        (
            New((count,), "int64"),
            New((count, NUMBERS.value), "float64" if job.is_double else "float32"),
            New((count, 2), "int64"),
            New((count, 2, 3), "int32"),
        ),
        RULE=job.rule,
        REAL=tl.float64 if job.is_double else tl.float32,
        LEVELS=job.rois.levels is not None,
        BLOCK=BLOCK,
        **launch.OPTIONS,
    )


def forward(call, maps, rois, tangent, scales, rule, output):
    """Writes ``output`` (K, C, P, Q)."""
    job = launch.Job(call, maps, output, rois, tangent, scales, rule)
    if job.is_empty:
        return output.zero_()
    count, channels, *bins = output.shape
    for level, features in enumerate(maps):
        image_of, numbers, samples, _ = _frames(job, level)
        steps = launch.strides(features), launch.strides(output)
        innermost = channels > 1 and all(step[1] == 1 for step in steps)
        block_c, block_b = BLOCKS[innermost]
        blocks = launch.quotient(math.prod(bins), block_b) * launch.quotient(channels, block_c)
        (output,) = call(
            forward_of_turned,
            launch.programs(count * blocks),
            (
                *(features, image_of, numbers, samples),
                *(count, channels, *features.shape[2:], *bins, *steps[0], *steps[1]),
                launch.before(output, features),
            ),
            (output,),
            INNERMOST=innermost,
            BLOCK_C=block_c,
            BLOCK_B=block_b,
            **launch.OPTIONS,
        )
    return output


def adjoint(call, d_output, rois, tangent, scales, rule, d_features):
    """Writes each of ``d_features`` (N, C, H, W)."""
    job = launch.Job(call, d_features, d_output, rois, tangent, scales, rule)
    if job.is_empty:
        return [d_map.zero_() for d_map in d_features]
    count, channels, *bins = d_output.shape
    block_c = CHANNELS // 2 if job.is_double else CHANNELS
    results = []
    for level, d_map in enumerate(d_features):
        image_of, numbers, samples, extents = _frames(job, level)
        bits = launch.touched(call, image_of, extents, d_map.shape, TILE)
        tiles, words = bits.shape
        results += call(
            adjoint_of_turned,
            launch.programs(tiles * launch.quotient(channels, block_c)),
            (
                *(d_output, numbers, samples, bits),
                *(count, channels, *d_map.shape[2:], *bins, words),
                *(*launch.strides(d_output), *launch.strides(d_map)),
            ),
            (d_map,),
            BLOCK_C=block_c,
            TILE_Y=TILE[0],
            TILE_X=TILE[1],
            **launch.OPTIONS | {"num_warps": 1},
        )
    return results


def box_gradient(*given):
    raise NotImplementedError(
        "on GPUs boxes that turn have a forward and an adjoint: for gradients in boxes, and "
        "tangents of them, take arrays on the CPU"
    )
