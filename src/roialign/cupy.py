"""The CuPy adapter: arrays are PyTorch's tensors for the length of a call, on CuPy's stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import cupy
import numpy as np

from roialign import _checks
from roialign._rois import Rois

try:
    import torch

    from roialign import torch as _torch
except ImportError as error:
    raise ImportError(
        "roialign needs PyTorch for CuPy arrays: pip install 'roialign[torch,gpu]'"
    ) from error

__all__: list[str] = []

float32 = np.dtype(np.float32)
byte_types = frozenset(map(np.dtype, ("uint8", "bool")))
takes_any_form = takes_numpy = False


def kind(dtype: np.dtype) -> str:
    if dtype.name in ("float16", "bfloat16", "float32", "float64"):
        return "float"
    return "integer" if dtype.kind in "iu" else "other"


def check_array(name: str, value: object) -> None:
    if not isinstance(value, cupy.ndarray):
        _checks.refuse_array(name, "cupy.ndarray", value)


def check_out(name: str, out: object, dtype: np.dtype) -> None:
    check_array(name, out)
    _checks.out_dtype(name, out.dtype, dtype)
    if _is_reversed(out):
        raise ValueError(f"`{name}` must have no negative strides, got {out.strides}")


@contextlib.contextmanager
def _shared(array: cupy.ndarray) -> Iterator[None]:
    """PyTorch works where CuPy does: on this array's device, and on CuPy's current stream there."""
    with array.device:
        pointer = cupy.cuda.get_current_stream().ptr
    device = torch.device("cuda", array.device.id)
    with torch.cuda.stream(torch.cuda.ExternalStream(pointer, device)):
        yield


def _converted(given: Any, kind: type, convert: Callable) -> Any:
    """Arrays of a `kind`, one or in RoIs, a tuple or a list, converted; the rest as it is."""
    if isinstance(given, Rois):
        return Rois(*_converted(tuple(given), kind, convert))
    if isinstance(given, (tuple, list)):
        return type(given)([_converted(item, kind, convert) for item in given])
    return convert(given) if isinstance(given, kind) else given


def _is_reversed(array: cupy.ndarray) -> bool:
    return any(step < 0 for step in array.strides)


def _tensor(array: cupy.ndarray) -> torch.Tensor:
    """On the array's memory; a copy of one with negative strides, which tensors have not."""
    return torch.from_dlpack(array.copy() if _is_reversed(array) else array)


def _tensors(given: Any) -> Any:
    return _converted(given, cupy.ndarray, _tensor)


def _arrays(given: Any) -> Any:
    return _converted(given, torch.Tensor, cupy.from_dlpack)


def _first(given: Any) -> cupy.ndarray | None:
    if isinstance(given, (tuple, list)):
        found = [_first(item) for item in given]
        return next((array for array in found if array is not None), None)
    return given if isinstance(given, cupy.ndarray) else None


def _as_torch(name: str) -> Callable:
    """PyTorch's function of that name, on CuPy's arrays."""

    def run(*args: Any, out: Any = None, **options: Any) -> Any:
        if out is not None:
            options["out"] = out
        array = _first(args)
        with contextlib.nullcontext() if array is None else _shared(array):
            options = {key: _tensors(value) for key, value in options.items()}
            result = getattr(_torch, name)(*_tensors(args), **options)
            return _arrays(result) if out is None else out

    return run


columns = _as_torch("columns")
repeated = _as_torch("repeated")
numbered = _as_torch("numbered")
is_view = _as_torch("is_view")
split = _as_torch("split")
with_index_column = _as_torch("with_index_column")
check_out_values = _as_torch("check_out_values")
forward = _as_torch("forward")
adjoint = _as_torch("adjoint")
box_gradient = _as_torch("box_gradient")


def joined(boxes: list[cupy.ndarray]) -> cupy.ndarray:
    return _as_torch("joined")(boxes) if boxes else cupy.zeros((0, 4), np.float32)


def cast(array: cupy.ndarray, dtype: np.dtype) -> cupy.ndarray:
    return array.astype(dtype, copy=False)


def from_numpy(array: np.ndarray, like: cupy.ndarray) -> cupy.ndarray:
    return cupy.asarray(array)


def as_numpy(boxes: cupy.ndarray) -> None:
    return None


def is_compiling() -> bool:
    return False


def takes_rows(features: object, rois: object) -> bool:
    return False
