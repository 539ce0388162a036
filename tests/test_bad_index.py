"""An image index that is no image: an error that names the RoI, or a row of zeros, no gradient."""

import re
from dataclasses import replace

import numpy as np
import pytest

import roialign
from backends import array, operations, pair, pooling, summed, taken_apart, three

NAN, INF = float("nan"), float("inf")
BAD = {
    **dict.fromkeys(("float16", "bfloat16"), (2, 3, 100, -1, -0.25, 0.5, 1.5, NAN, INF, -INF)),
    **dict.fromkeys(("float32", "float64"), (2, 1e30, -1, -0.25, 0.5, 1.5, NAN, INF, -INF)),
    "int8": (-128, -1, 2),
    "uint8": (2, 255),
    "int16": (-1, 257),
    "uint16": (65535,),
    "int32": (2, -1, -(2**31), 2**31 - 1),
    "uint32": (2**32 - 1,),
    "int64": (2**53 + 1, -(2**63), 2**63 - 1, 2**32),
    "uint64": (2**64 - 1, 2**63, 2**32 + 1),
}
FLOATS = tuple(BAD)[:4]


@pytest.fixture
def problem(make_problem):
    return make_problem(count=3, size=(2, 2), inside=True)


def rows(boxes, index, dtype):
    """(K, 5) of this dtype."""
    return np.column_stack([index.astype(dtype), boxes.astype(dtype)])


def assert_raises(backend, problem, rois, text):
    form, rois = taken_apart(rois)
    given = backend.array((problem.features, problem.draw_output(), *rois))
    message = rf"`image_index` of RoI 1 must be an integer in \[0, 2\), got {re.escape(text)}$"
    for operation in operations(problem, form):
        with pytest.raises(IndexError, match=message):
            backend.way(operation)(*given)


@pytest.mark.backends("raises", "-slow")
def test_it_raises(backend, problem):
    """In the index of a pair and in rows, whose dtypes are not narrowed before."""
    for dtype in (*FLOATS, *backend.integers):
        if dtype == "bfloat16" and dtype not in backend.traits:
            continue
        for value in BAD[dtype]:
            index = np.array([1, value, 0], object).astype(dtype)
            text = str(float(index[1])) if dtype in FLOATS else str(value)
            assert_raises(backend, problem, rows(problem.boxes, index, dtype), text)
            if dtype in backend.integers:
                assert_raises(backend, problem, (problem.boxes, index), text)


@pytest.mark.backends("raises")
def test_an_empty_box_does_not_hide_it(backend, problem):
    for box in ([NAN] * 4, [1, 1, 1, 1], [500, 500, 600, 600]):
        boxes = np.array([box] * 3, np.float32)
        assert_raises(backend, problem, rows(boxes, np.array([0, 2, 1]), np.float32), "2.0")


@pytest.mark.backends("raises", "-slow")
def test_the_first_one_is_named(backend, problem):
    good = np.repeat(rows(problem.boxes, problem.index, np.float32), 2, axis=0)
    for row in (0, 1, 4):
        rois = good.copy()
        rois[row:, 0] = [17, -1, 2.5, NAN, 99, 98][: 6 - row]
        d_output = np.ones((6, *problem.output_shape[1:]), np.float32)
        given = backend.array((problem.features, d_output, rois))
        for operation in operations(problem, array):
            with pytest.raises(IndexError, match=rf"RoI {row} .*\[0, 2\), got 17"):
                operation(*given)


@pytest.mark.backends("raises", "-slow")
def test_minus_zero_is_zero(backend, problem):
    rois = rows(problem.boxes, np.array([-0.0, 1, 0]), np.float32)
    for result in backend.run(three(problem, array), problem.features, problem.draw_output(), rois):
        assert np.isfinite(result).all() and result.any()


@pytest.mark.backends("fast", "strided")
def test_it_is_read_before_it_is_narrowed(backend):
    """2^24 + 1 is 2^24 in float32, 2049 is 2048 in float16."""
    last = 2**24 + 1
    images = np.broadcast_to(np.float32(1), (last, 1, 2, 2))
    box = np.array([[last, 0, 0, 1, 1]], np.float64)
    with pytest.raises(IndexError, match=str(last)):
        roialign.roi_align(backend.array(images), backend.array(box), 1)
    images = np.zeros((last + 1, 1, 1, 1), np.float16)
    images[last] = 7
    for rois in (box, box.astype(np.int64)):
        assert backend.roi_align(images, rois, 1, sampling_ratio=1).item() == 7
    images = np.arange(2050, dtype=np.float32).reshape(-1, 1, 1, 1)
    small = np.array([[2048, 0, 0, 1, 1]], np.float16)
    d_output = np.ones((1, 1, 1, 1), np.float16)
    for rois, image in ((small, 2048), ((small[:, 1:], np.array([2049])), 2049)):
        assert backend.roi_align(images, rois, 1, sampling_ratio=1).item() == image
        dx = backend.roi_align_adjoint(d_output, rois, images.shape, sampling_ratio=1)
        assert np.flatnonzero(dx).tolist() == [image]


@pytest.mark.backends("zeroes")
@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "float16", "float32", "float64"])
def test_its_row_is_zero(backend, problem, dtype):
    """And so are its gradients; the other RoIs have theirs."""
    bad = np.array([1, *BAD[dtype], 0], object).astype(dtype)
    boxes = np.resize(problem.boxes, (len(bad), 4)).astype(np.float64)
    boxes[[0, -1]] = problem.boxes[:2].round(1)
    widest = np.float32 if "narrow" in backend.traits else np.float64
    problem = replace(problem, features=problem.features.astype(widest))
    good = np.array([0, len(bad) - 1])
    form = array if dtype in FLOATS else pair

    def results(boxes, index):
        rois = (rows(boxes, index, dtype),) if form is array else (boxes, index)
        pool, given = pooling(problem, form), backend.array((problem.features, *rois))
        gradients = backend.grad(summed(pool), (0, 1))
        return backend.numpy((backend.way(pool)(*given), *gradients(*given)))

    output, d_features, d_rois = results(boxes, bad)
    expected = results(boxes[good], bad[good])
    assert not output[1:-1].any() and not d_rois[1:-1].any()
    for actual, right in zip((output[good], d_features, d_rois[good]), expected, strict=True):
        actual, right = actual.astype(np.float64), right.astype(np.float64)
        np.testing.assert_allclose(actual, right, rtol=0, atol=1e-12)
        assert right.any()
