"""The NumPy adapter: which arrays are accepted, what results look like, and the three operations."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from roialign import _checks, _core, _threads
from roialign._conventions import Rule

_FLOATS = frozenset(map(np.dtype, ("float16", "float32", "float64")))
_LARGE = 4 << 20  # bytes: from here on results live on huge pages


def is_array(value: object) -> bool:
    """An ndarray, or a memmap; subclasses that mean something else are refused."""
    return type(value) is np.ndarray or type(value) is np.memmap


# Types


def are_ordinary(features: object, rois: object) -> bool:
    """Whether no check of the types and shapes of these can fail, and the core reads them as they are."""
    return (
        type(features) is np.ndarray
        and type(rois) is np.ndarray
        and _core.are_ordinary(features, rois)
    )


def _is_bfloat16(dtype: np.dtype) -> bool:
    return dtype.kind == "V" and dtype.itemsize == 2 and dtype.name == "bfloat16"


def _shown(dtype: np.dtype) -> object:
    return dtype if dtype.isnative else f"{dtype}, which is not in native byte order"


def check_array(name: str, value: object) -> None:
    if not is_array(value):
        raise TypeError(f"`{name}` must be a numpy.ndarray, got {_checks.type_name(value)}")


def check_features(name: str, value: object) -> None:
    check_array(name, value)
    ok = value.dtype in _FLOATS or _is_bfloat16(value.dtype)
    _checks.features_dtype(name, _shown(value.dtype), ok)


def _check_boxes(name: str, value: object, integers: bool) -> None:
    check_array(name, value)
    dtype = value.dtype
    ok = dtype.kind in ("fiu" if integers else "f") and dtype.isnative or _is_bfloat16(dtype)
    _checks.boxes_dtype(name, _shown(dtype), ok, integers)


def _check_index(name: str, value: np.ndarray) -> None:
    dtype = value.dtype
    _checks.index_dtype(name, _shown(dtype), dtype.kind in "iu" and dtype.isnative)


def check_rois(rois: object, integers: bool = True) -> None:
    _checks.rois(
        rois, check_array, lambda name, value: _check_boxes(name, value, integers), _check_index
    )


def check_out(name: str, out: object, dtype: np.dtype) -> None:
    check_array(name, out)
    if out.dtype != dtype:
        raise TypeError(f"`{name}` must have dtype {dtype}, got {out.dtype}")


# Values


class Rois(NamedTuple):
    """The three forms as one: boxes (K, 4) and an image index (K,), or ordinary rows (K, 5) and None."""

    boxes: np.ndarray
    image_index: np.ndarray | None
    given: object

    def arrays(self) -> list[np.ndarray]:
        return list(self.given) if isinstance(self.given, (tuple, list)) else [self.given]

    def like_given(self, d_boxes: np.ndarray) -> Any:
        """A gradient (K, 4) in the form and dtype in which the rois came."""
        with np.errstate(over="ignore"):  # too large for the boxes' dtype: infinite
            return self._like_given(d_boxes)

    def _like_given(self, d_boxes: np.ndarray) -> Any:
        if isinstance(self.given, list):
            ends = np.cumsum([len(boxes) for boxes in self.given])[:-1]
            pieces = np.split(d_boxes, ends) if self.given else []
            return [p.astype(gradient_dtype(b.dtype)) for p, b in zip(pieces, self.given)]
        if isinstance(self.given, tuple):
            return d_boxes.astype(gradient_dtype(self.boxes.dtype), copy=False)
        result = np.zeros((len(d_boxes), 5), gradient_dtype(self.given.dtype))
        result[:, 1:] = d_boxes
        return result


def gradient_dtype(dtype: np.dtype) -> np.dtype:
    """Of a gradient in boxes of ``dtype``: float32 for integers."""
    return np.dtype(np.float32) if dtype.kind in "iu" else dtype


def parse_rois(rois: Any, images: int) -> Rois:
    _checks.roi_shapes(rois, images)
    if isinstance(rois, tuple):
        return Rois(*rois, rois)
    if isinstance(rois, list):
        index = np.repeat(np.arange(images), [len(boxes) for boxes in rois])
        # Boxes of different dtypes meet in float64, which holds all of them.
        dtypes = {boxes.dtype for boxes in rois}
        pieces = rois if len(dtypes) == 1 else [boxes.astype(np.float64) for boxes in rois]
        return Rois(np.concatenate(pieces) if pieces else np.zeros((0, 4), np.float32), index, rois)
    return Rois(rois[:, 1:], rois[:, 0], rois)


def check_out_values(name: str, out: np.ndarray, shape: tuple[int, ...], inputs: list) -> None:
    if out.shape != shape:
        raise ValueError(f"`{name}` must have shape {shape}, got {out.shape}")
    if not out.flags.writeable:
        raise ValueError(f"`{name}` must be writeable, got a read-only array")
    if _overlaps_itself(out):
        raise ValueError(f"`{name}` must not overlap itself, got strides {out.strides}")
    for array in inputs:
        if np.may_share_memory(out, array) and _shares_memory(out, array):
            raise ValueError(f"`{name}` must not overlap an input, got overlapping memory")


def _overlaps_itself(array: np.ndarray) -> bool:
    """Whether two elements share memory: along some axis, the first slice with a later one."""
    if array.flags.c_contiguous or array.size == 0:
        return False
    while array.ndim:
        if _shares_memory(array[:1], array[1:]):
            return True
        array = array[0]
    return False


def _shares_memory(a: np.ndarray, b: np.ndarray) -> bool:
    try:
        return np.shares_memory(a, b, max_work=10**6)
    except RuntimeError:  # numpy.exceptions.TooHardError: not proven to be disjoint
        return True


def is_channels_last(array: np.ndarray) -> bool:
    """Channels next to each other in memory, in an array where that means something."""
    _, channels, height, width = array.shape
    return (
        array.strides[1] == array.itemsize
        and channels > 1
        and height * width > 1
        and not array.flags.c_contiguous
    )


def empty(shape: tuple[int, ...], dtype: np.dtype, channels_last: bool) -> np.ndarray:
    """An uninitialised result (N, C, H, W): C-contiguous, or with channels innermost."""
    n, c, h, w = shape
    stored = (n, h, w, c) if channels_last else shape
    size = math.prod(stored) * dtype.itemsize
    if size >= _LARGE:
        _checks.size("output", shape)
        array = np.ndarray(stored, dtype, buffer=_core.allocate(size))
    else:
        array = np.empty(stored, dtype)
    return array.transpose(0, 3, 1, 2) if channels_last else array


# Operations. Their arguments have been checked, but for the image index.


def _addressable(array: np.ndarray) -> bool:
    """Whether every element is aligned: the core counts strides in elements."""
    flags = array.flags
    if flags.c_contiguous:
        return flags.aligned
    itemsize = array.itemsize
    return flags.aligned and all([stride % itemsize == 0 for stride in array.strides])


def _bits(array: np.ndarray) -> np.ndarray:
    """The array as the core takes it: bfloat16 as 16-bit integers."""
    return array.view(np.uint16) if array.dtype.kind == "V" else array


def _native(array: np.ndarray) -> np.ndarray:
    return _bits(array if _addressable(array) else array.copy())


def _native_boxes(boxes: np.ndarray, coordinate: np.dtype) -> np.ndarray:
    if boxes.dtype in _FLOATS or boxes.dtype.kind == "V":
        return _native(boxes)
    with np.errstate(over="ignore"):  # a box that is too large for the coordinate type is infinite
        return boxes.astype(coordinate)


def _native_tangent(tangent: np.ndarray, coordinate: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # as of boxes
        return np.require(tangent, coordinate, ["C", "ALIGNED"])


def _native_index(index: np.ndarray) -> np.ndarray:
    if index.dtype.kind in "iu":  # beyond int64: negative, and so refused
        return _native(index.astype(np.int64, copy=False))
    if index.dtype in _FLOATS or index.dtype.kind == "V":
        return _native(index)
    return index.astype(np.float64)


def _coordinate(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _run(operation, arrays, boxes, index, tangent, rule, result) -> Any:
    """Calls the core, which writes ``result``; raises where it refuses an image index."""
    if index is None:
        inputs = [*arrays, boxes]
    else:
        coordinate = _coordinate(arrays[0].dtype)
        inputs = [*map(_native, arrays), (_native_boxes(boxes, coordinate), _native_index(index))]
    if operation is not _core.box_gradient:
        inputs.append(None if tangent is None else _native_tangent(tangent, coordinate))
    target = result if _addressable(result) else np.empty(result.shape, result.dtype)
    bad = operation(*inputs, rule.numbers, _bits(target), _threads.get_num_threads())
    if bad >= 0:
        images = (result if operation is _core.adjoint else arrays[-1]).shape[0]
        got = boxes[bad, 0] if index is None else index[bad]
        raise IndexError(
            f"`image_index` of RoI {bad} must be an integer in [0, {images}), got {got}"
        )
    if target is not result:
        result[...] = target
    return result


def forward(
    features: np.ndarray,
    boxes: np.ndarray,
    image_index: np.ndarray | None,
    output_size: tuple[int, int],
    rule: Rule,
    *,
    tangent: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Pooled features (K, C, P, Q). With a ``tangent`` (K, 4): their derivative along it."""
    if out is None:
        shape = (len(boxes), features.shape[1], *output_size)
        out = empty(shape, features.dtype, is_channels_last(features))
    return _run(_core.forward, (features,), boxes, image_index, tangent, rule, out)


def adjoint(
    d_output: np.ndarray,
    boxes: np.ndarray,
    image_index: np.ndarray,
    feature_shape: tuple[int, ...],
    rule: Rule,
    *,
    tangent: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The gradient in the features (N, C, H, W). With a ``tangent``: its derivative along it."""
    if out is None:
        out = empty(feature_shape, d_output.dtype, is_channels_last(d_output))
    return _run(_core.adjoint, (d_output,), boxes, image_index, tangent, rule, out)


def box_gradient(
    d_output: np.ndarray,
    features: np.ndarray,
    boxes: np.ndarray,
    image_index: np.ndarray,
    rule: Rule,
) -> np.ndarray:
    """The gradient in the boxes (K, 4), x1 y1 x2 y2, of the coordinate type."""
    result = np.empty((len(boxes), 4), _coordinate(features.dtype))
    arrays = (d_output, features)
    return _run(_core.box_gradient, arrays, boxes, image_index, None, rule, result)
