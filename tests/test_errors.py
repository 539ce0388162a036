"""Every error of the public functions: its class, the argument it names and what it received."""

import inspect
import os
import re
import traceback
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

import roialign
from backends import Foreign, array, arrays_of, operations, pair, per_image, summed, taken_apart
from oracle import Problem
from roialign import _checks

FEATURES = np.arange(2 * 3 * 8 * 9, dtype=np.float32).reshape(2, 3, 8, 9)
ROIS = np.array([[0, 1, 1, 6, 5], [1, 0, 2, 7, 6.5]], np.float32)
BOXES, IMAGE_INDEX = ROIS[:, 1:].copy(), np.array([0, 1])
D_OUTPUT = np.ones((2, 3, 2, 2), np.float32)
ENDLESS = 10**5000  # Python writes no int of so many digits


# operation: the function, and arguments that are valid; the first is an array
OPERATIONS = {
    "forward": (roialign.roi_align, {"features": FEATURES, "rois": ROIS, "output_size": 2}),
    "adjoint": (
        roialign.roi_align_adjoint,
        {"d_output": D_OUTPUT, "rois": ROIS, "feature_shape": FEATURES.shape},
    ),
    "box_gradient": (
        roialign.roi_align_box_gradient,
        {"d_output": D_OUTPUT, "features": FEATURES, "rois": ROIS},
    ),
}
OUT = {"forward": (2, 3, 2, 2), "adjoint": FEATURES.shape, "box_gradient": ROIS.shape}


class ArrayLike:
    """What a DataFrame, a tensor of an unknown library or a list wrapper looks like."""

    def __init__(self, values):
        self.values = values
        self.shape, self.dtype, self.ndim = values.shape, values.dtype, values.ndim

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype)


def rows(index):
    """`ROIS` with another image index in row 1."""
    return np.array([ROIS[0], [index, *ROIS[1, 1:]]], np.float32)


# Rows: arguments, error, pattern of the argument's name, pattern of what was received


def wrong(argument, error, *values, within=lambda value: value, name=None, received="{}"):
    """An argument that is, or has within it, one of these values: the error shows that one."""
    return [
        ({argument: within(value)}, error, name or argument, received.format(shown(value, error)))
        for value in values
    ]


def shown(value, error):
    if type(value) is np.ndarray and error is TypeError:
        return re.escape(str(value.dtype))
    if type(value) is np.ndarray:
        return re.escape(str(value.shape)).replace(r",\)", r",?\)")  # MindSpore writes (1,) as (1)
    try:
        return re.escape(type(value).__name__ if error is TypeError else repr(value))
    except ValueError:  # of an int that Python does not write
        return "digits"


def wrong_alone_and_in_pairs(argument, error, *values, **options):
    for within in (lambda value: value, lambda value: (value, 1), lambda value: (1, value)):
        yield from wrong(argument, error, *values, within=within, **options)


def no_arrays(array):
    return [None, array.tolist(), memoryview(array), array.tobytes(), ArrayLike(array),
            np.ma.masked_array(array)]  # fmt: skip


def of_dtypes(array, *dtypes):
    return map(array.astype, dtypes)


