"""Every error of the public functions: its class, the argument it names and what it received."""

import re
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

import roialign
from backends import Foreign, array, arrays_of, operations, pair, per_image, taken_apart
from oracle import Problem

FEATURES = np.arange(2 * 3 * 8 * 9, dtype=np.float32).reshape(2, 3, 8, 9)
ROIS = np.array([[0, 1, 1, 6, 5], [1, 0, 2, 7, 6.5]], np.float32)
BOXES, IMAGE_INDEX = ROIS[:, 1:].copy(), np.array([0, 1])
D_OUTPUT = np.ones((2, 3, 2, 2), np.float32)


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


# (arguments, error, pattern of the argument's name, pattern of what was received)
OPTIONS = [
    ({"spatial_scale": "1"}, TypeError, "spatial_scale", "str"),
    ({"spatial_scale": None}, TypeError, "spatial_scale", "None"),
    ({"spatial_scale": True}, TypeError, "spatial_scale", "bool|True"),
    ({"spatial_scale": 1j}, TypeError, "spatial_scale", "complex|1j"),
    ({"spatial_scale": np.ones(1)}, TypeError, "spatial_scale", "ndarray|Tensor|Array"),
    ({"spatial_scale": (1.0, "1")}, TypeError, "spatial_scale", "str"),
    ({"spatial_scale": (False, 1.0)}, TypeError, "spatial_scale", "bool|False"),
    ({"spatial_scale": 0.0}, ValueError, "spatial_scale", "0"),
    ({"spatial_scale": -0.25}, ValueError, "spatial_scale", r"-0\.25"),
    ({"spatial_scale": float("nan")}, ValueError, "spatial_scale", "nan"),
    ({"spatial_scale": float("inf")}, ValueError, "spatial_scale", "inf"),
    ({"spatial_scale": (0.5, -2)}, ValueError, "spatial_scale", "-2"),
    ({"spatial_scale": (float("nan"), 1)}, ValueError, "spatial_scale", "nan"),
    ({"spatial_scale": (1.0, 1.0, 1.0)}, ValueError, "spatial_scale", r"3|\(1\.0, 1\.0, 1\.0\)"),
    ({"spatial_scale": (0.5,)}, ValueError, "spatial_scale", r"1|\(0\.5,\)"),
    ({"spatial_scale": ()}, ValueError, "spatial_scale", r"0|\(\)"),
    ({"sampling_ratio": 2.0}, TypeError, "sampling_ratio", r"float|2\.0"),
    ({"sampling_ratio": True}, TypeError, "sampling_ratio", "bool|True"),
    ({"sampling_ratio": np.True_}, TypeError, "sampling_ratio", "bool|True"),
    ({"sampling_ratio": "2"}, TypeError, "sampling_ratio", "str"),
    ({"sampling_ratio": None}, TypeError, "sampling_ratio", "None"),
    ({"sampling_ratio": (2, 2)}, TypeError, "sampling_ratio", r"tuple|\(2, 2\)"),
    ({"convention": 3}, TypeError, "convention", "int|3"),
    ({"convention": None}, TypeError, "convention", "None"),
    ({"convention": "half_pixels"}, ValueError, "convention", "half_pixels"),
    ({"convention": "torchvision"}, ValueError, "convention", "torchvision"),
    ({"convention": ""}, ValueError, "convention", "unknown"),
    ({"reduction": "max"}, ValueError, "reduction", "'mean'.*'max'"),
    ({"reduction": "max_corner"}, ValueError, "reduction", "'mean'.*'max_corner'"),
    ({"reduction": "sum"}, ValueError, "reduction", "'mean'.*'sum'"),
    ({"reduction": "Mean"}, ValueError, "reduction", "'mean'.*'Mean'"),
    ({"reduction": ""}, ValueError, "reduction", "'mean'.*''"),
    ({"reduction": None}, TypeError, "reduction", "None"),
    ({"reduction": ["mean"]}, TypeError, "reduction", "list"),
]
ROIS_FORMS = [
    ({"rois": None}, TypeError, "rois", "None"),
    ({"rois": ROIS.tolist()}, TypeError, "rois", "list"),
    ({"rois": ROIS.tobytes()}, TypeError, "rois", "bytes"),
    ({"rois": ArrayLike(ROIS)}, TypeError, "rois", "ArrayLike"),
    ({"rois": np.ma.masked_array(ROIS)}, TypeError, "rois", "MaskedArray"),
    ({"rois": ROIS.astype(complex)}, TypeError, "rois", "complex128"),
    ({"rois": ROIS.astype(object)}, TypeError, "rois", "object"),
    ({"rois": ROIS.astype(bool)}, TypeError, "rois", "bool"),
    ({"rois": ROIS.astype(">f4")}, TypeError, "rois", ">f4|big-endian"),
    ({"rois": ROIS.astype("U8")}, TypeError, "rois", "U8|str"),
    ({"rois": [BOXES[:1], BOXES[1:].tolist()]}, TypeError, "rois", "list"),
    ({"rois": [BOXES[:1], None]}, TypeError, "rois", "None"),
    ({"rois": [BOXES[:1], ArrayLike(BOXES[1:])]}, TypeError, "rois", "ArrayLike"),
    ({"rois": [BOXES[:1], BOXES[1:].astype(bool)]}, TypeError, "rois", "bool"),
    ({"rois": (BOXES.tolist(), IMAGE_INDEX)}, TypeError, "boxes|rois", "list"),
    ({"rois": (BOXES, IMAGE_INDEX.tolist())}, TypeError, "image_index|rois", "list"),
    ({"rois": (BOXES, ArrayLike(IMAGE_INDEX))}, TypeError, "image_index|rois", "ArrayLike"),
    ({"rois": (BOXES, IMAGE_INDEX.astype(np.float32))}, TypeError, "image_index", "float32"),
    ({"rois": (BOXES, IMAGE_INDEX.astype(bool))}, TypeError, "image_index", "bool"),
    ({"rois": (BOXES, IMAGE_INDEX.astype(">i8"))}, TypeError, "image_index", ">i8|big-endian"),
    ({"rois": (BOXES.astype(">f8"), IMAGE_INDEX)}, TypeError, "boxes|rois", ">f8|big-endian"),
    ({"rois": (BOXES.astype(complex), IMAGE_INDEX)}, TypeError, "boxes|rois", "complex128"),
    ({"rois": ROIS[:, :4]}, ValueError, "rois", r"\(2, 4\)"),
    ({"rois": np.zeros((3, 6), np.float32)}, ValueError, "rois", r"\(3, 6\)"),
    ({"rois": ROIS[0]}, ValueError, "rois", r"\(5,\)"),
    ({"rois": ROIS[None]}, ValueError, "rois", r"\(1, 2, 5\)"),
    ({"rois": np.zeros((), np.float32)}, ValueError, "rois", r"\(\)"),
    ({"rois": np.zeros((0, 4), np.float32)}, ValueError, "rois", r"\(0, 4\)"),
    ({"rois": ()}, ValueError, "rois", r"0|\(\)"),
    ({"rois": (BOXES,)}, ValueError, "rois", "1"),
    ({"rois": (BOXES, IMAGE_INDEX, IMAGE_INDEX)}, ValueError, "rois", "3"),
    ({"rois": (ROIS, IMAGE_INDEX)}, ValueError, "boxes|rois", r"\(2, 5\)"),
    ({"rois": (BOXES[0], IMAGE_INDEX)}, ValueError, "boxes|rois", r"\(4,\)"),
    ({"rois": (BOXES, IMAGE_INDEX[:1])}, ValueError, "image_index", r"\(1,\)|1"),
    ({"rois": (BOXES, IMAGE_INDEX[:, None])}, ValueError, "image_index", r"\(2, 1\)"),
    ({"rois": []}, ValueError, "rois", "0"),
    ({"rois": [BOXES]}, ValueError, "rois", "1"),
    ({"rois": [BOXES, BOXES, BOXES]}, ValueError, "rois", "3"),
    ({"rois": [BOXES[:1], ROIS[1:]]}, ValueError, "rois", r"\(1, 5\)"),
    ({"rois": [BOXES[:1], BOXES[0]]}, ValueError, "rois", r"\(4,\)"),
    ({"rois": np.zeros((2, 4), bool)}, TypeError, "rois", "bool"),  # dtype before columns
    ({"rois": np.zeros((2, 4, 1), complex)}, TypeError, "rois", "complex128"),
    ({"rois": (BOXES[:, :3], IMAGE_INDEX.astype(float))}, TypeError, "image_index", "float64"),
    ({"rois": (BOXES[:, :3], np.array([0, 9]))}, ValueError, "boxes|rois", r"\(2, 3\)"),
    (
        {"rois": np.full((2, 6), 9, np.float32)},
        ValueError,
        "rois",
        r"\(2, 6\)",
    ),  # before the image index
    ({"rois": [BOXES[:, :3], None]}, TypeError, "rois", "None"),
    ({"rois": [BOXES, BOXES, "3"]}, TypeError, "rois", "str"),  # kind before the list's length
    ({"rois": rows(2)}, IndexError, "image_index|rois", r"1\b.*\b2"),
    ({"rois": rows(-1)}, IndexError, "image_index|rois", r"1\b.*-1"),
    ({"rois": rows(0.5)}, IndexError, "image_index|rois", r"1\b.*0\.5"),
    ({"rois": rows(np.nan)}, IndexError, "image_index|rois", r"1\b.*nan"),
    ({"rois": rows(np.inf)}, IndexError, "image_index|rois", r"1\b.*inf"),
    ({"rois": (BOXES, np.array([0, 7]))}, IndexError, "image_index|rois", r"1\b.*\b7"),
    ({"rois": (BOXES, np.array([0, -3], np.int8))}, IndexError, "image_index|rois", r"1\b.*-3"),
]
FEATURE_ARRAYS = [
    ({"features": None}, TypeError, "features", "None"),
    ({"features": FEATURES.tolist()}, TypeError, "features", "list"),
    ({"features": memoryview(FEATURES)}, TypeError, "features", "memoryview"),
    ({"features": ArrayLike(FEATURES)}, TypeError, "features", "ArrayLike"),
    ({"features": np.ma.masked_array(FEATURES)}, TypeError, "features", "MaskedArray"),
    ({"features": FEATURES.astype(np.int32)}, TypeError, "features", "int32"),
    ({"features": FEATURES.astype(np.uint8)}, TypeError, "features", "uint8"),
    ({"features": FEATURES.astype(bool)}, TypeError, "features", "bool"),
    ({"features": FEATURES.astype(np.complex64)}, TypeError, "features", "complex64"),
    ({"features": FEATURES.astype(object)}, TypeError, "features", "object"),
    ({"features": FEATURES.astype(">f4")}, TypeError, "features", ">f4|big-endian"),
    ({"features": FEATURES.view("V4")}, TypeError, "features", "V4|void"),
    ({"features": FEATURES[0]}, ValueError, "features", r"\(3, 8, 9\)"),
    ({"features": FEATURES[0].astype(int)}, TypeError, "features", "int64"),  # dtype before rank
    ({"features": FEATURES[None]}, ValueError, "features", r"\(1, 2, 3, 8, 9\)"),
    ({"features": np.float32(1)}, TypeError, "features", "float"),
    ({"features": np.zeros((), np.float32)}, ValueError, "features", r"\(\)"),
    ({"features": FEATURES[:0]}, ValueError, "features", r"\(0, 3, 8, 9\)"),
    ({"features": FEATURES[:0, :0]}, ValueError, "features|d_output", r"\(\d, 0, "),
    ({"features": FEATURES[:, :, :0]}, ValueError, "features", r"\(2, 3, 0, 9\)"),
    ({"features": FEATURES[..., :0]}, ValueError, "features", r"\(2, 3, 8, 0\)"),
]
OUTPUT_SIZE = [
    ({"output_size": 2.0}, TypeError, "output_size", r"float|2\.0"),
    ({"output_size": True}, TypeError, "output_size", "bool|True"),
    ({"output_size": "2"}, TypeError, "output_size", "str"),
    ({"output_size": None}, TypeError, "output_size", "None"),
    ({"output_size": (2, 2.5)}, TypeError, "output_size", r"float|2\.5"),
    ({"output_size": (np.True_, 2)}, TypeError, "output_size", "bool|True"),
    ({"output_size": 0}, ValueError, "output_size", "0"),
    ({"output_size": -7}, ValueError, "output_size", "-7"),
    ({"output_size": (3, 0)}, ValueError, "output_size", "0"),
    ({"output_size": (-1, 3)}, ValueError, "output_size", "-1"),
    ({"output_size": (2, 2, 2)}, ValueError, "output_size", r"3|\(2, 2, 2\)"),
    ({"output_size": (2,)}, ValueError, "output_size", r"1|\(2,\)"),
]
D_OUTPUTS = [
    ({"d_output": None}, TypeError, "d_output", "None"),
    ({"d_output": D_OUTPUT.tolist()}, TypeError, "d_output", "list"),
    ({"d_output": np.ma.masked_array(D_OUTPUT)}, TypeError, "d_output", "MaskedArray"),
    ({"d_output": ArrayLike(D_OUTPUT)}, TypeError, "d_output", "ArrayLike"),
    ({"d_output": D_OUTPUT.astype(np.int64)}, TypeError, "d_output", "int64"),
    ({"d_output": D_OUTPUT.astype(">f4")}, TypeError, "d_output", ">f4|big-endian"),
    ({"d_output": D_OUTPUT[0]}, ValueError, "d_output", r"\(3, 2, 2\)"),
    ({"d_output": D_OUTPUT[None]}, ValueError, "d_output", r"\(1, 2, 3, 2, 2\)"),
    ({"d_output": D_OUTPUT[:1]}, ValueError, "d_output|rois", "1"),
    ({"d_output": np.ones((5, 3, 2, 2), np.float32)}, ValueError, "d_output|rois", "5"),
    ({"d_output": D_OUTPUT[:, :2]}, ValueError, "d_output|features|feature_shape", "2"),
    ({"d_output": D_OUTPUT[:, :, :0]}, ValueError, "d_output", r"\(2, 3, 0, 2\)"),
    ({"d_output": D_OUTPUT[..., :0]}, ValueError, "d_output", r"\(2, 3, 2, 0\)"),
]
FEATURE_SHAPES = [
    ({"feature_shape": None}, TypeError, "feature_shape", "None"),
    ({"feature_shape": 8}, TypeError, "feature_shape", "int|8"),
    ({"feature_shape": "2389"}, TypeError, "feature_shape", "str"),
    ({"feature_shape": (2, 3, 8.0, 9)}, TypeError, "feature_shape", r"float|8\.0"),
    ({"feature_shape": (2, 3, True, 9)}, TypeError, "feature_shape", "bool|True"),
    ({"feature_shape": (3, 8, 9)}, ValueError, "feature_shape", r"3|\(3, 8, 9\)"),
    ({"feature_shape": (1, 2, 3, 8, 9)}, ValueError, "feature_shape", r"5|\(1, 2, 3, 8, 9\)"),
    ({"feature_shape": (2, 3, -8, 9)}, ValueError, "feature_shape", "-8"),
    ({"feature_shape": (2, 4, 8, 9)}, ValueError, "feature_shape|d_output", "4"),
    ({"feature_shape": (0, 3, 8, 9)}, ValueError, "feature_shape", r"\(0, 3, 8, 9\)"),
    ({"feature_shape": (2, 3, 0, 9)}, ValueError, "feature_shape", r"\(2, 3, 0, 9\)"),
    ({"feature_shape": (2, 3, 8, 0)}, ValueError, "feature_shape", r"\(2, 3, 8, 0\)"),
]
UNLIKE = [
    ({"features": FEATURES.astype(np.float64)}, TypeError, "d_output|features", "float64"),
    ({"features": FEATURES.astype(np.float16)}, TypeError, "d_output|features", "float16"),
]
FITTING = [
    ({"features": FEATURES[:, :2]}, ValueError, "d_output|features", "2"),
]
UNREAD = [  # by the mean; what is given must fit all the same
    ({"features": "map"}, TypeError, "features", "str"),
    ({"features": FEATURES[0]}, ValueError, "features", r"\(3, 8, 9\)"),
    ({"features": FEATURES[:1]}, ValueError, "features", r"\(2, 3, 8, 9\).*\(1, 3, 8, 9\)"),
    ({"features": FEATURES[..., :-1]}, ValueError, "features", r"\(2, 3, 8, 8\)"),
]
TABLES = {
    "forward": OPTIONS + ROIS_FORMS + FEATURE_ARRAYS + OUTPUT_SIZE,
    "adjoint": OPTIONS + ROIS_FORMS + D_OUTPUTS + FEATURE_SHAPES + UNLIKE + UNREAD,
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
    shown = set()
    for changed, error, name, received in TABLES[operation]:
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


@pytest.mark.backends("fast")
def test_arrays_of_another_library(backend):
    features, rois = (backend.own(each) for each in (FEATURES, ROIS))
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


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_matrix_is_refused():
    for function, arguments in OPERATIONS.values():
        with pytest.raises(TypeError, match="`rois`.*matrix"):
            function(**arguments | {"rois": np.matrix(ROIS)})


def test_longdouble_features_are_refused():
    if np.dtype(np.longdouble) == np.dtype(np.float64):
        pytest.skip("longdouble is float64 here")
    with pytest.raises(TypeError, match="`features`.*(longdouble|float128|float96)"):
        roialign.roi_align(FEATURES.astype(np.longdouble), ROIS, 2)


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
@pytest.mark.parametrize("integer", [np.int8, np.int64, np.uint16, np.array])
def test_anything_with_index_is_an_integer(backend, integer):
    expected = backend.roi_align(FEATURES, ROIS, 2, sampling_ratio=3)
    for size in (integer(2), (integer(2), integer(2))):
        output = backend.roi_align(FEATURES, ROIS, size, sampling_ratio=integer(3))
        assert (output == expected).all()
    shape = tuple(map(integer, FEATURES.shape))
    expected = backend.roi_align_adjoint(D_OUTPUT, ROIS, FEATURES.shape)
    assert (backend.roi_align_adjoint(D_OUTPUT, ROIS, shape) == expected).all()
    unread = backend.array(FEATURES)  # the mean needs no features
    assert (backend.roi_align_adjoint(D_OUTPUT, ROIS, shape, features=unread) == expected).all()


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
        own = backend.array((features, *rois))

        def loss(features, *rois):
            return roialign.roi_align(features, form(*rois), (3, 2)).sum()

        d_features = backend.numpy(backend.grad(loss)(*own))
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


def test_bins_that_32_bits_do_not_count():
    d_output = np.broadcast_to(np.float32(0), (2, 3, 2**29, 2**29))
    for operation, changed in (
        ("forward", {"output_size": (2**16, 2**15)}),
        ("adjoint", {"d_output": d_output}),
        ("box_gradient", {"d_output": d_output}),
    ):
        function, arguments = OPERATIONS[operation]
        with pytest.raises(ValueError, match=rf"`{next(iter(changed))}` .*2147483647 bins"):
            function(**arguments | changed)
