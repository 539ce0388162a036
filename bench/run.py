"""The rounds: every contestant answers right first, then all take turns, one working at a time."""

import contextlib
import datetime
import itertools
import json
import math
import os
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from bench import floor, reference
from bench.environments import ROOT
from bench.peers import CONTESTANT, MAIN, OPERATIONS, PEERS, ROUNDING, VARIED

from cases import FPN, PYRAMIDS, WORKLOADS, Workload  # isort: skip (found by the reference)

ANSWER_LIMIT = 600  # seconds
TOLERANCE = 1e-4  # of the largest magnitude
CALLS = 200  # in the mean that says what launching on a GPU costs

# Beside those of tests/cases.py: what a call costs, what MindSpore does in reasonable time; one box
OTHERS = (
    Workload("W0", "a pixel", (1,) * 4, 1.0, 1, (1, 1), 2, (1.0, 1.0, 1.0, 0.0), (1, 1, 1)),
    replace(WORKLOADS["W5"], name="W5s", title="2 images", shape=(2, 64, 100, 152), per_image=128),
)
HUGE = {
    name: Workload(name, f"one box of {size}", FPN, 1 / 4, 1, (7, 7), 0, (side,) * 3 + (0.0,), ())
    for name, size, side in (("map", "the map's size", 304.0), ("huge", "1e9 px", 2.5e8))
}
EVERY = WORKLOADS | PYRAMIDS | HUGE | {workload.name: workload for workload in OTHERS}
WITHOUT_OUT = ("W1", "W4", "W6")  # where a call that makes its own output is timed too
# those with a goal first, for as long as the time lasts
ORDER = ("W1", "W5", "W4", "W6", "W1f", "W2")

clock = time.monotonic


class PeerError(Exception):
    """A worker raised, died, did not answer, or answered wrong."""


