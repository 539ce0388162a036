"""Every error of the public functions: its class, the argument it names and what it received."""

import re
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

import roialign

FEATURES = np.arange(2 * 3 * 8 * 9, dtype=np.float32).reshape(2, 3, 8, 9)
ROIS = np.array([[0, 1, 1, 6, 5], [1, 0, 2, 7, 6.5]], np.float32)
BOXES, IMAGE_INDEX = ROIS[:, 1:].copy(), np.array([0, 1])
D_OUTPUT = np.ones((2, 3, 2, 2), np.float32)


def forward(features=FEATURES, rois=ROIS, output_size=2, **options):
    return roialign.roi_align(features, rois, output_size, **options)


def adjoint(d_output=D_OUTPUT, rois=ROIS, feature_shape=FEATURES.shape, **options):
    return roialign.roi_align_adjoint(d_output, rois, feature_shape, **options)


def box_gradient(d_output=D_OUTPUT, features=FEATURES, rois=ROIS, **options):
    return roialign.roi_align_box_gradient(d_output, features, rois, **options)


OPERATIONS = (forward, adjoint, box_gradient)
OUT = {forward: (2, 3, 2, 2), adjoint: FEATURES.shape, box_gradient: ROIS.shape}


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
    ({"spatial_scale": np.ones(1)}, TypeError, "spatial_scale", "ndarray"),
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
    ({"reduction": "max"}, ValueError, "reduction", "max"),
    ({"reduction": "Mean"}, ValueError, "reduction", "Mean"),
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
    ({"features": FEATURES[None]}, ValueError, "features", r"\(1, 2, 3, 8, 9\)"),
    ({"features": np.float32(1)}, TypeError, "features", "float32"),
    ({"features": np.zeros((), np.float32)}, ValueError, "features", r"\(\)"),
    ({"features": FEATURES[:0]}, ValueError, "features", r"\(0, 3, 8, 9\)"),
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
MISSHAPEN = [
    ({"features": FEATURES[:, :2]}, ValueError, "d_output|features", "2"),
]
CASES = [
    (operation, *case)
    for operation, tables in (
        (forward, (OPTIONS, ROIS_FORMS, FEATURE_ARRAYS, OUTPUT_SIZE)),
        (adjoint, (OPTIONS, ROIS_FORMS, D_OUTPUTS, FEATURE_SHAPES, UNLIKE)),
        (box_gradient, (OPTIONS, ROIS_FORMS, FEATURE_ARRAYS, D_OUTPUTS, UNLIKE, MISSHAPEN)),
    )
    for table in tables
    for case in table
]


cases = pytest.mark.parametrize(
    "operation, arguments, error, name, received",
    CASES,
    ids=[
        f"{operation.__name__}-{'-'.join(arguments)}-{received}"
        for operation, arguments, _, _, received in CASES
    ],
)


def message(error):
    return str(error.value)


def out_for(operation, rois=ROIS, **_):
    """What fits a call, with these rois or with the ones that they should have been."""
    pair = operation is box_gradient and isinstance(rois, tuple)
    return np.full((2, 4) if pair else OUT[operation], 7, np.float32)


@cases
def test_error(operation, arguments, error, name, received):
    with pytest.raises(error) as caught:
        operation(**arguments)
    named = re.search(rf"`({name})(\[\d\])?`", message(caught))  # `rois[1]`: of a list
    assert named, f"no `{name}` in: {message(caught)}"
    assert re.search(received, message(caught).replace(named[0], "")), message(caught)


@cases
def test_out_is_untouched_by_an_error(operation, arguments, error, name, received):
    if operation is box_gradient and isinstance(arguments.get("rois"), list):
        error = TypeError  # a list of gradients takes no out
    out = out_for(operation, **arguments)
    with pytest.raises(error):
        operation(**arguments, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_defaults_of_this_table_are_valid(operation):
    assert np.isfinite(operation()).all()
    assert operation(out=np.empty(OUT[operation], np.float32)).shape == OUT[operation]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "first, second", [(TypeError, ValueError), (ValueError, IndexError), (TypeError, IndexError)]
)
def test_type_errors_come_before_value_errors_before_index_errors(operation, first, second):
    table = [(arguments, error) for where, arguments, error, *_ in CASES if where is operation]
    pairs = [
        (early, late)
        for (early, e), (late, f) in product(table, table)
        if e is first and f is second and not early.keys() & late.keys()
    ]
    assert pairs
    for early, late in pairs:
        with pytest.raises(first):  # none of the three is a subclass of another
            operation(**early, **late)


