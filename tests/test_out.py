"""`out=`: what is accepted, that all of it and nothing else is written, that it is returned."""

import numpy as np
import pytest

import roialign
import test_errors as errors
import tolerance
from backends import Foreign
from test_errors import BOXES, D_OUTPUT, FEATURES, IMAGE_INDEX, ROIS

PAIR = BOXES, IMAGE_INDEX
OF_PAIR = {"d_output": D_OUTPUT, "features": FEATURES, "rois": PAIR}
OPERATIONS = errors.OPERATIONS | {
    "box_gradient_of_pair": (roialign.roi_align_box_gradient, OF_PAIR)
}
operations = pytest.mark.parametrize("operation", OPERATIONS)


def call(operation, out=None, **changed):
    function, arguments = OPERATIONS[operation]
    return function(**arguments | changed, out=out)


def zeros(operation):
    return np.zeros(call(operation).shape, np.float32)


def poison(array):
    """Fill the whole buffer that `array` is a view of."""
    base = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    base.view(np.ndarray).reshape(-1).view(np.uint8)[...] = 0xFF  # NaN in every float dtype
    return base


@pytest.mark.backends("out")
@operations
@pytest.mark.parametrize("dtype", tolerance.DTYPES, ids=str)
def test_any_layout_is_filled_and_nothing_else(backend, operation, layouts, dtype):
    """With the bits of a new array, over values that are none; it is returned."""

    def cast(value):
        if isinstance(value, tuple):
            return tuple(map(cast, value))
        return value.astype(dtype) if getattr(value, "dtype", None) == np.float32 else value

    function, arguments = OPERATIONS[operation]
    given = {name: backend.own(cast(value)) for name, value in arguments.items()}
    expected = backend.numpy(function(**given))
    for name in layouts.keys() - {"read_only"} if backend.family == "numpy" else backend.layouts:
        out = layouts[name](np.zeros(expected.shape, dtype))
        base = poison(out)
        assert np.isnan(out).all()
        own = backend.array(out)
        assert function(**given, out=own) is own
        assert backend.numpy(own).tobytes() == expected.tobytes()
        assert own is not out or (bytes_outside(out, base) == 0xFF).all()


@pytest.mark.backends("out", "bytes")
def test_of_features_of_bytes(backend):
    """It is of floats, as what they are pooled to."""
    function, arguments = OPERATIONS["forward"]
    given = {name: backend.own(value) for name, value in arguments.items()}
    given["features"] = backend.array(arguments["features"].astype(np.uint8))
    out = backend.array(backend.numpy(function(**given)) + 1)
    assert function(**given, out=out) is out
    assert np.array_equal(backend.numpy(out), backend.numpy(function(**given)))
    out = backend.array(backend.numpy(out).astype(np.uint8))
    with pytest.raises(TypeError, match="`out` must have dtype .*float32, got .*uint8"):
        function(**given, out=out)


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


# what makes of an array that fits one that does not, and the error
UNFIT = [
    *(
        (change, ValueError)
        for change in (
            lambda out: out[:-1],
            lambda out: out[..., None],
            lambda out: out[None],
            lambda out: np.concatenate([out, out[:1]]),
            lambda out: out[..., :-1],
            lambda out: out.reshape(-1, *out.shape[2:]),
            lambda out: np.zeros((), out.dtype),
        )
    ),
    *(
        (lambda out, dtype=dtype: out.astype(dtype), TypeError)
        for dtype in (np.float16, tolerance.BFLOAT16, np.float64, np.int32, ">f4", object, "c8")
    ),
    *(
        (kind, TypeError)
        for kind in (np.ndarray.tolist, np.ma.masked_array, memoryview, bytes, lambda out: (out,))
    ),
]


@pytest.mark.backends("out")
@operations
def test_what_does_not_fit_is_refused(backend, operation):
    function, arguments = OPERATIONS[operation]
    given = {name: backend.own(value) for name, value in arguments.items()}
    fits = zeros(operation)
    for change, error in UNFIT:
        unfit = change(fits)
        try:
            out = backend.own(unfit)
        except Foreign:
            continue
        with pytest.raises(error, match="`out`") as caught:
            function(**given, out=out)
        text = str(caught.value)
        if type(unfit) is not np.ndarray:
            assert type(unfit).__name__ in text
        elif unfit.dtype == fits.dtype and unfit.dtype.isnative:
            assert str(unfit.shape) in text
        else:
            assert any(name in text for name in (unfit.dtype.name, unfit.dtype.str, "big-endian"))
    if backend.family != "numpy":
        with pytest.raises(TypeError, match=r"`out` must be a \w+.\w+, got numpy.ndarray"):
            function(**given, out=fits)


