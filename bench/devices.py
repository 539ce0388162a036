"""The devices, in a worker: their clocks, their memory, and what they say of themselves."""

import gc
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

LARGE = 256 * 2**20  # bytes, beyond any L3
CACHED = 256 * 2**10  # beyond L1, within L2
FLUSHED = 2**30  # beyond any L2 of a GPU
COPIES = 20
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DRIVERS = ("/sys/module/nvidia/version", "/sys/module/amdgpu/version")


class Cpu:
    name = "cpu"
    clock = staticmethod(CLOCKS["wall"])

    def machine(self):
        return {
            "cpu": cpu_model(),
            "cpus": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "huge_pages": text_of("/sys/kernel/mm/transparent_hugepage/enabled"),
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        }

    def bandwidth(self, threads):
        """Bytes per second from and to DRAM, and loaded from L2, of all threads together."""
        return {
            "copy": parallel(threads, copying),
            "read": parallel(threads, lambda: reading(LARGE, 1)),
            "cache": parallel(threads, lambda: reading(CACHED, 2000)),
        }

    def wait(self):
        """Until what was launched is done."""

    def wall(self, call, number):
        """Seconds of a call, the mean of so many. The result of the one before is held."""
        made, result = getattr(call, "before", tuple)(), None
        self.wait()
        start = self.clock()
        for _ in range(number):
            result = call(*made)
        self.wait()
        stop = self.clock()
        del result
        return (stop - start) / number

    def samples(self, call, samples, number):
        return [self.wall(call, number) for _ in range(samples)]

    def memory(self, call):
        """Bytes that a process's first call needs at its peak beyond what is held before."""
        gc.collect()
        with open("/proc/self/clear_refs", "w") as reset:  # the high-water mark, to what is held
            reset.write("5")
        before = status("VmRSS")
        call()
        return max(0, status("VmHWM") - before)


class Cuda(Cpu):
    """A GPU, by torch."""

    name = "cuda"

    def __init__(self):
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no GPU")
        self.torch, self.wait = torch, torch.cuda.synchronize
        self.buffer = torch.empty(FLUSHED // 4, dtype=torch.float32, device=self.name)

    def machine(self):
        found = self.torch.cuda.get_device_properties(self.name)
        clocks = smi("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
        drivers = clocks.pop("driver_version", None), *map(text_of, DRIVERS)
        driver = next(filter(None, drivers), None)
        if not driver:
            raise RuntimeError("the driver's version is not known: a record needs it")
        version = self.torch.version.cuda or self.torch.version.hip
        size = {"memory": found.total_memory, "l2": found.L2_cache_size}
        size |= {"processors": found.multi_processor_count, "clocks": clocks}
        return super().machine() | {"gpu": found.name, "driver": driver, "cuda": version} | size

    def bandwidth(self, threads):
        """Bytes per second, read and written, of the best of some copies."""
        source = self.torch.zeros(FLUSHED // 8, dtype=self.torch.float32, device=self.name)
        target = self.torch.empty_like(source)
        samples = self.samples(lambda: target.copy_(source), COPIES, 1)
        return {"copy": 2 * source.nbytes / min(samples), "samples": samples}

    def flush(self):
        """Writes what fills the L2 cache and reads it: nothing is left to be written back.

        That takes longer than the host needs to launch a call: what it does is in no sample.
        """
        self.buffer.zero_()
        self.buffer.amax()

    def samples(self, call, samples, number):
        """Between two events, after a flush; of several calls: wall time, no flush."""
        if number > 1:
            return super().samples(call, samples, number)
        events = []
        for _ in range(samples):
            made = getattr(call, "before", tuple)()
            start, stop = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush()
            start.record()
            call(*made)
            stop.record()
            events.append((start, stop))
        self.wait()
        return [start.elapsed_time(stop) / 1000 for start, stop in events]

    def memory(self, call):
        """Bytes at the peak of a call and of what is made before it, beyond inputs and results."""
        held = self.torch.cuda.memory_allocated()
        made, first = self.peak(getattr(call, "before", tuple))
        result, second = self.peak(call, *made)
        return max(first, second - result.nbytes) - sum(t.nbytes for t in made) - held

    def peak(self, function, *arguments):
        """A result, and the most bytes that were allocated while it was made."""
        self.wait()
        self.torch.cuda.reset_peak_memory_stats()
        result = function(*arguments)
        self.wait()
        return result, self.torch.cuda.max_memory_allocated()


def copying():
    source, target = np.ones(LARGE // 2, np.uint8), np.ones(LARGE // 2, np.uint8)
    return LARGE, lambda: np.copyto(target, source)  # LARGE / 2 read, LARGE / 2 written


def reading(size, times):
    source = np.broadcast_to(np.ones(size // 4, np.float32), (times, size // 4))
    maxima = np.empty(times, np.float32)
    return size * times, lambda: np.maximum.reduce(source, axis=1, out=maxima)


def parallel(threads, make):
    sizes, calls = zip(*(make() for _ in range(threads)), strict=True)
    with ThreadPoolExecutor(threads) as pool:

        def once():
            start = time.perf_counter()
            list(pool.map(lambda call: call(), calls))
            return time.perf_counter() - start

        return sum(sizes) / min(once() for _ in range(6))  # the first touches everything


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


def status(field):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def smi(*fields):
    """What nvidia-smi answers of the first device; nothing where it is not there."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        lines = subprocess.check_output(command, text=True, timeout=20).splitlines()
    except (OSError, subprocess.SubprocessError):
        lines = []
    return dict(zip(fields, lines[0].split(", "), strict=True)) if lines else {}


DEVICES = {"cpu": Cpu, "cuda": Cuda}
