"""CuPy arrays: PyTorch's tensors for the length of a call.

CuPy makes no array without a GPU, so a stand-in has its part here: the names that the adapter
uses, on memory of the CPU.
"""

import subprocess
import sys

import numpy as np
import pytest

import roialign

torch = pytest.importorskip("torch", reason="CuPy arrays become torch's tensors")

from cupy_stand_in import STREAM, Array, install  # noqa: E402

RULE = {"spatial_scale": 0.5, "sampling_ratio": 2}


@pytest.fixture
def cupy(monkeypatch):
    yield install(monkeypatch)
    sys.modules.pop("roialign.cupy", None)


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    features = random.standard_normal((2, 3, 8, 9)).astype(np.float32)
    rois = np.array([[0, 1, 2, 9, 8], [1, 3, 1, 12, 15], [0, 0, 0, 16, 14]], np.float32)
    return features, rois


def test_arrays_and_streams(cupy, arrays):
    features, rois = map(Array, arrays)
    assert isinstance(roialign.roi_align(features, rois, 2), Array)
    assert set(cupy.streams) == {(STREAM, torch.device("cuda", 0))}


def test_no_copy(cupy, arrays):
    features, _ = arrays
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
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: roialign needs PyTorch for CuPy arrays: pip install" in output.stderr
