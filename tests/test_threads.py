"""The same bits from any number of threads, in every run, from any thread and after a fork."""

import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import numpy as np
import pytest

import roialign
import tolerance
from backends import three
from isolation import isolated

pytestmark = pytest.mark.serial
FORK_WARNING = pytest.mark.filterwarnings("ignore:.*fork")  # Python's, and JAX's


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
def test_same_bits_of_every_backend(backend, make_problem):
    problem = make_problem(shape=(1, 64, 40, 40), count=40)
    given, expected = (problem.features, problem.draw_output(), *problem.rois), None
    for threads in (1, 2, 3):
        with backend.threads(threads):
            arrays = backend.run(three(problem), *given)
        found = [array.tobytes() for array in arrays]
        expected = expected or found
        assert found == expected


@pytest.mark.parametrize("layout", ["unaligned", "shifted"])
def test_same_bits_at_any_address(make_problem, layouts, layout):
    problem = shared_problem(make_problem, count=200)
    features, rois, options = problem.features, problem.rois, problem.options
    y = roialign.roi_align(features, rois, problem.size, **options)
    d_features = roialign.roi_align_adjoint(y, rois, features.shape, **options)
    out, d_out = layouts[layout](0 * y), layouts[layout](0 * d_features)
    roialign.roi_align(layouts[layout](features), rois, problem.size, **options, out=out)
    roialign.roi_align_adjoint(layouts[layout](y), rois, features.shape, **options, out=d_out)
    assert out.tobytes() == y.tobytes()
    assert d_out.tobytes() == d_features.tobytes()


@pytest.mark.parametrize("layout", ["channels_last", "unaligned", "shifted"])
def test_box_gradients_same_bits_in_any_layout(make_problem, layouts, layout):
    """One sum per block of channels, wherever they lie: also in an unaligned map's aligned copy."""
    problem = make_problem(shape=(1, 150, 20, 20), count=40)
    d_output, rois = problem.draw_output(), problem.rois
    expected = roialign.roi_align_box_gradient(d_output, problem.features, rois, **problem.options)
    features = layouts[layout](layouts["channels_last"](problem.features))
    d_boxes = roialign.roi_align_box_gradient(d_output, features, rois, **problem.options)
    assert d_boxes.tobytes() == expected.tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_threads_are_used(make_problem):
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as process:
        before, after = process.apply(count_threads, (shared_problem(make_problem), 4))
    assert after == before + 3  # the caller is the fourth


def count_threads(problem, threads):
    roialign.set_num_threads(1)
    results(problem)
    before = len(os.listdir("/proc/self/task"))
    roialign.set_num_threads(threads)
    results(problem)
    return before, len(os.listdir("/proc/self/task"))


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


def child_agrees(problem, expected, generations=0):
    """In a child process: exit code 0 iff it has the parent's results, and its own child too."""
    agrees = results(problem) == expected
    if generations:
        child = multiprocessing.get_context("fork").Process(
            target=child_agrees, args=(problem, expected, generations - 1)
        )
        child.start()
        child.join(60)
        agrees = agrees and child.exitcode == 0
    sys.exit(not agrees)


def run_child(method, *arguments):
    child = multiprocessing.get_context(method).Process(target=child_agrees, args=arguments)
    child.start()
    child.join(120)
    if child.exitcode is None:
        child.kill()
        child.join()
    return child.exitcode


@FORK_WARNING
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork(make_problem):
    """The parent's pool is alive; so are two generations of children, and the parent after them."""
    problem = shared_problem(make_problem)
    roialign.set_num_threads(3)
    expected = results(problem)
    assert run_child("fork", problem, expected, 1) == 0
    assert results(problem) == expected


def test_spawn(make_problem):
    problem = shared_problem(make_problem)
    assert run_child("spawn", problem, results(problem)) == 0


def check_interrupt(operation, threads):
    """A signal ends a long call; the next call has the right bits."""
    import signal
    import threading
    import time

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
    bits, after = interrupted_call(count)  # of six seconds
    assert bits is None and -0.1 < after < 2.5, after
    assert call(1).tobytes() == expected
    handled = []
    signal.signal(signal.SIGINT, lambda *_: handled.append(time.monotonic()))  # which goes on
    bits, after = interrupted_call(count // 3)
    assert time.monotonic() - handled[0] > after / 2 and len(handled) == 1
    assert bits == call(count // 3).tobytes()


@pytest.mark.parametrize("operation, threads", [("adjoint", 2), ("box_gradient", 1)])
def test_interrupt(operation, threads):
    isolated(check_interrupt, operation, threads, timeout=120)


def check_daemon_threads():
    features = np.ones((1, 16, 64, 64), np.float32)
    rois = np.tile(np.float32([[0, 1, 1, 40, 40]]), (50, 1))
    started = [Event() for _ in range(2)]

    def call(event):
        while True:
            roialign.roi_align(features, rois, 7)
            event.set()

    for event in started:
        Thread(target=call, args=(event,), daemon=True).start()
    for event in started:
        event.wait()


def test_daemon_threads_in_calls_at_exit():
    """The interpreter may shut down while they are in the middle of calls."""
    for _ in range(3):
        isolated(check_daemon_threads)
