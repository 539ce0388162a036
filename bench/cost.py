"""`python -m bench.cost`: what the GPU kernels must do for each workload, and the time to expect.

Counted from a workload's own boxes, and from the launches as they are made; nothing runs, so it
needs torch and Triton and no GPU. The time is the longest of what each count takes at an H200's
rates, as if all of it overlapped: expected, not measured. Latency, what a launch costs and what is
outside of the innermost loop are not in it, so a GPU takes longer.
"""

import argparse
import sys
from dataclasses import astuple, dataclass

import numpy as np
import torch

from bench import floor, reference, report, run
from roialign._triton import launch

SECTOR, WARP = 32, 32  # the bytes that L1 moves at least, the lanes of a warp
PROCESSORS, CLOCK = 132, 1.755e9  # of an H200
RATES = {  # per second: assumptions
    "DRAM": 4.3e12,
    "L2": 5.5e12,
    "L1": 128 * PROCESSORS * CLOCK,
    "instructions": 128 * PROCESSORS * CLOCK,
}
# of the innermost loop per value that it loads, in NCHW and channels_last, as Triton 3.9.0 compiles
# it for sm_90
INSTRUCTIONS = {"forward": (10.6, 7.5), "adjoint": (8.6, 6.2), "box_gradient": (21.5, 18.0)}


@dataclass
class Cost:
    dram: int  # bytes: what is touched of the map, and the output, once
    l2: int  # bytes: what each program reads, once
    l1: int  # bytes: the sectors that each load of a warp touches
    instructions: int  # of lanes, those too that wait while others of their program load
    loads: int  # likewise
    multiply_adds: int
    programs: int
    private: int  # bytes: tables, bits, partial sums

    @property
    def expected(self):
        """(seconds, what takes them)"""
        counts = astuple(self)[: len(RATES)]
        return max((n / rate, name) for n, (name, rate) in zip(counts, RATES.items(), strict=False))


class Launches:
    """An operation's kernels: their programs, private memory, and the constants of the last."""

    def __init__(self, workload, operation, dtype, layout):
        self.programs, self.private, self.constants = 0, 0, {}
        kind = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        features, output = (
            torch.empty(shape, dtype=getattr(torch, dtype), device="meta", memory_format=kind)
            for shape in (workload.shape, workload.output_shape)
        )
        boxes = launch.New((workload.rois_number, 4), "float32")
        index = launch.New((workload.rois_number,), "int64")
        # of the rule only the number of samples counts
        rule = (1.0, 1.0, workload.sampling, 0.0, 0.0, 0.0, 1.0, False)
        arguments = {
            "forward": (features, boxes, index, None, rule, output),
            "adjoint": (output, boxes, index, None, rule, features),
            "box_gradient": (output, features, boxes, index, rule),
        }[operation]
        getattr(launch, operation)(self._call, *arguments)

    def _call(self, kernel, grid, inputs, outputs, **constants):
        self.programs += grid[0]
        self.constants = constants
        made = (output for output in outputs if isinstance(output, launch.New))
        self.private += sum(int(np.prod(new.shape)) * np.dtype(new.dtype).itemsize for new in made)
        return outputs


