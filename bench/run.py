"""The rounds: every contestant answers right first, then all take turns, one working at a time."""

import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from bench import floor, reference
from bench.environments import ROOT

sys.path.insert(0, str(ROOT / "tests"))
from cases import WORKLOADS  # noqa: E402

ANSWER_LIMIT = 600  # seconds
TOLERANCE = 1e-4  # of the largest magnitude
ROUNDING = {"float32": 0.0, "float16": 2**-10, "bfloat16": 2**-7}  # of input and output
WITHOUT_OUT = ("W1", "W4", "W6")  # where a call that makes its own output is timed too
CHECKED_CHANNELS = 3
CHECKED_BOXES = 64


# what a worker forks is stopped and ended with it
OWN_GROUP = (
    {"process_group": 0}
    if sys.version_info >= (3, 11)
    else {"preexec_fn": getattr(os, "setpgrp", None)}
)


class PeerError(Exception):
    """A worker raised, died, did not answer, or answered wrong."""


class Unsupported(PeerError):
    """The implementation lacks the case."""


class Worker:
    """A process with one implementation. It is stopped unless it has something to answer."""

    def __init__(self, name, python, threads):
        self.name = name
        self.errors = tempfile.TemporaryFile()
        environment = dict(os.environ)
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[variable] = str(threads)
        self.process = subprocess.Popen(
            [python, "-m", "bench.peers.worker", name],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            **OWN_GROUP,
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

    @property
    def key(self):
        return "-".join(map(str, asdict(self).values()))


@dataclass(frozen=True)
class Settings:
    threads: int = 1
    rounds: int = 7
    slice: float = 0.2  # seconds that a contestant may take in a round
    operations: tuple = ("forward", "adjoint", "box_gradient")
    dtypes: tuple = ("float32", "float16", "bfloat16")
    layouts: tuple = ("nchw", "nhwc")
    out: bool = True
    convention: str = "asymmetric"  # the one that every peer but MindSpore differentiates rightly


class Arrays:
    """A workload's arrays, and the files in memory by which the workers get them."""

    def __init__(self, workload, folder):
        self.workload = workload
        self.rois = workload.rois()
        self.features = workload.features()
        self.d_output = workload.d_output()
        self.files = {}
        for name in ("rois", "features", "d_output"):
            self.files[name] = str(Path(folder) / f"{name}.npy")
            np.save(self.files[name], getattr(self, name))
        self._axes = {}

    def axes(self, convention):
        if convention not in self._axes:
            workload = self.workload
            self._axes[convention] = reference.axes(
                self.rois, workload.shape, workload.output_size, workload.scale,
                workload.sampling, convention,
            )  # fmt: skip
        return self._axes[convention]

    def expected(self, operation, convention):
        """The reference's result and the index of the part of a whole result that it is."""
        axes = self.axes(convention)
        channels = self.workload.shape[1]
        some = np.unique(np.linspace(0, channels - 1, CHECKED_CHANNELS).astype(int))
        if operation == "forward":
            part = np.s_[:, some]
            return reference.forward(self.features[:, some], self.rois, axes), part
        if operation == "adjoint":
            part = np.s_[:, some]
            d_output = self.d_output[:, some]
            return reference.adjoint(d_output, self.rois, axes, self.workload.shape), part
        boxes = np.unique(np.linspace(0, len(self.rois) - 1, CHECKED_BOXES).astype(int))
        d_rois = reference.box_gradient(
            self.d_output[boxes], self.features, self.rois[boxes], [axes[k] for k in boxes]
        )
        return d_rois, boxes


def contestants(workload, names, settings):
    """What takes turns on one workload: every variant of ours, and what each peer may have."""
    variants = [
        {"dtype": dtype, "layout": layout}
        for dtype in settings.dtypes
        for layout in settings.layouts
        if dtype == "float32" or layout == "nchw" or len(settings.layouts) == 1
    ]
    found = []
    for operation in settings.operations:
        for variant in variants:
            ours = Contestant("ours", operation, settings.convention, out=settings.out, **variant)
            found.append(ours)
            for name in names if operation != "box_gradient" else ():  # which nobody else has
                if name == "mindspore":  # its own convention, for both
                    theirs = replace(ours, convention="mindspore")
                    found += [theirs, replace(theirs, by=name)]
                elif name != "ours":
                    found.append(replace(ours, by=name))
        if operation == "forward" and workload.name in WITHOUT_OUT and settings.out:
            ours = Contestant("ours", operation, settings.convention, **variants[0])
            found.append(replace(ours, out=False))
    return found


def run_workload(workload, workers, settings, bandwidth, say):
    """One row per contestant: its seconds in every round, or why it was refused."""
    rows = {}
    results = {}
    with memory_folder() as folder:
        arrays = Arrays(workload, folder)
        for name, worker in workers.items():
            try:
                worker.ask("load", **arrays.files)
            except PeerError as error:
                say(f"  {name}: {error}")
        for contestant in contestants(workload, workers, settings):
            row = {"workload": workload.name, **asdict(contestant)}
            try:
                worker = workers[contestant.by]
                call_seconds = checked(contestant, worker, arrays, settings, results)
            except Unsupported:
                continue
            except PeerError as error:
                row["refused"] = str(error)
                say(f"  {contestant.key}: refused: {error}")
            else:
                row["floor"] = floors(arrays, contestant, bandwidth)
                row["samples"] = []
                row["turn"] = turn(call_seconds, settings.slice)
            rows[contestant] = row
        for _ in range(settings.rounds):
            for contestant, row in rows.items():
                if "samples" not in row:
                    continue
                try:
                    times = workers[contestant.by].ask("time", key=contestant.key, **row["turn"])
                    row["samples"].append([float(f"{t:.5g}") for t in times])
                except PeerError as error:
                    del row["samples"]
                    row["refused"] = str(error)
                    say(f"  {contestant.key}: refused: {error}")
    return list(rows.values())


def turn(call_seconds, slice_seconds):
    """How often a contestant runs in its turn: about a slice of time, samples of 1 ms at least."""
    number = max(1, round(0.001 / max(call_seconds, 1e-7)))
    samples = int(np.clip(slice_seconds / (call_seconds * number), 1, 25))
    return {"samples": samples, "number": number, "warm": number if samples > 1 else 0}


def memory_folder():
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)


