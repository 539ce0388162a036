"""`python -m bench --device cuda`: ours beside torchvision's kernels, on the same torch tensors.

A result is compared with that of the CPU core before its time is taken. Then all take turns. A
sample is the time between two events on the stream, with the L2 cache flushed before; the flush
takes longer than the host needs to launch a call, so what the host does is not in it, and is timed
apart (`launches`).
"""

import contextlib
import datetime
import importlib
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import roialign
from bench import floor, gpu_report, reference, run
from bench.environments import ROOT

ALIGNED = {"asymmetric": False, "half_pixel": True}
OURS, THEIRS, DETERMINISTIC = gpu_report.NAMES
ORDER = ("W1", "W5", "W4", "W6", "W1f", "W2")  # the others after them, if the budget lasts
VARIED = ("W1", "W4", "W5")  # in every dtype and layout, the deterministic mode and memory too
SMALL = ("W6",)  # where the host's time is taken
FLUSHED = 2**30  # bytes, beyond any L2
COPIES = 20
CALLS = 200  # of a launch
LAUNCHES = ("forward", "forward and backward", "forward, captured in a graph")
DRIVERS = ("/sys/module/nvidia/version", "/sys/module/amdgpu/version")

clock = time.monotonic


class Cuda:
    """The device: its clock, its memory, and what it says of itself."""

    name = "cuda"

    def __init__(self):
        if not torch.cuda.is_available():
            raise SystemExit("torch sees no GPU: nothing was measured")
        self.buffer = torch.empty(FLUSHED // 4, dtype=torch.float32, device=self.name)

    def machine(self):
        properties = torch.cuda.get_device_properties(self.name)
        asked = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
        answers = dict(zip(asked, smi(asked), strict=False))
        drivers = answers.pop("driver_version", None), *map(run.text_of, DRIVERS)
        driver = next(filter(None, drivers), None)
        if not driver:
            raise SystemExit("the driver's version is not known: a record needs it")
        return {
            "gpu": properties.name,
            "driver": driver,
            "memory": properties.total_memory,
            "l2": properties.L2_cache_size,
            "processors": properties.multi_processor_count,
            "clocks": answers,
        }

    def flush(self):
        """Writes what fills the L2 cache and reads it: nothing is left to be written back."""
        self.buffer.zero_()
        self.buffer.amax()

    def seconds(self, call, number):
        """So many samples of a call."""
        events = []
        for _ in range(number):
            state = call.before()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush()
            start.record()
            call.timed(state)
            stop.record()
            events.append((start, stop))
        self.synchronize()
        return [start.elapsed_time(stop) / 1000 for start, stop in events]

    def synchronize(self):
        torch.cuda.synchronize()

    def allocated(self):
        return torch.cuda.memory_allocated()

    def peak(self, function):
        """A result, and the most bytes that were allocated while it was made."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = function()
        self.synchronize()
        return result, torch.cuda.max_memory_allocated()

    def captured(self, function):
        """A replay of what the function launches."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()

        def replay():
            graph.replay()
            return result

        return replay


def smi(fields):
    """What nvidia-smi answers of the first device; nothing where it is not there."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines()[0].split(", ") if done.stdout and not done.returncode else []


@dataclass
class Problem:
    """A workload's tensors in one dtype and layout."""

    workload: object
    convention: str
    features: torch.Tensor
    rois: torch.Tensor
    d_output: torch.Tensor

    @cached_property
    def learned(self):
        return self.features.detach().requires_grad_()

    @property
    def options(self):
        return {
            "spatial_scale": self.workload.scale,
            "sampling_ratio": self.workload.sampling,
            "convention": self.convention,
        }


class Arrays:
    """A workload's arrays, and what the CPU core makes of them."""

    def __init__(self, workload, convention):
        self.workload, self.convention = workload, convention
        self.rois = workload.rois()
        self.features = torch.from_numpy(workload.features())
        self.d_output = torch.from_numpy(workload.d_output())
        self._expected = {}

    @cached_property
    def axes(self):
        w = self.workload
        return reference.axes(
            self.rois, w.shape, w.output_size, w.scale, w.sampling, self.convention
        )

    def problem(self, dtype, layout, device):
        kind = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        features, d_output = (
            array.to(getattr(torch, dtype)).to(device).contiguous(memory_format=kind)
            for array in (self.features, self.d_output)
        )
        rois = torch.from_numpy(self.rois).to(device)
        return Problem(self.workload, self.convention, features, rois, d_output)

    def expected(self, operation, dtype):
        """The CPU core's result in float32, of values as the dtype holds them."""
        if (operation, dtype) not in self._expected:
            rounded = self.problem(dtype, "nchw", "cpu")
            rounded = replace(
                rounded, features=rounded.features.float(), d_output=rounded.d_output.float()
            )
            result = call_of(OURS, operation, rounded).timed(None)
            self._expected[operation, dtype] = result.numpy()
        return self._expected[operation, dtype]


class Call(NamedTuple):
    """What is done before each sample, and what is timed: it takes what was made before."""

    before: object
    timed: object


def call_of(by, operation, problem):
    if operation == "forward":
        return Call(nothing, lambda _: pooled(by, problem, problem.features))
    if by == OURS:
        function, *arguments = {
            "adjoint": (
                roialign.roi_align_adjoint,
                problem.d_output,
                problem.rois,
                problem.workload.shape,
            ),
            "box_gradient": (
                roialign.roi_align_box_gradient,
                problem.d_output,
                problem.features,
                problem.rois,
            ),
        }[operation]
        return Call(nothing, lambda _: function(*arguments, **problem.options))
    return Call(
        lambda: pooled(by, problem, problem.learned),
        lambda output: gradient(by, problem, output),
    )


def nothing():
    return None


def pooled(by, problem, features):
    w = problem.workload
    if by == OURS:
        return roialign.roi_align(features, problem.rois, w.output_size, **problem.options)
    with deterministic(by == DETERMINISTIC):
        # it takes boxes of the map's dtype alone: under autocast it casts the map, as here
        output = importlib.import_module("torchvision").ops.roi_align(
            features.float(),
            problem.rois,
            w.output_size,
            w.scale,
            w.sampling or -1,
            ALIGNED[problem.convention],
        )
        return output.to(features.dtype)


def gradient(by, problem, output):
    with deterministic(by == DETERMINISTIC):
        return torch.autograd.grad(output, problem.learned, problem.d_output)[0]


@contextlib.contextmanager
def deterministic(on):
    """torch's deterministic mode for a while, and then as it was."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def contestants(workload, names, settings):
    """What takes turns on one workload; in float32 NCHW first."""
    varied = workload.name in VARIED
    variants = [
        {"dtype": dtype, "layout": layout}
        for dtype in settings.dtypes
        for layout in settings.layouts
        if (dtype, layout) == (settings.dtypes[0], settings.layouts[0])
        or (varied and (dtype == "float32" or layout == settings.layouts[0]))
    ]
    return [
        run.Contestant(by, operation, settings.convention, out=False, **variant)
        for variant in variants
        for operation in settings.operations
        for by in (OURS, *names)
        if by == OURS or operation != "box_gradient"  # which nobody else has
        if by != DETERMINISTIC or (varied and operation == "adjoint" and variant is variants[0])
    ]


def run_workload(workload, device, names, settings, bandwidth, end, say):
    """(rows, the contestants for which there was no time, rows of memory)."""
    arrays = Arrays(workload, settings.convention)
    rows, calls, left_out, problems = [], [], [], {}
    for contestant in contestants(workload, names, settings):
        if clock() >= end:
            left_out.append(f"{workload.name}-{contestant.key}")
            continue
        row = {"workload": workload.name, **asdict(contestant)}
        rows.append(row)
        variant = contestant.dtype, contestant.layout
        with refusing(row, say):
            if variant not in problems:
                problems[variant] = arrays.problem(*variant, device.name)
            call = call_of(contestant.by, contestant.operation, problems[variant])
            check(contestant, call, arrays)
            row["floor"] = floor_of(arrays, contestant, bandwidth)
            row["samples"] = []
            (once,) = device.seconds(call, 1)
            calls.append((row, call, int(np.clip(settings.slice / max(once, 1e-3), 1, 25))))
    for done in range(settings.rounds):
        if done and clock() >= end:
            left_out.append(f"{workload.name}: rounds after {done}")
            break
        for row, call, number in calls:
            if "refused" not in row:
                with refusing(row, say):
                    samples = device.seconds(call, number)
                    row["samples"].append([float(f"{t:.5g}") for t in samples])
    memory = []
    if workload.name in VARIED and problems:
        for by in (OURS, *names):
            row = {"workload": workload.name, "by": by}
            if clock() >= end:
                left_out.append(f"{workload.name}: memory of {by}")
                continue
            with refusing(row, say):
                row["bytes"] = memory_of(by, next(iter(problems.values())), device)
            memory.append(row)
    return rows, left_out, memory


@contextlib.contextmanager
def refusing(row, say):
    """An error is the row's, and is told: the others go on."""
    try:
        yield
    except Exception as error:
        row.pop("samples", None)
        row["refused"] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        told = [row[name] for name in ("workload", "by", *gpu_report.CASE) if name in row]
        say(f"  {' '.join(told)}: refused: {row['refused']}")


def check(contestant, call, arrays):
    """PeerError if a result is not the CPU core's, or if ours has other bits the second time."""
    found = call.timed(call.before())
    result = found.detach().float().cpu().numpy()
    expected = arrays.expected(contestant.operation, contestant.dtype)
    if result.shape != expected.shape:
        raise run.PeerError(f"has shape {result.shape}")
    scale = abs(arrays.features.numpy() if contestant.operation == "forward" else expected).max()
    allowed = (run.TOLERANCE + run.ROUNDING[contestant.dtype]) * scale
    run.agree(result, expected, allowed, "the CPU core")
    if contestant.by == OURS and not torch.equal(call.timed(call.before()), found):
        raise run.PeerError("has other bits the second time")


def floor_of(arrays, contestant, bandwidth):
    workload = arrays.workload
    through, _ = floor.traffic(
        contestant.operation,
        workload.shape,
        workload.output_shape,
        arrays.rois,
        arrays.axes,
        4 if contestant.dtype == "float32" else 2,
        contestant.layout,
    )
    return {"bytes": through, "dram": through / bandwidth["copy"]}


def memory_of(by, problem, device):
    """Bytes at the peak of a forward and its backward, beyond inputs and results."""
    problem.learned  # noqa: B018 (made before the count)
    before = device.allocated()
    output, forward = device.peak(lambda: pooled(by, problem, problem.learned))
    d_features, backward = device.peak(lambda: gradient(by, problem, output))
    return max(forward, backward - d_features.nbytes) - output.nbytes - before


def launches(workload, device, names, settings, say):
    """Rows of wall seconds of a call among many, without flushes: what small launches cost."""
    problem = Arrays(workload, settings.convention).problem("float32", "nchw", device.name)
    rows, timed = [], []
    for by in (OURS, *names):
        for operation in LAUNCHES if by != DETERMINISTIC else ():
            row = {"workload": workload.name, "by": by, "operation": operation, "samples": []}
            rows.append(row)
            with refusing(row, say):
                call = launch_of(by, operation, problem, device)
                call()
                timed.append((row, call))
    for _ in range(settings.rounds):
        for row, call in timed:
            if "refused" not in row:
                with refusing(row, say):
                    row["samples"].append([wall(device, call)])
    return rows


def launch_of(by, operation, problem, device):
    forward = partial(pooled, by, problem, problem.features)
    if operation == "forward":
        return forward
    if operation == "forward and backward":
        return lambda: gradient(by, problem, pooled(by, problem, problem.learned))
    return device.captured(forward)


def wall(device, call):
    device.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    device.synchronize()
    return (time.perf_counter() - start) / CALLS


def copy_bandwidth(device):
    """Bytes per second, read and written, of the best of some copies."""
    source = torch.zeros(FLUSHED // 8, dtype=torch.float32, device=device.name)
    target = torch.empty_like(source)
    samples = device.seconds(Call(nothing, lambda _: target.copy_(source)), COPIES)
    return 2 * source.nbytes / min(samples), samples


def peers(say):
    """The names of torchvision's contestants, and their versions; none where it does not work."""
    try:
        module = importlib.import_module("torchvision")
        module.ops.roi_align(torch.zeros(1, 1, 1, 1), torch.zeros(1, 5), 1)
    except Exception as error:
        say(f"torchvision left out, so ours and the floor only: {type(error).__name__}: {error}")
        return (), {}
    return (THEIRS, DETERMINISTIC), {"torchvision": {"torchvision": module.__version__}}


def versions():
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError:
        triton = None
    return {
        "roialign": roialign.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": triton,
    }


def measure(workloads, device, settings, budget, with_peers=True, say=print):
    """The record of a run, ready for JSON. `budget`: seconds, after which nothing new is begun."""
    end = clock() + budget
    machine = run.machine() | device.machine()
    names, theirs = peers(say) if with_peers else ((), {})
    bandwidth, copies = copy_bandwidth(device)
    record = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": run.commit(),
        "machine": machine,
        "settings": asdict(replace(settings, out=False)) | {"budget": budget},
        "bandwidth": {"copy": bandwidth, "samples": copies},
        "versions": {"ours": versions(), **theirs},
        "workloads": {workload.name: workload.title for workload in workloads},
        "rows": [],
        "memory": [],
        "launches": [],
        "left_out": [],
    }
    wanted = [*ORDER, *(workload.name for workload in workloads)]
    for workload in sorted(workloads, key=lambda workload: wanted.index(workload.name)):
        say(f"{workload.name}: {workload.title}")
        rows, left_out, memory = run_workload(
            workload, device, names, settings, record["bandwidth"], end, say
        )
        record["rows"] += rows
        record["left_out"] += left_out
        record["memory"] += memory
    for workload in workloads:
        if workload.name in SMALL and settings.rounds:
            if clock() < end:
                record["launches"] += launches(workload, device, names, settings, say)
            else:
                record["left_out"].append(f"{workload.name}: launches")
    return record


def write(record, folder):
    """Appends the record; `bench/results` takes those of a GPU only."""
    results = ROOT / "bench" / "results"
    if not record["machine"].get("gpu") and Path(folder).resolve().is_relative_to(results):
        raise SystemExit(f"not measured on a GPU: nothing is written to {results}")
    return run.write(record, folder)
