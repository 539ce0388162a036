"""`out=`: what is accepted, that all of it and nothing else is written, that it is returned."""

import tempfile

import ml_dtypes
import numpy as np
import pytest

import roialign

N, C, H, W = 2, 5, 8, 9
RNG = np.random.default_rng(7)
FEATURES = RNG.standard_normal((N, C, H, W)).astype(np.float32)
ROIS = np.array(
    [[0, 1.3, 1.1, 6.6, 5.2], [1, 0.4, 2.1, 7.7, 6.5], [0, 2.0, 3.0, 4.0, 7.0]], np.float32
)
PAIR = (ROIS[:, 1:].copy(), ROIS[:, 0].astype(np.int64))
D_OUTPUT = RNG.standard_normal((3, C, 3, 4)).astype(np.float32)


def forward(out=None, features=FEATURES, rois=ROIS):
    return roialign.roi_align(features, rois, (3, 4), out=out)


def adjoint(out=None, d_output=D_OUTPUT, rois=ROIS):
    return roialign.roi_align_adjoint(d_output, rois, FEATURES.shape, out=out)


def box_gradient(out=None, d_output=D_OUTPUT, features=FEATURES, rois=ROIS):
    return roialign.roi_align_box_gradient(d_output, features, rois, out=out)


def box_gradient_of_pair(out=None):
    return box_gradient(out, rois=PAIR)


OPERATIONS = (forward, adjoint, box_gradient, box_gradient_of_pair)
operations = pytest.mark.parametrize("operation", OPERATIONS)


def plain(shape, dtype):
    return np.empty(shape, dtype)


def reversed_axes(shape, dtype):
    return np.empty(shape[::-1], dtype).T


def channels_last(shape, dtype):
    return np.moveaxis(np.empty((shape[0], *shape[2:], shape[1]), dtype), -1, 1)


def strided(shape, dtype):
    whole = np.empty([2 * n + 3 for n in shape], dtype)
    return whole[tuple(slice(2, 2 * n + 2, 2) for n in shape)]


def mirrored(shape, dtype):
    return np.empty(shape, dtype)[(slice(None, None, -1),) * len(shape)]


def unaligned(shape, dtype):
    whole = np.empty(np.prod(shape) * np.dtype(dtype).itemsize + 1, np.uint8)
    return whole[1:].view(dtype).reshape(shape)


def field(shape, dtype):
    """One field of packed records: strides that are no multiple of the item size."""
    record = np.dtype([("head", np.uint8), ("value", dtype), ("tail", np.uint8)])
    return np.empty(shape, record)["value"]


def memmap(shape, dtype):
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype, "w+", shape=shape)


LAYOUTS = (plain, reversed_axes, channels_last, strided, mirrored, unaligned, field, memmap)


def poison(array):
    """Fill the whole buffer that `array` is a view of."""
    base = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    base.view(np.ndarray).reshape(-1).view(np.uint8)[...] = 0xFF  # NaN in every float dtype
    return base


@operations
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_layout_is_filled_and_nothing_else(operation, layout, dtype):
    if dtype is np.float64:  # the other element size
        operation = on_doubles(operation)
    expected = operation()
    out = layout(expected.shape, expected.dtype)
    base = poison(out)
    assert np.isnan(out).all()
    assert operation(out) is out
    # another layout may sum in another order
    atol = 64 * np.finfo(out.dtype).eps * max(1, np.abs(expected).max())
    np.testing.assert_allclose(out, expected, rtol=0, atol=atol)
    assert (bytes_outside(out, base) == 0xFF).all()


def bytes_outside(out, base):
    """The bytes of `base`, the buffer, that belong to no element of `out`."""
    raw = base.view(np.ndarray).reshape(-1).view(np.uint8)
    inside = np.zeros(raw.size, bool)
    offset = out.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    starts = offset + sum(
        np.arange(n).reshape([-1 if i == axis else 1 for i in range(out.ndim)]) * stride
        for axis, (n, stride) in enumerate(zip(out.shape, out.strides, strict=True))
    )
    for byte in range(out.itemsize):
        inside[np.ravel(starts) + byte] = True
    assert inside.sum() == out.nbytes
    return raw[~inside]


def on_doubles(operation):
    arguments = {
        forward: {"features": FEATURES.astype(np.float64)},
        adjoint: {"d_output": D_OUTPUT.astype(np.float64)},
        box_gradient: {"rois": ROIS.astype(np.float64)},
        box_gradient_of_pair: {"rois": (PAIR[0].astype(np.float64), PAIR[1])},
    }[operation]
    call = box_gradient if operation is box_gradient_of_pair else operation
    return lambda out=None: call(out, **arguments)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layout", [plain, channels_last, strided, unaligned])