@pytest.mark.parametrize(
    "rois, error",
    [
        (np.zeros((2, 4), bool), TypeError),  # dtype before columns
        (np.zeros((2, 4, 1), object), TypeError),
        ((BOXES[:, :3], IMAGE_INDEX.astype(float)), TypeError),
        ((BOXES[:, :3], np.array([0, 9])), ValueError),  # columns before the index's range
        (np.full((2, 6), 9.0), ValueError),
        ([BOXES[:, :3], None], TypeError),
        ([BOXES, BOXES, "3"], TypeError),  # kind before the list's length
    ],
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_order_inside_one_argument(operation, rois, error):
    with pytest.raises(error):
        operation(rois=rois)


@pytest.mark.parametrize(
    "features, error",
    [
        (np.zeros((3, 8, 9), int), TypeError),
        (np.zeros((0, 8, 9), np.float32), ValueError),
    ],
)
def test_dtype_of_features_before_rank(features, error):
    for operation in (forward, box_gradient):
        with pytest.raises(error):
            operation(features=features)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_matrix_is_refused(operation):
    with pytest.raises(TypeError, match="`rois`.*matrix"):
        operation(rois=np.matrix(ROIS))


def test_longdouble_features_are_refused():
    if np.dtype(np.longdouble) == np.dtype(np.float64):
        pytest.skip("longdouble is float64 here")
    with pytest.raises(TypeError, match="`features`.*(longdouble|float128|float96)"):
        forward(features=FEATURES.astype(np.longdouble))


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
        forward(convention=given)
    assert given in message(caught)
    listed = message(caught).replace(given, "", 1)
    assert re.search(rf"(?<![\w:]){re.escape(nearest)}(?![\w:=])", listed), message(caught)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("reduction", ["max", "max_corner", "sum", ""])
def test_other_reductions_list_what_is_accepted(operation, reduction):
    with pytest.raises(ValueError, match="`reduction`.*mean"):
        operation(reduction=reduction)


def test_features_given_to_adjoint_are_checked():
    # the mean needs none; what is given must still fit
    assert (adjoint(features=FEATURES) == adjoint()).all()
    for features, error in (
        ("map", TypeError),
        (FEATURES[0], ValueError),
        (FEATURES[..., :-1], ValueError),
    ):
        with pytest.raises(error, match="`features`"):
            adjoint(features=features)


def test_a_second_array_library_is_refused():
    class Tensor(ArrayLike):
        __module__ = "torch"

    for arguments in (
        {"features": Tensor(FEATURES)},
        {"rois": Tensor(ROIS)},
        {"rois": (Tensor(BOXES), IMAGE_INDEX)},
    ):
        with pytest.raises(TypeError, match="Tensor"):
            forward(**arguments)


@pytest.mark.parametrize(
    "kind",
    [float, np.float32, np.float16, np.float64, np.longdouble, int, np.int64, np.uint8, Fraction],
)
def test_any_real_scalar_is_a_scale(kind):
    expected = forward(spatial_scale=2.0)
    assert (forward(spatial_scale=kind(2)) == expected).all()
    assert (forward(spatial_scale=(kind(2), 2.0)) == expected).all()


@pytest.mark.parametrize("integer", [np.int8, np.int64, np.uint16, np.array])
def test_anything_with_index_is_an_integer(integer):
    expected = forward(output_size=2, sampling_ratio=3)
    assert (forward(output_size=integer(2), sampling_ratio=integer(3)) == expected).all()
    assert (forward(output_size=(integer(2), integer(2)), sampling_ratio=3) == expected).all()
    assert (adjoint(feature_shape=tuple(map(integer, FEATURES.shape))) == adjoint()).all()


def empties():
    """`rois` without a RoI for N images, in every form."""
    boxes = np.zeros((0, 4), np.float32)
    yield "array", lambda n: np.zeros((0, 5), np.float32)
    yield "pair", lambda n: (boxes, np.zeros(0, np.int64))
    yield "list", lambda n: [boxes] * n


SHAPES = [
    (2, 3, 8, 9),
    (0, 3, 8, 9),
    (2, 0, 8, 9),
    (2, 3, 0, 9),
    (2, 3, 8, 0),
    (0, 0, 0, 0),
    (1, 17, 1, 1),
]


@pytest.mark.parametrize(
    "form, none", list(empties()), ids=lambda v: v if isinstance(v, str) else ""
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_no_roi_gives_an_empty_result(form, none, shape, dtype):
    features, rois = np.zeros(shape, dtype), none(shape[0])
    d_output = np.zeros((0, shape[1], 3, 2), dtype)
    y = forward(features, rois, (3, 2))
    assert y.shape == d_output.shape and y.dtype == dtype
    assert forward(features, rois, (3, 2), out=d_output) is d_output
    poisoned = np.full(shape, np.nan, dtype)
    for d_features in (
        adjoint(d_output, rois, shape),
        adjoint(d_output, rois, shape, out=poisoned),
    ):
        assert d_features.shape == shape and d_features.dtype == dtype
        assert (d_features == 0).all()
    d_rois = box_gradient(d_output, features, rois)
    if form == "list":
        assert type(d_rois) is list and [d.shape for d in d_rois] == [(0, 4)] * shape[0]
    else:
        assert d_rois.shape == ((0, 5) if form == "array" else (0, 4))


@pytest.mark.parametrize(
    "rois", [ROIS, (BOXES, IMAGE_INDEX), [BOXES[:1], BOXES[1:]]], ids=["array", "pair", "list"]
)
def test_no_channel_gives_empty_maps_and_a_zero_box_gradient(rois):
    features, d_output = FEATURES[:, :0], D_OUTPUT[:, :0]
    assert forward(features, rois).shape == (2, 0, 2, 2)
    assert adjoint(d_output, rois, features.shape).shape == (2, 0, 8, 9)
    d_rois = box_gradient(d_output, features, rois)
    d_rois = np.concatenate(d_rois) if isinstance(rois, list) else d_rois
    assert d_rois.shape[0] == 2 and (d_rois == 0).all()


def test_no_channel_still_checks_the_image_index():
    with pytest.raises(IndexError, match="2"):
        forward(FEATURES[:, :0], rows(2))
    with pytest.raises(ValueError, match="`features`"):
        forward(np.zeros((0, 0, 8, 9), np.float32))


@pytest.mark.parametrize(
    "count, error",
    [
        (0, ValueError),
        (-1, ValueError),
        (True, TypeError),
        (2.0, TypeError),
        ("2", TypeError),
        (None, TypeError),
    ],
)
def test_set_num_threads(count, error):
    before = roialign.get_num_threads()
    with pytest.raises(error) as caught:
        roialign.set_num_threads(count)
    assert str(count) in message(caught) or type(count).__name__ in message(caught)
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
    for call, name in (
        (lambda: forward(features, rois), "features"),
        (lambda: adjoint(d_output, rois, shape), "feature_shape"),
        (lambda: box_gradient(d_output, features, rois), "features"),
    ):
        with pytest.raises(ValueError, match=rf"`{name}` .*2147483647.*2147483648"):
            call()
    assert forward(features, rois[:0]).shape == (0, 1, 2, 2)


def test_bins_that_32_bits_do_not_count():
    d_output = np.broadcast_to(np.float32(0), (2, 3, 2**29, 2**29))
    for call, name in (
        (lambda: forward(output_size=(2**16, 2**15)), "output_size"),
        (lambda: adjoint(d_output), "d_output"),
        (lambda: box_gradient(d_output), "d_output"),
    ):
        with pytest.raises(ValueError, match=rf"`{name}` .*2147483647 bins"):
            call()
