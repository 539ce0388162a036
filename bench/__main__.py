"""`python -m bench`, from the repository root: see bench/README.md."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from bench import report, run
from bench.environments import PEERS, ROOT, find, set_up

OPERATIONS = ("forward", "adjoint", "box_gradient")
QUICK = ("W1f", "W3", "W6")


def main(arguments=None):
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: on a GPU")
    add("--budget", type=float, default=360, help="seconds on a GPU; then nothing new is begun")
    add("--setup", nargs="*", metavar="PEER", choices=PEERS, help="make the peers' environments")
    add("--workloads", nargs="+", default=list(run.WORKLOADS), choices=run.WORKLOADS)
    add("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    add("--dtype", nargs="+", default=list(run.ROUNDING), choices=run.ROUNDING)
    add("--layout", nargs="+", default=("nchw", "nhwc"), choices=("nchw", "nhwc"))
    add("--convention", default="asymmetric", choices=("asymmetric", "half_pixel"))
    add("--threads", nargs="+", type=int, default=[1], help="one run for each number")
    add("--rounds", type=int, default=5, help="0 checks the results and times nothing")
    add("--slice", type=float, default=0.2, help="seconds of one turn")
    add("--peers", nargs="*", default=PEERS, choices=PEERS, help="which of them; none: ours alone")
    add("--peer", action="append", default=[], metavar="NAME=PYTHON", help="`ours` is a name too")
    add("--out", action=argparse.BooleanOptionalAction, default=True, help="ours gets `out=`")
    add("--extras", action=argparse.BooleanOptionalAction, default=True)
    add("--quick", action="store_true", help=f"{' '.join(QUICK)}, 2 short rounds, no extras")
    add("--results", default=ROOT / "bench" / "results", help="folder of the JSON lines")
    given = parser.parse_args(arguments)
    if given.setup is not None:
        return 1 if set_up(given.setup or PEERS) else 0

    settings = run.Settings(
        rounds=given.rounds,
        slice=given.slice,
        operations=tuple(given.operations),
        dtypes=tuple(given.dtype),
        layouts=tuple(given.layout),
        out=given.out,
        convention=given.convention,
    )
    if given.quick:
        settings = replace(settings, rounds=2, slice=0.05)
        given.extras = False
        given.workloads = [name for name in given.workloads if name in QUICK] or given.workloads
    workloads = [run.WORKLOADS[name] for name in given.workloads]
    if given.device != "cpu":
        return on_gpu(workloads, settings, given)

    pythons = dict(peer.split("=", 1) for peer in given.peer)
    found = find(pythons)
    pythons = {"ours": pythons.get("ours", sys.executable)} | {
        name: found[name] for name in given.peers if name in found
    }
    for name in given.peers:
        if name not in found:
            print(f"{name} is not installed: python -m bench --setup {name}")
    for threads in given.threads:
        record = run.run(
            workloads,
            pythons,
            replace(settings, threads=threads),
            extras=given.extras and given.rounds > 0,
        )
        if given.rounds:
            print(run.write(record, given.results))
            print(report.tables(record))


def on_gpu(workloads, settings, given):
    from bench import gpu, gpu_report

    peers = "torchvision" in given.peers
    record = gpu.measure(workloads, gpu.Cuda(), settings, given.budget, peers)
    if given.rounds:
        print(gpu.write(record, Path(given.results) / "gpu"))
    print(gpu_report.tables(record))
    wrong = [row for row in record["rows"] if row["by"] == gpu.OURS and "refused" in row]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
