"""`ROIAlign`, and the layers of frameworks: MindSpore's operator, exactly, with all its errors."""

import copy
import pickle

import numpy as np
import pytest

import test_errors as errors
from backends import Foreign, summed
from roialign import ROIAlign, roi_align

FEATURES = np.random.default_rng(3).standard_normal((2, 5, 9, 11)).astype(np.float32)
ROIS = np.array([[0, 1.5, 2, 30, 25], [1, 0, 0, 43, 35], [0, 20.25, 8.5, 22, 30]], np.float32)
ARGUMENTS = {
    "pooled_height": 3,
    "pooled_width": 2,
    "spatial_scale": 0.25,
    "sample_num": 2,
    "roi_end_mode": 1,
}
VALUES = tuple(ARGUMENTS.values())


@pytest.mark.backends("values")
@pytest.mark.parametrize("roi_end_mode, convention", [(1, "mindspore"), (0, "mindspore_legacy")])
@pytest.mark.parametrize("sample_num", [-3, 0, 2])
def test_is_roi_align_of_the_mindspore_conventions(backend, roi_end_mode, convention, sample_num):
    """Also where a layer is used again."""
    options = {"spatial_scale": 0.25, "sampling_ratio": sample_num, "convention": convention}
    expected = backend.roi_align(FEATURES, ROIS, (3, 2), **options)
    for layer in backend.layers(3, 2, 0.25, sample_num, roi_end_mode):
        first = backend.run(layer, FEATURES, ROIS)
        backend.run(layer, FEATURES[:, :3], ROIS[:1])
        for y in (first, backend.run(layer, FEATURES, ROIS)):
            assert y.tobytes() == expected.tobytes()


@pytest.mark.backends("values", "grad", "-slow")
def test_gradients(backend):
    features, rois, d_output = backend.array((FEATURES, ROIS, np.cos(FEATURES[..., :3, :2])[:1]))
    options = {"spatial_scale": 0.25, "sampling_ratio": 2, "convention": "mindspore"}

    def gradients(pool):
        return backend.numpy(backend.grad(summed(pool, d_output), (0, 1))(features, rois))

    def function(features, rois):
        return roi_align(features, rois, (3, 2), **options)

    expected = gradients(function)
    for layer in backend.layers(*VALUES):
        for actual, right in zip(gradients(layer), expected, strict=True):
            assert np.array_equal(actual, right) and right.any()


@pytest.mark.backends("fast")
def test_defaults_repr_and_copies(backend):
    shown = "pooled_height=3, pooled_width=2, spatial_scale=0.25, sample_num=2, roi_end_mode=1"
    for layer in (*backend.layers(3, 2, 0.25), *backend.layers(*VALUES)):
        for same in (layer, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
            assert shown in repr(same)
            y = backend.run(same, FEATURES, ROIS)
            assert np.array_equal(y, ROIAlign(*VALUES)(FEATURES, ROIS))


INTEGERS = [True, np.int64(1), np.int32(1), np.array(1), 1.0, np.float64(1), "1", None, (1,)]
SCALES = [1, True, np.float32(0.25), np.float16(0.25), np.int64(1), np.array(0.25), "1", None]
SCALES.append((0.25, 0.25))
OUT_OF_RANGE = {
    "pooled_height": [0, -1, *errors.LARGE],
    "pooled_width": [0, -9, *errors.LARGE],
    "spatial_scale": [0.0, -0.0, -0.25, float("nan"), float("inf"), float("-inf")],
    "sample_num": errors.MANY,
    "roi_end_mode": [2, -1, 3],
}


@pytest.mark.backends("fast")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_checked_at_construction(backend, name):
    """They are Python's int and float, of which NumPy's float64 is one."""
    kind, wrong = (float, SCALES) if name == "spatial_scale" else (int, INTEGERS)
    for layer in backend.layer_kinds:
        for value in wrong:
            with pytest.raises(TypeError, match=f"`{name}`.*{type(value).__name__}") as caught:
                layer(**ARGUMENTS | {name: value})
            if isinstance(value, (int, float, np.generic)):
                assert f"{kind.__name__}(" in str(caught.value)  # the cast
        for value in OUT_OF_RANGE.get(name, []):
            with pytest.raises(ValueError, match=f"`{name}`.*{errors.shown(value, ValueError)}"):
                layer(**ARGUMENTS | {name: value})
        with pytest.raises(ValueError, match=r"`\(pooled_height, pooled_width\)` .*7 bins"):
            layer(2**16, 2**15, 1.0)
        layer(**ARGUMENTS | {"spatial_scale": np.float64(0.25), "sample_num": 4096})


def test_type_errors_come_first():
    with pytest.raises(TypeError, match="`roi_end_mode`"):
        ROIAlign(0, 0, -1.0, 2, 1.0)
    with pytest.raises(TypeError, match="`rois`"):
        ROIAlign(*VALUES)(FEATURES[0], ROIS.tolist())
    bad_index = ROIS + np.float32([9, 0, 0, 0, 0])
    with pytest.raises(TypeError, match="`features`"):
        ROIAlign(*VALUES)(FEATURES.astype(int), bad_index)
    with pytest.raises(ValueError, match="`features`"):
        ROIAlign(*VALUES)(FEATURES[0], bad_index)


def test_arguments_have_no_other_names():
    with pytest.raises(TypeError):
        ROIAlign(2, 2)
    with pytest.raises(TypeError):
        ROIAlign(2, 2, 1.0, sampling_ratio=2)
    with pytest.raises(TypeError):
        ROIAlign(2, 2, 1.0)(FEATURES)


REFUSED = [  # by a call, which takes floats, and no form of rois but rows
    *(row for row in errors.ROIS_FORMS if not isinstance(row[0]["rois"], (tuple, list))),
    *errors.wrong("rois", TypeError, [ROIS[:, 1:]] * 2, (ROIS[:, 1:], np.zeros(3, int))),
    *errors.wrong("rois", TypeError, *errors.of_dtypes(ROIS, "i4", "i8", "u1")),
    *errors.FEATURE_ARRAYS,
    *errors.BYTES,
]


@pytest.mark.backends("fast")
def test_errors_of_a_call(backend):
    for layer in backend.layers(*VALUES):
        for changed, error, name, received in REFUSED:
            given = {"features": errors.FEATURES, "rois": errors.ROIS} | changed
            try:
                given = backend.own(list(given.values()))
            except Foreign:
                continue
            with pytest.raises(error, match=f"(?i)`({name})`.*({received})"):
                layer(*given)
    for kind in backend.layer_kinds[1:]:
        given = rf"`features` must be a {backend.family}.Tensor, got numpy.ndarray"
        with pytest.raises(TypeError, match=given):
            kind(*VALUES)(FEATURES, ROIS)
