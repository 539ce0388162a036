"""`python -m bench.regimes`: in which regimes is a peer faster? See bench/README.md.

A third of a grid of maps, channels, boxes, bins, samples and layouts, drawn at run time. A result
is checked before it is timed; where a peer seems faster, all of that regime is timed again. A map
of ratios is drawn beside the record.
"""

import argparse
import contextlib
import importlib.util
import itertools
import math
import random
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np

from bench import run
from bench.devices import CLOCKS
from bench.environments import ROOT, find
from bench.peers import LAYOUTS, OPERATIONS, PEERS, TITLES

from cases import Workload  # isort: skip (found by bench.reference)

MAPS = ("16x16", "50x76", "200x304", "800x1333", "2000x3000")
GRID = (MAPS, (1, 3, 16, 64, 256), (1, 8, 100, 1000), (1, 7, 28), (1, 2, 0), LAYOUTS)
MOST_MAP, MOST_OUTPUT = 80e6, 120e6  # bytes
THIRDS = 3
AGAIN = 15  # rounds, where a peer seems faster
FEW = 20e-6  # seconds of a call that is mostly overhead
ALLOWED = {False: 0.95, True: 0.8}  # a peer's time in ours; of a call that is mostly overhead


def regimes(seed):
    """(A workload, a layout) for each point of a third of the grid."""
    points = []
    for point in itertools.product(*GRID):
        map_, channels, count, bins, samples, layout = point
        height, width = map(int, map_.split("x"))
        shape, side = (1, channels, height, width), min(height, width)
        name = " ".join(map(str, point))
        bytes_ = 4 * math.prod(shape), 4 * count * channels * bins**2
        if bytes_[0] <= MOST_MAP and bytes_[1] <= MOST_OUTPUT:
            sides, size = (1.0, side / 4, side - 1.0, 0.5), (bins, bins)
            workload = Workload(name, name, shape, 1.0, count, size, samples, sides, ())
            points.append((workload, layout))
    random.Random(0).shuffle(points)  # the same order always; a seed takes every third
    return points[seed::THIRDS]


def contestants(layout, settings):
    """Rows: ours, and each peer that has the operation and the layout; others get a copy."""
    for name, operation in itertools.product(("ours", *settings.peers), settings.operations):
        peer = PEERS["cpu"][name]
        if operation in peer.operations:
            here = layout if layout in peer.layouts else peer.layouts[0]
            row = "", name, operation, settings.convention, "float32", here, name == "ours", ""
            yield dict(zip(run.CONTESTANT, row, strict=True))


def measure(workload, layout, workers, settings):
    """Rows with samples (seconds, of each round), all results checked against ours before."""
    rows, right = [], {}
    with run.memory_folder() as folder:
        answers = run.Answers(workload, folder, workers["ours"], settings.threads)
        for name in settings.peers:
            workers[name].ask("load", **answers.files)
        for row in contestants(layout, settings):
            worker = workers[row["by"]]
            row |= {"workload": workload.name, "samples": []}
            result, reply = answers.result(row, worker)
            expected = right.setdefault(row["operation"], result)  # ours comes first
            expected = PEERS["cpu"][row["by"]].right(row["operation"], expected)
            allowed = run.tolerance(workload) * np.abs(expected).max(initial=1)
            run.agree(result, expected, allowed, "ours")
            rows.append((row, worker, run.turn(reply["seconds"], settings)))

    def rounds(count):
        for _, (row, worker, turn) in itertools.product(range(count), rows):
            row["samples"] += worker.ask("time", key=run.key_of(row), **turn)

    rounds(settings.rounds)
    if slower([row for row, *_ in rows]):
        for row, *_ in rows:
            row["samples"].clear()
        rounds(AGAIN)
    return [row for row, *_ in rows]


def ratios(rows):
    """(Row of a peer, its time in ours, seconds of ours) of one regime."""
    ours = {row["operation"]: median(row["samples"]) for row in rows if row["by"] == "ours"}
    for row in rows:
        if row["by"] != "ours":
            seconds = ours[row["operation"]]
            yield row, median(row["samples"]) / seconds, seconds


def slower(rows):
    """Of one regime: where ours takes longer than is allowed."""
    return [found for found in ratios(rows) if found[1] < ALLOWED[found[2] < FEW]]


