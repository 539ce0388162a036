"""The rounds: every contestant answers right first, then all take turns, one working at a time."""

import contextlib
import datetime
import itertools
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from bench import floor
from bench.environments import ROOT
from bench.peers import LAYOUTS, MAIN, OPERATIONS, PEERS, ROUNDING, VARIED
from bench.reference import Arrays

from cases import FPN, WORKLOADS, Workload  # isort: skip (found by the reference)

ANSWER_LIMIT = 600  # seconds
TOLERANCE = 1e-4  # of the largest magnitude
CALLS = 200  # in the mean that says what launching on a GPU costs

# Beside those of tests/cases.py: what a call costs, what MindSpore does in reasonable time; one box
OTHERS = (
    Workload("W0", "a pixel", (1,) * 4, 1.0, 1, (1, 1), 2, (1.0, 1.0, 1.0, 0.0), (1, 1, 1)),
    replace(WORKLOADS["W5"], name="W5s", title="2 images", shape=(2, 64, 100, 152), per_image=128),
)
HUGE = {
    name: Workload(name, title, FPN, 1 / 4, 1, (7, 7), 0, (side, side, side, 0.0), ())
    for name, title, side in (
        ("map", "one box of the map's size", 304.0),
        ("huge", "one box of 1e9 px", 2.5e8),
    )
}
EVERY = WORKLOADS | HUGE | {workload.name: workload for workload in OTHERS}
WITHOUT_OUT = ("W1", "W4", "W6")  # where a call that makes its own output is timed too
# those with a goal first, for as long as the time lasts
ORDER = ("W1", "W5", "W4", "W6", "W1f", "W2")

clock = time.monotonic


class PeerError(Exception):
    """A worker raised, died, did not answer, or answered wrong."""


class Worker:
    """A process with one implementation. It is stopped unless it has something to answer."""

    def __init__(self, process, device, threads, python, path=None):
        self.errors = tempfile.TemporaryFile()
        environment = dict(os.environ)
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[variable] = str(threads)
        if path is not None:
            environment["PYTHONPATH"] = path
        self.process = subprocess.Popen(
            [python, "-m", "bench.worker", process, device],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,  # what it forks is stopped and ended with it
        )

    def ask(self, command, **arguments):
        self._signal("SIGCONT")
        limit = threading.Timer(ANSWER_LIMIT, self.process.kill)
        limit.start()
        try:
            self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self.process.stdin.flush()
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


@dataclass(frozen=True)
class Contestant:
    by: str
    operation: str
    convention: str
    dtype: str = "float32"
    layout: str = "nchw"
    out: bool = True
    build: str = ""  # "before": another one of ours

    @property
    def key(self):
        return "-".join(map(str, asdict(self).values())).strip("-")


@dataclass(frozen=True)
class Settings:
    device: str = "cpu"
    threads: int = 1
    rounds: int = 7
    slice: float = 0.2  # seconds that a contestant may take in a round
    operations: tuple = MAIN
    dtypes: tuple = tuple(ROUNDING)
    layouts: tuple = LAYOUTS
    out: bool = True
    convention: str = "asymmetric"  # the one that every peer but MindSpore differentiates rightly
    peers: tuple = ()  # beside ours
    before: str | None = None  # another build of ours
    overhead: bool = False  # what a call costs: on a GPU wall time, else as always
    budget: float | None = None  # seconds, after which nothing new is begun
    extras: bool = True  # memory, one box, import


def contestants(workload, settings):
    """What takes turns on one workload; float32 in NCHW first."""
    peers, operations = PEERS[settings.device], settings.operations
    names = ("ours", *settings.peers)
    names = [name for name in names if workload.name in (peers[name].only or (workload.name,))]
    if workload.name in HUGE:
        names, operations = ["ours"], ("forward",)
    everywhere = workload.name in (WORKLOADS if settings.device == "cpu" else VARIED)
    found = []
    for dtype, layout in itertools.product(settings.dtypes, settings.layouts):
        plain = (dtype, layout) == (settings.dtypes[0], settings.layouts[0])
        varied = everywhere and (dtype == "float32" or layout == settings.layouts[0])
        for operation, name in itertools.product(operations if plain or varied else (), names):
            peer = peers[name]
            has = operation in peer.operations and dtype in peer.dtypes and layout in peer.layouts
            if not has:
                continue
            one = Contestant(name, operation, settings.convention, dtype, layout, settings.out)
            if peer.conventions and settings.convention not in peer.conventions:
                one = replace(one, convention=next(iter(peer.conventions)))
                if operation in peers["ours"].operations:  # beside which it is seen
                    found.append(replace(one, by="ours"))
            found.append(one)
            if name == "ours" and operation == "forward" and plain and settings.out:
                found += [replace(one, out=False)] * (workload.name in WITHOUT_OUT)
    builds = ("", "before") if settings.before else ("",)
    return list(
        dict.fromkeys(
            replace(one, build=build)
            for one, build in itertools.product(found, builds)
            if not build or peers[one.by].ours
        )
    )


