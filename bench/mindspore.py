"""Ours through the MindSpore adapter beside mindspore.ops.ROIAlign: `python -m bench.mindspore`.

In an environment with MindSpore (`python -m bench --setup mindspore` makes one; install roialign
there). Features (2, 64, 100, 152), 256 RoIs, 7x7 bins, 2 samples, roi_end_mode 1. Results are compared
first; then come the rounds, in which both take turns. Milliseconds per call, median with least and
largest.
"""

import datetime
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import mindspore
import numpy as np
from mindspore import Tensor, nn

import roialign
from bench import run

ROUNDS = 7
WORKLOAD = replace(run.WORKLOADS["W5"], name="ms", shape=(2, 64, 100, 152), per_image=128)
TOLERANCE = 1e-5  # of the largest magnitude


class Pool(nn.Cell):
    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def construct(self, features, rois):
        return self.operator(features, rois)


class Gradient(nn.Cell):
    """The features' gradient of a weighted sum. PyNative mode makes the forward and the boxes' too."""

    def __init__(self, operator, d_output):
        super().__init__()
        self.operator, self.d_output = operator, d_output
        self.gradient = mindspore.grad(self.loss)

    def loss(self, features, rois):
        return (self.operator(features, rois) * self.d_output).sum()

    def construct(self, features, rois):
        return self.gradient(features, rois)


def operators():
    arguments = *WORKLOAD.output_size, WORKLOAD.scale, WORKLOAD.sampling
    return {
        "ours": roialign.mindspore.ROIAlign(*arguments),
        "theirs": mindspore.ops.ROIAlign(*arguments),
    }


def checked(calls):
    """The calls, of which ours gives what theirs does."""
    ours, theirs = (calls[name]().asnumpy() for name in ("ours", "theirs"))
    error, allowed = np.abs(ours - theirs).max(), TOLERANCE * np.abs(theirs).max()
    if not error <= allowed:
        raise SystemExit(f"ours differs from theirs by {error:.2g}, allowed {allowed:.2g}")
    return calls


def seconds(call):
    start = time.perf_counter()
    call().asnumpy()  # waits for the result
    return time.perf_counter() - start


def measured(cell):
    features, rois = Tensor(WORKLOAD.features()), Tensor(WORKLOAD.rois())
    cells = {name: cell(operator) for name, operator in operators().items()}
    calls = checked({name: lambda c=c: c(features, rois) for name, c in cells.items()})
    samples = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call().asnumpy()
            samples[name] += [seconds(call) * 1e3 for _ in range(3)]
    return samples


def main():
    roialign.set_num_threads(1)  # theirs uses one
    d_output = Tensor(WORKLOAD.d_output())
    modes = {"PyNative": mindspore.PYNATIVE_MODE, "Graph": mindspore.GRAPH_MODE}
    cells = {"forward": Pool, "gradient in the features": lambda o: Gradient(o, d_output)}
    record = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": run.commit(),
        "machine": run.machine(),
        "versions": {"roialign": roialign.__version__, "mindspore": mindspore.__version__},
        "milliseconds": {},
    }
    print("| | ours, ms | mindspore.ops.ROIAlign, ms | faster |\n| --- | ---: | ---: | ---: |")
    for mode, value in modes.items():
        mindspore.set_context(mode=value)
        for name, cell in cells.items():
            samples = measured(cell)
            record["milliseconds"][f"{mode}, {name}"] = samples
            ours, theirs = (
                "{1:.2f} ({0:.2f}..{2:.2f})".format(min(s), statistics.median(s), max(s))
                for s in samples.values()
            )
            ratio = statistics.median(samples["theirs"]) / statistics.median(samples["ours"])
            print(f"| {mode}, {name} | {ours} | {theirs} | {ratio:.0f}x |")
    print(run.write(record, Path(__file__).parent / "results" / "mindspore"))


if __name__ == "__main__":
    sys.exit(main())