MANY = 4097, 2**31, 2**63, ENDLESS
LARGE = MANY[1:]
OPTIONS = [
    *wrong_alone_and_in_pairs("spatial_scale", TypeError, "1", None, True, 1j),
    *wrong_alone_and_in_pairs("spatial_scale", ValueError, 0.0, -0.25, np.nan, np.inf),
    *wrong("spatial_scale", ValueError, (1.0, 1.0, 1.0), (0.5,), ()),
    ({"spatial_scale": np.ones(1)}, TypeError, "spatial_scale", "ndarray|Tensor|Array"),
    *wrong("sampling_ratio", TypeError, 2.0, True, np.True_, "2", None, (2, 2)),
    *wrong("sampling_ratio", ValueError, *MANY, received="at most 4096, .*{}.* 0 adapts to the"),
    *wrong("convention", TypeError, 3, None),
    *wrong("convention", ValueError, "half_pixels", "torchvision", ""),
    *wrong("reduction", TypeError, None, ["mean"]),
    *wrong("reduction", ValueError, "maximum", "sum", "Mean", "", received="'mean', 'max'.*{}"),
]
OF_BOXES = {"within": lambda boxes: (boxes, IMAGE_INDEX), "name": "boxes"}
OF_INDEX = {"within": lambda index: (BOXES, index), "name": "image_index"}
OF_IMAGE = {"within": lambda boxes: [BOXES[:1], boxes]}
OF_ROI_1 = {"name": "image_index", "received": r"1\b.*{}"}
ROIS_FORMS = [
    *wrong("rois", TypeError, *no_arrays(ROIS)),
    *wrong("rois", TypeError, *of_dtypes(ROIS, complex, object, bool, ">f4", "U8")),
    *wrong("rois", ValueError, ROIS[:, :4], ROIS[0], ROIS[None]),
    *wrong("rois", ValueError, *(np.full(s, 9, np.float32) for s in [(), (0, 4), (2, 6), (3, 6)])),
    *wrong("rois", TypeError, *no_arrays(BOXES[1:]), BOXES[1:].astype(bool), **OF_IMAGE),
    *wrong("rois", ValueError, ROIS[1:], BOXES[0], **OF_IMAGE),
    *wrong("rois", TypeError, BOXES.tolist(), *of_dtypes(BOXES, complex, ">f8"), **OF_BOXES),
    *wrong("rois", ValueError, ROIS, BOXES[0], **OF_BOXES),
    *wrong("rois", TypeError, IMAGE_INDEX.tolist(), ArrayLike(IMAGE_INDEX), **OF_INDEX),
    *wrong("rois", TypeError, *of_dtypes(IMAGE_INDEX, np.float32, bool, ">i8"), **OF_INDEX),
    *wrong("rois", ValueError, IMAGE_INDEX[:1], IMAGE_INDEX[:, None], **OF_INDEX),
    *wrong("rois", ValueError, 0, 1, 3, within=lambda n: (BOXES, *[IMAGE_INDEX] * 2)[:n]),
    *wrong("rois", ValueError, 0, 1, 3, within=lambda n: [BOXES] * n),
    # dtypes and kinds before shapes and lengths, those before the image index
    *wrong("rois", TypeError, np.zeros((2, 4), bool), np.zeros((2, 4, 1), complex)),
    *wrong("rois", TypeError, None, "3", within=lambda boxes: [ROIS, BOXES, boxes]),
    ({"rois": (ROIS, IMAGE_INDEX.astype(float))}, TypeError, "image_index", "float64"),
    ({"rois": (ROIS, np.array([0, 9]))}, ValueError, "boxes", r"\(2, 5\)"),
    *wrong("rois", IndexError, 2.0, -1.0, 0.5, np.nan, np.inf, within=rows, **OF_ROI_1),
    *wrong("rois", IndexError, 7, -3, within=lambda i: (BOXES, np.array([0, i])), **OF_ROI_1),
]
CAST = r"{}: cast it, \w+\.(astype|to)\("
BYTES = wrong("features", TypeError, *of_dtypes(FEATURES, "u1", bool), received=CAST)
FEATURE_ARRAYS = [
    *wrong("features", TypeError, *no_arrays(FEATURES), np.float32(1), FEATURES.view("V4")),
    *wrong("features", TypeError, *of_dtypes(FEATURES, *{np.dtype("g")} - {np.dtype("d")})),
    *wrong("features", TypeError, *of_dtypes(FEATURES, "i4", "i1", "c8", object), received=CAST),
    *wrong("features", TypeError, FEATURES.astype(">f4")),
    *wrong("features", TypeError, FEATURES[0].astype(int)),  # dtype before rank
    *wrong("features", ValueError, FEATURES[0], FEATURES[None], np.zeros((), np.float32)),
    *wrong("features", ValueError, FEATURES[:0], FEATURES[:, :, :0], FEATURES[..., :0]),
    ({"features": FEATURES[:0, :0]}, ValueError, "features|d_output", r"\(\d, 0, "),
]
OUTPUT_SIZE = [
    *wrong_alone_and_in_pairs("output_size", TypeError, 2.0, True, np.True_, "2", None),
    *wrong_alone_and_in_pairs("output_size", ValueError, 0, -7),
    *wrong_alone_and_in_pairs("output_size", ValueError, *LARGE, received="2147483647, .*{}"),
    *wrong("output_size", ValueError, (2, 2, 2), (2,), -ENDLESS, (ENDLESS, 1, 1)),
    *wrong("output_size", TypeError, Fraction(ENDLESS), received="digits"),
    *wrong("output_size", ValueError, (2**16, 2**15), received="2147483647 bins"),
]
D_OUTPUTS = [
    *wrong("d_output", TypeError, *no_arrays(D_OUTPUT), *of_dtypes(D_OUTPUT, "i8", "u1", ">f4")),
    *wrong("d_output", ValueError, D_OUTPUT[0], D_OUTPUT[None], D_OUTPUT[:1], D_OUTPUT[:, :2]),
    *wrong("d_output", ValueError, D_OUTPUT[:, :, :0], D_OUTPUT[..., :0], D_OUTPUT.repeat(2, 0)),
]
TOO_MANY = [(n, c, 8, 9) for n in (2**58, 2**62, *LARGE[1:]) for c in (3, 0)]
FEATURE_SHAPES = [
    *wrong("feature_shape", TypeError, None, 8, "2389"),
    *wrong("feature_shape", TypeError, 8.0, True, within=lambda side: (2, 3, side, 9)),
    *wrong("feature_shape", ValueError, (3, 8, 9), (1, 2, 3, 8, 9), (2, 3, -8, 9)),
    *wrong("feature_shape", ValueError, (0, 3, 8, 9), (2, 3, 0, 9), (2, 3, 8, 0)),
    ({"feature_shape": (2, 4, 8, 9)}, ValueError, "feature_shape|d_output", "4"),
    *wrong("feature_shape", ValueError, *TOO_MANY, received=r"fewer than 2\*\*60 elements"),
]
UNLIKE = wrong("features", TypeError, *of_dtypes(FEATURES, "f8", "f2"), name="d_output|features")
FITTING = [({"features": FEATURES[:, :2]}, ValueError, "d_output|features", "2")]
UNREAD = [  # by the mean; what is given must fit all the same
    *wrong("features", TypeError, "map"),
    *wrong("features", ValueError, FEATURES[0], FEATURES[:1], FEATURES[..., :-1]),
]
TABLES = {
    "forward": OPTIONS + ROIS_FORMS + FEATURE_ARRAYS + OUTPUT_SIZE,
    "adjoint": OPTIONS + ROIS_FORMS + D_OUTPUTS + FEATURE_SHAPES + UNLIKE + UNREAD + BYTES,
    "box_gradient": OPTIONS + ROIS_FORMS + FEATURE_ARRAYS + D_OUTPUTS + UNLIKE + FITTING,
}


