"""dtypes and layouts of the inputs, the layout of the results, and that they are rounded once."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import oracle
import roialign
import tolerance
from backends import array, pair, three

FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
RNG = np.random.default_rng(11)
FEATURES = RNG.standard_normal((2, 19, 9, 10)).astype(np.float32)
ROIS = np.array(
    [[0, 1.3, 1.1, 6.6, 5.2], [1, 0.4, 2.1, 7.7, 6.5], [0, -3.0, 3.0, 4.0, 12.0]], np.float32
)
SIZE = (3, 4)
D_OUTPUT = RNG.standard_normal((3, 19, *SIZE)).astype(np.float32)

# Nothing about these is rounded before the result is: sample positions are multiples of 1/8 (two
# samples in bins of 2), and features and d_output integers of at most 10 bits.
EXACT = {"convention": roialign.Convention(), "sampling_ratio": 2}
EXACT_ROIS = np.array([[0, 0.125, 1.375, 6.125, 7.375], [1, 2.875, -2.625, 8.875, 3.375]])


def integers(shape, dtype):
    """Exact in `dtype`; in float64."""
    top = 127 if dtype == ml_dtypes.bfloat16 else 1023
    return RNG.integers(-top, top + 1, shape).astype(np.float64)


def forward(features=FEATURES, rois=ROIS, **options):
    return roialign.roi_align(features, rois, SIZE, **options)


def adjoint(d_output=D_OUTPUT, rois=ROIS, shape=FEATURES.shape, **options):
    return roialign.roi_align_adjoint(d_output, rois, shape, **options)


def box_gradient(d_output=D_OUTPUT, features=FEATURES, rois=ROIS, **options):
    return roialign.roi_align_box_gradient(d_output, features, rois, **options)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("boxes", FLOATS)
@pytest.mark.parametrize("channels", [1, 3, 16, 35])
def test_results_are_rounded_once(dtype, boxes, channels):
    features, d_output = integers((2, channels, 9, 10), dtype), integers((2, channels, 3, 3), dtype)
    rois = EXACT_ROIS.astype(boxes)
    y = roialign.roi_align(features, EXACT_ROIS, 3, **EXACT)
    rounded = roialign.roi_align(features.astype(dtype), rois, 3, **EXACT)
    assert rounded.dtype == dtype and (rounded == y.astype(dtype)).all()
    dx = roialign.roi_align_adjoint(d_output, EXACT_ROIS, features.shape, **EXACT)
    rounded = roialign.roi_align_adjoint(d_output.astype(dtype), rois, features.shape, **EXACT)
    assert rounded.dtype == dtype and (rounded == dx.astype(dtype)).all()
    d_rois = roialign.roi_align_box_gradient(rounded[:0, :, :1, :1], rounded, rois[:0])
    assert d_rois.dtype == boxes
    if channels == 35 and dtype in FLOATS[:2]:  # the mean of rounded samples is another
        one = roialign.roi_align(features, EXACT_ROIS, 6, **EXACT | {"sampling_ratio": 1})
        samples = one.astype(dtype).astype(np.float64).reshape(2, 35, 3, 2, 3, 2)
        assert (samples.mean((3, 5)).astype(dtype) != y.astype(dtype)).any()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_what_overflows_is_infinite(dtype):
    # 64 boxes on one pixel: the true gradient is out of range
    top = float(ml_dtypes.finfo(dtype).max)
    d_output = np.full((64, 1, 1, 1), top, dtype)
    boxes = np.repeat(np.array([[0, 4.0, 4.0, 5.0, 5.0]], np.float32), 64, 0)
    dx = roialign.roi_align_adjoint(d_output, boxes, (1, 1, 9, 9), sampling_ratio=1)
    assert dx[0, 0, 4, 4] == np.inf and np.isinf(dx).sum() == 1
    boxes = np.array([[0, 1, 1, 14, 14]], np.float32)  # but no sum on the way to a finite one
    dx = roialign.roi_align_adjoint(np.full((1, 2, 2, 2), top, dtype), boxes, (1, 2, 16, 16))
    assert np.isfinite(dx).all()


def test_every_bit_pattern_of_half_precision_is_read_and_written():
    # p = 1 exactly: the output is that pixel, converted there and back
    bits = np.arange(2**16, dtype=np.uint16)
    box = np.array([[0, 1.0, 1.0, 2.0, 2.0]], np.float32)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        features = np.zeros((1, 2**16, 3, 3), dtype)
        features[0, :, 1, 1] = bits.view(dtype)
        y = roialign.roi_align(features, box, 1, sampling_ratio=1).ravel()
        values = bits.view(dtype)
        with np.errstate(invalid="ignore"):  # signalling NaN
            nan = np.isnan(values)
        assert np.isnan(y[nan]).all()
        assert (y[~nan] == values[~nan]).all()


def test_longdouble_boxes():
    rois = ROIS.astype(np.longdouble)
    assert (forward(rois=rois) == forward()).all()
    assert (adjoint(rois=rois) == adjoint()).all()
    assert box_gradient(rois=rois).dtype == np.longdouble
    rois[1, 3] = np.finfo(np.longdouble).max  # infinite in float32 (and in float64): no warning
    assert (forward(rois=rois)[1] == 0).all() and (forward(rois=rois)[0] == forward()[0]).all()


def test_boxes_are_read_as_float64_only_for_float64_features():
    # 2^-30 is lost beside 4 in float32
    fine = np.array([[0, 4 + 2.0**-30, 4.0, 6 + 2.0**-30, 6.0]])
    coarse = fine.astype(np.float32).astype(np.float64)
    ramp = np.broadcast_to(np.arange(10.0), (1, 1, 10, 10))
    d_output = np.ones((1, 1, 1, 1))
    for dtype, differ in ((np.float32, False), (np.float64, True)):
        y = [roialign.roi_align(ramp.astype(dtype), r, 1, sampling_ratio=1) for r in (fine, coarse)]
        dx = [
            roialign.roi_align_adjoint(d_output.astype(dtype), r, (1, 1, 10, 10), sampling_ratio=1)
            for r in (fine, coarse)
        ]
        assert (y[0] != y[1]).any() == differ
        assert (dx[0] != dx[1]).any() == differ


@pytest.mark.parametrize("dtype", tolerance.DTYPES + tolerance.BYTES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 9, 11), (1, 40, 16, 12)])
def test_layouts(make_problem, layouts, dtype, shape):
    """Of every input; they are read and not written."""
    problem = make_problem(dtype=dtype, shape=shape)
    features, g = problem.features, problem.draw_output()
    y, d_features = oracle.forward(problem), oracle.adjoint(problem, g)
    d_boxes = oracle.box_gradient(problem, g)
    boxes, index = problem.rois
    rows = np.column_stack([index, boxes]).astype(boxes.dtype)
    strides = set()
    for layout in layouts.values():
        for form, rois in ((pair, (boxes, index)), (array, (rows,))):
            given = [layout(each) for each in (features, g, *rois)]
            strides.add(given[0].strides)
            output, adjoint, of_boxes = three(problem, form)(*given)
            tolerance.check(output, y, tolerance.forward(problem, y))
            tolerance.check(adjoint, d_features, tolerance.adjoint(problem, g, d_features))
            bound = tolerance.box_gradient(problem, g, d_boxes)
            tolerance.check(of_boxes[:, -4:], d_boxes, bound)
            for actual, right in zip(given, (features, g, *rois), strict=True):
                assert actual.tobytes() == right.tobytes()
    assert len(strides) == len(layouts) - 4  # four are other memory


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (3,), (2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_elements_that_share_memory(make_problem, axes, dtype):
    """Axes of stride 0, windows that overlap, and one box for all."""

    def one(values):
        return values[tuple(slice(1) if i in axes else slice(None) for i in range(4))]

    problem = make_problem(dtype=dtype, shape=(2, 4, 8, 9))
    g = problem.draw_output()
    signal = RNG.standard_normal(200).astype(dtype)
    windows = np.lib.stride_tricks.as_strided(
        signal, problem.features.shape, [s * signal.itemsize for s in (50, 20, 9, 1)]
    )
    for features in (np.broadcast_to(one(problem.features), problem.features.shape), windows):
        d_output = np.broadcast_to(one(g), g.shape)
        boxes = np.broadcast_to(problem.boxes[1], problem.boxes.shape)
        index = np.broadcast_to(np.int64(1), len(boxes))
        given = replace(problem, features=features, boxes=boxes, index=index)
        results = three(given)(features, d_output, boxes, index)
        expected = three(given)(*(each.copy() for each in (features, d_output, boxes, index)))
        for actual, right in zip(results, expected, strict=True):
            rtol = 2e-3 if actual.dtype == np.float16 else 0
            np.testing.assert_allclose(actual, right, rtol=rtol, atol=1e-5 * abs(right).max())


def with_steps(array, axes, step):
    """The array, with another stride along axes of length 1."""
    strides = [step if i in axes else s for i, s in enumerate(array.strides)]
    return np.lib.stride_tricks.as_strided(array, array.shape, strides)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (3,), (2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("step", [0, 4, -400])
@pytest.mark.parametrize("last", [False, True])
def test_strides_of_axes_of_length_1_mean_nothing(layouts, axes, step, last):
    def laid(array):
        one = array[tuple(slice(1) if i in axes else slice(None) for i in range(4))]
        return layouts["channels_last" if last else "contiguous"](one.copy())

    features, rois = laid(FEATURES), np.abs(ROIS[:1])
    out, d_features = forward(features, rois), np.empty_like(features)
    d_output = laid(D_OUTPUT[: len(rois), : features.shape[1]])
    adjoint(d_output, rois, features.shape, out=d_features)
    d_boxes = box_gradient(d_output, features, rois)
    odd = with_steps(features, axes, step)
    odd_d = with_steps(d_output, [i for i in axes if d_output.shape[i] == 1], step)
    odd_rois = with_steps(rois, (0,), step)
    result = forward(odd, odd_rois)
    assert result.tobytes() == out.tobytes() and result.strides == out.strides
    target = np.zeros_like(out)
    forward(odd, odd_rois, out=with_steps(target, [i for i in axes if out.shape[i] == 1], step))
    assert target.tobytes() == out.tobytes()
    target = np.empty_like(features)
    adjoint(odd_d, odd_rois, features.shape, out=with_steps(target, axes, step))
    assert target.tobytes() == d_features.tobytes()
    assert box_gradient(odd_d, odd, odd_rois).tobytes() == d_boxes.tobytes()


def test_memmap_is_an_array(tmp_path):
    path = tmp_path / "features"
    np.memmap(path, np.float32, "w+", shape=FEATURES.shape)[...] = FEATURES
    features = np.memmap(path, np.float32, "r", shape=FEATURES.shape)
    y = forward(features)
    assert type(y) is np.ndarray and (y == forward()).all()
    rois = np.memmap(tmp_path / "rois", np.float32, "w+", shape=ROIS.shape)
    rois[...] = ROIS
    assert (forward(rois=rois) == forward()).all()
    assert type(box_gradient(rois=rois)) is np.ndarray


def nhwc(n, c, h, w):
    return np.ones((n, h, w, c), np.float32).transpose(0, 3, 1, 2)


def nchw(n, c, h, w):
    return np.ones((n, c, h, w), np.float32)


MAKERS = {  # name: (an array of n, c, h, w, whether its results are channels_last)
    "nchw": (nchw, False),
    "nhwc": (nhwc, True),
    "cropped": (lambda n, c, h, w: nhwc(n, c, h + 3, w + 2)[:, :, 1:-2, :-2], True),
    "flipped": (lambda *shape: nhwc(*shape)[:, :, ::-1, ::-1], True),
    "half the channels": (lambda n, c, h, w: nhwc(n, 2 * c, h, w)[:, :c], True),
    "whc": (lambda n, c, h, w: np.ones((n, w, h, c), "f4").transpose(0, 3, 2, 1), True),
    "every other channel": (lambda n, c, h, w: nhwc(n, 2 * c, h, w)[:, ::2], False),
    "channels reversed": (lambda *shape: nhwc(*shape)[:, ::-1], False),
    "columns first": (lambda n, c, h, w: nchw(n, c, w, h).transpose(0, 1, 3, 2), False),
    "constant": (lambda *shape: np.broadcast_to(np.float32(1), shape), False),
}


@pytest.mark.parametrize(
    "name, shape, last",
    [
        *((name, (2, 5, 8, 9), last) for name, (_, last) in MAKERS.items()),
        ("nhwc", (2, 1, 8, 9), False),  # C = 1
        ("cropped", (2, 1, 8, 9), False),  # the same, not NCHW-contiguous
        ("nhwc", (2, 5, 1, 1), False),  # H W = 1
        ("cropped", (2, 5, 1, 1), False),
        ("nhwc", (2, 5, 1, 9), True),
        ("nhwc", (2, 5, 8, 1), True),
        ("nhwc", (1, 2, 1, 2), True),
    ],
)
def test_results_are_channels_last_iff_the_input_is(name, shape, last):
    make, _ = MAKERS[name]
    rois = np.array([[0, 0, 0, 1, 1], [0, 0, 0, 8, 8]], np.float32)
    y = roialign.roi_align(make(*shape), rois, (3, 4))
    assert y.shape == (2, shape[1], 3, 4)
    dx = roialign.roi_align_adjoint(make(2, *shape[1:]), rois, (1, shape[1], 6, 7))
    assert dx.shape == (1, shape[1], 6, 7)
    for result in (y, dx):
        assert result.strides == (nhwc if last else nchw)(*result.shape).strides
        assert result.flags.writeable and result.flags.aligned
