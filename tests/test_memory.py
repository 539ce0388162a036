"""Large results: never shared while alive, bounded once freed; scratch in its bound; no leak."""

import contextlib
import os
import queue
import sys
import threading

import numpy as np
import pytest

import roialign
from cases import WORKLOADS, Workload
from isolation import in_a_child, isolated

pytestmark = pytest.mark.serial
MIB = 2**20
SANITIZED = "san" in os.environ.get("LD_PRELOAD", "")  # a sanitizer holds freed memory back
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
resident_set = pytest.mark.skipif(sys.platform != "linux" or SANITIZED, reason="reads /proc/self")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

LARGE = (1, 64, 16, 16)  # pooled by 512 boxes to 8 x 8: 8 MiB of float32
BOXES = np.tile(np.array([[0, 1, 1, 14, 13]], np.float32), (512, 1))


def pool(value, boxes=BOXES, **options):
    """8 MiB (per 512 boxes) of one value."""
    return roialign.roi_align(np.full(LARGE, value, np.float32), boxes, 8, **options)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak():
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def is_all(array, value):
    return array.min() > value - 1e-3 and array.max() < value + 1e-3  # False for NaN


def check_live_results_are_never_shared():
    alive = []
    for value in range(1, 13):
        alive.append((value, pool(value)))
        if value % 3 == 0:
            del alive[0]  # its buffer may be taken by the next
        for earlier, result in alive:
            assert result.nbytes == 8 * MIB and is_all(result, earlier)
    for i, (_, a) in enumerate(alive):
        for _, b in alive[:i]:
            assert not np.may_share_memory(a, b)


def check_a_view_keeps_its_buffer():
    result = pool(3)
    views = result[7:, ::2, 1], result.T[1], memoryview(result[5])
    del result
    for values in ((4, 5, 6), (7,)):
        others = [pool(value) for value in values]
        for other in others:
            other[...] = np.nan
        assert all(is_all(np.asarray(view), 3) for view in views)
        del others, other


def test_adjoint_results_are_not_shared_with_forward_results():
    y = pool(2)
    dx = roialign.roi_align_adjoint(y, BOXES, (8, 64, 64, 64))
    assert dx.nbytes == 8 * MIB and not np.may_share_memory(dx, y)
    kept = dx.copy()
    del y
    again = pool(9)
    again[...] = np.nan
    assert (dx == kept).all()


@pytest.mark.parametrize("count", [255, 256, 257])
def test_results_around_the_threshold_are_plain_arrays(count):
    # 4 MiB is 256 boxes: below it NumPy's own memory, from it on the library's
    results = [pool(value, BOXES[:count]) for value in (1, 2, 3)]
    for value, result in zip((1, 2, 3), results, strict=True):
        assert type(result) is np.ndarray
        assert result.shape == (count, 64, 8, 8) and is_all(result, value)
        assert result.flags.writeable and result.flags.aligned and result.flags.c_contiguous
        assert is_all(np.concatenate([result, result]), value) and is_all(result.reshape(-1), value)
        result[...] = 5
        assert is_all(np.add(result, 1, out=result), 6)


