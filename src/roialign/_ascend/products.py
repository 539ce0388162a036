"""The kernels as matrix products: Out = A_y . F . A_x^T, tile by tile.

`axis_weights` writes the matrices A of docs/spec.md (3) as they are, zeros too: for each RoI A_y
(P, H), then A_x (Q, W), together `room` numbers. It fills the *window*, the pixels that a RoI
reaches, and leaves the other columns unwritten. `extents` (K, 2, 3) says the window's first and
last pixel, in y and in x. The weights are in one to three tables, one after another: value; or
value and derivative along a box tangent; or value and slopes in the box's start and end.

Coordinates, weights and sums are in float32; there is no float64. A program takes turns, so a grid
may be smaller than the work. Sizes are not specialised; the last strides are, where they are 1.
"""

import triton
import triton.language as tl

from roialign._triton.geometry import exponent, grid_of, inside, position, shares, tap
from roialign._triton.kernels import (
    OTHER_MAP,
    ROIS_PER_WORD,
    divided,
    ends,
    image_on,
    index_of,
    kernel,
    place_of,
    rounded,
    store_sums,
    whole,
)


@triton.jit
def tile(
    start, row, rows, column, columns, row_step, column_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of a matrix with so many rows and columns, those from (row, column) on, and zeros beyond."""
    r = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    c = (column + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    at = start + r * row_step + c * column_step
    return tl.load(at, (r < rows) & (c < columns), other=0).to(tl.float32)


@triton.jit
def window(extent):
    """The pixels that a RoI reaches: first and end in y, and in x."""
    first_y, last_y = tl.load(extent), tl.load(extent + 1)
    return first_y, last_y + 1, tl.load(extent + 3), tl.load(extent + 4) + 1


@triton.jit
def product(a, b, total):
    return tl.dot(a, b, total, input_precision="ieee")


@kernel("map", "levels_stride")
def axis_weights(
    boxes, image_index, levels, tangent,
    map, maps, count, images, height, width, bins_y, bins_x,
    scale_y, scale_x,
    boxes_stride, boxes_step, index_stride, levels_stride,
    image_of, extents, weights,
    RULE: tl.constexpr, TABLES: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_P: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Fills the matrices, `image_of` and `extents` (see `axis_taps`). A turn: an axis of a RoI."""
    images, maps = whole(images), whole(maps)
    height, width, bins_y, bins_x = whole(height), whole(width), whole(bins_y), whole(bins_x)
    room = bins_y * height + bins_x * width
    k = tl.arange(0, BLOCK_P).to(tl.int64)[:, None]
    for turn in range(tl.program_id(0), 2 * count, tl.num_programs(0)):
        axis, roi = divided(whole(turn), whole(2))  # 0: y, 1: x
        image = index_of(tl.load(image_index + roi * index_stride), images)
        if LEVELS:
            level = index_of(tl.load(levels + roi * levels_stride), maps)
            image = image_on(image, level, map)
        tl.store(image_of + roi, image, axis == 0)
        size, bins = tl.where(axis == 0, height, width), tl.where(axis == 0, bins_y, bins_x)
        scale = tl.where(axis == 0, scale_y, scale_x)
        matrix = weights + roi * room + axis * bins_y * height

        lo, hi, finite = ends(boxes + roi * boxes_stride, boxes_step, axis, None, tl.float32)
        start, bin, samples, clamped = grid_of(
            tl.where(k < bins, lo, 0),  # not scalars: triton-ascend cannot divide these
            tl.where(k < bins, hi, 0),
            scale,
            bins,
            RULE,
        )
        samples = tl.where(image >= 0, samples, 0)
        divisor = tl.maximum(samples, 1).to(tl.float32)
        slope_scale = tl.where(finite, scale, 0)

        first, end = inside(start, bin, tl.where(k < bins, samples, 0), k, size, False)
        low, _, _ = tap(position(start, bin, samples, k, first, False), size)
        high, _, _ = tap(position(start, bin, samples, k, end - 1, False), size)
        lowest = tl.min(tl.where(first < end, low, size))
        highest = tl.max(tl.where(first < end, tl.minimum(high + 1, size - 1), -1))
        at = extents + (roi * 2 + axis) * 3
        tl.store(at, tl.where(highest < 0, 0, lowest).to(tl.int32))
        tl.store(at + 1, highest.to(tl.int32))

        for column in range(lowest, highest + 1, SIDE):
            pixel = (column + tl.arange(0, SIDE)).to(tl.int64)[None, :]
            value = tl.zeros((BLOCK_P, SIDE), tl.float32)
            slope_lo, slope_hi = value, value
            for sample in range(tl.max(end - first)):
                j = first + sample
                lower, fraction, moves = tap(position(start, bin, samples, k, j, False), size)
                here, next = (j < end) & (pixel == lower), (j < end) & (pixel == lower + 1)
                value += tl.where(here, 1 - fraction, tl.where(next, fraction, 0))
                if TABLES > 1:
                    in_lo, in_hi = shares(bin, samples, bins, k, j, clamped, tl.float32)
                    sign = tl.where(here, -1.0, 1.0)
                    counted = (here | next) & moves
                    slope_lo += tl.where(counted, sign * in_lo, 0)
                    slope_hi += tl.where(counted, sign * in_hi, 0)
            to = matrix + k * size + pixel
            written = (k < bins) & (pixel <= highest)
            tl.store(to, value / divisor, written)
            slope_lo, slope_hi = slope_lo * slope_scale / divisor, slope_hi * slope_scale / divisor
            if TABLES == 2:
                v_lo = tl.load(tangent + roi * 4 + 1 - axis).to(tl.float32)
                v_hi = tl.load(tangent + roi * 4 + 3 - axis).to(tl.float32)
                sloped = (slope_lo != 0) | (slope_hi != 0)
                moved = tl.where(sloped, slope_lo * v_lo + slope_hi * v_hi, 0)
                tl.store(to + count * room, moved, written)
            if TABLES == 3:
                tl.store(to + count * room, slope_lo, written)
                tl.store(to + 2 * count * room, slope_hi, written)


@kernel("count", "output_p", but="features_w")
def forward(
    features, image_of, extents, weights,
    count, channels, height, width, bins_y, bins_x,
    features_n, features_c, features_h, features_w,
    output_k, output_c, output_p, output_q,
    before, output,
    TABLES: tl.constexpr, BLOCK_P: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """docs/spec.md (4), and with TABLES 2 its derivative (8). One turn: a channel of a RoI."""
    height, width, bins_y, bins_x = whole(height), whole(width), whole(bins_y), whole(bins_x)
    room = bins_y * height + bins_x * width
    next_table = count * room
    for turn in range(tl.program_id(0), count * channels, tl.num_programs(0)):
        c, roi = divided(whole(turn), channels)
        image = tl.load(image_of + roi)
        plane = features + tl.maximum(image, 0) * features_n + c * features_c
        matrix_y = weights + roi * room
        matrix_x = matrix_y + bins_y * height
        slopes_y, slopes_x = matrix_y + next_table, matrix_x + next_table
        first_y, end_y, first_x, end_x = window(extents + roi * 6)
        for p in range(0, tl.where(image == OTHER_MAP, 0, bins_y), BLOCK_P):
            for q in range(0, bins_x, BLOCK_P):
                total = tl.zeros((BLOCK_P, BLOCK_P), tl.float32)
                for y in range(first_y, end_y, SIDE):
                    along = tl.zeros((SIDE, BLOCK_P), tl.float32)
                    v_along = along
                    for x in range(first_x, end_x, SIDE):
                        f = tile(plane, y, end_y, x, end_x, features_h, features_w, SIDE, SIDE)
                        a_x = tile(matrix_x, q, bins_x, x, end_x, width, 1, BLOCK_P, SIDE)
                        along = product(f, tl.trans(a_x), along)
                        if TABLES == 2:
                            v_x = tile(slopes_x, q, bins_x, x, end_x, width, 1, BLOCK_P, SIDE)
                            v_along = product(f, tl.trans(v_x), v_along)
                    a_y = tile(matrix_y, p, bins_y, y, end_y, height, 1, BLOCK_P, SIDE)
                    if TABLES == 2:
                        v_y = tile(slopes_y, p, bins_y, y, end_y, height, 1, BLOCK_P, SIDE)
                        total = product(a_y, v_along, product(v_y, along, total))
                    else:
                        total = product(a_y, along, total)
                r = (p + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
                s = (q + tl.arange(0, BLOCK_P)).to(tl.int64)[None, :]
                at = output + roi * output_k + c * output_c + r * output_p + s * output_q
                tl.store(at, rounded(total, output.dtype.element_ty), (r < bins_y) & (s < bins_x))


@kernel("count", "d_features_h", but="d_output_q")
def adjoint(
    d_output, extents, weights, bits,
    count, channels, images, height, width, bins_y, bins_x, words,
    d_output_k, d_output_c, d_output_p, d_output_q,
    d_features_n, d_features_c, d_features_h, d_features_w,
    d_features,
    TABLES: tl.constexpr, BLOCK_P: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """docs/spec.md (5), with TABLES 2 its derivative (8). One turn: a channel of a map's tile.

    It adds the RoIs that reach the tile, in their order, and writes each pixel once.
    """
    height, width, bins_y, bins_x = whole(height), whole(width), whole(bins_y), whole(bins_x)
    room = bins_y * height + bins_x * width
    next_table = count * room
    tiles = images * tl.cdiv(height, SIDE) * tl.cdiv(width, SIDE)
    turns = (tiles * channels).to(tl.int32)
    for turn in range(tl.program_id(0), turns, tl.num_programs(0)):
        c, place = divided(whole(turn), channels)
        image, tile_y, tile_x = place_of(place, height, width, SIDE, SIDE)
        y, x = tile_y * SIDE, tile_x * SIDE
        row, column = y + tl.arange(0, SIDE)[:, None], x + tl.arange(0, SIDE)[None, :]
        total = tl.zeros((SIDE, SIDE), tl.float32)
        for word in range(words):
            rest = tl.load(bits + place * words + word)
            while rest != 0:
                lowest = rest & -rest
                rest -= lowest
                roi = whole(word * ROIS_PER_WORD + exponent(lowest))
                plane = d_output + roi * d_output_k + c * d_output_c
                matrix_y = weights + roi * room
                matrix_x = matrix_y + bins_y * height
                slopes_y, slopes_x = matrix_y + next_table, matrix_x + next_table
                added = tl.zeros((SIDE, SIDE), tl.float32)
                for p in range(0, bins_y, BLOCK_P):
                    a_y = tl.trans(tile(matrix_y, p, bins_y, y, height, height, 1, BLOCK_P, SIDE))
                    if TABLES == 2:
                        v_y = tile(slopes_y, p, bins_y, y, height, height, 1, BLOCK_P, SIDE)
                        v_y = tl.trans(v_y)
                    for q in range(0, bins_x, BLOCK_P):
                        g = tile(
                            plane, p, bins_y, q, bins_x, d_output_p, d_output_q, BLOCK_P, BLOCK_P
                        )
                        a_x = tile(matrix_x, q, bins_x, x, width, width, 1, BLOCK_P, SIDE)
                        none = tl.zeros((BLOCK_P, SIDE), tl.float32)
                        along = product(g, a_x, none)
                        if TABLES == 2:
                            v_x = tile(slopes_x, q, bins_x, x, width, width, 1, BLOCK_P, SIDE)
                            added = product(a_y, product(g, v_x, none), product(v_y, along, added))
                        else:
                            added = product(a_y, along, added)
                first_y, end_y, first_x, end_x = window(extents + roi * 6)
                in_y, in_x = (
                    (row >= first_y) & (row < end_y),
                    (column >= first_x) & (column < end_x),
                )
                total += tl.where(in_y & in_x, added, 0)  # beyond the window are no weights
        plane = d_features + image * d_features_n + c * d_features_c
        at = plane + row * d_features_h + column * d_features_w
        tl.store(at, rounded(total, d_features.dtype.element_ty), (row < height) & (column < width))


@kernel("count", "features_h", but="d_output_q")
def box_gradient(
    d_output, features, image_of, extents, weights,
    count, channels, height, width, bins_y, bins_x,
    d_output_k, d_output_c, d_output_p, d_output_q,
    features_n, features_c, features_h, features_w,
    partial,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """docs/spec.md (7), of some channels of a RoI: x1, y1, x2, y2 in `partial` (blocks, K, 4).

    <G, A_y . F . A_x^T> is <A_y^T . G . A_x, F>: one turn makes the former's adjoint, tile by tile.
    """
    height, width, bins_y, bins_x = whole(height), whole(width), whole(bins_y), whole(bins_x)
    room = bins_y * height + bins_x * width
    next_table = count * room
    for turn in range(tl.program_id(0), count * tl.cdiv(channels, BLOCK_C), tl.num_programs(0)):
        roi, block = divided(whole(turn), count)
        image = tl.maximum(tl.load(image_of + roi), 0)
        matrix_y = weights + roi * room
        matrix_x = matrix_y + bins_y * height
        lo_matrix_y, lo_matrix_x = matrix_y + next_table, matrix_x + next_table
        hi_matrix_y, hi_matrix_x = lo_matrix_y + next_table, lo_matrix_x + next_table
        first_y, end_y, first_x, end_x = window(extents + roi * 6)
        none = tl.zeros((SIDE, SIDE), tl.float32)
        x1, y1, x2, y2 = none, none, none, none
        for y in range(first_y, end_y, SIDE):
            for x in range(first_x, end_x, SIDE):
                for p in range(0, bins_y, BLOCK_P):
                    a_y = tl.trans(tile(matrix_y, p, bins_y, y, end_y, height, 1, BLOCK_P, SIDE))
                    lo_y = tile(lo_matrix_y, p, bins_y, y, end_y, height, 1, BLOCK_P, SIDE)
                    hi_y = tile(hi_matrix_y, p, bins_y, y, end_y, height, 1, BLOCK_P, SIDE)
                    lo_y, hi_y = tl.trans(lo_y), tl.trans(hi_y)
                    for q in range(0, bins_x, BLOCK_P):
                        a_x = tile(matrix_x, q, bins_x, x, end_x, width, 1, BLOCK_P, SIDE)
                        lo_x = tile(lo_matrix_x, q, bins_x, x, end_x, width, 1, BLOCK_P, SIDE)
                        hi_x = tile(hi_matrix_x, q, bins_x, x, end_x, width, 1, BLOCK_P, SIDE)
                        for turned in range(tl.minimum(BLOCK_C, channels - block * BLOCK_C)):
                            c = block * BLOCK_C + turned
                            plane = features + image * features_n + c * features_c
                            row = d_output + roi * d_output_k + c * d_output_c
                            f = tile(plane, y, end_y, x, end_x, features_h, features_w, SIDE, SIDE)
                            g = tile(
                                row, p, bins_y, q, bins_x, d_output_p, d_output_q, BLOCK_P, BLOCK_P
                            )
                            bins = tl.zeros((BLOCK_P, SIDE), tl.float32)
                            along = product(g, a_x, bins)
                            x1 += f * product(a_y, product(g, lo_x, bins), none)
                            y1 += f * product(lo_y, along, none)
                            x2 += f * product(a_y, product(g, hi_x, bins), none)
                            y2 += f * product(hi_y, along, none)
        store_sums(partial + (block * count + roi) * 4, x1, y1, x2, y2)
