"""`python -m bench.peers.worker NAME`: JSON requests on stdin, one JSON reply each on stdout.

Runs in the environment of the implementation, so it needs NumPy and nothing else of the bench.
"""

import gc
import importlib
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass

import numpy as np


@dataclass
class Problem:
    """What an implementation is asked: arrays in the asked dtype and layout, and parameters."""

    features: np.ndarray  # [N, C, H, W]
    rois: np.ndarray  # [K, 5]: image, x1, y1, x2, y2
    d_output: np.ndarray  # [K, C, P, Q]
    output_size: tuple
    spatial_scale: float
    sampling_ratio: int
    convention: str
    out: bool
    threads: int


class Worker:
    def __init__(self, module):
        self.module = module
        self.arrays = {}
        self.calls = {}

    def versions(self):
        return self.module.versions()

    def load(self, features, rois, d_output):
        """Reads a workload's arrays from `.npy` files; what was prepared before is dropped."""
        self.calls.clear()
        gc.collect()
        self.arrays = {
            "features": np.load(features),
            "rois": np.load(rois),
            "d_output": np.load(d_output),
        }

    def prepare(self, key, operation, save, **parameters):
        """Builds a call, saves its first result, returns the seconds of its second run."""
        try:
            call = self._call(operation, **parameters)
            result = call()
        except ValueError as error:
            return {"unsupported": str(error)}
        np.save(save, np.ascontiguousarray(self.module.array(result), np.float32))
        del result
        self.calls[key] = call
        return {"seconds": seconds(call, 1)}

    def _call(self, operation, dtype, layout, rois=None, **parameters):
        if not hasattr(self.module, operation):
            raise ValueError(f"has no {operation}")
        if dtype not in getattr(self.module, "DTYPES", ("float32",)):
            raise ValueError(f"takes no {dtype}")
        if layout not in getattr(self.module, "LAYOUTS", ("nchw",)):
            raise ValueError(f"takes no {layout}")
        problem = Problem(
            features=converted(self.arrays["features"], dtype, layout),
            rois=np.load(rois) if rois else self.arrays["rois"],
            d_output=converted(self.arrays["d_output"], dtype, layout),
            **parameters,
        )
        return getattr(self.module, operation)(problem)

    def time(self, key, samples, number, warm):
        """Seconds per call: `samples` means over `number` calls, after `warm` untimed ones."""
        call = self.calls[key]
        for _ in range(warm):
            call()
        return [seconds(call, number) for _ in range(samples)]

    def memory(self, operation, **parameters):
        """Bytes that a first call needs at its peak beyond what the process held before it."""
        call = self._call(operation, **parameters)
        gc.collect()
        with open("/proc/self/clear_refs", "w") as reset:  # the high-water mark, to what is held
            reset.write("5")
        before = status("VmRSS")
        call()
        return max(0, status("VmHWM") - before)


def converted(array, dtype, layout):
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    array = array.astype(dtype, copy=False)
    if layout == "nhwc":
        array = np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    return array


def seconds(call, number):
    """The result of the call before is held, as in a loop that assigns it."""
    result = None
    start = time.perf_counter()
    for _ in range(number):
        result = call()
    stop = time.perf_counter()
    del result
    return (stop - start) / number


def status(field):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def main(name):
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    requests = sys.stdin
    gc.disable()
    worker = None
    for line in requests:
        request = json.loads(line)
        try:
            if worker is None:
                worker = Worker(importlib.import_module(f"bench.peers.{name}"))
            reply = {"reply": getattr(worker, request.pop("command"))(**request)}
        except Exception:
            reply = {"error": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main(sys.argv[1])
