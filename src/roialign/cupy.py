"""The CuPy adapter: arrays are PyTorch's tensors for the length of a call, on CuPy's stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import cupy
import numpy as np

from roialign import _checks
from roialign._conventions import Rule

try:
    import torch

    from roialign import torch as _torch
except ImportError as error:
    raise ImportError(
        "roialign needs PyTorch for CuPy arrays: pip install 'roialign[torch,gpu]'"
    ) from error

__all__: list[str] = []

_FLOATS = ("float16", "bfloat16", "float32", "float64")


# Types


def are_ordinary(features: object, rois: object) -> bool:
    return False


def check_array(name: str, value: object) -> None:
    if not isinstance(value, cupy.ndarray):
        raise TypeError(f"`{name}` must be a cupy.ndarray, got {_checks.type_name(value)}")


def check_features(name: str, value: object) -> None:
    check_array(name, value)
    _checks.features_dtype(name, value.dtype, value.dtype.name in _FLOATS)


def _check_boxes(name: str, value: object, integers: bool) -> None:
    check_array(name, value)
    ok = value.dtype.name in _FLOATS or (integers and value.dtype.kind in "iu")
    _checks.boxes_dtype(name, value.dtype, ok, integers)


def _check_index(name: str, value: cupy.ndarray) -> None:
    _checks.index_dtype(name, value.dtype, value.dtype.kind in "iu")


def check_rois(rois: object, integers: bool = True) -> None:
    _checks.rois(
        rois, check_array, lambda name, value: _check_boxes(name, value, integers), _check_index
    )


def check_out(name: str, out: object, dtype: np.dtype) -> None:
    check_array(name, out)
    if out.dtype != dtype:
        raise TypeError(f"`{name}` must have dtype {dtype}, got {out.dtype}")


# Values


@contextlib.contextmanager
def _shared(array: cupy.ndarray) -> Iterator[None]:
    """PyTorch works where CuPy does: on this array's device, and on CuPy's current stream there."""
    with array.device:
        pointer = cupy.cuda.get_current_stream().ptr
    device = torch.device("cuda", array.device.id)
    with torch.cuda.stream(torch.cuda.ExternalStream(pointer, device)):
        yield


def _converted(given: Any, kind: type, convert: Any) -> Any:
    """Arrays of a `kind`, one or in a tuple or list, converted; the rest as it is."""
    if isinstance(given, (tuple, list)):
        return type(given)(_converted(item, kind, convert) for item in given)
    return convert(given) if isinstance(given, kind) else given


def _tensors(given: Any) -> Any:
    return _converted(given, cupy.ndarray, torch.from_dlpack)


def _arrays(given: Any) -> Any:
    return _converted(given, torch.Tensor, cupy.from_dlpack)


class Rois(NamedTuple):
    """The three forms as tensors: boxes (K, 4) and an image index (K,)."""

    boxes: torch.Tensor
    image_index: torch.Tensor
    given: object
    tensors: _torch.Rois

    def arrays(self) -> list[cupy.ndarray]:
        return list(self.given) if isinstance(self.given, (tuple, list)) else [self.given]

    def like_given(self, d_boxes: cupy.ndarray) -> Any:
        """A gradient (K, 4) in the form and dtype in which the rois came."""
        with _shared(d_boxes):
            return _arrays(self.tensors.like_given(_tensors(d_boxes)))


def gradient_dtype(dtype: np.dtype) -> np.dtype:
    """Of a gradient in boxes of ``dtype``: float32 for integers."""
    return np.dtype(np.float32) if dtype.kind in "iu" else dtype


def parse_rois(rois: Any, images: int) -> Rois:
    _checks.roi_shapes(rois, images)
    arrays = rois if isinstance(rois, (tuple, list)) else [rois]
    with _shared(arrays[0]) if arrays else contextlib.nullcontext():
        parsed = _torch.parse_rois(_tensors(rois), images)
    return Rois(parsed.boxes, parsed.image_index, rois, parsed)


def check_out_values(
    name: str, out: cupy.ndarray, shape: tuple[int, ...], inputs: list[cupy.ndarray]
) -> None:
    with _shared(out):
        _torch.check_out_values(name, _tensors(out), shape, _tensors(inputs))


# Operations. Their arguments have been checked, but for devices.


def forward(
    features: cupy.ndarray,
    boxes: torch.Tensor,
    image_index: torch.Tensor,
    output_size: tuple[int, int],
    rule: Rule,
    *,
    out: cupy.ndarray | None = None,
) -> cupy.ndarray:
    """Pooled features (K, C, P, Q)."""
    with _shared(features):
        given = _tensors(features), boxes, image_index, output_size, rule
        output = _torch.forward(*given, out=_tensors(out))
        return _arrays(output) if out is None else out


def adjoint(
    d_output: cupy.ndarray,
    boxes: torch.Tensor,
    image_index: torch.Tensor,
    feature_shape: tuple[int, ...],
    rule: Rule,
    *,
    out: cupy.ndarray | None = None,
) -> cupy.ndarray:
    """The gradient in the features (N, C, H, W)."""
    with _shared(d_output):
        given = _tensors(d_output), boxes, image_index, feature_shape, rule
        d_features = _torch.adjoint(*given, out=_tensors(out))
        return _arrays(d_features) if out is None else out


def box_gradient(
    d_output: cupy.ndarray,
    features: cupy.ndarray,
    boxes: torch.Tensor,
    image_index: torch.Tensor,
    rule: Rule,
) -> cupy.ndarray:
    """The gradient in the boxes (K, 4), x1 y1 x2 y2, in their dtype."""
    with _shared(d_output):
        given = *_tensors((d_output, features)), boxes, image_index, rule
        return _arrays(_torch.box_gradient(*given))
