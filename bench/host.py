"""`python -m bench.host`: what a call on an NVIDIA GPU costs the host, measured without one.

Tensors of the CPU pass for a GPU's, and Triton's driver does nothing. So the time is that of
Python, of torch and of what is kept between calls. What is not in it: what CUDA takes to launch a
kernel, and to make the tensors' device the current one. Needs torch, Triton and TRITON_INTERPRET=0.
"""

import argparse
import ctypes
import statistics
from unittest import mock

from triton.runtime.driver import driver

import roialign.torch.kernels as kernels
from bench import run
from bench.devices import DEVICES
from bench.gpu import problem_of
from bench.peers import MAIN, PEERS, torch as of_torch

from triton_offline import TARGETS, Device  # isort: skip (found by the reference)

WORKLOADS = ("W1", "W6")
ROUNDS, CALLS = 9, 500
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of glibc's mallopt


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, choices=run.EVERY)
    parser.add_argument("--calls", type=int, default=CALLS, help="in each of 9 rounds")
    options = parser.parse_args(argv)
    keep_freed_memory()
    driver.set_active(Device(TARGETS["sm_90"]))
    print(f"us of a call, the median of {ROUNDS} rounds (least, most)")
    with mock.patch.object(kernels, "home", lambda tensor: "_triton"):
        for name in options.workloads:
            given = DEVICES["cpu"](), "float32", "nchw", PEERS["cuda"]["ours"]
            problem = problem_of(run.EVERY[name], *given)
            for operation in MAIN:
                call = getattr(of_torch, operation)(problem)
                call()  # compiles
                times = sorted(time(call, options.calls) for _ in range(ROUNDS))
                median = statistics.median(times)
                print(f"{name} {operation}: {median:.1f} ({times[0]:.1f}, {times[-1]:.1f})")


def keep_freed_memory():
    """Nothing goes back to the system, as with torch's allocator for a GPU."""
    library = ctypes.CDLL(None)
    library.mallopt(MMAP_MAX, 0)
    library.mallopt(TRIM_THRESHOLD, 2**31 - 1)


def time(call, number):
    begin = run.clock()
    for _ in range(number):
        call()
    return (run.clock() - begin) / number * 1e6


if __name__ == "__main__":
    main()