def attempt(backend, operation, **changed):
    """The call as a function of its first array and of the RoIs, which is what is compiled."""
    function, arguments = OPERATIONS[operation]
    arguments = {name: backend.own(value) for name, value in (arguments | changed).items()}
    name = next(iter(arguments))
    first, rois = arguments.pop(name), arguments.pop("rois")
    form, parts = taken_apart(rois)
    pairs = not isinstance(rois, tuple) or len(rois) == 2
    if not pairs or not all(isinstance(part, backend.kind) for part in parts):
        parts = ()

        def form():
            return rois

    if not isinstance(first, backend.kind):
        return function(first, rois=rois, **arguments)

    def call(first, *rois):
        return function(first, rois=form(*rois), **arguments)

    return backend.way(call)(first, *parts)


def entries(backend, operation):
    """Of arrays that the library has; where calls are compiled, one of each argument and error."""
    shown, table = set(), TABLES[operation]
    for changed, error, name, received in table if "bytes" in backend.traits else table + BYTES:
        key = *changed, error, name
        if error is IndexError and "raises" not in backend.traits:
            continue
        if "fast" not in backend.traits and key in shown:
            continue
        try:
            backend.own(list(changed.values()))
        except Foreign:
            continue
        shown.add(key)
        yield changed, error, name, received


def topics(operation):
    return sorted({name for changed, *_ in TABLES[operation] for name in changed})


@pytest.mark.backends("values", "-slow")
@pytest.mark.parametrize(
    "operation, topic", [(operation, name) for operation in TABLES for name in topics(operation)]
)
def test_error(backend, operation, topic):
    found = [entry for entry in entries(backend, operation) if topic in entry[0]]
    assert found
    for changed, error, name, received in found:
        with pytest.raises(error) as caught:
            attempt(backend, operation, **changed)
        text = str(caught.value).partition("\n")[0]  # a compiler adds where it was
        named = re.search(rf"`({name})(\[\d\])?`", text)  # `rois[1]`: of a list
        assert named, f"no `{name}` in: {text}"
        assert re.search(received, text.replace(named[0], ""), re.IGNORECASE), text
        if "out" in backend.traits:
            check_out_is_untouched(backend, operation, changed, error)


