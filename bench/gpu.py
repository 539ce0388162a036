"""`python -m bench --device cuda --quick`, and `--sweep`: of a GPU, in one process.

Each ends within 4 minutes. A line of JSON is written as soon as something is known, so a run that
is cut short is a record too; a sweep goes on where the one before ended.
"""

import contextlib
import json
from itertools import product

import numpy as np
import torch

import roialign
from bench import run
from bench.devices import DEVICES
from bench.peers import MAIN, PEERS, ROUNDING, torch as of_torch
from bench.worker import Problem, converted, version

SECONDS = 240
SAMPLES, CALLS = 15, 200  # of a call between flushes; of what a call costs the host
TIMED = ("W1", "W1f", "W5", "W2", "W4", "W7")
SWEPT = ("W1", "W2")
VARIANTS = tuple(product(("float32", "bfloat16"), ("nchw", "nhwc")))
# dtype, layout, sampling and channels of what is checked; of taps sampling and channels
DTYPES = "float32", "float16", "bfloat16", "float64"
CASES = tuple(product(DTYPES, ("nchw", "nhwc"), (0, 2), (32, 7)))
ROIS = 64
TAPS = tuple(product((0, 1, 2, 3), (96, 97)))
GENERAL = "general"  # our kernels for any call, where others are usual
# what asks whether they are
USUAL = {"forward": "by_rows", "adjoint": "by_map_rows", "box_gradient": "by_box_rows"}
TUNED = {
    "sorted": ((8, 8), (4, 16), (8, 16), (16, 16), (2**20, 2**20)),  # the last: not sorted
    "lanes": (128, 64, 256),
    "steps": (8, 4, 16),
    "maxnreg": (None, 64, 96),
    "packed": ((32, 128), (64, 64), (32, 64)),
}


class Record:
    """Lines of JSON in a file, those that are there and more, until the time is over."""

    def __init__(self, path):
        self.end = run.clock() + SECONDS
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = path.read_text().splitlines() if path.exists() else []
        self.rows = [json.loads(line) for line in self.lines]
        self.path, self.wrong = path, False

    def add(self, **row):
        self.rows.append(row)
        self.wrong |= row.get("right") is False
        line = json.dumps(row)
        print(line, flush=True)
        with open(self.path, "a") as file:
            print(line, file=file)

    def begin(self, **row):
        """Whether there is time for this; what has none is recorded."""
        if run.clock() < self.end:
            return True
        self.add(**row, left_out=True)
        return False


def heading(record, device):
    machine = device.machine()
    versions = {name: version(name) for name in (*of_torch.PACKAGES, "jax")}
    record.add(machine=machine, versions=versions, bandwidth=device.bandwidth(1)["copy"])


def check(record, device, seed):
    """Every kernel, on fresh random inputs, beside the core on the CPU."""
    random = np.random.default_rng(seed)
    for dtype, layout, sampling, channels in CASES:
        features = random.standard_normal((2, channels, 20, 24), np.float32)
        g = random.standard_normal((ROIS, channels, 7, 5), np.float32)
        start = random.random((ROIS, 2)) * 60
        boxes = np.concatenate([start, start + 1 + random.random((ROIS, 2)) * 60], 1)
        rois = np.concatenate([random.integers(2, size=(ROIS, 1)), boxes], 1).astype(np.float32)
        here = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in (features, g)]
        if layout == "nhwc":
            here = [x.contiguous(memory_format=torch.channels_last) for x in here]
        here.append(torch.from_numpy(rois))
        there = [x.to(device.name) for x in here]
        options = {"spatial_scale": 0.25, "sampling_ratio": sampling}
        of_case = {"dtype": dtype, "layout": layout, "channels": channels} | options
        for operation in MAIN:
            expected, *found = (pooled(operation, *x, options) for x in (here, there, there))
            error = (found[0].float() - expected.float()).abs().max() / expected.abs().max()
            right = float(error) <= run.TOLERANCE + ROUNDING.get(dtype, 0)
            right &= torch.equal(*found)
            record.add(check=operation, **of_case, error=float(error), right=right)
    for sampling, channels in TAPS:  # a channel is 1 at its pixel of a row, so results are weights
        pixels = torch.eye(channels).reshape(1, channels, 1, channels)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        rows = torch.from_numpy(random.uniform(-9, 200, (ROIS, 5)).astype(np.float32))
        rows[:, 0], rows[:, 2], rows[:, 4] = 0, 0, 2
        options = {"spatial_scale": 0.5, "sampling_ratio": sampling}
        results = [
            roialign.roi_align(*each, (1, 7), **options).cpu()
            for each in ((pixels, rows), (pixels.to(device.name), rows.to(device.name)))
        ]
        record.add(check="taps", sampling=sampling, channels=channels, right=torch.equal(*results))


def pooled(operation, features, d_output, rois, options):
    """A result on the CPU."""
    if operation == "forward":
        return roialign.roi_align(features, rois, d_output.shape[2:], **options).cpu()
    if operation == "adjoint":
        return roialign.roi_align_adjoint(d_output, rois, features.shape, **options).cpu()
    return roialign.roi_align_box_gradient(d_output, features, rois, **options).cpu()