def check_what_stays_resident(limit):
    """Free 10 x 32 MiB: at most `limit` MiB stay (the cache), and the library still works."""
    boxes = np.tile(BOXES, (4, 1))
    pool(1, boxes, out=np.empty((2048, 64, 8, 8), np.float32))  # scratch, threads
    pool(1, BOXES[:8])
    before = resident()
    results = [pool(value, boxes) for value in range(10)]
    assert all(result.nbytes == 32 * MIB for result in results)
    assert resident() - before > 10 * 32 * MIB * 0.9
    del results
    kept = resident() - before
    assert kept <= (limit + 6) * MIB, f"{kept / MIB:.0f} MiB stay with a limit of {limit}"
    print(kept // MIB)
    assert is_all(pool(4, boxes), 4)


@resident_set
@pytest.mark.parametrize(
    "setting, limit", [(None, 256), ("64", 64), ("32", 32), ("40", 40), ("0", 0), ("31", 31)]
)
def test_cache_limit(setting, limit):
    env = {"ROIALIGN_CACHE_MB": setting} if setting else None
    kept = int(isolated(check_what_stays_resident, limit, env=env))
    if limit >= 32:
        assert kept >= 30  # there is a cache, or this test measures nothing


def check_many_sizes_stay_within_the_limit():
    pool(1, BOXES[:8])
    before = resident()
    for count in list(range(256, 1600, 96)) * 2:
        pool(1, np.tile(BOXES, (4, 1))[:count])
    assert resident() - before <= (256 + 6) * MIB


def check_no_leak():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((2, 64, 32, 32)).astype(np.float32)
    rois = np.array([[i % 2, 1, 1, 20 + i % 8, 25] for i in range(350)], np.float32)
    d_output = np.ones((350, 64, 7, 7), np.float32)
    last = features.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)

    def a_round():
        roialign.roi_align(features, rois, 7)  # 4.4 MB: from the cache
        roialign.roi_align(last, rois[:16], 7, convention="mindspore")
        roialign.roi_align(features.astype(np.float16), rois[:8], 3)
        roialign.roi_align_adjoint(d_output, rois, features.shape)
        roialign.roi_align_box_gradient(d_output, features, rois)
        roialign.roi_align_box_gradient(d_output[:4], features, [rois[:2, 1:], rois[2:4, 1:]])
        roialign.roi_align(features, (rois[:, 1:], rois[:, 0].astype(int)), 2)
        for bad in (
            {"rois": rois[:, :4]},
            {"rois": rois + 5},
            {"rois": None},
            {"rois": rois, "out": features},
            {"rois": rois, "convention": "none"},
        ):
            try:
                roialign.roi_align(features, output_size=7, **bad)
            except (TypeError, ValueError, IndexError):
                continue
            raise AssertionError(bad)

    for _ in range(5):
        a_round()
    before = resident()
    for _ in range(25):  # 12 calls each
        a_round()
    grown = resident() - before
    assert grown < 2 * MIB, f"{grown / MIB:.1f} MiB in 300 calls"


def check_no_leak_of_references():
    rois, out = BOXES[:4].copy(), np.empty((4, 64, 8, 8), np.float32)
    features = np.ones(LARGE, np.float32)
    objects = (features, rois, out)
    before = [sys.getrefcount(o) for o in objects]
    for _ in range(50):
        roialign.roi_align(features, rois, 8, out=out)
        roialign.roi_align_adjoint(out, rois, LARGE)
        roialign.roi_align_box_gradient(out, features, rois)
        with contextlib.suppress(IndexError):
            roialign.roi_align(features, rois + 3, 8, out=out)
    assert [sys.getrefcount(o) for o in objects] == before


SPOTS = Workload(
    "spots", "2 boxes", (1, 1, 4000, 5000), 1.0, 2, (7, 7), 0, (190.0, 250.0, 300.0, 0.2), ()
)


def check_peak(spots, operation, threads, dtype, last):
    """Memory beyond inputs and outputs: 256 H W per thread, or less where less is touched, taps,
    box gradient K C/16."""
    workload = SPOTS if spots else WORKLOADS["W1"]
    (_, channels, height, width), rois = workload.shape, workload.rois()
    features, y = (np.ones(shape, dtype) for shape in (workload.shape, workload.output_shape))
    if last:
        features, y = (
            np.ones((a.shape[0], *a.shape[2:], channels), dtype).transpose(0, 3, 1, 2)
            for a in (features, y)
        )
    options = {"spatial_scale": workload.scale, "sampling_ratio": workload.sampling}
    roialign.set_num_threads(threads)
    roialign.roi_align(features[:, :16, :8, :8], rois[:1], 1)  # what is loaded once
    before = resident()
    reset_peak()
    if operation == "forward":
        roialign.roi_align(features, rois, 7, out=y, **options)
    elif operation == "adjoint":
        roialign.roi_align_adjoint(y, rois, features.shape, out=features, **options)
    else:
        roialign.roi_align_box_gradient(y, features, rois, **options)
    extra = peak() - before
    scratch = 30 * MIB if spots else 256 * height * width * threads
    # a tap: index and weight, in both orders, for values and slopes; a window has up to size + 2
    taps = ((rois[:, 3:] - rois[:, 1:3]) * workload.scale + 3).sum() * 2 * 2 * 2 * 16
    partial = len(rois) * channels / 16 * 4 * 8 if operation == "box_gradient" else 0
    allowed = scratch + taps + partial + 2 * MIB  # one huge page: so fine is what is counted
    assert extra <= allowed, f"{extra / MIB:.1f} MiB of {allowed / MIB:.1f}"
    assert extra > 0 or spots


