"""The NumPy adapter: which arrays are accepted, what results look like, the operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from roialign import _checks, _core, _threads
from roialign._rois import Rois

_FLOATS = frozenset(map(np.dtype, ("float16", "float32", "float64")))
_KINDS = {"f": "wide float", "i": "integer", "u": "integer"}
_FLOAT64, _UINT16 = np.dtype(np.float64), np.dtype(np.uint16)  # compared with faster than the types
_LARGE = 4 << 20  # bytes: from here on results live on huge pages


def is_array(value: object) -> bool:
    """An ndarray, or a memmap; subclasses that mean something else are refused."""
    return type(value) is np.ndarray or type(value) is np.memmap


# Types

float32 = np.dtype(np.float32)
byte_types = frozenset(map(np.dtype, ("uint8", "bool")))
takes_any_form = takes_numpy = False


def _is_bfloat16(dtype: np.dtype) -> bool:
    return dtype.kind == "V" and dtype.itemsize == 2 and dtype.name == "bfloat16"


def kind(dtype: np.dtype) -> str:
    if dtype in _FLOATS or _is_bfloat16(dtype):
        return "float"
    return _KINDS.get(dtype.kind, "other")


def check_array(name: str, value: Any) -> None:
    if not is_array(value):
        _checks.refuse_array(name, "numpy.ndarray", value)
    if not value.dtype.isnative:
        hint = _checks.cast(name, value, value.dtype.name)
        raise TypeError(f"`{name}` must be in native byte order, got {value.dtype}{hint}")


def check_out(name: str, out: Any, dtype: np.dtype) -> None:
    if type(out) is np.ndarray and out.dtype == dtype:
        return
    check_array(name, out)
    _checks.out_dtype(name, out.dtype, dtype)


# RoIs


def columns(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows[:, 1:], rows[:, 0]


def joined(boxes: list[np.ndarray]) -> np.ndarray:
    if not boxes:
        return np.zeros((0, 4), np.float32)
    if len({array.dtype for array in boxes}) > 1:  # float64 holds all of them
        boxes = [array.astype(np.float64) for array in boxes]
    return np.concatenate(boxes)


def repeated(counts: list[int], like: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


def numbered(images: int, each: int, like: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(images), each)


def from_numpy(array: np.ndarray, like: object) -> np.ndarray:
    return array


def as_numpy(boxes: np.ndarray) -> np.ndarray:
    return boxes


def split(array: np.ndarray, counts: list[int]) -> list[np.ndarray]:
    return np.split(array, np.cumsum(counts)[:-1]) if counts else []


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # too large for the dtype: infinite
        return array.astype(dtype, copy=False)


def with_index_column(d_boxes: np.ndarray) -> np.ndarray:
    rows, numbers = d_boxes.shape
    result = np.zeros((rows, 1 + numbers), d_boxes.dtype)  # np.pad takes 10 us
    result[:, 1:] = d_boxes
    return result


# Results


def check_out_values(name: str, out: np.ndarray, shape: tuple[int, ...], inputs: list[Any]) -> None:
    if out.shape != shape:
        _checks.refuse_shape(name, str(shape), out.shape)
    if not out.flags.writeable:
        raise ValueError(f"`{name}` must be writeable, got a read-only array")
    check_overlaps(name, out, inputs)


def check_overlaps(name: str, out: np.ndarray, inputs: list[Any]) -> None:
    if overlaps_itself(out):
        raise ValueError(f"`{name}` must not overlap itself, got strides {out.strides}")
    for array in inputs:
        if np.may_share_memory(out, array) and share_memory(out, array):
            raise ValueError(f"`{name}` must not overlap an input, got overlapping memory")


def is_view(reshaped: np.ndarray, array: np.ndarray) -> bool:
    return np.may_share_memory(reshaped, array)


def overlaps_itself(array: np.ndarray) -> bool:
    """Whether two elements share memory: along some axis, the first slice with a later one.

    It reads none of them.
    """
    if array.flags.c_contiguous or array.size == 0:
        return False
    extent = array.itemsize
    for stride, count in sorted(zip(array.strides, array.shape)):
        if count > 1 and stride < extent:
            break
        extent += (count - 1) * stride
    else:
        return False  # each stride is beyond what the smaller ones span
    while array.ndim:
        if share_memory(array[:1], array[1:]):
            return True
        array = array[0, ...]
    return False


def share_memory(a: np.ndarray, b: np.ndarray) -> bool:
    try:
        return np.shares_memory(a, b, max_work=10**6)  # type: ignore[arg-type]
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


# Operations


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


def _native(name: str, array: np.ndarray) -> np.ndarray:
    if not _addressable(array):
        _core.log(f"`{name}` is copied: its elements are not aligned")
        array = array.copy()
    return _bits(array)


def _converted(name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    _core.log(f"`{name}` is converted from {array.dtype} to {np.dtype(dtype)}")
    return cast(array, dtype)


def _native_index(name: str, index: np.ndarray) -> np.ndarray:
    if index.dtype == _UINT16:  # which stands for bfloat16
        return _converted(name, index, np.int32)
    if index.dtype in _FLOATS or index.dtype.kind in "iu":
        return _native(name, index)
    return _converted(name, index, _FLOAT64)


def _run(
    operation: Callable[..., None],
    arrays: tuple[Any, ...],
    scales: tuple[float, ...],
    rois: Rois,
    tangents: tuple[np.ndarray | None, ...],
    rule: tuple[float, ...],
    out: np.ndarray | tuple[np.ndarray, ...],
    selectors: Any = None,
) -> None:
    """Has the core write `out`. Where it refuses an array, another takes its place."""
    (boxes, index, levels), threads = rois, _threads.get_num_threads()
    given, rest = (scales, (boxes, index), levels, *tangents, rule), (threads, selectors)
    try:
        return operation(*arrays, *given, out, *rest)
    except (TypeError, ValueError):
        pass
    results = out if isinstance(out, tuple) else (out,)
    coordinate = _FLOAT64 if results[0].dtype == _FLOAT64 else float32
    arrays = tuple([_native_maps(array) for array in arrays])
    selectors = None if selectors is None else _native_maps(selectors)
    if boxes.dtype not in _FLOATS:  # one that is too large for the coordinate type is infinite
        boxes = _converted("boxes", boxes, coordinate)
    pair = _native("boxes", boxes), _native_index("image_index", index)
    levels = None if levels is None else _native_index("levels", levels)
    tangents = tuple([_tangent(tangent, coordinate) for tangent in tangents])
    targets = [r if _addressable(r) else np.empty(r.shape, r.dtype) for r in results]
    native = [_bits(target) for target in targets]
    into = native if isinstance(out, tuple) else native[0]
    operation(*arrays, scales, pair, levels, *tangents, rule, into, threads, selectors)
    for result, target in zip(results, targets):
        if target is not result:
            _core.log("`out` is copied from another array: it is not aligned")
            result[...] = target


def _native_maps(given: Any) -> Any:
    if isinstance(given, np.ndarray):
        return _native("d_output", given)
    return [_native("features", array) for array in given]


def _tangent(tangent: np.ndarray | None, coordinate: np.dtype) -> np.ndarray | None:
    if tangent is None:
        return None
    return np.require(cast(tangent, coordinate), requirements=["C", "A"])


def is_compiling() -> bool:
    return False


def takes_rows(features: object, rois: object) -> bool:
    return (
        type(features) is np.ndarray
        and type(rois) is np.ndarray
        and _core.takes_rows(features, rois)
    )


def forward_rows(features, rows, output_size, scales, rule, out) -> np.ndarray | None:
    if out is None:
        out = _empty_output(features, rows, output_size)
        _core.forward(features, scales, rows, None, None, rule, out, _threads.get_num_threads())
    elif not _core.forward_rows(
        features, rows, out, *output_size, scales, rule, _threads.get_num_threads()
    ):
        return None
    return out


def forward(
    maps, rois, output_size, scales, rule, *, layout="NCHW", tangent=None, out=None
) -> np.ndarray:
    """With a ``tangent`` (K, 4): the derivative along it."""
    if out is None:
        out = _empty_output(maps[0], rois.boxes, output_size, layout)
    _run(_core.forward, (maps,), scales, rois, (tangent,), rule, out)
    return out


def _empty_output(features, boxes, output_size, layout="NCHW") -> np.ndarray:
    shape = (boxes.shape[0], features.shape[1], *output_size)
    dtype = float32 if features.itemsize == 1 else features.dtype
    return empty(shape, dtype, layout == "NHWC" or is_channels_last(features))


def adjoint(
    d_output,
    rois,
    feature_shapes,
    scales,
    rule,
    *,
    layout="NCHW",
    selectors=None,
    tangent=None,
    out=None,
) -> tuple[np.ndarray, ...]:
    """With a ``tangent`` (K, 4): the derivative along it."""
    if out is None:
        last = layout == "NHWC" or is_channels_last(d_output)
        out = tuple([empty(shape, d_output.dtype, last) for shape in feature_shapes])
    _run(_core.adjoint, (d_output,), scales, rois, (tangent,), rule, out, selectors)
    return out


def box_gradient(d_output, maps, rois, scales, rule, *, layout="NCHW") -> np.ndarray:
    real = _FLOAT64 if d_output.dtype == _FLOAT64 else float32
    result = np.empty(rois.boxes.shape, real)
    _run(_core.box_gradient, (d_output, maps), scales, rois, (), rule, result)
    return result