def check_out_is_untouched(backend, operation, changed, error):
    rois = changed.get("rois")
    if operation == "box_gradient" and isinstance(rois, list):
        error = TypeError  # a list of gradients takes no out
    of_pair = operation == "box_gradient" and isinstance(rois, tuple)
    out = backend.array(np.full((2, 4) if of_pair else OUT[operation], 7, np.float32))
    with pytest.raises(error):
        attempt(backend, operation, **changed, out=out)
    assert (backend.numpy(out) == 7).all()


@pytest.mark.backends("values", "-slow")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_defaults_of_this_table_are_valid(backend, operation):
    assert np.isfinite(backend.numpy(attempt(backend, operation))).all()
    out = backend.array(np.zeros(OUT[operation], np.float32))
    if "out" in backend.traits:
        assert attempt(backend, operation, out=out) is out
    else:
        with pytest.raises(TypeError, match="`out` must be None"):
            attempt(backend, operation, out=out)


@pytest.mark.backends("fast")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "first, second", [(TypeError, ValueError), (ValueError, IndexError), (TypeError, IndexError)]
)
def test_type_errors_come_before_value_errors_before_index_errors(
    backend, operation, first, second
):
    table = [(changed, error) for changed, error, *_ in entries(backend, operation)]
    pairs = [
        (early, late)
        for (early, e), (late, f) in product(table, table)
        if e is first and f is second and not early.keys() & late.keys()
    ]
    assert pairs
    for early, late in pairs:
        with pytest.raises(first):  # none of the three is a subclass of another
            attempt(backend, operation, **early, **late)


LEVELS = {"spatial_scales": [1.0, 0.5]}
CALLS = {  # of each public function of arrays: what is valid, and positional
    roialign.multiscale_roi_align: ([FEATURES, FEATURES[..., ::2]], ROIS, 2),
    roialign.multiscale_roi_align_adjoint: (D_OUTPUT, ROIS, [FEATURES.shape] * 2),
    roialign.multiscale_roi_align_box_gradient: (D_OUTPUT, [FEATURES] * 2, ROIS),
    roialign.roi_align_rotated: (FEATURES, np.zeros((2, 6), np.float32), 2),
    roialign.assign_levels: (ROIS, (2, 5)),
    roialign.ROIAlign: (2, 2, 0.25),
} | {function: tuple(arguments.values()) for function, arguments in OPERATIONS.values()}
WRONG_KINDS = [
    None, True, -1, 2.5, np.nan, ENDLESS, "abc", b"", (), {}, object(), len, np.float32(1),
    np.ones(2), np.ones((2, 5), bool), [[1.0]], ((1, 2),), slice(1), {1}, "x" * 10**5,
]  # fmt: skip


@pytest.mark.backends("fast")
@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_wrong_kinds_in_every_argument(backend, function):
    """An error is ours: raised by the package itself, with the name of an argument."""
    for i, parameter in enumerate(inspect.signature(function).parameters.values()):
        for wrong in WRONG_KINDS:
            for given in (wrong, [wrong] * 2, (wrong, wrong)):
                arguments = [backend.own(each) for each in CALLS[function]]
                options = dict(LEVELS) if "multiscale" in function.__name__ else {}
                if i < len(arguments):
                    arguments[i] = given
                else:
                    options[parameter.name] = given
                try:
                    function(*arguments, **options)
                except (TypeError, ValueError, IndexError, NotImplementedError) as error:
                    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
                    ours = raised_in.startswith(os.path.dirname(roialign.__file__))
                    assert ours and "`" in str(error), (parameter.name, given)
                    assert len(str(error)) < 1000


@pytest.mark.backends("fast")
def test_arrays_of_another_library(backend):
    features, rois = (backend.own(each) for each in (FEATURES, ROIS))
    if backend.family == "jax":  # it takes NumPy's beside its own
        for given in ((features, ROIS), (FEATURES, rois)):
            assert isinstance(roialign.roi_align(*given, 2), backend.kind)
        return
    if backend.family != "numpy":
        given = rf"`rois` must be a {backend.family}\.\w+, got numpy.ndarray"
        with pytest.raises(TypeError, match=given):
            roialign.roi_align(features, ROIS, 2)
        given = rf"`rois` must be a numpy.ndarray, got {backend.family}"
        with pytest.raises(TypeError, match=given):
            roialign.roi_align(FEATURES, rois, 2)
        return

    class Tensor(ArrayLike):
        __module__ = "torch"

    for first, rest in (
        (Tensor(FEATURES), ROIS),
        (FEATURES, Tensor(ROIS)),
        (FEATURES, (Tensor(BOXES), IMAGE_INDEX)),
    ):
        with pytest.raises(TypeError, match="Tensor"):
            roialign.roi_align(first, rest, 2)


