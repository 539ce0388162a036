"""What a call costs above its kernel: `python -m bench.overhead`, with torch installed.

A map of one pixel and one RoI, so that next to nothing is left but the call. Microseconds, median
with least and largest of the rounds; `kernel` is the core alone on the same memory, and is taken off
the others.
"""

import datetime
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

import roialign
import roialign.torch
from bench import run
from bench.calls import seconds_of


def calls():
    """Name -> a call, or one with its backward."""
    features, rois = torch.rand(1, 1, 1, 1), torch.tensor([[0, 0, 0, 1.0, 1.0]])
    learned = features.clone().requires_grad_()
    d_output, out = torch.ones(1, 1, 1, 1), torch.empty(1, 1, 1, 1)
    options = {"spatial_scale": 1.0, "sampling_ratio": 2, "convention": "asymmetric"}
    rule = (1.0, 1.0, 2, 0.0, 0.0, 0.0, 1.0, False)

    def pool(features):
        return roialign.roi_align(features, rois, 1, **options)

    compiled = torch.compile(pool, fullgraph=True)
    empty = torch.compile(lambda features: features.view(-1), fullgraph=True)
    in_numpy, rois_in_numpy = features.numpy(), rois.numpy()
    result = np.empty((1, 1, 1, 1), np.float32)
    compiled(features), empty(features)
    return {
        "kernel": lambda: roialign._core.forward(features, rois, None, rule, out, 1),
        "NumPy, out=": lambda: roialign.roi_align(
            in_numpy, rois_in_numpy, 1, **options, out=result
        ),
        "torch": lambda: pool(features),
        "torch, a gradient needed": lambda: pool(learned),
        "torch, with its backward": lambda: pool(learned).backward(d_output),
        "torch, compiled": lambda: compiled(features),
        "torch, a compiled function that does nothing": lambda: empty(features),
    }


def main():
    torch.set_num_threads(1)
    roialign.set_num_threads(1)
    timed = seconds_of(calls())
    samples = {name: [s * 1e6 for s in values] for name, values in timed.items()}
    kernel = statistics.median(samples["kernel"])
    print("| a call | us above the kernel |\n| --- | ---: |")
    for name, values in samples.items():
        off = 0 if name == "kernel" else kernel
        low, middle, high = (f(values) - off for f in (min, statistics.median, max))
        print(f"| {name} | {middle:.1f} ({low:.1f}..{high:.1f}) |")
    record = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": run.commit(),
        "machine": run.machine(),
        "versions": {"roialign": roialign.__version__, "torch": torch.__version__},
        "microseconds": samples,
    }
    print(run.write(record, Path(__file__).parent / "results" / "overhead"))


if __name__ == "__main__":
    sys.exit(main())
