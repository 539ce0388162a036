"""dtypes and layouts of the inputs, the layout of the results, and that they are rounded once."""

import mmap

import ml_dtypes
import numpy as np
import pytest

import roialign

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


def close(actual, expected):
    """Equal but for the order of sums."""
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=64 * np.finfo(np.float32).eps * scale)


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


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_the_exact_case_sees_double_rounding(dtype):
    # the rig: a mean of samples that were rounded differs from the rounded mean
    features = integers((2, 35, 9, 10), dtype)
    y = roialign.roi_align(features, EXACT_ROIS, 3, **EXACT)
    fine = (
        roialign.roi_align(
            features, EXACT_ROIS, 6, convention=EXACT["convention"], sampling_ratio=1
        )
        .astype(dtype)
        .astype(np.float64)
    )
    twice = fine.reshape(2, 35, 3, 2, 3, 2).mean((3, 5)).astype(dtype)
    assert (twice != y.astype(dtype)).any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_constant_stays_exact_over_many_samples(dtype):
    # accumulated in float16 this mean is 0.127
    ones = np.ones((1, 3, 40, 40), dtype)
    box = np.array([[0, 4, 4, 36, 36]], np.float32)
    y = roialign.roi_align(ones, box, 1, sampling_ratio=127)
    assert abs(y.astype(np.float64) - 1).max() <= 32 * 2.0**-24
    if dtype in (np.float16, ml_dtypes.bfloat16):
        assert (y == 1).all()


def test_float16_does_not_overflow_in_sums():
    big = np.full((1, 2, 16, 16), 65504, np.float16)
    box = np.array([[0, 1, 1, 14, 14]], np.float32)
    assert (roialign.roi_align(big, box, 2, sampling_ratio=4) == 65504).all()
    ones = np.full((1, 2, 2, 2), 60000, np.float16)
    dx = roialign.roi_align_adjoint(ones, np.repeat(box, 2, 0)[:1], (1, 2, 16, 16))
    assert np.isfinite(dx).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_what_overflows_is_infinite(dtype):
    # 64 boxes on one pixel: the true gradient is out of range
    top = float(ml_dtypes.finfo(dtype).max)
    d_output = np.full((64, 1, 1, 1), top, dtype)
    boxes = np.repeat(np.array([[0, 4.0, 4.0, 5.0, 5.0]], np.float32), 64, 0)
    dx = roialign.roi_align_adjoint(d_output, boxes, (1, 1, 9, 9), sampling_ratio=1)
    assert dx[0, 0, 4, 4] == np.inf and np.isinf(dx).sum() == 1


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_subnormals_are_kept(dtype):
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    features = np.full((1, 18, 8, 8), 3 * tiny, dtype)
    y = roialign.roi_align(features, np.array([[0, 1, 1, 6, 6]], np.float32), 2)
    assert (y.astype(np.float64) == 3 * tiny).all()


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


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("boxes", FLOATS)
def test_dtypes_of_results(dtype, boxes):
    features, d_output, rois = FEATURES.astype(dtype), D_OUTPUT.astype(dtype), ROIS.astype(boxes)
    pair = (rois[:, 1:], rois[:, 0].astype(np.int32))
    assert forward(features, rois).dtype == dtype
    assert adjoint(d_output, rois).dtype == dtype
    assert box_gradient(d_output, features, rois).dtype == boxes
    assert box_gradient(d_output, features, pair).dtype == boxes
    listed = box_gradient(d_output, features, [pair[0], pair[0][:0]])
    assert [d.dtype for d in listed] == [boxes] * 2


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


def test_float32_boxes_with_float64_features_compute_in_float64():
    ramp = np.broadcast_to(np.arange(10.0), (1, 1, 10, 10))
    box = np.array([[0, 0.1, 0.1, 7.7, 7.7]], np.float32)
    y = roialign.roi_align(
        ramp, box, 7, spatial_scale=0.3, sampling_ratio=3, convention="asymmetric"
    )
    x1, x2 = box[0, 1].astype(float) * 0.3, box[0, 3].astype(float) * 0.3
    centres = x1 + (np.arange(7) + 0.5) * (x2 - x1) / 7
    np.testing.assert_allclose(y[0, 0], np.broadcast_to(centres, (7, 7)), rtol=1e-14)


