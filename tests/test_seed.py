"""`ROIAlign`: MindSpore's operator, exactly, with all its errors."""

import re

import ml_dtypes
import numpy as np
import pytest

import roialign
from roialign import ROIAlign

FEATURES = np.random.default_rng(3).standard_normal((2, 5, 9, 11)).astype(np.float32)
ROIS = np.array([[0, 1.5, 2, 30, 25], [1, 0, 0, 43, 35], [0, 20.25, 8.5, 22, 30]], np.float32)
ARGUMENTS = {
    "pooled_height": 3,
    "pooled_width": 2,
    "spatial_scale": 0.25,
    "sample_num": 2,
    "roi_end_mode": 1,
}
INTEGERS = ("pooled_height", "pooled_width", "sample_num", "roi_end_mode")


def layer(**changed):
    return ROIAlign(**ARGUMENTS | changed)


def test_documentation_example():
    features = np.array([[[[1.0, 2.0], [3.0, 4.0]]]], np.float32)
    rois = np.array([[0, 0.2, 0.3, 0.2, 0.3]], np.float32)
    y = ROIAlign(2, 2, 0.5, 2)(features, rois)
    np.testing.assert_allclose(y, [[[[1.775, 2.025], [2.275, 2.525]]]], rtol=1e-6)
    assert y.dtype == np.float32


def test_positional_order_and_defaults():
    y = ROIAlign(3, 2, 0.25)(FEATURES, ROIS)
    assert y.shape == (3, 5, 3, 2)
    assert (y == ROIAlign(3, 2, 0.25, 2, 1)(FEATURES, ROIS)).all()
    assert (y == layer()(FEATURES, ROIS)).all()
    assert not np.allclose(y, ROIAlign(3, 2, 0.25, 3)(FEATURES, ROIS))
    assert not np.allclose(y, ROIAlign(3, 2, 0.25, 2, 0)(FEATURES, ROIS))


@pytest.mark.parametrize("roi_end_mode, convention", [(1, "mindspore"), (0, "mindspore_legacy")])
@pytest.mark.parametrize("sample_num", [-3, -1, 0, 1, 2, 5])
def test_is_roi_align_of_the_mindspore_conventions(roi_end_mode, convention, sample_num):
    y = layer(roi_end_mode=roi_end_mode, sample_num=sample_num)(FEATURES, ROIS)
    same = roialign.roi_align(
        FEATURES, ROIS, (3, 2), spatial_scale=0.25, sampling_ratio=sample_num, convention=convention
    )
    assert y.tobytes() == same.tobytes()


def test_roi_end_mode_1_is_the_default_and_counts_the_last_pixel():
    # linear map: a bin's mean is its centre; mode 1 moves the end by one pixel
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32), (1, 1, 40, 40))
    box = np.array([[0, 4, 4, 11, 11]], np.float32)
    assert ROIAlign(1, 1, 1.0)(ramp, box).item() == 8.0
    assert ROIAlign(1, 1, 1.0, 2, 0)(ramp, box).item() == 7.5


@pytest.mark.parametrize("sample_num", [-1, -7, -(10**30)])
@pytest.mark.parametrize("roi_end_mode", [0, 1])
def test_any_sample_num_below_one_adapts(sample_num, roi_end_mode):
    adaptive = layer(sample_num=0, roi_end_mode=roi_end_mode)(FEATURES, ROIS)
    assert (
        layer(sample_num=sample_num, roi_end_mode=roi_end_mode)(FEATURES, ROIS) == adaptive
    ).all()


def test_adaptive_boxes_smaller_than_the_output_are_finite():
    # floor(size / P) = 0: MindSpore gives NaN, the rule one sample per bin
    box = np.array([[0, 8, 8, 8.5, 8.5]], np.float32)
    y = ROIAlign(7, 7, 0.25, 0)(FEATURES, box)
    assert (y == ROIAlign(7, 7, 0.25, 1)(FEATURES, box)).all() and np.isfinite(y).all()


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize(
    "value",
    [True, np.int64(1), np.int32(1), np.array(1), 1.0, np.float64(1), "1", None, (1,)],
    ids=lambda v: type(v).__name__,
)
def test_integers_are_python_ints(name, value):
    with pytest.raises(TypeError, match=f"`{name}`.*{type(value).__name__}") as caught:
        layer(**{name: value})
    if isinstance(value, (bool, float, np.generic)):
        assert "int(" in str(caught.value)  # the cast


@pytest.mark.parametrize(
    "value",
    [
        1,
        True,
        np.float32(0.25),
        np.float16(0.25),
        np.int64(1),
        np.array(0.25),
        "1",
        None,
        (0.25, 0.25),
    ],
    ids=lambda v: type(v).__name__,
)
def test_the_scale_is_a_python_float(value):
    with pytest.raises(TypeError, match=f"`spatial_scale`.*{type(value).__name__}") as caught:
        layer(spatial_scale=value)
    if isinstance(value, (int, np.generic)):
        assert "float(" in str(caught.value)  # the cast


def test_float64_scalar_is_a_float():
    assert isinstance(np.float64(0.25), float)
    y = layer(spatial_scale=np.float64(0.25))(FEATURES, ROIS)
    assert (y == layer()(FEATURES, ROIS)).all()


@pytest.mark.parametrize(
    "name, value",
    [
        ("pooled_height", 0),
        ("pooled_height", -1),
        ("pooled_width", 0),
        ("pooled_width", -9),
        ("spatial_scale", 0.0),
        ("spatial_scale", -0.0),
        ("spatial_scale", -0.25),
        ("spatial_scale", float("nan")),
        ("spatial_scale", float("inf")),
        ("spatial_scale", float("-inf")),
        ("roi_end_mode", 2),
        ("roi_end_mode", -1),
        ("roi_end_mode", 3),
    ],
)
def test_values_are_checked_at_construction(name, value):
    with pytest.raises(ValueError, match=rf"`{name}`.*{re.escape(str(value))}"):
        layer(**{name: value})