def checked(contestant, worker, arrays, settings, results):
    """Seconds of one call of a contestant whose result is right; PeerError if it is not."""
    path = str(Path(arrays.files["rois"]).with_name("result.npy"))
    reply = worker.ask(
        "prepare",
        key=contestant.key,
        save=path,
        **parameters(arrays.workload, contestant, settings.threads),
    )
    if "unsupported" in reply:
        raise Unsupported(reply["unsupported"])
    result = np.load(path)
    shapes = {
        "forward": arrays.workload.output_shape,
        "adjoint": arrays.workload.shape,
        "box_gradient": arrays.rois.shape,
    }
    if result.shape != shapes[contestant.operation]:
        raise PeerError(f"has shape {result.shape}")
    rule = contestant.operation, contestant.convention
    if rule not in results:
        results[rule] = {"reference": arrays.expected(*rule)}
    expected, part = results[rule]["reference"]
    scale = np.abs(arrays.features if contestant.operation == "forward" else expected).max()
    allowed = (TOLERANCE + ROUNDING[contestant.dtype]) * scale
    agree(result[part], expected, allowed, "the reference")
    if contestant.by == "ours" and contestant.dtype == "float32":
        results[rule].setdefault("ours", result)
    elif "ours" in results[rule]:
        agree(result, results[rule]["ours"], allowed, "ours")
    return reply["seconds"]


def parameters(workload, contestant, threads):
    named = asdict(contestant)
    del named["by"]
    return {
        "output_size": workload.output_size,
        "spatial_scale": workload.scale,
        "sampling_ratio": workload.sampling,
        "threads": threads,
        **named,
    }


def agree(result, expected, allowed, whose):
    error = np.abs(result - expected).max()
    if not error <= allowed:  # NaN is not
        raise PeerError(f"differs from {whose} by {error:.2g}, allowed {allowed:.2g}")


def floors(arrays, contestant, bandwidth):
    workload = arrays.workload
    through = floor.traffic(
        contestant.operation,
        workload.shape,
        workload.output_shape,
        arrays.rois,
        arrays.axes(contestant.convention),
        4 if contestant.dtype == "float32" else 2,
        contestant.layout,
    )
    dram, cache = floor.seconds(*through, bandwidth)
    return {"bytes": through[0], "cache_bytes": through[1], "dram": dram, "dram_and_cache": cache}


