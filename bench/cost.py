"""`python -m bench.cost`: what the GPU kernels must do for each workload, and the time to expect.

Counted from a workload's own boxes, and from the launches as they are made; nothing runs, so it
needs torch and Triton and no GPU. The time is the longest of what each count takes at an H200's
rates, as if all of it overlapped: expected, not measured. Latency and what a launch costs are not
in it, nor what makes taps. So a GPU takes longer. `--write` writes the table of docs/kernels.md.
"""

import argparse
import functools
import sys
from itertools import product

import numpy as np

from bench import floor, reference, report, run
from bench.environments import ROOT
from bench.gpu import GENERAL, USUAL, tuned
from bench.peers import LAYOUTS, MAIN, OPERATIONS, ROUNDING
from roialign import _checks

from triton_offline import Problem, memory  # isort: skip (found by the reference)

SECTOR, WARP = 32, 32  # the bytes that L1 moves at least, the lanes of a warp
PROCESSORS, CLOCK = 132, 1.755e9  # of an H200
ISSUED = 0.75  # of the slots for instructions: an assumption
RATES = {  # per second: assumptions
    "DRAM": 4.3e12,
    "L2": 5.5e12,
    "L1": 128 * PROCESSORS * CLOCK,
    "instructions": ISSUED * 128 * PROCESSORS * CLOCK,
}
# Of machine code of sm_90, as Triton 3.9.0 compiles it, instructions of a lane for each channel:
# of the general kernels in NCHW and channels_last, for a value that is loaded, for a step over y,
# and for a program (of the adjoint: for a RoI that reaches its tile)
INSTRUCTIONS = {
    "forward": ((10.6, 5.9, 60), (7.4, 10.9, 45)),
    "adjoint": ((8.6, 6.0, 15.8), (6.2, 5.1, 9.6)),
    "box_gradient": ((21.5, 25.5, 86), (18.0, 28.3, 79)),
}
# of all loops of `gather`, of few taps and of any number, by (output in NCHW, 16 bits)
GATHER = ((2.97, 3.05), (4.23, 3.72)), ((4.65, 4.0), (5.7, 4.9))
# of `scatter`, per value of a tile, in NCHW and channels_last: for a RoI that reaches it, and if it
# has weight there; for a row of its bins, and for a bin of the general loop
SCATTER = (1.3, 4.4, 6.0, 5.9), (1.1, 3.2, 5.7, 5.7)
# of `box_rows`, of any number of taps and of few, by 16 bits: for a value; and of 32 channels for a
# block of CHANNELS, for the sums of a pair of taps, and for each of 16 pairs of a step
BOX_ROWS = ((2.7, 3.7), 10.1, 3.8), ((2.2, 3.2), 11.6, 0)
# of torchvision's kernels: for an output, and for a sample of it
PEER, PEER_OUTPUT, PEER_SAMPLE = "torchvision", 274, 91.5
WEIGHTS = {"forward": 1, "adjoint": 1, "box_gradient": 3}  # of a tap: the latter has slopes too


def launched(workload, dtype, layout, convention):
    """The arrays of a workload's calls."""
    images, channels, *size = workload.shape
    shapes = {"images": images, "channels": channels, "size": tuple(size)}
    shapes |= {"bins": workload.output_size, "count": workload.rois_number}
    scales, rule = _checks.rule(workload.scale, workload.sampling, convention, "mean")
    return Problem(dtype, last=layout == "nhwc", **shapes, scales=scales, rule=rule)


@functools.lru_cache(1)
def taps_of(workload, convention):
    """The RoIs, and their taps."""
    rois = workload.rois()
    return rois, reference.axes_of(workload, rois, convention)