def holder(module, *names):
    """An object that holds an array, of a class of this module."""
    methods = {name: lambda self: None for name in names}
    return type("Holder", (ArrayLike,), {"__module__": module, **methods})(ROIS)


@pytest.mark.parametrize(
    "given, hint",
    [
        (ROIS.tolist(), "write np.asarray(features)"),
        (holder("anywhere"), "write np.asarray(features)"),
        (holder("pandas", "to_numpy"), "write features.to_numpy()"),
        (holder("dask.array", "compute"), "write features.compute()"),
        (np.ma.masked_array(ROIS), "write features.filled(0)"),
        (holder("h5py._hl.dataset"), "slice it first, features[...]"),
        (holder("zarr.core"), "slice it first, features[...]"),
        (None, None),
        ("features.npy", None),
    ],
)
def test_what_is_no_array_has_a_way_to_one(given, hint):
    with pytest.raises(TypeError) as caught:
        roialign.roi_align(given, ROIS, 2)
    _, _, end = str(caught.value).partition(f"got {_checks.type_name(given)}")
    assert end == (f": {hint}" if hint else "")


@pytest.mark.parametrize(
    "given, nearest",
    [
        ("half_pixels", "half_pixel"),
        ("Mindspore", "mindspore"),
        ("torchvision", "torchvision:aligned=True"),
        ("torchvision:aligned=true", "torchvision:aligned=True"),
        ("onnx:halfpixel", "onnx:half_pixel"),
        ("mindspore:roi_end_mode=2", "mindspore:roi_end_mode=1"),
    ],
)
def test_unknown_convention_lists_the_nearest_names(given, nearest):
    with pytest.raises(ValueError) as caught:
        roialign.roi_align(FEATURES, ROIS, 2, convention=given)
    text = str(caught.value)
    assert given in text
    listed = text.replace(given, "", 1)
    assert re.search(rf"(?<![\w:]){re.escape(nearest)}(?![\w:=])", listed), text


@pytest.mark.backends("fast")
def test_any_real_scalar_is_a_scale(backend):
    expected = backend.roi_align(FEATURES, ROIS, 2, spatial_scale=2.0)
    for kind in (
        float, np.float32, np.float16, np.float64, np.longdouble, int, np.int64, np.uint8, Fraction,
    ):  # fmt: skip
        for scale in (kind(2), (kind(2), 2.0)):
            assert (backend.roi_align(FEATURES, ROIS, 2, spatial_scale=scale) == expected).all()


@pytest.mark.backends("fast")
@pytest.mark.parametrize("integer", [np.int8, np.int64, np.uint16, np.array, None])
def test_anything_with_index_is_an_integer(backend, integer):
    integer = integer or (lambda value: backend.array(np.array(value)))
    if not hasattr(integer(2), "__index__"):
        return
    expected = backend.roi_align(FEATURES, ROIS, 2, sampling_ratio=3)
    for size in (integer(2), (integer(2), integer(2))):
        output = backend.roi_align(FEATURES, ROIS, size, sampling_ratio=integer(3))
        assert (output == expected).all()
    shape = tuple(map(integer, FEATURES.shape))
    expected = backend.roi_align_adjoint(D_OUTPUT, ROIS, FEATURES.shape)
    assert (backend.roi_align_adjoint(D_OUTPUT, ROIS, shape) == expected).all()
    # the mean needs no features
    assert (backend.roi_align_adjoint(D_OUTPUT, ROIS, shape, features=FEATURES) == expected).all()


class SeveralIntegers:
    """As MindSpore's tensors say that they have several elements."""

    def __index__(self):
        raise ValueError("only one element")


@pytest.mark.parametrize(
    "value, message",
    [
        ({"output_size": np.array([8, 12])}, r"an int or a pair \(height, width\)"),
        ({"output_size": np.array(True)}, "an int"),
        ({"output_size": SeveralIntegers()}, r"an int or a pair \(height, width\)"),
        ({"spatial_scale": np.array([0.5, 0.5])}, r"a number or a pair \(scale_y"),
    ],
)
def test_an_array_is_no_pair(value, message):
    with pytest.raises(TypeError, match=f"`{next(iter(value))}` must be {message}"):
        roialign.roi_align(FEATURES, ROIS, **{"output_size": 2} | value)


