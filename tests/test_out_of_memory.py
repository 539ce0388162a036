"""A call that runs out of memory is a MemoryError, and the next call gives the right bits."""

import hashlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import roialign
from isolation import isolated
from roialign import _core
from test_memory import MIB, SANITIZED

CALLS = {
    "forward": lambda features, rois, g: roialign.roi_align(features, rois, g.shape[2:]),
    "adjoint": lambda features, rois, g: roialign.roi_align_adjoint(g, rois, features.shape),
    "box_gradient": lambda features, rois, g: roialign.roi_align_box_gradient(g, features, rois),
    "largest": lambda features, rois, g: roialign.roi_align_adjoint(
        g, rois, features.shape, features=features, reduction="max"
    ),
}


def problem():
    """Threads share the work; scratch, and a result of forward, have pages of their own."""
    rng = np.random.default_rng(0)
    rois = np.zeros((270, 5), np.float32)
    rois[:, 0], rois[:, 1:3] = np.arange(270) % 2, rng.uniform(-9, 180, (270, 2))
    rois[:, 3:] = rois[:, 1:3] + rng.uniform(0, 20, (270, 2))
    features = rng.standard_normal((2, 20, 184, 184), np.float32)
    return features, rois, rng.standard_normal((270, 20, 14, 14), np.float32)


def check_every_allocation(name):
    roialign.set_num_threads(2)
    arrays = problem()

    def bits():
        return hashlib.sha256(CALLS[name](*arrays).tobytes()).digest()

    def after_failure(n):
        """How many allocations there were; the bits after the n-th of them failed."""
        _core.fail_allocation(n)
        try:
            first = bits()  # one thread less is no error
        except MemoryError:
            first = None
        made = _core.fail_allocation(0)
        result = bits()
        assert first in (None, result)
        return made.to_bytes(4, "big") + result

    def in_a_child(n):
        """Where no thread has allocated anything yet."""
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.write(write, after_failure(n))
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            answer = pipe.read()
        assert os.waitpid(child, 0)[1] == 0, f"allocation {n}"
        return int.from_bytes(answer[:4], "big"), answer[4:]

    made, expected = in_a_child(0)
    assert made > 20
    for n in itertools.count(1):
        made, got = in_a_child(n)
        assert got == expected, f"allocation {n}"
        if made < n:
            break


@pytest.mark.skipif(
    not hasattr(_core, "fail_allocation"), reason="not built with ROIALIGN_FAIL_ALLOCATIONS"
)
@pytest.mark.parametrize("name", CALLS)
def test_every_allocation(name):
    isolated(check_every_allocation, name, env={"PYTHONWARNINGS": "ignore"})


def check_a_limit_of_the_system(room):
    import resource

    def call():
        return roialign.roi_align(features, rois, 1)

    features = np.broadcast_to(np.float32(1), (1, 1, 1, 2_000_000))
    rois = np.float32([[0, 0, 0, 2e6, 1]])
    roialign.roi_align(features[..., :8], rois, 1)
    with open("/proc/self/statm") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + room * MIB, hard))
    with pytest.raises(MemoryError):
        call()
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    with ThreadPoolExecutor(1) as executor:  # a thread has scratch of its own
        expected = executor.submit(call).result()
    assert call() == expected


@pytest.mark.skipif(
    not os.path.exists("/proc/self/statm") or SANITIZED, reason="limits the address space"
)
@pytest.mark.parametrize("room", range(40, 61, 5))
def test_a_limit_of_the_system(room):
    isolated(check_a_limit_of_the_system, room)