def problem_of(workload, device, dtype, layout, peer):
    arrays = {n: getattr(workload, n)() for n in ("features", "rois", "d_output")}
    given = {
        name: of_torch.given(converted(array, dtype, layout), device.name)
        for name, array in arrays.items()
    }
    convention = "asymmetric"
    return Problem(
        peer=peer,
        **given,
        output_size=workload.output_size,
        spatial_scale=workload.scale,
        sampling_ratio=workload.sampling,
        convention=peer.conventions[convention] if peer.conventions else convention,
        pyramid=workload.sizes if workload.coarser else None,
        levels=workload.levels(arrays["rois"]).tolist() if workload.coarser else None,
    )


@contextlib.contextmanager
def tuned(**values):
    """`roialign._triton.launch` with other numbers."""
    from roialign._triton import compiled, launch

    before = {name: getattr(launch, name) for name in values}
    try:
        for name, value in values.items():
            setattr(launch, name, value)
        compiled.operation_of.cache_clear()
        yield
    finally:
        for name, value in before.items():
            setattr(launch, name, value)
        compiled.operation_of.cache_clear()


def time(record, device, row, problem, samples, number=1):
    """Adds the row with its samples, or why there are none."""
    try:
        call = getattr(of_torch, row["operation"])(problem)
        call(*getattr(call, "before", tuple)())  # compiles
        record.add(**row, samples=device.samples(call, samples, number))
    except Exception as error:  # of a peer, or of memory: the others go on
        record.add(**row, refused=f"{type(error).__name__}: {error}"[:300])
    finally:
        torch.use_deterministic_algorithms(False)


def contestants(workload):
    """(name, operation, the peer, numbers of ours that are changed)"""
    peers = PEERS["cuda"]
    for operation in MAIN:
        for name in ("ours", "torchvision", "torchvision_deterministic"):
            peer = peers[name]
            able = operation in peer.operations and (peer.pyramids or not workload.coarser)
            if able and workload.name in (peer.only or [workload.name]):
                yield name, operation, peer, {}
        yield GENERAL, operation, peers["ours"], {USUAL[operation]: lambda *_: False}


def quick(record, seed):
    device = DEVICES["cuda"]()
    heading(record, device)
    check(record, device, seed)
    for name, (dtype, layout) in product(TIMED, VARIANTS):
        workload = run.EVERY[name]
        for by, operation, peer, changed in contestants(workload):
            row = {"workload": name, "by": by, "operation": operation}
            row |= {"dtype": dtype, "layout": layout}
            if record.begin(**row):
                with tuned(**changed):
                    problem = problem_of(workload, device, dtype, layout, peer)
                    time(record, device, row, problem, SAMPLES)
    for by in ("ours", "torchvision"):  # what a call costs the host
        problem = problem_of(run.EVERY["W6"], device, "float32", "nchw", PEERS["cuda"][by])
        row = {"workload": "W6", "by": by, "operation": "forward", "calls": CALLS}
        time(record, device, row, problem, 5, CALLS)


def choices():
    """The usual numbers, and then each of the others alone."""
    usual = {name: values[0] for name, values in TUNED.items()}
    yield usual
    for name, values in TUNED.items():
        for value in values[1:]:
            yield usual | {name: value}


def sweep(record, seed):
    """What each number makes of the forward; `seed` is that of checks, of which it has none."""
    from roialign._triton import launch

    device = DEVICES["cuda"]()
    done = [
        {n: v for n, v in row.items() if n not in ("samples", "refused")} for row in record.rows
    ]
    if not done:
        heading(record, device)
    for name, (dtype, layout), choice in product(SWEPT, VARIANTS, choices()):
        row = {"workload": name, "by": "ours", "operation": "forward", "dtype": dtype}
        row = json.loads(json.dumps(row | {"layout": layout} | choice))
        if row in done or run.clock() >= record.end:
            continue
        registers = {} if choice["maxnreg"] is None else {"maxnreg": choice["maxnreg"]}
        numbers = {
            "SORTED": (choice["sorted"],) * 2,
            "LANES": (choice["lanes"],) * 2,
            "STEPS": choice["steps"],
            "PACKED": choice["packed"],
            "OPTIONS": launch.OPTIONS | registers,
        }
        with tuned(**numbers):
            problem = problem_of(run.EVERY[name], device, dtype, layout, PEERS["cuda"]["ours"])
            time(record, device, row, problem, SAMPLES)
    for name, (dtype, layout) in product(SWEPT, VARIANTS):
        wanted = {"workload": name, "dtype": dtype, "layout": layout}.items()
        timed = [row for row in record.rows if "samples" in row and wanted <= row.items()]
        if timed:
            best = min(timed, key=lambda row: np.median(row["samples"]))
            print("best:", json.dumps(best | {"samples": float(np.median(best["samples"]))}))
