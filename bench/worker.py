"""`python -m bench.worker PROCESS DEVICE`: JSON requests on stdin, one JSON reply each on stdout.

Runs in the environment of the implementation, so it needs NumPy and nothing else of the bench.
"""

import gc
import importlib
import json
import os
import sys
import traceback
from dataclasses import dataclass
from importlib import metadata

import numpy as np

from bench.devices import CLOCKS, DEVICES
from bench.peers import OPERATIONS, PEERS, Operation, Peer


@dataclass
class Problem:
    """What an implementation is asked: arrays of its kind, in a dtype and layout, and numbers."""

    peer: Peer
    features: object  # [N, C, H, W]
    rois: object  # [K, 5]: image, x1, y1, x2, y2; turned [K, 6]: image, x, y, w, h, degrees
    d_output: object  # [K, C, P, Q]
    output_size: tuple
    spatial_scale: float
    sampling_ratio: int
    convention: object  # in the peer's words
    operation: Operation = OPERATIONS["forward"]
    out: bool = False
    threads: int = 1
    pyramid: list | None = None  # the size of each map, each half of the one before; None: one map
    levels: list | None = None  # [K]: the map of each RoI of a pyramid

    @property
    def options(self):
        """Arguments of our functions."""
        found = {"sampling_ratio": self.sampling_ratio, "convention": self.convention}
        if self.operation.reduction != "mean":
            found["reduction"] = self.operation.reduction
        if self.pyramid:
            return found | {"spatial_scales": self.scales}
        return found | {"spatial_scale": self.spatial_scale}

    @property
    def scales(self):
        return [self.spatial_scale / 2**level for level in range(len(self.pyramid))]

    def maps(self, stored, copy):
        """Arrays [N, C, H, W] of a pyramid that is stored as one row."""
        found, start = [], 0
        for height, width in self.pyramid:
            flat = stored[:, :, 0, start : start + height * width]
            found.append(copy(flat.reshape(*stored.shape[:2], height, width)))
            start += height * width
        return found


class Session:
    """Answers for the peers of one process on one device."""

    def __init__(self, process, device):
        self.peers = {p.name: p for p in PEERS[device].values() if p.process == process}
        self.first = next(iter(self.peers.values()))
        self.module = importlib.import_module(f"bench.peers.{self.first.module}")
        self.device = DEVICES[device]()
        self.arrays, self.given, self.calls = {}, {}, {}

    def versions(self):
        """Of what answers: the first peer has pooled a pixel."""
        pixel = np.ones((1, 1, 1, 1), np.float32)
        self.arrays = {"features": pixel, "d_output": pixel, "rois": np.float32([[0, 0, 0, 1, 1]])}
        convention = next(iter(self.first.conventions or ["asymmetric"]))
        asked = {"output_size": (1, 1), "spatial_scale": 1.0, "sampling_ratio": 2}
        self._call(self.first.name, "forward", convention, "float32", "nchw", **asked)()
        found = {name: version(name) for name in self.module.PACKAGES}
        ours = sys.modules.get("roialign")
        found |= {"isa": ours._core.isa, "at": ours.__file__} if ours else {}
        return {name: number for name, number in found.items() if number}

    def machine(self):
        return self.device.machine()

    def bandwidth(self, threads):
        return self.device.bandwidth(threads)

    def load(self, **files):
        """Reads a workload's `.npy` files; what was prepared before is dropped."""
        self.given.clear()
        if self.calls:
            self.calls.clear()
            gc.collect()
        self.arrays = {name: np.load(file) for name, file in files.items()}

    def prepare(self, key, save, **asked):
        """Builds a call, saves its first result; its seconds, and whether the bits are the same."""
        call = self._call(**asked)
        first, second = self._result(call), self._result(call)
        np.save(save, first)
        self.calls[key] = call
        (seconds,) = self.device.samples(call, 1, 1)
        return {"seconds": seconds, "same": first.tobytes() == second.tobytes()}

    def time(self, key, samples, number, warm, clock):
        """Seconds per call: `samples` means over `number` calls, after `warm` untimed ones."""
        self.device.clock, call = CLOCKS[clock], self.calls[key]
        for _ in range(warm):
            call(*getattr(call, "before", tuple)())
        return self.device.samples(call, samples, number)

    def memory(self, **asked):
        return self.device.memory(self._call(**asked))

    def _call(self, by, operation, convention, dtype, layout, output_size, **numbers):
        if (dtype, layout) not in self.given:
            given = getattr(self.module, "given", lambda array, device: array)
            self.given[dtype, layout] = {
                name: given(converted(array, dtype, layout), self.device.name)
                for name, array in self.arrays.items()
            }
        peer, operation = self.peers[by], OPERATIONS[operation]
        arrays = dict(self.given[dtype, layout])
        turned = arrays.pop("turned", None)
        problem = Problem(
            peer=peer,
            operation=operation,
            convention=peer.conventions[convention] if peer.conventions else convention,
            output_size=tuple(output_size),
            **arrays | ({"rois": turned} if operation.rotated else {}),
            **numbers,
        )
        return getattr(self.module, operation.function)(problem)

    def _result(self, call):
        result = call(*getattr(call, "before", tuple)())
        array = getattr(self.module, "array", np.asarray)
        if isinstance(result, (tuple, list)):  # one for each map
            rows = [np.reshape(each, (*each.shape[:2], 1, -1)) for each in map(array, result)]
            return np.concatenate(rows, -1, dtype=np.float32)
        return np.array(array(result), np.float32, order="C")


def converted(array, dtype, layout):
    """Of maps and outputs; boxes stay as they are."""
    if array.ndim != 4:
        return array
    if dtype == "bfloat16":
        dtype = importlib.import_module("ml_dtypes").bfloat16
    array = array.astype(dtype, copy=False)
    if layout == "nhwc":
        array = np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    return array


def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main(process, device):
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    gc.disable()
    session = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            session = session or Session(process, device)
            reply = {"reply": getattr(session, request.pop("command"))(**request)}
        except Exception:
            reply = {"error": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