def unwritable():
    """Arrays by (shape -> array): that are read only, or whose elements share memory."""

    def read_only(shape):
        array = np.zeros(shape, np.float32)
        array.flags.writeable = False
        return array

    def stride_0(shape, axis):
        strides = list(np.zeros(shape, np.float32).strides)
        strides[axis] = 0
        return np.lib.stride_tricks.as_strided(np.zeros(shape, np.float32), shape, strides)

    def windows(shape):  # every stride is one element: a sliding window
        return np.lib.stride_tricks.as_strided(
            np.zeros(sum(shape), np.float32), shape, [4] * len(shape)
        )

    def half_elements(shape):  # neighbours share two of their four bytes
        raw = np.zeros(4 * np.prod(shape), np.uint8)
        strides = [2 * int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
        return np.ndarray(shape, np.float32, raw, 0, strides)

    yield "read only", read_only, "(writ|read)"
    yield "first axis", lambda shape: stride_0(shape, 0), "overlap"
    yield "last axis", lambda shape: stride_0(shape, -1), "overlap"
    yield "windows", windows, "overlap"
    yield "half elements", half_elements, "overlap"


@operations
@pytest.mark.parametrize("make, words", [pytest.param(*w, id=name) for name, *w in unwritable()])
def test_what_cannot_be_written_is_refused(operation, make, words):
    out = make(call(operation).shape)
    with pytest.raises(ValueError, match=f"`out`.*{words}"):
        call(operation, out)
    assert (out == 0).all()


def test_interleaved_axes_do_not_overlap():
    # element (i, j) at 4 i + 3 j: no two are the same for i < 2, j < 4, though the axes interleave
    whole = np.full(14, np.nan, np.float32)
    out = np.lib.stride_tricks.as_strided(whole, (2, 4), (16, 12))
    assert len({4 * i + 3 * j for i in range(2) for j in range(4)}) == out.size
    assert call("box_gradient_of_pair", out) is out
    assert (out == call("box_gradient_of_pair")).all()


def test_interleaved_with_an_input_is_accepted():
    square = np.cos(np.arange(24, dtype=np.float32)).reshape(D_OUTPUT.shape)  # a map, its output
    for operation, name, values, changed in (
        ("forward", "features", square, {}),
        ("adjoint", "d_output", square, {"feature_shape": square.shape}),
        ("box_gradient", "rois", ROIS, {}),
    ):
        whole = np.zeros((*values.shape, 2), np.float32)
        given, out = whole[..., 0], whole[..., 1]
        given[...] = values
        assert np.may_share_memory(given, out) and not np.shares_memory(given, out)
        assert call(operation, out, **changed | {name: given}) is out
        expected = call(operation, **changed | {name: values})
        np.testing.assert_allclose(out, expected, atol=1e-4)
        assert (given == values).all()


OVERLAPPING = [  # operation, an input, the argument that it is given in
    ("forward", FEATURES, lambda a: {"features": a}),
    ("forward", ROIS, lambda a: {"rois": a}),
    ("forward", PAIR[0], lambda a: {"rois": (a, PAIR[1])}),
    ("forward", PAIR[0][:1], lambda a: {"rois": [a, BOXES[1:]]}),
    ("adjoint", D_OUTPUT, lambda a: {"d_output": a}),
    ("adjoint", ROIS, lambda a: {"rois": a}),
    ("box_gradient", D_OUTPUT, lambda a: {"d_output": a}),
    ("box_gradient", FEATURES, lambda a: {"features": a}),
    ("box_gradient", ROIS, lambda a: {"rois": a}),
    ("box_gradient_of_pair", PAIR[1], lambda a: {"rois": (PAIR[0], a)}),
]


@pytest.mark.parametrize("operation, values, argument", OVERLAPPING)
def test_overlap_with_an_input_is_refused(operation, values, argument):
    """By its last four bytes."""
    out = zeros(operation)
    raw = np.zeros(values.nbytes + out.nbytes - 4, np.uint8)
    given = raw[: values.nbytes].view(values.dtype).reshape(values.shape)
    given[...] = values
    out = raw[values.nbytes - 4 :].view(np.float32).reshape(out.shape)
    with pytest.raises(ValueError, match="`out`.*overlap"):
        call(operation, out, **argument(given))
    assert (given == values).all()


@pytest.mark.backends("out", "strided")
def test_overlap_in_any_memory_is_refused(backend):
    memory, rois = backend.array((np.zeros(500, np.float32), ROIS))
    features, out = memory[:432].reshape(FEATURES.shape), memory[431:455].reshape(D_OUTPUT.shape)
    with pytest.raises(ValueError, match="`out` must not overlap an input"):
        roialign.roi_align(features, rois, 2, out=out)


@pytest.mark.backends("out")
def test_empty_out_is_returned(backend):
    none, empty = np.zeros((0, 5), np.float32), D_OUTPUT[:0]
    given = FEATURES, empty, none, none, np.ones_like(FEATURES)
    features, d_output, none, d_rois, d_features = backend.array(given)
    assert roialign.roi_align(features, none, 2, out=d_output) is d_output
    out = roialign.roi_align_adjoint(d_output, none, FEATURES.shape, out=d_features)
    assert out is d_features and not backend.numpy(out).any()
    assert roialign.roi_align_box_gradient(d_output, features, none, out=d_rois) is d_rois