class Worker:
    """A process with one implementation. It is stopped unless it has something to answer."""

    def __init__(self, process, device, threads, python, path=None):
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the worker is)
        variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = os.environ | dict.fromkeys(variables, str(threads))
        environment |= {} if path is None else {"PYTHONPATH": path}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        # a group of its own: what it forks is stopped and ended with it
        options = {"cwd": ROOT, "env": environment, "text": True, "start_new_session": True}
        command = [python, "-m", "bench.worker", process, device]
        self.process = subprocess.Popen(command, **pipes, **options)

    def ask(self, command, **arguments):
        self._signal("SIGCONT")
        limit = threading.Timer(ANSWER_LIMIT, self.process.kill)
        limit.start()
        try:
            request = json.dumps({"command": command, **arguments})
            print(request, file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            limit.cancel()
        self._signal("SIGSTOP")
        if not line:
            self.errors.seek(0)
            last = self.errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise PeerError(f"the process ended ({self.process.wait()}) {' '.join(last)}".strip())
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"].strip().splitlines()[-1])
        return answer["reply"]

    def close(self):
        self._signal("SIGKILL")
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(BrokenPipeError):  # of what the dead process did not read
                stream.close()

    def _signal(self, name):
        """To the worker and what it started; only where there are process groups."""
        if hasattr(os, "killpg") and self.process.poll() is None:
            os.killpg(self.process.pid, getattr(signal, name))


def contestants(workload, settings):
    """Rows of what takes turns on one workload; float32 in NCHW first."""
    peers, operations = PEERS[settings.device], settings.operations
    names = ["ours", *settings.peers]
    if workload.name in HUGE:
        names, operations = ["ours"], ["forward"]
    everywhere = workload.name in (WORKLOADS if settings.device == "cpu" else VARIED)
    without_out = [("ours", "forward", True)] if workload.name in WITHOUT_OUT else []
    outs, builds = {settings.out, False}, ["", "before"] if settings.before else [""]
    every = settings.dtypes, settings.layouts, operations, names, sorted(outs)[::-1], builds
    found = {}
    for dtype, layout, operation, name, out, build in itertools.product(*every):
        peer, convention, by = peers[name], settings.convention, [name]
        plain = (dtype, layout) == (settings.dtypes[0], settings.layouts[0])
        varied = plain or (everywhere and (dtype == "float32" or layout == settings.layouts[0]))
        wanted = out == settings.out or (name, operation, plain) in without_out
        able = peer.has(workload.name, operation, dtype, layout) and (peer.ours or not build)
        able &= (peer.pyramids and not OPERATIONS[operation].sampled) or not workload.coarser
        if convention not in (peer.conventions or [convention]):
            convention, by = next(iter(peer.conventions)), ["ours", name]  # beside which it is seen
        for one in by if varied and wanted and able else ():
            if operation in peers[one].operations:
                row = workload.name, one, operation, convention, dtype, layout, out, build
                found[row] = dict(zip(CONTESTANT, row, strict=True))
    return [*found.values()]


def key_of(row):
    return "-".join(str(row[name]) for name in CONTESTANT).strip("-")


class Answers:
    """A workload's arrays in files for the workers, and what their results must be."""

    def __init__(self, workload, folder, judge, threads):
        self.workload, self.judge = workload, judge
        self.arrays = {n: getattr(workload, n)() for n in ("rois", "features", "d_output")}
        self.turned = workload.turned()
        saved = self.arrays | {"turned": self.turned}
        self.files = {name: f"{folder}/{name}.npy" for name in saved}
        self.path, self.right = f"{folder}/result.npy", {}
        self.axes = cache(partial(reference.axes_of, workload, self.arrays["rois"]))
        for name, array in saved.items():
            np.save(self.files[name], array)
        self.numbers = {
            "output_size": workload.output_size,
            "spatial_scale": workload.scale,
            "sampling_ratio": workload.sampling,
            "pyramid": workload.sizes if workload.coarser else None,
            "levels": workload.levels(self.arrays["rois"]).tolist() if workload.coarser else None,
            "threads": threads,
        }
        judge.ask("load", **self.files)

    def asked(self, row):
        """What a worker is asked for."""
        return {name: row[name] for name in CONTESTANT[1:-1]} | self.numbers

    def result(self, row, worker):
        reply = worker.ask("prepare", key=key_of(row), save=self.path, **self.asked(row))
        return np.load(self.path), reply

    def expected(self, row, operation):
        """All that the core gives on the CPU, a part by the reference, and what takes it out."""
        convention, what = row["convention"], OPERATIONS[operation]
        if (operation, convention) not in self.right:
            plain = {"by": "ours", "operation": operation, "dtype": "float32", "layout": "nchw"}
            whole, _ = self.result(row | plain, self.judge)
            rois, features, d_output = self.arrays.values()
            if not what.sampled:
                asked = operation, self.workload, self.axes(convention), convention
                part = reference.part(*asked, **self.arrays)
            elif what.function == "forward":
                asked = what, self.workload, convention, self.turned if what.rotated else rois
                part = reference.sampled_part(*asked, features)
            else:
                output, *_ = self.expected(row, what.beside)
                part = reference.transposed(features, d_output, output)
            self.right[operation, convention] = whole, *part
        return self.right[operation, convention]

    def check(self, row, worker, peer):
        """Seconds of a call of a contestant whose result is right; PeerError if it is not."""
        result, reply = self.result(row, worker)
        operation = OPERATIONS[row["operation"]].result
        if operation:
            whole, part, view = self.expected(row, operation)
            if result.shape != whole.shape:
                raise PeerError(f"has shape {result.shape}")
            pooled = OPERATIONS[operation].function == "forward"
            allowed = TOLERANCE if peer.ours else tolerance(self.workload)
            allowed += ROUNDING[row["dtype"]]
            for found, right, whose in (
                (view(result), part, "the reference"),
                (result, whole, "ours"),
            ):
                scale = np.abs(self.arrays["features"] if pooled else right).max()
                agree(found, peer.right(operation, right), allowed * scale, whose)
        if peer.ours and not reply["same"]:
            raise PeerError("has other bits the second time")
        return reply["seconds"]

    def floor(self, row, bandwidth):
        """Bytes and seconds that one of the three operations takes at least."""
        itemsize, axes = 4 if row["dtype"] == "float32" else 2, self.axes(row["convention"])
        rest = self.arrays["rois"], axes, itemsize, row["layout"]
        through = floor.traffic(row["operation"], self.workload, *rest)
        bytes_ = dict(zip(("bytes", "cache_bytes"), through, strict=True))
        return bytes_ | floor.seconds(*through, bandwidth)


def tolerance(workload):
    """Of a peer: it may round a coordinate otherwise, and a pixel may differ from the next by 2."""
    return TOLERANCE + 2 * max(workload.shape[2:]) * float(np.finfo(np.float32).eps)


def agree(result, expected, allowed, whose):
    error = np.abs(result - expected).max()
    if not error <= allowed:  # NaN is not
        raise PeerError(f"differs from {whose} by {error:.2g}, allowed {allowed:.2g}")


def turn(call_seconds, settings):
    """How often a contestant runs in its turn: about a slice of time, samples of 1 ms at least."""
    number = max(1, round(0.001 / max(call_seconds, 1e-7)))
    if settings.device == "cuda":  # each call after a flush, which takes its time too
        number, call_seconds = (CALLS if settings.overhead else 1), max(call_seconds, 1e-3)
    samples = int(np.clip(settings.slice / (call_seconds * number), 1, 25))
    warm = number if samples > 1 else 0
    return {"samples": samples, "number": number, "warm": warm, "clock": settings.clock}


def memory_folder():
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)