def run_huge_box(worker, settings):
    """Seconds of one adaptive box of the map's size and of one of 1e9 pixels."""
    workload = replace(WORKLOADS["W1"], sampling=0)
    _, _, height, width = workload.shape
    boxes = {
        "map": [0, 0, 0, width / workload.scale, height / workload.scale],
        "1e9 px": [0, -5e8, -5e8, 5e8, 5e8],
    }
    contestant = Contestant("ours", "forward", settings.convention)
    samples = {name: [] for name in boxes}
    with memory_folder() as folder:
        arrays = Arrays(workload, folder)
        worker.ask("load", **arrays.files)
        rois, result = (str(Path(folder) / name) for name in ("box.npy", "result.npy"))
        for name, box in boxes.items():
            np.save(rois, np.array([box], np.float32))
            asked = parameters(workload, contestant, settings.threads)
            worker.ask("prepare", key=name, save=result, rois=rois, **asked)
            largest = np.abs(np.load(result)).max()
            if not largest <= np.abs(arrays.features).max():
                raise PeerError(f"gives {largest} for the box {name}")
        for _ in range(settings.rounds):
            for name in boxes:
                samples[name].append(worker.ask("time", key=name, samples=5, number=1, warm=1))
    return samples


def run_memory(python, settings, names=("W1", "W4", "W5")):
    """Bytes at the peak of a process's first call beyond its inputs and its output."""
    rows = []
    for name in names:
        workload = WORKLOADS[name]
        with memory_folder() as folder:
            arrays = Arrays(workload, folder)
            for operation in settings.operations:
                contestant = Contestant("ours", operation, settings.convention)
                worker = Worker("ours", python, settings.threads)
                try:
                    worker.ask("load", **arrays.files)
                    asked = parameters(workload, contestant, settings.threads)
                    beyond = worker.ask("memory", **asked)
                finally:
                    worker.close()
                scratch = 256 * workload.shape[2] * workload.shape[3] * settings.threads
                row = {"workload": name, "operation": operation, "bytes": beyond}
                rows.append({**row, "scratch": scratch})
    return rows


def run_import(python, tries=9):
    """Seconds of `import roialign` in fresh processes, NumPy imported before."""
    code = "import numpy; t = clock(); import roialign; print(clock() - t)"
    command = [python, "-c", f"from time import perf_counter as clock; {code}"]
    return [
        float(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
        for _ in range(tries)
    ]


def machine():
    return {
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "huge_pages": text_of("/sys/kernel/mm/transparent_hugepage/enabled"),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def cpu_model():
    for line in (text_of("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return platform.processor() or platform.machine()


def text_of(path):
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def commit():
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


def run(workloads, pythons, settings, extras=True, say=print):
    """The record of a run, ready for JSON. `pythons`: name -> Python, "ours" among them."""
    record = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "settings": asdict(settings),
        "bandwidth": floor.bandwidths(settings.threads),
        "versions": {},
        "workloads": {workload.name: workload.title for workload in workloads},
        "rows": [],
    }
    workers = {}
    try:
        for name, python in pythons.items():
            worker = Worker(name, python, settings.threads)
            try:
                record["versions"][name] = worker.ask("versions")
                workers[name] = worker
            except PeerError as error:
                worker.close()
                if name == "ours":
                    raise
                say(f"{name} left out: {error}")
        for workload in workloads:
            say(f"{workload.name}: {workload.title}")
            rows = run_workload(workload, workers, settings, record["bandwidth"], say)
            record["rows"] += rows
        if extras:
            say("one huge box, memory, import")
            record["huge_box"] = run_huge_box(workers["ours"], settings)
            record["import"] = run_import(pythons["ours"])
            if sys.platform == "linux":
                record["memory"] = run_memory(pythons["ours"], settings)
    finally:
        for worker in workers.values():
            worker.close()
    return record


def write(record, folder):
    """Appends the record to `<date>-<cpu or gpu>.jsonl`; the path."""
    device = record["machine"].get("gpu", record["machine"]["cpu"])
    slug = "-".join("".join(c if c.isalnum() else " " for c in device).split())
    path = Path(folder) / f"{record['date'][:10]}-{slug.lower()}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as lines:
        lines.write(json.dumps(record) + "\n")
    return path