def table(by_regime):
    """By map and channels, peer and operation: how many, how many are slower, least and median."""
    groups = defaultdict(list)
    for name, rows in by_regime.items():
        for row, ratio, seconds in ratios(rows):
            place = *name.split()[:2], row["by"], row["operation"]
            groups[place].append((ratio, ratio < ALLOWED[seconds < FEW]))
    yield "| map | channels | peer | operation | regimes | slower | theirs / ours: least, median |"
    yield "|---|---|---|---|---|---|---|"
    for place, found in sorted(groups.items(), key=lambda item: (len(item[0][0]), item[0])):
        least, middle = min(r for r, _ in found), median(r for r, _ in found)
        cells = *place, len(found), sum(lost for _, lost in found), f"{least:.2f}, {middle:.1f}"
        yield f"| {' | '.join(map(str, cells))} |"


def panels(by_regime):
    """Of each peer and operation the least ratio, by map, channels, boxes and bins."""
    found = defaultdict(dict)
    for name, rows in by_regime.items():
        place = tuple(name.split()[:4])
        for row, ratio, _ in ratios(rows):
            panel = found[f"{TITLES[row['by']]}, {row['operation']}"]
            panel[place] = min(ratio, panel.get(place, ratio))
    return found


def draw(record, by_regime, path):
    from bench import heatmap

    threads = record["settings"]["threads"]
    about = f"{record['machine']['cpu']}, {threads} thread(s), {record['date'][:10]}"
    title = (
        f"Time of a peer divided by that of roialign: {about}.\n"
        "A cell is the least of both layouts and of 1, 2 and adaptive samples, in a third of the "
        "grid. Blank: not drawn, or too large."
    )
    axes = ([*map(str, values)] for values in GRID[:4])
    heatmap.draw(panels(by_regime), *axes, title, path)


def main(arguments=None, start=run.Worker):
    parser = argparse.ArgumentParser("python -m bench.regimes", description=__doc__)
    add = parser.add_argument
    add("--seed", type=int, choices=range(THIRDS), default=random.randrange(THIRDS))
    add("--most", type=int, help="so many regimes and no more")
    add("--operations", nargs="+", default=["forward", "adjoint"], choices=OPERATIONS)
    add("--convention", default="asymmetric", choices=("asymmetric", "half_pixel"))
    add("--peers", nargs="+", default=["torchvision", "onnxruntime"], choices=PEERS["cpu"])
    add("--peer", action="append", default=[], metavar="NAME=PYTHON", help="as in python -m bench")
    add("--threads", type=int, default=1)
    add("--clock", default="wall", choices=CLOCKS, help="cpu: where others use the machine too")
    add("--rounds", type=int, default=3)
    add("--slice", type=float, default=0.03, help="seconds of one turn")
    add("--results", type=Path, default=ROOT / "bench" / "results" / "regimes")
    given = parser.parse_args(arguments)
    settings = SimpleNamespace(**vars(given), device="cpu", overhead=False, before=None)
    pythons = find({"ours", *given.peers}, dict(peer.split("=", 1) for peer in given.peer))
    settings.peers = [name for name in given.peers if name in pythons]
    by_regime = {}
    with contextlib.ExitStack() as stack:
        opened, versions = run.opened(settings, pythons, print, start, stack)
        peers = {name: (PEERS["cpu"][name].process, "") for name in ("ours", *settings.peers)}
        workers = {name: opened[key] for name, key in peers.items() if key in opened}
        settings.peers = [name for name in settings.peers if name in workers]
        for workload, layout in regimes(given.seed)[: given.most]:
            rows = by_regime[workload.name] = measure(workload, layout, workers, settings)
            for row, ratio, seconds in slower(rows):
                print(f"{workload.name}: {row['by']} {row['operation']} takes {ratio:.2f} of our "
                      f"{1e6 * seconds:.1f} us", flush=True)  # fmt: skip
        record = run.heading(settings, versions, workers["ours"])
    record["rows"] = [row for rows in by_regime.values() for row in rows]
    path = run.write(record, given.results)
    print(path, *table(by_regime), sep="\n")
    if importlib.util.find_spec("matplotlib"):
        image = path.with_name("-".join([path.stem, *given.operations, f"{given.seed}.png"]))
        draw(record, by_regime, image)
        print(image)
    return int(any(slower(rows) for rows in by_regime.values()))


if __name__ == "__main__":
    sys.exit(main())