def cost(workload, operation, dtype="float32", layout="nchw", convention="asymmetric"):
    rois = workload.rois()
    axes = reference.axes(
        rois, workload.shape, workload.output_size, workload.scale, workload.sampling, convention
    )
    itemsize = 4 if dtype == "float32" else 2
    through, _ = floor.traffic(
        operation, workload.shape, workload.output_shape, rois, axes, itemsize, layout
    )
    launches = Launches(workload, operation, dtype, layout)
    constants = launches.constants
    count = by_columns if operation == "adjoint" else by_rows
    boxes = [count(y, x, itemsize, constants) for y, x in axes]
    values, table, sectors, loads, outer = np.sum(boxes, 0, dtype=np.int64)
    channels, parts = workload.shape[1], parts_of(constants)
    if constants["INNERMOST"]:  # lanes go along channels
        taps = sum(y_weights.sum() * x_weights.sum() for y_weights, x_weights in map(used, axes))
        sectors = taps * itemsize / SECTOR
    blocks = -(-channels // constants["BLOCK_C"])
    channels_of_blocks = blocks * constants["BLOCK_C"]
    d_output = np.prod(workload.output_shape) * itemsize if operation == "box_gradient" else 0
    loads *= channels_of_blocks
    return Cost(
        dram=int(through),
        l2=int(values * channels * itemsize + table * blocks + d_output),
        l1=int(sectors * channels * SECTOR + 2 * d_output),
        instructions=int(loads * INSTRUCTIONS[operation][constants["INNERMOST"]]),
        loads=int(loads),
        multiply_adds=int(parts * loads + (4 if parts == 3 else 1) * outer * channels_of_blocks),
        programs=launches.programs,
        private=launches.private,
    )


def parts_of(constants):
    """Weights of an entry: the box gradient has slopes too."""
    return constants.get("PARTS", 3)


def used(pair):
    """[bins, pixels] bool of y and of x."""
    return [axis.weights != 0 for axis in pair]


def by_rows(y, x, itemsize, constants):
    """Of one RoI: values and bytes of the table that programs read, sectors, loads, steps over y.

    Per channel, but the table is read for a block of channels. A program has BLOCK_B bins.
    """
    of_y, of_x = used((y, x))
    bins_y, bins_x = len(of_y), len(of_x)
    lanes = constants["BLOCK_B"]
    entries = of_y.sum() + of_x.sum()
    entry = 4 + 4 * parts_of(constants)  # bytes: a pixel, and its weights
    values = table = loads = outer = 0
    for block in range(0, bins_y * bins_x, lanes):
        b = np.arange(block, min(block + lanes, bins_y * bins_x))
        rows, columns = of_y[np.unique(b // bins_x)], of_x[np.unique(b % bins_x)]
        values += rows.any(0).sum() * columns.any(0).sum()
        table += (bins_y + bins_x) * 16 + entries * entry
        most_y, most_x = rows.sum(1).max(), columns.sum(1).max()
        loads += most_y * most_x * lanes
        outer += most_y * lanes
    b = np.arange(-(-bins_y * bins_x // WARP) * WARP)
    exists = b < bins_y * bins_x
    pixels_y = listed(of_y, y.pixels)[np.where(exists, b // bins_x, 0)]  # [lanes, most]
    pixels_x = listed(of_x, x.pixels)[b % bins_x]
    sectors = np.where(pixels_x < 0, -1, pixels_x * itemsize // SECTOR)
    keys = pixels_y[:, :, None] * 2**32 + sectors[:, None, :]
    there = exists[:, None, None] & (pixels_y >= 0)[:, :, None] & (sectors >= 0)[:, None, :]
    return values, table, distinct(np.where(there, keys, -1)), loads, outer


def by_columns(y, x, itemsize, constants):
    """The same of the adjoint: a program has a tile of pixels, and those RoIs that reach it."""
    bins_x = len(x.weights)
    tile = constants["TILE_Y"], constants["TILE_X"]
    maps = [whole_tiles(axis, length) for axis, length in zip((y, x), tile, strict=True)]
    if any(A.size == 0 for A in maps):
        return 0, 0, 0, 0, 0
    of_y, of_x = (A.reshape(len(A), -1, length) for A, length in zip(maps, tile, strict=True))
    tiles = of_y.shape[1] * of_x.shape[1]
    values = of_y.any(2).sum() * of_x.any(2).sum()
    table = tiles * (24 + 8 * sum(tile))
    table += 4 * (of_y.sum() * of_x.shape[1] + of_x.sum() * of_y.shape[1])
    most_y, most_x = (A.sum(0).max(1) for A in (of_y, of_x))  # of each row of tiles
    loads = most_y.sum() * most_x.sum() * np.prod(tile)
    outer = most_y.sum() * len(most_x) * np.prod(tile)
    bins_of_y, bins_of_x = (listed(A.T, np.arange(len(A))) for A in maps)  # [pixels, most]
    at = (bins_of_y[:, None, :, None] * bins_x + bins_of_x[None, :, None, :]) * itemsize // SECTOR
    there = (bins_of_y >= 0)[:, None, :, None] & (bins_of_x >= 0)[None, :, None, :]
    keys = np.where(there, at, -1)  # [rows, columns, most, most]
    rows, columns, *most = keys.shape
    lines = WARP // tile[1]  # of a tile, in a warp
    keys = keys.reshape(rows // lines, lines, columns // tile[1], tile[1], *most).swapaxes(1, 2)
    return values, table, distinct(keys.reshape(-1, *most)), loads, outer


def whole_tiles(axis, length):
    """[bins, pixels] bool, of the tiles from the first to the last that is reached."""
    weights = used((axis,))[0]
    reached = axis.pixels[weights.any(0)]
    if reached.size == 0:
        return np.zeros((len(weights), 0), bool)
    first = reached[0] // length * length
    whole = np.zeros((len(weights), (reached[-1] // length + 1) * length - first), bool)
    whole[:, reached - first] = weights[:, weights.any(0)]
    return whole


def listed(chosen, values):
    """[R, most]: those of the values [V] that a row of `chosen` [R, V] takes, and then -1."""
    count = chosen.sum(1)
    order = np.argsort(~chosen, axis=1, kind="stable")[:, : count.max(initial=0)]
    return np.where(np.arange(order.shape[1]) < count[:, None], values[order], -1)


def distinct(keys):
    """How many keys, of lanes [L, ...], are different in a warp, with -1 for none; of all loads."""
    keys = np.sort(keys.reshape(-1, WARP, int(np.prod(keys.shape[1:]))), axis=1)
    new = np.ones(keys.shape, bool)
    new[:, 1:] = keys[:, 1:] != keys[:, :-1]
    return (new & (keys >= 0)).sum()


def table(workloads, operations, dtype, layout):
    header = ["", "DRAM, MB", "L2, MB", "L1, MB", "instructions, 1e6", "loads, 1e6"]
    header += [
        "multiply-adds, 1e6",
        "programs",
        "private, MB",
        "expected, ms",
        "of",
        "copy floor, ms",
    ]
    lines = []
    for workload in workloads:
        for operation in operations:
            found = cost(workload, operation, dtype, layout)
            seconds, name = found.expected
            counts = [f"{count / 1e6:.4g}" for count in astuple(found)]
            counts[6] = found.programs
            floor_seconds = found.dram / RATES["DRAM"]
            times = [f"{seconds * 1e3:.3g}", name, f"{floor_seconds * 1e3:.3g}"]
            title = f"{workload.name} {report.OPERATIONS[operation].lower()}"
            lines.append([title, *counts, *times])
    return report.markdown(header, lines)


def main(arguments=None):
    parser = argparse.ArgumentParser("python -m bench.cost", description=__doc__)
    add = parser.add_argument
    add("--workloads", nargs="+", default=list(run.WORKLOADS), choices=run.WORKLOADS)
    add("--operations", nargs="+", default=list(report.OPERATIONS), choices=report.OPERATIONS)
    add("--dtype", default="float32", choices=run.ROUNDING)
    add("--layout", default="nchw", choices=("nchw", "nhwc"))
    given = parser.parse_args(arguments)
    workloads = [run.WORKLOADS[name] for name in given.workloads]
    print(f"Expected on an H200, not measured: {given.dtype}, {given.layout}.\n")
    print(table(workloads, given.operations, given.dtype, given.layout))


if __name__ == "__main__":
    sys.exit(main())
