"""ROIALIGN_LOG=1: a line for each call, and for each array that was not taken as it came."""

import re
import threading
from dataclasses import replace

import numpy as np
import pytest

import roialign
from backends import named, operations, pooling
from conftest import draw_problem, moved
from isolation import calling, python
from roialign import _core

OPERATIONS = "forward", "adjoint", "box_gradient"


def log(body, *args, value="1"):
    ran = python(*calling(body, *args), env={"ROIALIGN_LOG": value})
    assert ran.returncode == 0, ran.stderr
    return [line for line in ran.stderr.splitlines() if line.startswith("roialign: ")]


def call(operation, problem):
    named_operations = dict(zip(OPERATIONS, operations(problem), strict=True))
    named_operations[operation](problem.features, problem.draw_output(), *problem.rois)


def call_of_two_images(operation, way, sampling=3):
    """One box on the first, 400 on the second."""
    problem = draw_problem(shape=(2, 6, 100, 120), count=401, size=(7, 5), sampling=sampling)
    problem.index[:] = np.arange(401) > 0
    roialign.set_num_threads(1)
    _core.force_way(way)
    call(operation, problem)


def check_line(line, operation, way):
    what = rf"{operation}: float32 \(2, 6, 100, 120\), 401 RoIs of 7 x 5 bins"
    how = f"{way}; {_core.isa}, 1 thread"
    assert re.fullmatch(rf"roialign: {what}; {how}, \d+\.\d{{3}} ms", line), line


@pytest.mark.parametrize("way, counts", [(0, (1, 1, 0)), (1, (2, 0, 0)), (2, (0, 2, 0))])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_call(operation, way, counts):
    (line,) = log(call_of_two_images, operation, way)
    check_line(line, operation, r"{} images? packed, {} by rows, {} by bins".format(*counts))


@pytest.mark.parametrize("operation", OPERATIONS[:2])
def test_a_call_of_few_samples(operation):
    (line,) = log(call_of_two_images, operation, 4, 1)
    check_line(line, operation, "all by samples")


def largest_of_few_samples(reduction):
    problem = draw_problem(shape=(1, 3, 40, 50), count=9, size=(1, 1), sampling=1)
    options = {"reduction": reduction, **problem.options}
    roialign.roi_align(problem.features, problem.rois, problem.size, **options)


@pytest.mark.parametrize("reduction", ["max", "max_corner"])
def test_largest_of_few_samples(reduction):
    (line,) = log(largest_of_few_samples, reduction)
    assert "; all by samples; " in line


def largest_channels_last(count, bins, dtype):
    """Adjoint and box gradient, of maps whose channels are innermost."""
    shape, size = (1, 64, 60, 80), (bins, bins)
    problem = draw_problem(shape=shape, count=count, size=size, sampling=2, dtype=dtype)
    last, g = (
        np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        for x in (problem.features, problem.draw_output())
    )
    options = {"reduction": "max", **problem.options}
    roialign.roi_align_adjoint(g, problem.rois, last.shape, features=last, **options)
    roialign.roi_align_box_gradient(g, last, problem.rois, **options)


@pytest.mark.parametrize(
    "count, bins, dtype, packed",
    [(40, 7, "float32", 1), (1, 1, "float32", 0), (1, 1, "float16", 1)],
)
def test_largest_channels_last(count, bins, dtype, packed):
    """Where pixels of a channel are far apart, only a few samples are taken in place, of no 16-bit
    maps: there each channel would be one by one.
    """
    lines = log(largest_channels_last, count, bins, dtype)
    assert len(lines) == 2 and all(re.search(rf"; {packed} images? packed", x) for x in lines)


@pytest.mark.parametrize("value", ["0", ""])
def test_silence(value):
    assert not log(call_of_two_images, "forward", 0, value=value)
    assert not log(convert, "numpy", value=value)


def call_beside_another():
    """Until that is done."""
    problem = draw_problem(shape=(1, 64, 60, 80), count=150, size=(7, 7))
    roialign.set_num_threads(2)
    call("forward", problem)
    more = {"boxes": problem.boxes.repeat(200, 0), "index": problem.index.repeat(200)}
    longer = threading.Thread(target=call, args=("forward", replace(problem, **more)))
    longer.start()
    while longer.is_alive():
        call("forward", problem)


def test_threads():
    first, *rest = log(call_beside_another)
    assert ", 2 threads, " in first
    assert any(", 1 thread as the others are busy, " in line for line in rest)


