"""As much of jax-triton as the adapter uses: its call is a callback to Triton's interpreter."""

import sys
import threading
import types

import jax
import numpy as np

import roialign.jax
import triton_interpreter

_turn = threading.Lock()  # devices are threads


class Buffer:
    """What the interpreter asks of a tensor, on a NumPy array."""

    def __init__(self, array):
        self.array, self.dtype = array, array.dtype

    def data_ptr(self):
        return self.array.ctypes.data

    def itself(self, *_, **__):
        return self

    untyped_storage = cpu = new_empty = set_ = copy_ = itself
    storage_offset = size = stride = itself


def triton_call(
    *inputs, kernel, grid, out_shape, enable_fp_fusion, compute_capability,
    input_output_aliases=None, **constants,
):  # fmt: skip
    assert not enable_fp_fusion and compute_capability == 90

    def run(*values):
        values = [np.asarray(value) for value in values]
        poison = {"i": 2**30}  # of floats NaN
        outputs = [np.full(o.shape, poison.get(o.dtype.kind, np.nan), o.dtype) for o in out_shape]
        for source, target in (input_output_aliases or {}).items():
            outputs[target][...] = values[source]
        values = map(Buffer, values)
        inputs_ = [next(values) if isinstance(x, jax.Array) else x for x in inputs]
        with _turn, np.errstate(all="ignore"):  # NaN and overflow are silent on a GPU
            kernel[grid](*inputs_, *map(Buffer, outputs), **constants)
        return outputs

    return jax.pure_callback(run, out_shape, *(x for x in inputs if isinstance(x, jax.Array)))


def module(version=(0, 3, 1)):
    module = types.ModuleType("jax_triton")
    module.__version_info__, module.get_compute_capability = version, lambda device: 90
    module.triton_call = triton_call
    return module


def install(monkeypatch):
    """The CPU takes the way of GPUs."""
    triton_interpreter.hasten()
    plain = roialign.jax._plain

    def on_gpu(call, *operands):
        with monkeypatch.context() as patch:
            patch.setattr(roialign.jax, "_plain", plain)
            return roialign.jax._on_gpu(*operands, call=call)

    monkeypatch.setitem(sys.modules, "jax_triton", module())
    monkeypatch.setattr(roialign.jax, "_plain", on_gpu)
    monkeypatch.setattr(roialign.jax, "_dense_everywhere", "as on a GPU")  # what is cached differs