@contextlib.contextmanager
def refusing(row, say):
    """An error is the row's, and is told: the others go on."""
    try:
        yield
    except PeerError as error:
        row.pop("samples", None)
        row["refused"] = str(error)
        say(f"  {key_of(row)}: refused: {error}")


def opened(settings, pythons, say, start, stack):
    """(process, build) -> its worker, and versions by its name. What does not work is left out."""
    peers = PEERS[settings.device]
    chosen = [peers[name] for name in ("ours", *settings.peers)]
    builds = {(peer.process, ""): pythons[peer.environment] for peer in chosen}
    if settings.before:
        builds |= {(p.process, "before"): pythons[p.environment] for p in chosen if p.ours}
    workers, versions, places = {}, {}, {}
    for (process, build), python in builds.items():
        found = place_of(settings.before, python) if build else (python,)
        worker = start(process, settings.device, settings.threads, *found)
        stack.callback(worker.close)
        name = f"{process} {build}".strip()
        try:
            versions[name] = worker.ask("versions")
        except PeerError as error:
            if process == peers["ours"].process:
                raise
            say(f"{name} left out: {error}")
            continue
        place = versions[name].pop("at", None)
        if place and place == places.setdefault(process, place) and build:
            raise PeerError(f"{name}: both builds are at {place}")
        workers[process, build] = worker
    return workers, versions


def place_of(before, python):
    """The Python and the search path of another build: that of an environment, or a folder."""
    folder = Path(before).resolve()
    if folder.is_file():
        return before, ""
    return python, str(folder / "src" if (folder / "src").is_dir() else folder)


