"""`python -m bench`, from the repository root: see bench/README.md."""

import argparse
import datetime
import sys
from pathlib import Path

from bench import report, run
from bench.devices import CLOCKS
from bench.environments import REQUIREMENTS, ROOT, find, set_up
from bench.peers import (
    LAYOUTS,
    MAIN,
    OPERATIONS,
    OVERHEAD,
    PEERS,
    ROUNDING,
    SAMPLED_RUN,
    TITLES,
    USUAL,
)

QUICK = {"workloads": ("W1f", "W3", "W6"), "rounds": 2, "slice": 0.05}


def main(arguments=None, start=run.Worker):
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    add = parser.add_argument
    add("--device", default="cpu", choices=PEERS, help="cuda: on a GPU")
    add("--overhead", action="store_true", help="what a call costs, in each framework")
    add("--sampled", action="store_true", help="maxima and rotated boxes, beside the mean")
    add("--before", metavar="PATH", help="another build of ours takes turns: a folder, or a Python")
    add("--setup", nargs="*", metavar="PEER", choices=REQUIREMENTS, help="make environments")
    add("--workloads", nargs="+", choices=run.EVERY)
    add("--operations", nargs="+", choices=OPERATIONS)
    add("--dtypes", nargs="+", choices=ROUNDING)
    add("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    add("--convention", choices=("asymmetric", "half_pixel"))
    add("--threads", nargs="+", type=int, default=[1], help="one run for each number")
    add("--clock", default="wall", choices=CLOCKS, help="cpu: where others use the machine too")
    add("--rounds", type=int, help="5, with --before 15; 0 checks the results and times nothing")
    add("--slice", type=float, help="seconds of one turn: 0.2, with --before 0.1")
    add("--budget", type=float, help="seconds; then nothing new is begun. 360 on a GPU")
    add("--peers", nargs="*", choices=TITLES, help="which of them; none: ours alone")
    add("--peer", action="append", default=[], metavar="NAME=PYTHON", help="`ours` is a name too")
    add("--out", action=argparse.BooleanOptionalAction, default=True, help="ours gets `out=`")
    add("--extras", action=argparse.BooleanOptionalAction, default=True)
    add(
        "--quick",
        action="store_true",
        help="a part in short rounds; of a GPU in 4 minutes",
    )
    add("--sweep", action="store_true", help="of a GPU: our kernels with other sizes of blocks")
    add("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the JSON lines")
    given = parser.parse_args(arguments)
    if given.setup is not None:
        return 1 if set_up(given.setup or REQUIREMENTS) else 0

    if given.device == "cuda" and (given.quick or given.sweep):
        return on_one_gpu("sweep" if given.sweep else "quick", given.results / "cuda")
    on_gpu, peers = given.device != "cpu", PEERS[given.device]
    part = given.before or given.overhead or given.sampled or given.quick or given.rounds == 0
    given.extras &= not part
    given.out &= not on_gpu
    workloads = [*run.WORKLOADS, *(() if on_gpu else run.PYRAMIDS)]
    usual = {"workloads": workloads, "peers": USUAL[given.device], "operations": MAIN}
    usual |= {"rounds": 5, "slice": 0.2, "budget": 360.0 if on_gpu else None}
    usual |= {"dtypes": [*ROUNDING], "convention": "asymmetric"}
    if given.extras and not on_gpu:
        usual["workloads"] = [*workloads, *run.HUGE]
    usual |= SAMPLED_RUN if given.sampled else {}
    if given.before:
        usual |= {"peers": (), "rounds": 15, "slice": 0.1}
    usual |= (OVERHEAD[given.device] if given.overhead else {}) | (QUICK if given.quick else {})
    vars(given).update({n: value for n, value in usual.items() if getattr(given, n) is None})

    named = dict(peer.split("=", 1) for peer in given.peer)
    pythons = find({"ours", *(peers[name].environment for name in ("ours", *given.peers))}, named)
    for name in given.peers:
        if peers[name].environment not in pythons:
            print(f"{name} is not installed: python -m bench --setup {peers[name].environment}")
    given.peers = [name for name in given.peers if peers[name].environment in pythons]
    kind = given.device if on_gpu else "overhead" * given.overhead or "before" * bool(given.before)
    kind = kind or "sampled" * given.sampled
    wrong = False
    for threads in given.threads:
        settings = argparse.Namespace(**vars(given) | {"threads": threads})
        try:
            record = run.run(settings, pythons, start=start)
        except run.PeerError as error:
            raise SystemExit(f"nothing was measured: {error}") from error
        if given.rounds:
            print(run.write(record, given.results / kind))
        print(report.tables(record))
        wrong |= any("refused" in row and peers[row["by"]].ours for row in record["rows"])
    return int(wrong)


def on_one_gpu(mode, folder):
    from bench import gpu  # which needs torch

    now = datetime.datetime.now().astimezone()
    # a sweep goes on in the same file
    name = mode if mode == "sweep" else f"{now:%Y-%m-%d-%H%M%S}-{mode}"
    record = gpu.Record(folder / f"{name}.jsonl")
    getattr(gpu, mode)(record, seed=int(now.timestamp()))
    return int(record.wrong)


if __name__ == "__main__":
    sys.exit(main())
