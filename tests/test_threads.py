"""The same bits from any number of threads, in every run, from any thread and after a fork."""

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import roialign
import tolerance
from backends import three
from conftest import draw_problem
from isolation import isolated

pytestmark = pytest.mark.serial


@pytest.fixture(autouse=True)
def restore_threads():
    threads = roialign.get_num_threads()
    yield
    roialign.set_num_threads(threads)


def results(problem, layout=np.ascontiguousarray):
    """The bits of the three operations."""
    given = layout(problem.features), layout(problem.draw_output()), *problem.rois
    return [array.tobytes() for array in three(problem)(*given)]


def shared_problem(make_problem, **options):
    """Large enough that threads share the work."""
    defaults = {"shape": (2, 64, 60, 80), "count": 150, "size": (7, 7), "sampling": 0}
    return make_problem(**defaults | options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        *({"dtype": dtype} for dtype in (*tolerance.DTYPES, np.uint8) if dtype != np.float32),
        {"shape": (1, 16, 100, 120), "count": 600},  # one task, if cut by channels alone
        {"shape": (1, 3, 50, 60), "count": 200, "sampling": 2},
        {"shape": (1, 256, 30, 40), "count": 3, "size": (14, 14)},
        {"shape": (5, 40, 20, 30), "convention": "asymmetric"},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "reversed"])
def test_same_bits(make_problem, layouts, options, layout):
    problem = shared_problem(make_problem, **options)
    roialign.set_num_threads(1)
    expected = results(problem, layouts[layout])
    for threads in (2, 3, 8, 8, 1):
        roialign.set_num_threads(threads)
        assert results(problem, layouts[layout]) == expected


@pytest.mark.backends("values", "exact")
@pytest.mark.parametrize("maps", [1, 2])
def test_same_bits_of_every_backend(backend, pyramid, maps):
    p, found = pyramid(np.float32, channels=40, count=600, maps=maps), set()
    for threads in (1, 2, 7):
        with backend.threads(threads):
            results = backend.run(p.together, p.d_output, *p.maps, *p.rois)
        found.add(b"".join(array.tobytes() for array in results))
    assert len(found) == 1


@pytest.mark.parametrize("layout", ["unaligned", "shifted"])
def test_same_bits_at_any_address(make_problem, layouts, layout):
    problem = shared_problem(make_problem, count=200, shape=(2, 150, 30, 40))
    assert results(problem, layouts[layout]) == results(problem)
    last = layouts["channels_last"]
    assert results(problem, lambda a: layouts[layout](last(a)))[2] == results(problem)[2]


@pytest.mark.backends("exact", "maps", "-slow")
def test_concurrent_calls(backend, make_problem):
    problems = [shared_problem(make_problem, seed=seed, count=40) for seed in range(4)]
    functions = [backend.way(three(problem)) for problem in problems]

    def bits(i):
        given = problems[i].features, problems[i].draw_output(), *problems[i].rois
        found = backend.numpy(functions[i](*backend.array(given)))
        return [array.tobytes() for array in found]

    with backend.threads(3), ThreadPoolExecutor(8) as executor:
        expected = list(map(bits, range(4)))
        assert list(executor.map(bits, list(range(4)) * 6)) == expected * 6


def check_threads_are_used():
    counts = []
    for threads in (1, 4):
        roialign.set_num_threads(threads)
        results(shared_problem(draw_problem))
        counts.append(len(os.listdir("/proc/self/task")))
    assert counts[1] == counts[0] + 3  # the caller is the fourth


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_threads_are_used():
    isolated(check_threads_are_used)


def check_interrupt(operation, threads):
    """A signal ends a long call; the next call has the right bits."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else a background job ignores it
    roialign.set_num_threads(threads)
    features = np.random.default_rng(0).standard_normal((1, 512, 64, 64), np.float32)
    rois = np.tile(np.float32([[0, 1, 2, 60, 61]]), (64, 1))
    rois[:, 1] += np.arange(64)

    def call(count):
        several = np.tile(rois, (count, 1))
        d_output = np.broadcast_to(np.float32(1), (len(several), 512, 7, 7))
        if operation == "adjoint":
            return roialign.roi_align_adjoint(d_output, several, features.shape)
        return roialign.roi_align_box_gradient(d_output, features, several)

    def interrupted_call(count):
        """The bits, and how long it took after the signal, which comes in half a second."""
        timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
        timer.start()
        start = time.monotonic()
        try:
            return call(count).tobytes(), time.monotonic() - start - 0.5
        except KeyboardInterrupt:
            return None, time.monotonic() - start - 0.5
        finally:
            timer.join()

    def seconds():
        start = time.monotonic()
        call(1)
        return time.monotonic() - start

    count = int(6 / min(seconds() for _ in range(4))) + 1
    expected = call(1).tobytes()
    bits, ended = interrupted_call(count)  # of six seconds, if nothing else runs
    assert bits is None and ended > -0.1
    assert call(1).tobytes() == expected
    handled = []
    signal.signal(signal.SIGINT, lambda *_: handled.append(time.monotonic()))  # which goes on
    bits, after = interrupted_call(count // 3)
    assert time.monotonic() - handled[0] > after / 2 and len(handled) == 1
    assert ended < after + 0.5  # less than a third of the call
    assert bits == call(count // 3).tobytes()


@pytest.mark.parametrize("operation, threads", [("adjoint", 2), ("box_gradient", 1)])
def test_interrupt(operation, threads):
    isolated(check_interrupt, operation, threads)


def check_daemon_threads():
    features = np.ones((1, 16, 64, 64), np.float32)
    rois = np.tile(np.float32([[0, 1, 1, 40, 40]]), (50, 1))
    started = [threading.Event() for _ in range(2)]

    def call(event):
        while True:
            roialign.roi_align(features, rois, 7)
            event.set()

    for event in started:
        threading.Thread(target=call, args=(event,), daemon=True).start()
    for event in started:
        event.wait()


def test_daemon_threads_in_calls_at_exit():
    """The interpreter may shut down while they are in the middle of calls."""
    for _ in range(3):
        isolated(check_daemon_threads)