def cost(workload, operation, dtype="float32", layout="nchw", convention="asymmetric", by="ours"):
    """Counts by name, of bytes where it says so; those of lanes too that wait for others.

    `by`: our kernels, the GENERAL ones of them, or those of the PEER.
    """
    rois, axes = taps_of(workload, convention)
    itemsize = 4 if dtype == "float32" else 2
    through, _ = floor.traffic(operation, workload, rois, axes, itemsize, layout)
    if by == PEER:
        return of_peer(workload, operation, rois, convention, axes, itemsize, through)
    changed = {name: lambda *_: False for name in USUAL.values()} if by == GENERAL else {}
    with tuned(**changed):
        launches = launched(workload, dtype, layout, convention).launches(operation)
    kernels = {each.kernel: each for each in launches}
    if "plan" in kernels:
        return gathered(workload, rois, axes, launches, kernels, itemsize, through)
    if "scatter" in kernels:
        return scattered(workload, axes, launches, itemsize, through)
    (constants,) = (each.constants for each in launches if "INNERMOST" in each.constants)
    weights = WEIGHTS[operation]
    of_box, row = bins, workload.shape[3]
    if operation == "adjoint":
        of_box, row = tiles, workload.output_size[1]
    counts = [
        (*count(lanes_y, lanes_x, row, itemsize), table)
        for y, x in axes
        for lanes_y, lanes_x, table in of_box(y, x, weights, constants)
    ]
    values, sectors, loads, outer, started, table = np.sum(counts, 0, dtype=np.int64).tolist()
    channels, last = workload.shape[1], constants["INNERMOST"]
    if last:  # lanes go along channels
        taps = sum((y.weights != 0).sum() * (x.weights != 0).sum() for y, x in axes)
        sectors = taps * itemsize / SECTOR
    blocks = -(-channels // constants["BLOCK_C"])
    lanes = blocks * constants["BLOCK_C"]  # of the channels
    d_output = np.prod(workload.output_shape) * itemsize if operation == "box_gradient" else 0
    steps = weights * loads + (4 if weights == 3 else 1) * outer
    found = {
        # bytes: what is touched of the map, and the output, once; what each program reads, once;
        # the sectors that each load of a warp touches
        "DRAM": through,
        "L2": values * channels * itemsize + table * blocks + d_output,
        "L1": sectors * channels * SECTOR + 2 * d_output,
        "instructions": lanes * np.dot((loads, outer, started), INSTRUCTIONS[operation][last]),
        "loads": loads * lanes,
        "multiply-adds": steps * lanes,
        "programs": sum(each.grid[0] for each in launches),
        "private": memory(launches),  # bytes: tables, bits, partial sums
    }
    return {name: int(number) for name, number in found.items()}


def gathered(workload, rois, axes, launches, kernels, itemsize, through):
    """Of what takes sorted rows: a program's pixels come from L2 once, and then from L1."""
    main = kernels.get("gather") or kernels["box_rows"]
    numbers, constants, sloped = main.arguments, main.constants, main.kernel == "box_rows"
    lanes = constants["ROWS"] * constants["BINS"]
    taps, channels, (_, width) = constants["TAPS"], workload.shape[1], workload.shape[2:]
    rows = in_order(workload, rois, kernels["plan"].constants)
    values, groups, steps = 0, 0, 0
    for program in chunks(rows, numbers["steps"] * constants["ROWS"]):
        touched = []
        for step in chunks(program, constants["ROWS"]):
            chosen = [(axes[k][0].weights[p] != 0, axes[k][1]) for k, p in step]
            of_x = max(((x.weights != 0).sum(1).max(initial=0) for _, x in chosen), default=0)
            of_y = max((y.sum() for y, _ in chosen), default=0)
            of_y = -(-of_y // 4) * 4 if sloped else of_y
            groups += taps if taps else of_y * -(-of_x // 4)  # of four taps of x
            steps += 1
        for k, p in program:
            y, x = axes[k]
            lines = y.pixels[y.weights[p] != 0]
            touched.append((rois[k, 0] * workload.shape[2] + lines[:, None]) * width + x.pixels)
        values += len(np.unique(np.concatenate([each.ravel() for each in touched])))
    loads, output = 4 * lanes * groups, np.prod(workload.output_shape) * itemsize
    if sloped:
        (of_value, of_pair, of_step), short = BOX_ROWS[taps > 0], itemsize == 2
        blocks = 32 * channels / constants["CHANNELS"]
        instructions = loads * (channels * of_value[short] + blocks * of_pair)
        instructions += 16 * lanes * steps * blocks * of_step
    else:
        of_value = GATHER[not taps][not constants["LAST"]][itemsize == 2]
        instructions = loads * channels * of_value
    found = {
        "DRAM": through,
        "L2": values * channels * itemsize + output,
        "L1": loads * channels * itemsize,
        "instructions": instructions,
        "loads": loads * channels,
        "multiply-adds": loads * channels,
        "programs": sum(each.grid[0] for each in launches),
        "private": memory(launches),
    }
    packed = [workload.shape] * kernels["plan"].constants["PACK"]
    packed += [workload.output_shape] * ("pack" in kernels)
    return with_packed(found, packed, itemsize)


def with_packed(found, shapes, itemsize):
    """And arrays that are copied: read and written."""
    for shape in shapes:
        moved = 2 * np.prod(shape) * itemsize
        found["DRAM"], found["L2"] = found["DRAM"] + moved, found["L2"] + moved
    return {name: int(number) for name, number in found.items()}


def of_peer(workload, operation, rois, convention, axes, itemsize, through):
    """A lane makes an output of all its samples. Their adjoint adds 4 pixels of each by atomics.

    An atomic addition moves a sector; what each RoI touches comes from L2 once.
    """
    pairs = reference.samples(workload, rois, convention)
    samples = sum(max(y.n, 0) * max(x.n, 0) for y, x in pairs)
    bins = np.prod(workload.output_shape[1:])  # of a RoI, in all channels
    outputs, samples = len(rois) * bins, samples * bins
    values = sum(y.pixels.size * x.pixels.size for y, x in axes) * workload.shape[1] * itemsize
    atomics = 4 * samples * (operation == "adjoint")
    found = {
        "DRAM": through,
        "L2": (SECTOR * atomics or values) + outputs * itemsize,
        "L1": 4 * samples * itemsize,
        "instructions": outputs * PEER_OUTPUT + samples * PEER_SAMPLE,
        "loads": 4 * samples,
        "multiply-adds": 4 * samples,
        "programs": 0,
        "private": 0,
    }
    return {name: int(number) for name, number in found.items()}


def scattered(workload, axes, launches, itemsize, through):
    """Of the adjoint by rows of the map: a program reads each bin that it needs from L2 once."""
    _, columns, scatter = launches
    tile, channels = scatter.constants["TILE"], workload.shape[1]
    reached, lines, pairs, general, loads, bins = 0, 0, 0, 0, 0, 0
    for y, x in axes:
        if not (y.pixels.size and x.pixels.size):
            continue
        of_y, of_x = ((axis.weights != 0).sum(0) for axis in (y, x))  # bins of each pixel
        parts = tiles_of_axis(x, tile)
        reached += len(parts) * (y.pixels[-1] - y.pixels[0] + 1)
        lines += len(parts) * (of_y != 0).sum()
        if max(of_y.max(), of_x.max()) <= 2:
            pairs += len(parts) * of_y.sum()
        else:
            general += len(parts) * of_y.sum() * of_x.max()
        loads += of_y.sum() * of_x.sum()
        bins += of_y.sum() * sum(len(np.unique(part[part >= 0])) for part in parts)
    each = SCATTER[scatter.constants["LAST"]]
    steps = np.dot((reached, lines, pairs, general), each)
    found = {
        "DRAM": through,
        "L2": bins * channels * itemsize + np.prod(workload.shape) * itemsize,
        "L1": loads * channels * itemsize,
        "instructions": steps * tile * channels,
        "loads": loads * channels,
        "multiply-adds": (2 * pairs + general) * tile * channels,
        "programs": sum(each.grid[0] for each in launches),
        "private": memory(launches),
    }
    packed = [workload.output_shape] * columns.constants["PACK"]
    return with_packed(found, packed, itemsize)


def chunks(rows, size):
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def in_order(workload, rois, constants):
    """[K * P, 2]: RoI and row of bins, sorted as `plan` sorts them, but for classes of area."""
    bins, scale = workload.output_size[0], workload.scale
    at = (np.arange(bins) + 0.5) / bins
    y = (rois[:, 2:3] + (rois[:, 4:] - rois[:, 2:3]) * at) * scale // constants["TILE_Y"]
    x = (rois[:, 1] + rois[:, 3]) / 2 * scale // constants["TILE_X"]
    x = np.where(y % 2, -x[:, None], x[:, None])
    image = np.broadcast_to(rois[:, :1], y.shape)
    order = np.lexsort([x.ravel(), y.ravel(), image.ravel()])
    return np.stack(np.unravel_index(order, y.shape), 1)


def expected(counts):
    """(seconds, what takes them)"""
    return max((counts[name] / rate, name) for name, rate in RATES.items())


def count(lanes_y, lanes_x, row, itemsize):
    """Of one program, per channel: values, sectors, loads, steps over y, lanes.

    Each lane [L, most], -1 for none, has its rows and columns of an array with rows of that length.
    """
    lanes = len(lanes_y)
    warp = min(WARP, lanes)
    there = (lanes_y >= 0)[:, :, None] & (lanes_x >= 0)[:, None]
    most_y, most_x = ((of_lanes >= 0).sum(1).max() for of_lanes in (lanes_y, lanes_x))
    at = lanes_y[:, :, None] * row + lanes_x[:, None]  # [L, most of y, most of x]
    sectors = np.where(there, at * itemsize // SECTOR, -1)
    sectors = np.sort(sectors.reshape(lanes // warp, warp, *at.shape[1:]), axis=1)
    new = sectors >= 0
    new[:, 1:] &= sectors[:, 1:] != sectors[:, :-1]
    return len(np.unique(at[there])), new.sum(), lanes * most_y * most_x, lanes * most_y, lanes


def bins(y, x, weights, constants):
    """Of one RoI, for each program: its lanes that have bins, their pixels; bytes of a table."""
    of_y, of_x = y.weights != 0, x.weights != 0
    pixels_y, pixels_x = listed(of_y, y.pixels), listed(of_x, x.pixels)
    p, q = np.indices((len(of_y), len(of_x))).reshape(2, -1)
    entry = 4 + 4 * weights  # a pixel, and its weights
    table = (len(of_y) + len(of_x)) * 16 + (of_y.sum() + of_x.sum()) * entry
    lanes = constants["BLOCK_B"]
    for first in range(0, len(p), lanes):
        block = np.s_[first : first + lanes]
        rest = ((0, max(0, first + lanes - len(p))), (0, 0))  # lanes without a bin
        none = {"constant_values": -1}
        yield (
            np.pad(pixels_y[p[block]], rest, **none),
            np.pad(pixels_x[q[block]], rest, **none),
            table,
        )


def tiles(y, x, weights, constants):
    """The same of the adjoint: a program has a tile of pixels, with their bins."""
    sizes = constants["TILE_Y"], constants["TILE_X"]
    for of_y, of_x in product(*map(tiles_of_axis, (y, x), sizes)):
        entries = (of_y >= 0).sum() + (of_x >= 0).sum()
        lanes_y, lanes_x = np.repeat(of_y, sizes[1], axis=0), np.tile(of_x, (sizes[0], 1))
        yield lanes_y, lanes_x, 24 + 8 * sum(sizes) + 4 * entries


def tiles_of_axis(axis, size):
    """[size, most] of each tile from the first to the last that is reached: its pixels' bins."""
    bins = len(axis.weights)
    if not axis.pixels.size:
        return []
    first, last = axis.pixels[[0, -1]] // size
    chosen = np.zeros(((last + 1) * size, bins), bool)
    chosen[axis.pixels] = axis.weights.T != 0
    parts = chosen.reshape(-1, size, bins)[first:]
    return [listed(part, np.arange(bins)) for part in parts]


def listed(chosen, values):
    """[R, most]: those of the values [V] that a row of `chosen` [R, V] takes, and then -1."""
    count = chosen.sum(1)
    order = np.argsort(~chosen, axis=1, kind="stable")[:, : count.max(initial=0)]
    return np.where(np.arange(order.shape[1]) < count[:, None], values[order], -1)


# what a page shows
PAGE, SHOWN = ROOT / "docs" / "kernels.md", ("W1", "W4")
BEGIN, END = "<!-- cost:begin -->", "<!-- cost:end -->"
COLUMNS = (  # title, by, dtype, layout
    ("NCHW", "ours", "float32", "nchw"),
    ("channels_last", "ours", "float32", "nhwc"),
    ("bfloat16, channels_last", "ours", "bfloat16", "nhwc"),
    ("general kernels, NCHW", GENERAL, "float32", "nchw"),
    ("torchvision", PEER, "float32", "nchw"),
)


def page():
    """The table of PAGE: microseconds, and what takes them."""
    lines = []
    for name, operation in product(SHOWN, MAIN):
        workload, cells = run.WORKLOADS[name], []
        for _, by, dtype, layout in COLUMNS:
            if by == PEER and operation == "box_gradient":  # they have none
                cells.append("-")
                continue
            counts = cost(workload, operation, dtype, layout, by=by)
            seconds, of = expected(counts)
            cells.append(f"{1e6 * seconds:.0f} {of}")
        lines.append([f"{name} {OPERATIONS[operation].title.lower()}", *cells])
    return report.markdown(["us", *(title for title, *_ in COLUMNS)], lines)


def main(arguments=None):
    parser = argparse.ArgumentParser("python -m bench.cost", description=__doc__)
    add = parser.add_argument
    add("workloads", nargs="*", default=list(run.WORKLOADS))
    add("--dtype", default="float32", choices=ROUNDING)
    add("--layout", default="nchw", choices=LAYOUTS)
    add("--write", action="store_true", help="the table of docs/kernels.md")
    given = parser.parse_args(arguments)
    if given.write:
        report.rewrite(PAGE, page(), BEGIN, END)
        return
    lines = []
    for name, operation in product(given.workloads, MAIN):
        counts = cost(run.WORKLOADS[name], operation, given.dtype, given.layout)
        seconds, of = expected(counts)
        numbers = [f"{number:.4g}" for number in counts.values()]
        times = [f"{1e3 * seconds:.3g}", of, f"{1e3 * counts['DRAM'] / RATES['DRAM']:.3g}"]
        lines.append([f"{name} {OPERATIONS[operation].title.lower()}", *numbers, *times])
    print(f"Expected on an H200, not measured: {given.dtype}, {given.layout}.\n")
    print(report.markdown(["", *counts, "expected, ms", "of", "copy floor, ms"], lines))


if __name__ == "__main__":
    sys.exit(main())
