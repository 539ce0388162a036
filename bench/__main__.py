"""`python -m bench`, from the repository root: see bench/README.md."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from bench import report, run
from bench.environments import REQUIREMENTS, ROOT, find, set_up
from bench.peers import LAYOUTS, MAIN, OPERATIONS, OVERHEAD, PEERS, ROUNDING, TITLES, USUAL

QUICK = {"workloads": ("W1f", "W3", "W6"), "rounds": 2, "slice": 0.05}


def main(arguments=None, start=run.Worker):
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    add = parser.add_argument
    add("--device", default="cpu", choices=PEERS, help="cuda: on a GPU")
    add("--overhead", action="store_true", help="what a call costs, in each framework")
    add("--before", metavar="PATH", help="another build of ours takes turns: a folder, or a Python")
    add("--setup", nargs="*", metavar="PEER", choices=REQUIREMENTS, help="make environments")
    add("--workloads", nargs="+", choices=run.EVERY)
    add("--operations", nargs="+", choices=OPERATIONS)
    add("--dtype", nargs="+", default=tuple(ROUNDING), choices=ROUNDING)
    add("--layout", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    add("--convention", default="asymmetric", choices=("asymmetric", "half_pixel"))
    add("--threads", nargs="+", type=int, default=[1], help="one run for each number")
    add("--rounds", type=int, help="5, with --before 15; 0 checks the results and times nothing")
    add("--slice", type=float, help="seconds of one turn: 0.2, 0.1")
    add("--budget", type=float, help="seconds; then nothing new is begun. 360 on a GPU")
    add("--peers", nargs="*", choices=TITLES, help="which of them; none: ours alone")
    add("--peer", action="append", default=[], metavar="NAME=PYTHON", help="`ours` is a name too")
    add("--out", action=argparse.BooleanOptionalAction, default=True, help="ours gets `out=`")
    add("--extras", action=argparse.BooleanOptionalAction, default=True)
    add("--quick", action="store_true", help="some workloads, 2 short rounds, no extras")
    add("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the JSON lines")
    given = parser.parse_args(arguments)
    if given.setup is not None:
        return 1 if set_up(given.setup or REQUIREMENTS) else 0

    on_gpu = given.device != "cpu"
    chosen = {"workloads": run.WORKLOADS, "peers": USUAL[given.device], "operations": MAIN}
    chosen |= {"rounds": 5, "slice": 0.2, "budget": 360.0 if on_gpu else None}
    extras = given.extras and not (given.before or given.overhead or given.quick)
    if extras and not on_gpu:
        chosen["workloads"] = [*run.WORKLOADS, *run.HUGE]
    if given.before:
        chosen |= {"peers": (), "rounds": 15, "slice": 0.1}
    if given.overhead:
        chosen |= OVERHEAD[given.device]
    if given.quick:
        chosen |= QUICK
    asked = {name: getattr(given, name) for name in chosen}
    chosen |= {name: value for name, value in asked.items() if value is not None}
    workloads = [run.EVERY[name] for name in chosen.pop("workloads")]

    pythons = dict(peer.split("=", 1) for peer in given.peer)
    peers = PEERS[given.device]
    environments = {peers[name].environment for name in ("ours", *chosen["peers"])}
    pythons = find({"ours", *environments}, pythons)
    for name in sorted(environments - pythons.keys()):
        print(f"{name} is not installed: python -m bench --setup {name}")
    chosen["peers"] = [name for name in chosen["peers"] if peers[name].environment in pythons]
    settings = run.Settings(
        device=given.device,
        dtypes=tuple(given.dtype),
        layouts=tuple(given.layout),
        out=given.out and not on_gpu,
        convention=given.convention,
        before=given.before,
        overhead=given.overhead,
        extras=extras and chosen["rounds"] > 0,
        **chosen,
    )
    kind = (
        given.device if on_gpu else "overhead" if given.overhead else "before" * bool(given.before)
    )
    wrong = []
    for threads in given.threads:
        try:
            record = run.run(workloads, pythons, replace(settings, threads=threads), start=start)
        except run.PeerError as error:
            raise SystemExit(f"nothing was measured: {error}") from error
        if settings.rounds:
            print(run.write(record, given.results / kind))
        print(report.tables(record))
        wrong += [row for row in record["rows"] if "refused" in row and peers[row["by"]].ours]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