def layouts(array):
    """(name, an array of the same values) in every layout that NumPy can make."""
    yield "contiguous", array.copy()
    yield "fortran", np.asfortranarray(array)
    if array.ndim == 4:
        yield (
            "channels_last",
            np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        )
        yield (
            "columns_first",
            np.ascontiguousarray(array.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2),
        )
        yield "images_last", np.ascontiguousarray(array.transpose(1, 2, 3, 0)).transpose(3, 0, 1, 2)
    gaps = np.full([2 * n + 1 for n in array.shape], 0xFF, np.uint8).repeat(array.itemsize, -1)
    gaps = gaps.view(array.dtype)  # NaN in every float dtype
    gaps = gaps[(slice(1, None, 2),) * array.ndim]
    gaps[...] = array
    yield "gaps", gaps
    back = (slice(None, None, -1),) * array.ndim
    yield "negative", array[back].copy()[back]
    yield "negative gaps", np.repeat(array[back], 2, axis=-1)[..., ::2][back]
    record = np.zeros(array.shape, np.dtype([("head", "u1"), ("value", array.dtype)]))
    record["value"] = array
    yield "field", record["value"]
    raw = bytearray(array.nbytes + 1)
    unaligned = np.frombuffer(raw, array.dtype, offset=1).reshape(array.shape)
    unaligned[...] = array
    yield "unaligned", unaligned
    read_only = array.copy()
    read_only.flags.writeable = False
    yield "read-only", read_only
    yield "bytes", np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)
    memory = mmap.mmap(-1, array.nbytes)
    mapped = np.frombuffer(memory, array.dtype).reshape(array.shape)
    mapped[...] = array
    yield "mmap", mapped


LAYOUTS = [name for name, _ in layouts(np.zeros((2, 2, 2, 2)))]
SAME_STRIDES = ("unaligned", "read-only", "bytes", "mmap")


def in_layout(name, array):
    return dict(layouts(array)).get(name, array)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_layouts_of_every_input(layout, dtype):
    features, d_output = FEATURES.astype(dtype), D_OUTPUT.astype(dtype)
    step = 0 if dtype in (np.float32, np.float64) else 2 * float(ml_dtypes.finfo(dtype).eps)

    def same(actual, expected):
        if layout in SAME_STRIDES:
            assert actual.tobytes() == expected.tobytes()
        actual, expected = actual.astype(np.float64), expected.astype(np.float64)
        np.testing.assert_allclose(
            actual, expected, rtol=step, atol=64 * 2.0**-23 * max(1, np.abs(expected).max())
        )

    laid = {"features": in_layout(layout, features), "d_output": in_layout(layout, d_output)}
    same(forward(laid["features"]), forward(features))
    same(adjoint(laid["d_output"]), adjoint(d_output))
    same(box_gradient(**laid), box_gradient(d_output, features))
    rois = in_layout(layout, ROIS.astype(dtype))
    pair = (in_layout(layout, ROIS[:, 1:].astype(dtype)), in_layout(layout, np.array([0, 1, 0])))
    for given in (rois, pair):
        same(forward(rois=given), forward(rois=ROIS.astype(dtype)))
        same(adjoint(rois=given), adjoint(rois=ROIS.astype(dtype)))
    same(box_gradient(rois=rois), box_gradient(rois=ROIS.astype(dtype)))