class Answers:
    """A workload's arrays in files for the workers, and what their results must be."""

    def __init__(self, workload, folder, judge, threads):
        self.workload, self.judge, self.threads = workload, judge, threads
        self.arrays, self._right = Arrays(workload), {}
        self.files = {name: f"{folder}/{name}.npy" for name in ("rois", "features", "d_output")}
        self.path = f"{folder}/result.npy"
        for name, path in self.files.items():
            np.save(path, getattr(self.arrays, name))
        judge.ask("load", **self.files)

    def asked(self, contestant):
        """What a worker is asked for."""
        named = asdict(contestant)
        del named["build"]
        return named | {
            "output_size": self.workload.output_size,
            "spatial_scale": self.workload.scale,
            "sampling_ratio": self.workload.sampling,
            "threads": self.threads,
        }

    def result(self, contestant, worker):
        key, asked = contestant.key, self.asked(contestant)
        reply = worker.ask("prepare", key=key, save=self.path, **asked)
        return np.load(self.path), reply

    def right(self, operation, convention):
        """All that the core gives on the CPU, a part by the reference, and its index."""
        if (operation, convention) not in self._right:
            whole, _ = self.result(Contestant("ours", operation, convention), self.judge)
            expected = self.arrays.expected(operation, convention)
            self._right[operation, convention] = whole, *expected
        return self._right[operation, convention]

    def check(self, contestant, worker, ours):
        """Seconds of a call of a contestant whose result is right; PeerError if it is not."""
        result, reply = self.result(contestant, worker)
        operation = OPERATIONS[contestant.operation][1]
        if operation:
            whole, part, index = self.right(operation, contestant.convention)
            if result.shape != whole.shape:
                raise PeerError(f"has shape {result.shape}")
            scale = np.abs(self.arrays.features if operation == "forward" else part).max()
            allowed = (TOLERANCE + ROUNDING[contestant.dtype]) * scale
            agree(result[index], part, allowed, "the reference")
            agree(result, whole, allowed, "ours")
        if ours and not reply["same"]:
            raise PeerError("has other bits the second time")
        return reply["seconds"]

    def floor(self, contestant, bandwidth):
        """Bytes and seconds that one of the three operations takes at least."""
        through = floor.traffic(
            contestant.operation,
            self.workload,
            self.arrays.rois,
            self.arrays.axes(contestant.convention),
            4 if contestant.dtype == "float32" else 2,
            contestant.layout,
        )
        named = dict(zip(("bytes", "cache_bytes"), through, strict=True))
        return named | floor.seconds(*through, bandwidth)


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
    return {"samples": samples, "number": number, "warm": number if samples > 1 else 0}


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
        say(f"  {row['by']} {row['operation']}: refused: {error}")


def opened(settings, pythons, say, start, stack):
    """(process, build) -> its worker, and versions by its name. What does not work is left out."""
    peers = PEERS[settings.device]
    chosen = [peers[name] for name in ("ours", *settings.peers)]
    builds = {(peer.process, ""): pythons[peer.environment] for peer in chosen}
    if settings.before:
        ours = {peer.process for peer in chosen if peer.ours}
        builds |= {(process, "before"): builds[process, ""] for process in ours}
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