OPERATIONS = "forward", "adjoint", "box_gradient"


@resident_set
@pytest.mark.parametrize(
    "spots, operation, threads, dtype, last",
    [
        *((False, name, 1, "float32", False) for name in OPERATIONS),
        *((False, name, 2, "float32", False) for name in OPERATIONS[:2]),
        *((False, name, 1, "float32", True) for name in OPERATIONS[:2]),
        *((False, "forward", 1, dtype, False) for dtype in ("float16", "float64")),
        *((True, name, 2, dtype, False) for name in OPERATIONS for dtype in ("float16", "float32")),
    ],
)
def test_peak_memory(spots, operation, threads, dtype, last):
    isolated(check_peak, spots, operation, threads, dtype, last)


def check_forks(large):
    """Two generations of children of a process in which other threads are in the middle of calls
    all the time, with whatever they hold: outputs and gradients; and the parent after them."""
    boxes, features = BOXES if large else BOXES[:8], np.full(LARGE, 3, np.float32)
    stop = threading.Event()
    roialign.set_num_threads(3)

    def results():
        y = roialign.roi_align(features, boxes, 8)
        d_boxes = roialign.roi_align_box_gradient(y, features, boxes)
        return y, roialign.roi_align_adjoint(y, boxes, LARGE), d_boxes

    def agree():
        return all(map(np.array_equal, results(), expected))

    def churn():
        while not stop.is_set():
            assert agree()

    def generations():
        right = agree() and in_a_child(agree) and agree()
        for array in expected:
            array[...] = np.nan  # its own copy of the page
        return right

    expected = results()
    assert is_all(expected[0], 3) and expected[1].any()
    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    children = [in_a_child(generations) for _ in range(12)]
    stop.set()
    for thread in threads:
        thread.join()
    assert all(children) and agree()


@forks
@pytest.mark.parametrize("large", [False, True])
def test_fork(large):
    isolated(check_forks, large, env={"PYTHONWARNINGS": "ignore"})


def check_a_child_frees_what_the_parent_made():
    for _ in range(4):
        results = [pool(value) for value in (1, 2)]
        del results[0]  # in the cache at the fork

        def frees_and_makes(results=results):
            results.clear()
            return all(map(is_all, [pool(value) for value in (7, 8, 9)], (7, 8, 9)))

        assert in_a_child(frees_and_makes)
        assert is_all(results[0], 2) and is_all(pool(4), 4)


def check_a_child_has_threads_of_its_own():
    def threads():
        return len(os.listdir("/proc/self/task"))

    roialign.set_num_threads(2)
    pool(1)
    assert threads() > 1, "the call used one thread"
    assert in_a_child(lambda: threads() == 1 and pool(2) is not None and threads() > 1)


def check_freed_in_another_thread():
    made = queue.Queue(4)

    def consume():
        while (item := made.get()) is not None:
            value, result = item
            assert is_all(result, value)
            result[...] = np.nan

    thread = threading.Thread(target=consume)
    thread.start()
    for value in range(24):
        made.put((value, pool(value)))
    made.put(None)
    thread.join()


def check_results_outlive_everything():
    # freed at interpreter exit, after the module may be gone
    import builtins

    builtins.kept = pool(1)
    roialign.kept = pool(2)


@pytest.mark.parametrize(
    "check",
    [
        check_live_results_are_never_shared,
        check_a_view_keeps_its_buffer,
        pytest.param(check_many_sizes_stay_within_the_limit, marks=resident_set),
        pytest.param(check_no_leak, marks=resident_set),
        check_no_leak_of_references,
        pytest.param(check_a_child_frees_what_the_parent_made, marks=forks),
        pytest.param(check_a_child_has_threads_of_its_own, marks=linux),
        check_freed_in_another_thread,
        check_results_outlive_everything,
    ],
)
def test_in_a_process_of_its_own(check):
    isolated(check, env={"PYTHONWARNINGS": "ignore"})