def test_layouts_really_differ():
    strides = {array.strides for name, array in layouts(FEATURES) if name not in SAME_STRIDES}
    assert len(strides) == len(LAYOUTS) - len(SAME_STRIDES)
    assert not dict(layouts(FEATURES))["unaligned"].flags.aligned


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (3,), (2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_stride_0(axes, dtype):
    one = FEATURES[tuple(slice(1) if i in axes else slice(None) for i in range(4))].astype(dtype)
    features = np.broadcast_to(one, FEATURES.shape)
    assert all(features.strides[i] == 0 for i in axes)
    np.testing.assert_allclose(
        forward(features).astype(float),
        forward(features.copy()).astype(float),
        rtol=2e-3 if dtype is np.float16 else 0,
        atol=2e-6,
    )
    one = D_OUTPUT[tuple(slice(1) if i in axes else slice(None) for i in range(4))]
    d_output = np.broadcast_to(one, D_OUTPUT.shape)
    close(adjoint(d_output), adjoint(d_output.copy()))
    close(
        box_gradient(d_output, np.broadcast_to(FEATURES[:1], FEATURES.shape)),
        box_gradient(d_output.copy(), np.repeat(FEATURES[:1], 2, 0)),
    )


def with_steps(array, axes, step):
    """The array, with another stride along axes of length 1."""
    strides = [step if i in axes else s for i, s in enumerate(array.strides)]
    return np.lib.stride_tricks.as_strided(array, array.shape, strides)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (3,), (2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("step", [0, 4, -400])
@pytest.mark.parametrize("last", [False, True])
def test_strides_of_axes_of_length_1_mean_nothing(axes, step, last):
    def laid(array):
        one = array[tuple(slice(1) if i in axes else slice(None) for i in range(4))]
        return in_layout("channels_last" if last else "contiguous", one.copy())

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
    target = np.empty_like(features)
    adjoint(odd_d, odd_rois, features.shape, out=with_steps(target, axes, step))
    assert target.tobytes() == d_features.tobytes()
    assert box_gradient(odd_d, odd, odd_rois).tobytes() == d_boxes.tobytes()


def test_one_box_broadcast_to_many():
    rois = np.broadcast_to(ROIS[1], (5, 5))
    assert (forward(rois=rois) == forward(rois=rois.copy())).all()
    pair = (np.broadcast_to(ROIS[1, 1:], (5, 4)), np.broadcast_to(np.int64(1), 5))
    close(forward(rois=pair), forward(rois=rois))


def test_windows_that_overlap_in_the_input_are_fine():
    signal = RNG.standard_normal(200).astype(np.float32)
    features = np.lib.stride_tricks.as_strided(signal, (2, 3, 8, 9), (200, 80, 36, 4))
    close(forward(features), forward(features.copy()))


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


def test_inputs_are_never_written():
    arrays = [FEATURES.copy(), D_OUTPUT.copy(), ROIS.copy()]
    for array in arrays:
        array.flags.writeable = False
    features, d_output, rois = arrays
    forward(features, rois)
    adjoint(d_output, rois)
    box_gradient(d_output, features, rois)
    for array, original in zip(arrays, (FEATURES, D_OUTPUT, ROIS), strict=True):
        assert (array == original).all()


def nchw(shape):
    return np.ones(shape, np.float32)


def nhwc(shape):
    n, c, h, w = shape
    return np.ones((n, h, w, c), np.float32).transpose(0, 3, 1, 2)


def cropped(shape):
    n, c, h, w = shape
    return nhwc((n, c, h + 3, w + 2))[:, :, 1:-2, :-2]


def flipped(shape):
    return nhwc(shape)[:, :, ::-1, ::-1]


def half_channels(shape):
    n, c, h, w = shape
    return nhwc((n, 2 * c, h, w))[:, :c]


def every_other_channel(shape):
    n, c, h, w = shape
    return nhwc((n, 2 * c, h, w))[:, ::2]


def channels_reversed(shape):
    return nhwc(shape)[:, ::-1]


def columns_first(shape):
    n, c, h, w = shape
    return np.ones((n, c, w, h), np.float32).transpose(0, 1, 3, 2)


def width_height_channels(shape):
    n, c, h, w = shape
    return np.ones((n, w, h, c), np.float32).transpose(0, 3, 2, 1)


def constant(shape):
    return np.broadcast_to(np.float32(1), shape)


SHAPE = (2, 5, 8, 9)


@pytest.mark.parametrize(
    "make, shape, last",
    [
        (nchw, SHAPE, False),
        (nhwc, SHAPE, True),
        (cropped, SHAPE, True),
        (flipped, SHAPE, True),
        (half_channels, SHAPE, True),
        (width_height_channels, SHAPE, True),
        (every_other_channel, SHAPE, False),  # channel stride 2
        (channels_reversed, SHAPE, False),  # channel stride -1
        (columns_first, SHAPE, False),
        (constant, SHAPE, False),
        (nhwc, (2, 1, 8, 9), False),  # C = 1
        (cropped, (2, 1, 8, 9), False),  # the same, not NCHW-contiguous
        (nhwc, (2, 5, 1, 1), False),  # H W = 1
        (cropped, (2, 5, 1, 1), False),
        (nhwc, (2, 5, 1, 9), True),
        (nhwc, (2, 5, 8, 1), True),
        (nhwc, (1, 2, 1, 2), True),
    ],
)
def test_results_are_channels_last_iff_the_input_is(make, shape, last):
    array = make(shape)
    assert array.shape == shape
    rois = np.array([[0, 0, 0, 1, 1], [0, 0, 0, 8, 8]], np.float32)
    y = roialign.roi_align(array, rois, (3, 4))
    assert y.shape == (2, shape[1], 3, 4)
    dx = roialign.roi_align_adjoint(make((2, *shape[1:])), rois, (1, shape[1], 6, 7))
    assert dx.shape == (1, shape[1], 6, 7)
    for result in (y, dx):
        assert result.strides == (nhwc if last else nchw)(result.shape).strides
        assert result.flags.writeable and result.flags.aligned


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [2, 15, 16, 17, 128, 131])
def test_channels_last_has_the_same_values(dtype, channels):
    features = RNG.standard_normal((2, channels, 9, 10)).astype(dtype)
    d_output = RNG.standard_normal((3, channels, *SIZE)).astype(dtype)
    last = [
        np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        for a in (features, d_output)
    ]
    step = 0 if dtype in (np.float32, np.float64) else 2 * float(ml_dtypes.finfo(dtype).eps)
    for a, b in (
        (forward(last[0]), forward(features)),
        (adjoint(last[1], shape=features.shape), adjoint(d_output, shape=features.shape)),
    ):
        assert a.strides != b.strides
        a, b = a.astype(np.float64), b.astype(np.float64)
        np.testing.assert_allclose(a, b, rtol=step, atol=1e-5)


def test_results_own_their_memory():
    y = forward()
    kept = y.copy()
    for _ in range(3):
        other = forward(2 * FEATURES)
        assert not np.shares_memory(y, other)
        other[...] = np.nan
    assert (y == kept).all()