def run_workload(workload, workers, judge, fresh, settings, bandwidth, end, say):
    """Rows of seconds in every round and of memory, or why not; and what there was no time for."""
    peers = PEERS[settings.device]
    rows, timed, left_out = [], [], []

    def begun(contestant):
        """Its row and its worker, if both are there in time."""
        worker = workers.get((peers[contestant.by].process, contestant.build))
        if worker and clock() >= end:
            left_out.append(f"{workload.name}-{contestant.key}")
        elif worker:
            rows.append({"workload": workload.name, **asdict(contestant)})
            yield rows[-1], worker

    with memory_folder() as folder:
        answers = Answers(workload, folder, judge, settings.threads)
        for worker in workers.values():
            worker.ask("load", **answers.files)
        for contestant in contestants(workload, settings):
            for row, worker in begun(contestant):
                with refusing(row, say):
                    seconds = answers.check(contestant, worker, peers[contestant.by].ours)
                    if contestant.operation in MAIN and not settings.overhead:
                        row["floor"] = answers.floor(contestant, bandwidth)
                    row |= {"samples": [], "turn": turn(seconds, settings)}
                    timed.append((row, partial(worker.ask, "time", key=contestant.key)))
        for done in range(settings.rounds):
            if done and clock() >= end:
                left_out.append(f"{workload.name}: rounds after {done}")
                break
            for row, ask in timed:
                if "refused" not in row:
                    with refusing(row, say):
                        times = ask(**row["turn"])
                        row["samples"].append([float(f"{t:.5g}") for t in times])
        for contestant in weighed(workload, settings):
            for row, worker in begun(contestant):
                with refusing(row, say), fresh(worker) as worker:
                    worker.ask("load", **answers.files)
                    row["memory"] = worker.ask("memory", **answers.asked(contestant))
                    row["scratch"] = 256 * np.prod(workload.shape[2:]).item() * settings.threads
    return rows, left_out


def weighed(workload, settings):
    """Whose memory is taken: of ours a first call; on a GPU, of all a forward and its backward."""
    only = replace(settings, dtypes=settings.dtypes[:1], layouts=settings.layouts[:1], before=None)
    change = {"peers": ()} if settings.device == "cpu" else {"operations": ("backward",)}
    if workload.name not in VARIED or not settings.extras:
        return []
    return [c for c in contestants(workload, replace(only, **change)) if c.out == settings.out]


def run_import(python, tries=9):
    """Seconds of `import roialign` in fresh processes, NumPy imported before."""
    code = "import numpy; t = clock(); import roialign; print(clock() - t)"
    command = [python, "-c", f"from time import perf_counter as clock; {code}"]
    return [
        float(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
        for _ in range(tries)
    ]


def commit(folder=ROOT):
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.stdout.strip() or None


def run(workloads, pythons, settings, say=print, start=Worker):
    """The record of a run, ready for JSON. `pythons`: environment -> Python."""
    end = clock() + (float("inf") if settings.budget is None else settings.budget)
    here = settings.device == "cpu"
    with contextlib.ExitStack() as stack:
        workers, versions = opened(settings, pythons, say, start, stack)
        base = judge = workers[PEERS[settings.device]["ours"].process, ""]
        if not here:
            judge = start("ours", "cpu", os.cpu_count(), pythons["ours"])
            stack.callback(judge.close)

        def fresh(worker):
            """A process of ours that has done nothing; a GPU's memory is counted by what it holds."""
            new = start("ours", "cpu", settings.threads, pythons["ours"]) if here else None
            return contextlib.closing(new) if new else contextlib.nullcontext(worker)

        record = {
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": base.ask("machine"),
            "settings": asdict(settings),
            "bandwidth": base.ask("bandwidth", threads=settings.threads),
            "versions": versions,
            "workloads": {workload.name: workload.title for workload in workloads},
            "rows": [],
            "left_out": [],
        }
        if settings.budget is not None:
            wanted = [*ORDER, *EVERY]
            workloads = sorted(workloads, key=lambda workload: wanted.index(workload.name))
        for workload in workloads:
            say(f"{workload.name}: {workload.title}")
            rows, left_out = run_workload(
                workload, workers, judge, fresh, settings, record["bandwidth"], end, say
            )
            record["rows"] += rows
            record["left_out"] += left_out
        if here and settings.extras:
            record["import"] = run_import(pythons["ours"])
    return record


def write(record, folder):
    """Appends the record to `<date>-<cpu or gpu>.jsonl`; the path."""
    device = record["machine"]["cpu" if record["settings"]["device"] == "cpu" else "gpu"]
    slug = "-".join("".join(c if c.isalnum() else " " for c in device).split())
    path = Path(folder) / f"{record['date'][:10]}-{slug.lower()}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as lines:
        lines.write(json.dumps(record) + "\n")
    return path