def test_type_errors_come_first():
    with pytest.raises(TypeError, match="`roi_end_mode`"):
        ROIAlign(0, 0, -1.0, 2, 1.0)
    with pytest.raises(TypeError, match="`rois`"):
        layer()(FEATURES[0], ROIS.tolist())
    bad_index = ROIS + np.float32([9, 0, 0, 0, 0])
    with pytest.raises(TypeError, match="`features`"):
        layer()(FEATURES.astype(int), bad_index)
    with pytest.raises(ValueError, match="`features`"):
        layer()(FEATURES[0], bad_index)


def test_arguments_have_no_other_names():
    with pytest.raises(TypeError):
        ROIAlign(2, 2)
    with pytest.raises(TypeError):
        ROIAlign(2, 2, 1.0, sampling_ratio=2)
    with pytest.raises(TypeError):
        layer()(FEATURES)


@pytest.mark.parametrize(
    "rois, error, received",
    [
        (ROIS.tolist(), TypeError, "list"),
        ([ROIS[:2, 1:], ROIS[2:, 1:]], TypeError, "list"),
        ((ROIS[:, 1:], np.zeros(3, np.int64)), TypeError, "tuple"),
        (None, TypeError, "None"),
        (ROIS.astype(np.int32), TypeError, "int32"),
        (ROIS.astype(np.int64), TypeError, "int64"),
        (ROIS.astype(np.uint8), TypeError, "uint8"),
        (ROIS.astype(bool), TypeError, "bool"),
        (ROIS.astype(complex), TypeError, "complex128"),
        (ROIS.astype(">f4"), TypeError, ">f4|big-endian"),
        (np.ma.masked_array(ROIS), TypeError, "MaskedArray"),
        (ROIS[:, 1:], ValueError, r"\(3, 4\)"),
        (np.zeros((3, 6), np.float32), ValueError, r"\(3, 6\)"),
        (ROIS[0], ValueError, r"\(5,\)"),
        (ROIS[None], ValueError, r"\(1, 3, 5\)"),
        (np.zeros((0, 4), np.float32), ValueError, r"\(0, 4\)"),
    ],
)
def test_rois(rois, error, received):
    with pytest.raises(error, match=f"`rois`.*({received})"):
        layer()(FEATURES, rois)


@pytest.mark.parametrize(
    "features, error, received",
    [
        (FEATURES.tolist(), TypeError, "list"),
        (None, TypeError, "None"),
        (FEATURES.astype(np.int32), TypeError, "int32"),
        (FEATURES.astype(np.complex64), TypeError, "complex64"),
        (FEATURES.astype(">f4"), TypeError, ">f4|big-endian"),
        (FEATURES.astype(object), TypeError, "object"),
        (np.ma.masked_array(FEATURES), TypeError, "MaskedArray"),
        (FEATURES[0], ValueError, r"\(5, 9, 11\)"),
        (FEATURES[None], ValueError, r"\(1, 2, 5, 9, 11\)"),
        (FEATURES[:0], ValueError, r"\(0, 5, 9, 11\)"),
        (FEATURES[:, :, :0], ValueError, r"\(2, 5, 0, 11\)"),
    ],
)
def test_features(features, error, received):
    with pytest.raises(error, match=f"`features`.*({received})"):
        layer()(features, ROIS)


@pytest.mark.parametrize("index", [2, -1, 0.5, np.nan, np.inf])
def test_image_index(index):
    # MindSpore rounds a fraction and reads out of bounds for NaN
    rois = ROIS.copy()
    rois[2, 0] = index
    with pytest.raises(IndexError, match=rf"\b2\b.*{re.escape(f'{index:g}')}"):
        layer()(FEATURES, rois)


@pytest.mark.parametrize("features", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("rois", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_dtypes_may_differ(features, rois):
    # exact in every dtype: bins of 1, 2 and 3 pixels, a ramp of small integers
    ramp = np.add.outer(np.arange(9), np.arange(11)).astype(features)[None, None]
    boxes = np.array([[0, 4, 8, 11, 19], [0, 8, 0, 31, 23]])
    y = layer()(ramp, boxes.astype(rois))
    exact = layer()(ramp.astype(np.float64), boxes.astype(np.float64))
    assert y.dtype == features
    assert (y == exact.astype(features)).all()


def test_no_roi():
    for shape in ((2, 5, 9, 11), (0, 5, 9, 11), (2, 0, 9, 11), (2, 5, 0, 0)):
        y = layer()(np.zeros(shape, np.float16), np.zeros((0, 5), np.float32))
        assert y.shape == (0, shape[1], 3, 2) and y.dtype == np.float16


def test_a_layer_is_reused_and_keeps_no_state():
    align = layer()
    first = align(FEATURES, ROIS)
    kept = first.copy()
    assert align(FEATURES[:, :3], ROIS[:1]).shape == (1, 3, 3, 2)
    again = align(FEATURES, ROIS)
    assert again is not first and (again == kept).all() and (first == kept).all()
    assert not np.shares_memory(again, first)


def test_repr_shows_every_argument():
    text = repr(layer(sample_num=-4, roi_end_mode=0))
    assert text.startswith("ROIAlign(")
    for value in (3, 2, 0.25, -4, 0):
        assert str(value) in text


def test_inputs_are_not_written():
    features, rois = FEATURES.copy(), ROIS.copy()
    features.flags.writeable = rois.flags.writeable = False
    layer()(features, rois)
    assert (features == FEATURES).all() and (rois == ROIS).all()
