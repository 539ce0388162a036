"""As much of CuPy as the adapter uses, on memory of the CPU: CuPy makes no array without a GPU."""

import sys
import types
from typing import ClassVar

import numpy as np
import torch

import roialign

STREAM = 0x1234560


class Device:
    """Of an array; entered, it is the current one."""

    def __init__(self, id, entered):
        self.id, self.entered = id, entered

    def __enter__(self):
        self.entered.append(self.id)

    def __exit__(self, *error):
        pass


class Array(np.lib.mixins.NDArrayOperatorsMixin):
    """cupy.ndarray."""

    entered: ClassVar = []

    def __init__(self, values):
        self.values = values

    dtype = property(lambda self: self.values.dtype)
    shape = property(lambda self: self.values.shape)
    strides = property(lambda self: self.values.strides)
    ndim = property(lambda self: self.values.ndim)
    device = property(lambda self: Device(0, self.entered))

    def __len__(self):
        return len(self.values)

    def astype(self, dtype, copy=True):
        with np.errstate(over="ignore"):
            return Array(self.values.astype(dtype, copy=copy))

    def __array_ufunc__(self, ufunc, method, *inputs):
        inputs = [each.values if isinstance(each, Array) else each for each in inputs]
        with np.errstate(all="ignore"):
            return Array(getattr(ufunc, method)(*inputs))

    def copy(self):
        return Array(self.values.copy())

    def reshape(self, shape):
        return Array(self.values.reshape(shape))

    def swapaxes(self, first, second):
        return Array(self.values.swapaxes(first, second))

    def __getitem__(self, key):
        return Array(self.values[key])

    def __setitem__(self, key, array):
        self.values[key] = array.values

    def __dlpack__(self, **options):
        return self.values.__dlpack__()

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


def install(monkeypatch):
    """The module `cupy`; its `streams` are those that torch was given."""
    module = types.ModuleType("cupy")
    module.ndarray = Array
    module.asarray = lambda array: Array(np.array(array))
    module.zeros = lambda shape, dtype: Array(np.zeros(shape, dtype))
    module.from_dlpack = lambda tensor: Array(np.from_dlpack(tensor))
    module.cuda = types.SimpleNamespace(
        get_current_stream=lambda: types.SimpleNamespace(ptr=STREAM)
    )
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.delitem(sys.modules, "roialign.cupy", raising=False)
    monkeypatch.delattr(roialign, "cupy", raising=False)
    module.streams = []
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, device: (pointer, device))
    real = torch.cuda.stream

    def stream(chosen):
        module.streams.append(chosen)
        return real(None)

    monkeypatch.setattr(torch.cuda, "stream", stream)
    return module