def test_half_precision_out(dtype, layout):
    features, d_output = FEATURES.astype(dtype), D_OUTPUT.astype(dtype)
    for operation, argument in (
        (forward, {"features": features}),
        (adjoint, {"d_output": d_output}),
    ):
        expected = operation(**argument).astype(np.float32)
        out = layout(expected.shape, dtype)
        out[...] = np.nan
        assert operation(out, **argument) is out
        step = 2 * float(ml_dtypes.finfo(dtype).eps)  # one rounding may fall either way
        np.testing.assert_allclose(out.astype(np.float32), expected, rtol=step, atol=1e-6)


@operations
def test_alignment_does_not_change_a_bit(operation):
    expected = operation(poisoned(operation))
    out = unaligned(expected.shape, expected.dtype)
    assert operation(out).tobytes() == expected.tobytes()


def poisoned(operation):
    result = operation()
    return np.full(result.shape, np.nan, result.dtype)


@operations
def test_out_is_what_no_out_gives(operation):
    assert operation(poisoned(operation)).tobytes() == operation().tobytes()


@operations
def test_column_0_of_a_box_gradient_is_zero(operation):
    out = operation(poisoned(operation))
    if operation is box_gradient:
        assert out.shape == (3, 5) and (out[:, 0] == 0).all()
        assert (out[:, 1:] == box_gradient_of_pair()).all()
    assert np.isfinite(out).all() and np.abs(out).max() > 0


@operations
@pytest.mark.parametrize(
    "change",
    [
        lambda s: s[:-1],
        lambda s: (*s, 1),
        lambda s: (1, *s),
        lambda s: (s[0] + 1, *s[1:]),
        lambda s: (*s[:-1], s[-1] - 1),
        lambda s: (s[0] * s[1], *s[2:]),
        lambda s: (),
    ],
)
def test_shape_is_exact(operation, change):
    shape = change(operation().shape)
    with pytest.raises(ValueError, match="`out`") as caught:
        operation(np.zeros(shape, np.float32))
    assert str(shape) in str(caught.value)


@operations
@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int32, ">f4", object, np.complex64]
)
def test_dtype_is_exact(operation, dtype):
    with pytest.raises(TypeError, match="`out`") as caught:
        operation(np.zeros(operation().shape, dtype))
    text = str(caught.value)
    assert np.dtype(dtype).name in text or str(np.dtype(dtype)) in text or "big-endian" in text


@operations
@pytest.mark.parametrize(
    "make",
    [np.ndarray.tolist, np.ma.masked_array, memoryview, bytes, lambda a: (a,)],
    ids=["list", "masked", "memoryview", "bytes", "tuple"],
)
def test_is_an_array(operation, make):
    out = make(np.zeros(operation().shape, np.float32))
    with pytest.raises(TypeError, match=f"`out`.*{type(out).__name__}"):
        operation(out)


@operations
def test_read_only_is_refused(operation):
    out = np.zeros(operation().shape, np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="`out`.*(writ|read)"):
        operation(out)
    assert (out == 0).all()