@pytest.mark.backends("raises", "-slow")
def test_no_channel_still_checks_the_image_index(backend):
    with pytest.raises(IndexError, match="2"):
        attempt(backend, "forward", features=FEATURES[:, :0], rois=rows(2))


@pytest.mark.backends("values")
@pytest.mark.parametrize("form", [array, pair, per_image])
@pytest.mark.parametrize(
    "count, shape",
    [(0, shape) for shape in [(2, 3, 8, 9), (0, 3, 8, 9), (2, 0, 8, 9), (2, 3, 0, 9), (0, 0, 0, 0)]]
    + [(1, (2, 0, 8, 9))],
)
def test_nothing_to_pool(backend, form, count, shape):
    """No RoI, or no channel: results that are empty or 0, in their forms; so are derivatives."""
    images, channels = shape[:2]
    total, index = count * images, np.repeat(np.arange(images), count)
    rois = arrays_of(form, np.tile(BOXES[:1], (total, 1)), index, images)
    features, g = np.zeros(shape, np.float16), np.zeros((total, channels, 3, 2), np.float16)
    problem = Problem(features, BOXES, IMAGE_INDEX, (3, 2), convention="half_pixel")
    output, d_features, d_rois = [
        backend.run(operation, features, g, *rois) for operation in operations(problem, form)
    ]
    assert output.shape == g.shape and output.dtype == d_features.dtype == features.dtype
    assert d_features.shape == shape and not d_features.any()
    if form is per_image:
        assert type(d_rois) is list and [d.shape for d in d_rois] == [(count, 4)] * images
        d_rois = np.zeros((0, 4)) if not images else np.concatenate(d_rois)
    assert d_rois.shape == (total, 5 if form is array else 4) and not d_rois.any()
    if "grad" in backend.traits:
        forward, *_ = operations(problem, form)
        gradient = backend.grad(summed(forward))
        d_features = backend.numpy(gradient(*backend.array((features, g, *rois))))
        assert d_features.shape == shape and not d_features.any()


WRONG_COUNTS = [(0, "0"), (-1, "-1"), (-(10**5000), "too many digits")]
WRONG_COUNTS += [(True, "True"), (2.0, "float"), ("2", "str"), (None, "None")]


@pytest.mark.parametrize("count, shown", WRONG_COUNTS, ids=lambda v: type(v).__name__)
def test_set_num_threads(count, shown):
    before = roialign.get_num_threads()
    error = ValueError if type(count) is int else TypeError
    with pytest.raises(error, match=f"`n` must be .*{shown}"):
        roialign.set_num_threads(count)
    assert roialign.get_num_threads() == before


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        roialign.roi_align(FEATURES, ROIS, 2, 1.0)
    with pytest.raises(TypeError):
        roialign.roi_align_adjoint(D_OUTPUT, ROIS, FEATURES.shape, 1.0)
    with pytest.raises(TypeError):
        roialign.roi_align_box_gradient(D_OUTPUT, FEATURES, ROIS, 1.0)


@pytest.mark.parametrize("shape", [(1, 1, 2**31, 1), (1, 1, 1, 2**31)])
def test_a_side_that_32_bits_do_not_count(shape):
    features, rois = np.broadcast_to(np.float16(0), shape), np.zeros((1, 5), np.float32)
    d_output = np.zeros((1, 1, 2, 2), np.float16)
    for name, call, given in (
        ("features", roialign.roi_align, (features, rois, 2)),
        ("feature_shape", roialign.roi_align_adjoint, (d_output, rois, shape)),
        ("features", roialign.roi_align_box_gradient, (d_output, features, rois)),
    ):
        with pytest.raises(ValueError, match=rf"`{name}` .*2147483647.*2147483648"):
            call(*given)
    assert roialign.roi_align(features, rois[:0], 2).shape == (0, 1, 2, 2)


@pytest.mark.parametrize("operation", ["adjoint", "box_gradient"])
def test_bins_that_32_bits_do_not_count(operation):
    function, arguments = OPERATIONS[operation]
    d_output = np.broadcast_to(np.float32(0), (2, 3, 2**29, 2**29))
    with pytest.raises(ValueError, match="`d_output` .*2147483647 bins"):
        function(**arguments | {"d_output": d_output})