def run_workload(workload, team, record):
    """Adds rows of seconds in every round and of memory, or why not; and what had no time."""
    settings, peers, timed = team.settings, PEERS[team.settings.device], []

    def begun(rows):
        """Those for which there are a worker, which comes with them, and time."""
        for row in rows:
            worker = team.workers.get((peers[row["by"]].process, row["build"]))
            if worker and clock() >= team.end:
                record["left_out"].append(key_of(row))
            elif worker:
                record["rows"].append(row)
                yield row, worker

    with memory_folder() as folder:
        answers = Answers(workload, folder, team.judge, settings.threads)
        for worker in team.workers.values():
            worker.ask("load", **answers.files)
        for row, worker in begun(contestants(workload, settings)):
            with refusing(row, team.say):
                seconds = answers.check(row, worker, peers[row["by"]])
                if row["operation"] in MAIN and not settings.overhead:
                    row["floor"] = answers.floor(row, record["bandwidth"])
                row |= {"samples": [], "turn": turn(seconds, settings)}
                timed.append((row, worker))
        for done in range(settings.rounds):
            if done and clock() >= team.end:
                record["left_out"].append(f"{workload.name}: rounds after {done}")
                break
            for row, worker in timed:
                if "refused" not in row:
                    with refusing(row, team.say):
                        times = worker.ask("time", key=key_of(row), **row["turn"])
                        row["samples"].append([float(f"{t:.5g}") for t in times])
        for row, worker in begun(weighed(workload, settings)):
            with refusing(row, team.say), team.fresh(worker) as one:
                one.ask("load", **answers.files)
                row["memory"] = one.ask("memory", **answers.asked(row))
                row["scratch"] = 256 * math.prod(workload.shape[2:]) * settings.threads


def weighed(workload, settings):
    """Whose memory is taken: of ours a first call; on a GPU, of all a forward and its backward."""
    only = {"peers": ()} if settings.device == "cpu" else {"operations": ("backward",)}
    only |= {"dtypes": settings.dtypes[:1], "layouts": settings.layouts[:1], "before": None}
    rows = contestants(workload, SimpleNamespace(**vars(settings) | only))
    there = settings.extras and workload.name in VARIED
    return [row for row in rows if there and row["out"] == settings.out]


def import_seconds(python, tries=9):
    """Of `import roialign` in fresh processes, NumPy imported before."""
    code = "from time import perf_counter as clock; import numpy; t = clock(); import roialign"
    command = [python, "-c", f"{code}; print(clock() - t)"]
    return [float(subprocess.check_output(command, cwd=ROOT)) for _ in range(tries)]


def run(settings, pythons, say=print, start=Worker):
    """The record of a run, ready for JSON. `pythons`: environment -> Python."""
    here, budget = settings.device == "cpu", settings.budget
    end = clock() + (float("inf") if budget is None else budget)
    with contextlib.ExitStack() as stack:
        workers, versions = opened(settings, pythons, say, start, stack)
        base = judge = workers[PEERS[settings.device]["ours"].process, ""]
        if not here:
            judge = start("ours", "cpu", os.cpu_count(), pythons["ours"])
            stack.callback(judge.close)

        def fresh(worker):
            """A process of ours that has done nothing; of a GPU's memory, what it holds."""
            new = start("ours", "cpu", settings.threads, pythons["ours"]) if here else None
            return contextlib.closing(new) if new else contextlib.nullcontext(worker)

        team = {"workers": workers, "judge": judge, "fresh": fresh, "end": end, "say": say}
        team = SimpleNamespace(settings=settings, **team)
        workloads = [EVERY[name] for name in settings.workloads]
        if budget is not None:
            wanted = [*ORDER, *EVERY]
            workloads.sort(key=lambda workload: wanted.index(workload.name))
        record = heading(settings, versions, base) | {
            "bandwidth": base.ask("bandwidth", threads=settings.threads),
            "workloads": {workload.name: workload.title for workload in workloads},
            "rows": [],
            "left_out": [],
        }
        for workload in workloads:
            say(f"{workload.name}: {workload.title}")
            run_workload(workload, team, record)
        if here and settings.extras:
            record["import"] = import_seconds(pythons["ours"])
    return record


def heading(settings, versions, worker):
    """What every record says first."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit or None,
        "machine": worker.ask("machine"),
        "settings": {n: v for n, v in vars(settings).items() if n not in ("peer", "results")},
        "versions": versions,
    }


def write(record, folder):
    """Appends the record to `<date>-<cpu or gpu>.jsonl`; the path."""
    device = record["machine"]["cpu" if record["settings"]["device"] == "cpu" else "gpu"]
    slug = "-".join("".join(c if c.isalnum() else " " for c in device).split())
    path = Path(folder) / f"{record['date'][:10]}-{slug.lower()}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as lines:
        print(json.dumps(record), file=lines)
    return path