def self_overlapping():
    """Views whose elements share memory, by (shape -> array)."""

    def stride_0(shape, axis):
        small = np.zeros([1 if i == axis else n for i, n in enumerate(shape)], np.float32)
        return np.lib.stride_tricks.as_strided(
            small, shape, [0 if i == axis else s for i, s in enumerate(small.strides)]
        )

    def windows(shape):  # every stride is one element: a sliding window
        return np.lib.stride_tricks.as_strided(
            np.zeros(sum(shape), np.float32), shape, [4] * len(shape)
        )

    def half_elements(shape):  # neighbours share two of their four bytes
        raw = np.zeros(4 * np.prod(shape), np.uint8)
        strides = [2 * int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
        return np.ndarray(shape, np.float32, raw, 0, strides)

    yield "first axis", lambda shape: stride_0(shape, 0)
    yield "last axis", lambda shape: stride_0(shape, len(shape) - 1)
    yield "windows", windows
    yield "half elements", half_elements


@operations
@pytest.mark.parametrize(
    "kind, make", list(self_overlapping()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_self_overlap_is_refused(operation, kind, make):
    out = make(operation().shape)
    with pytest.raises(ValueError, match="`out`.*overlap"):
        operation(out)
    assert (out == 0).all()


def test_interleaved_axes_do_not_overlap():
    # element (i, j) at 4 i + 3 j: no two are the same for i < 3, j < 4, though the axes interleave
    whole = np.full(18, np.nan, np.float32)
    out = np.lib.stride_tricks.as_strided(whole, (3, 4), (16, 12))
    assert len({4 * i + 3 * j for i in range(3) for j in range(4)}) == out.size
    assert box_gradient_of_pair(out) is out
    assert (out == box_gradient_of_pair()).all()


def interleaved(values):
    """(a copy of `values`, an array of its shape) that take turns in one buffer."""
    whole = np.zeros((*values.shape, 2), values.dtype)
    whole[..., 0] = values
    return whole[..., 0], whole[..., 1]


def test_interleaved_with_an_input_is_accepted():
    square = RNG.standard_normal((3, C, 3, 4)).astype(np.float32)  # a map and its output
    for values, call in (
        (square, lambda a, out=None: forward(out, a)),
        (square, lambda a, out=None: roialign.roi_align_adjoint(a, ROIS, square.shape, out=out)),
        (ROIS, lambda a, out=None: box_gradient(out, rois=a)),
    ):
        given, out = interleaved(values)
        assert np.may_share_memory(given, out) and not np.shares_memory(given, out)
        assert call(given, out) is out
        np.testing.assert_allclose(out, call(values), atol=1e-4)
        assert (given == values).all()


def overlapping():
    """(operation, argument, call with `out` laid over that input)."""

    def over(source, shape, dtype=np.float32):
        """An array of `shape` over the last bytes of `source`, and at least one of them."""
        flat = source.reshape(-1).view(np.uint8)
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return flat[flat.size - count :].view(dtype).reshape(shape)

    def room(values, shape):
        """`values` at the front of a buffer in which `shape` fits, overlapping by some bytes."""
        whole = np.zeros(values.size + int(np.prod(shape)) - 1, np.float32)
        whole[: values.size] = values.ravel()
        return whole[: values.size].reshape(values.shape), over(whole, shape)

    def case(values, shape, call):
        source, out = room(values, shape)
        return source, lambda: call(source, out)

    y, dx, dr = forward().shape, FEATURES.shape, ROIS.shape
    yield "forward-features", *case(FEATURES, y, lambda a, o: forward(o, a))
    yield "forward-rois", *case(ROIS, y, lambda a, o: forward(o, rois=a))
    yield "forward-boxes", *case(PAIR[0], y, lambda a, o: forward(o, rois=(a, PAIR[1])))
    yield "forward-list", *case(PAIR[0][:1], y, lambda a, o: forward(o, rois=[PAIR[0][:2], a]))
    yield "adjoint-d_output", *case(D_OUTPUT, dx, lambda a, o: adjoint(o, a))
    yield "adjoint-rois", *case(ROIS, dx, lambda a, o: adjoint(o, rois=a))
    yield "gradient-d_output", *case(D_OUTPUT, dr, lambda a, o: box_gradient(o, a))
    yield "gradient-features", *case(FEATURES, dr, lambda a, o: box_gradient(o, features=a))
    yield "gradient-rois", *case(ROIS, dr, lambda a, o: box_gradient(o, rois=a))


@pytest.mark.parametrize(
    "case, source, call", list(overlapping()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_overlap_with_an_input_is_refused(case, source, call):
    before = source.copy()
    with pytest.raises(ValueError, match="`out`.*overlap"):
        call()
    assert (source == before).all()


def test_overlap_with_the_image_index_is_refused():
    whole = np.zeros(16, np.int64)
    index = whole[13:]
    index[...] = PAIR[1]
    out = whole.view(np.float32)[20:].reshape(3, 4)
    with pytest.raises(ValueError, match="`out`.*overlap"):
        box_gradient(out, rois=(PAIR[0], index))


def test_out_may_be_the_very_input_never():
    square = FEATURES.copy()  # (2, 5, 8, 9) pooled from 2 RoIs to (2, 5, 8, 9)
    with pytest.raises(ValueError, match="`out`.*overlap"):
        roialign.roi_align(square, ROIS[:2], (8, 9), out=square)
    assert (square == FEATURES).all()


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_an_axis_of_length_one_may_have_any_stride(axis):
    shape = [1 if i == axis else n for i, n in enumerate((3, C, 3, 4))]
    features = FEATURES[:, : shape[1]]
    expected = roialign.roi_align(features, ROIS[: shape[0]], tuple(shape[2:]))
    out = np.zeros(shape, np.float32)
    for stride in (0, 4, -12345, 2**40):
        strides = [stride if i == axis else s for i, s in enumerate(out.strides)]
        view = np.lib.stride_tricks.as_strided(out, shape, strides)
        view[...] = np.nan
        roialign.roi_align(features, ROIS[: shape[0]], tuple(shape[2:]), out=view)
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_empty_out_is_returned():
    none = np.zeros((0, 5), np.float32)
    for rois, shape in ((none, (0, C, 3, 4)),):
        out = np.empty(shape, np.float32)
        assert forward(out, rois=rois) is out
    d_features = np.full(FEATURES.shape, np.nan, np.float32)
    assert adjoint(d_features, np.zeros((0, C, 3, 4), np.float32), none) is d_features
    assert (d_features == 0).all()
    d_rois = np.empty((0, 5), np.float32)
    assert box_gradient(d_rois, np.zeros((0, C, 3, 4), np.float32), rois=none) is d_rois


def test_stale_values_do_not_enter():
    # adjoint sums: it must not start from what is there
    out = np.full(FEATURES.shape, 1e30, np.float32)
    np.testing.assert_array_equal(adjoint(out), adjoint())
