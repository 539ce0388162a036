"""CuPy arrays: PyTorch's tensors for the length of a call.

CuPy makes no array without a GPU, so a stand-in has its part here: the names that the adapter
uses, on memory of the CPU.
"""

import sys

import numpy as np
import pytest

import roialign

torch = pytest.importorskip("torch", reason="CuPy arrays become torch's tensors")

from cupy_stand_in import STREAM, Array, install  # noqa: E402
from isolation import python  # noqa: E402


@pytest.fixture
def cupy(monkeypatch):
    yield install(monkeypatch)
    sys.modules.pop("roialign.cupy", None)


def test_arrays_and_streams(cupy):
    features, rois = Array(np.ones((2, 3, 8, 9), np.float32)), Array(np.zeros((1, 5), np.float32))
    assert isinstance(roialign.roi_align(features, rois, 2), Array)
    assert set(cupy.streams) == {(STREAM, torch.device("cuda", 0))}


def test_no_copy(cupy):
    features = np.ones((2, 3, 8, 9), np.float32)
    import roialign.cupy as adapter

    tensor = adapter._tensors(Array(features))
    assert tensor.data_ptr() == features.ctypes.data
    assert adapter._arrays(tensor).values.ctypes.data == features.ctypes.data


def test_without_torch():
    code = (
        "import sys, types; sys.modules['torch'] = None; cupy = types.ModuleType('cupy');"
        "cupy.ndarray = type('ndarray', (), {}); sys.modules['cupy'] = cupy; import roialign;"
        "roialign.roi_align(cupy.ndarray(), None, 1)"
    )
    assert "roialign needs PyTorch for CuPy arrays: pip install" in python("-c", code).stderr


def test_negative_strides(cupy):
    """Features are copied; `out` is refused, because its memory would not be written."""
    features, rois = (
        np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4),
        np.array([[0, 1, 1, 3, 3]]),
    )
    backwards, rois = features[:, :, ::-1], rois.astype(np.float32)
    output = roialign.roi_align(Array(backwards), Array(rois), 2)
    np.testing.assert_array_equal(output.values, roialign.roi_align(backwards, rois, 2))
    out = Array(np.empty((1, 2, 2, 2), np.float32)[::-1])
    with pytest.raises(ValueError, match="`out` must have no negative strides"):
        roialign.roi_align(Array(features), Array(rois), 2, out=out)