def call_channels_last():
    problem = draw_problem(shape=(1, 256, 50, 76), count=50, size=(14, 14))
    roialign.set_num_threads(2)
    last = np.ascontiguousarray(problem.features.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    roialign.roi_align(last, problem.rois, problem.size, **problem.options)


def test_threads_share_few_rois_where_nothing_is_packed():
    (line,) = log(call_channels_last)
    assert "0 images packed, 0 by rows, 1 by bins; " in line and ", 2 threads, " in line


def as_they_are(backend, *arrays):
    """The arrays as the backend's, in the same memory."""
    if backend.family == "torch":
        return list(map(backend.torch.from_numpy, arrays))
    return list(arrays)


def convert(name):
    backend, problem = named(name), draw_problem()
    backend.start(None)
    features, d_output, boxes, index = as_they_are(
        backend, problem.features, problem.draw_output(), *problem.rois
    )
    odd_features, odd_d_output, odd_out, whole = as_they_are(
        backend,
        *(moved(a, 1) for a in (problem.features, problem.draw_output(), problem.draw_output())),
        problem.boxes.astype(np.int64),
    )
    size, options = problem.size, problem.options
    roialign.roi_align(odd_features, (boxes, index), size, **options)
    roialign.roi_align_adjoint(odd_d_output, (boxes, index), features.shape, **options)
    roialign.roi_align_box_gradient(d_output, features, (whole, index), **options)
    roialign.roi_align(features, (boxes, index), size, **options, out=odd_out)


@pytest.mark.backends("fast", "strided")
def test_copies(backend):
    expected = [
        "`features` is copied: its elements are not aligned",
        "`d_output` is copied: its elements are not aligned",
        "`boxes` is converted from (torch.)?int64 to (torch.)?float32",
        "`out` is copied from another (array|tensor): .* aligned",
    ]
    found = [line for line in log(convert, backend.name) if " bins; " not in line]
    assert len(found) == len(expected)
    assert all(map(re.fullmatch, [f"roialign: {each}.*" for each in expected], found)), found


def call_of_a_backend(name):
    backend, problem = named(name), draw_problem()
    rois = problem.boxes.astype(np.int32), problem.index
    with pytest.MonkeyPatch.context() as monkeypatch:
        backend.start(monkeypatch)
        backend.roi_align(problem.features, rois, problem.size, **problem.options)


@pytest.mark.backends("values")
def test_every_backend(backend):
    """Of the core, the kernels for GPUs, or neither. Compiled programs convert by themselves."""
    expected = {
        "triton": "forward on .* by the kernels of roialign._triton",
        "triton.ascend": "forward on .* by the kernels of roialign._ascend",
        "jax.dense": "forward is compiled to plain JAX: there is no kernel",
        "jax_triton": "forward is compiled to the kernels of roialign._triton",
    }.get(backend.name, "forward: float32 .* bins; ")
    *before, line = log(call_of_a_backend, backend.name)
    assert re.match(f"roialign: {expected}", line), line
    compiled = backend.name.startswith("jax") or backend.name == "mindspore.graph"
    assert ["`boxes` is converted" in each for each in before] == [True] * (not compiled)


def batched_calls(name):
    """Of features, of gradients, of boxes, and of features and boxes."""
    backend, problem = named(name), draw_problem()
    forward, adjoint, _ = operations(problem)
    with pytest.MonkeyPatch.context() as monkeypatch:
        backend.start(monkeypatch)
        given = problem.features, problem.draw_output(), *problem.rois
        one, batch = backend.array((given, [np.stack([each] * 4) for each in given]))
        for operation, batched in (forward, [0]), (adjoint, [1]), (forward, [2]), (forward, [0, 2]):
            axes = tuple(0 if i in batched else None for i in range(4))
            mixed = [batch[i] if i in batched else one[i] for i in range(4)]
            backend.numpy(backend.vmap(operation, axes)(*mixed))


@pytest.mark.backends("func", "maps", "-slow")
def test_batches(backend):
    """Of features they are more channels, so taps are built once; of boxes they are more RoIs."""
    lines = "\n".join(log(batched_calls, backend.name))
    found = re.findall(r"^roialign: (\w+): \w+ (\(.*?\)), (\d+) RoIs", lines, re.MULTILINE)
    assert found == [
        ("forward", "(2, 20, 9, 11)", "7"),
        ("adjoint", "(2, 20, 9, 11)", "7"),
        ("forward", "(2, 5, 9, 11)", "28"),
        ("forward", "(8, 5, 9, 11)", "28"),
    ]


def call_of_torch(threads):
    backend = named("torch")
    backend.start(None)
    problem = draw_problem(shape=(1, 64, 60, 80), count=150, size=(7, 7))
    with backend.threads(2):
        backend.torch.set_num_threads(threads)
        backend.run(pooling(problem), problem.features, *problem.rois)


def test_threads_are_at_most_torchs():
    pytest.importorskip("torch", reason="needs torch")
    for threads, shown in ((1, ", 1 thread, "), (2, ", 2 threads, ")):
        (line,) = log(call_of_torch, threads)
        assert shown in line
