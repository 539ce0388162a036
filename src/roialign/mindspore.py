"""The MindSpore adapter: which tensors are accepted, the operators, their derivatives, the layer.

In reading order: checks; the rules of differentiation; the primitives, which are entries of the
core; the operations; the layer. MindSpore's compiler reads the source of all that runs in a graph,
the public functions too, and knows a part of Python only.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Callable
from typing import Any

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common import _Function

import roialign
from roialign import _checks, _core, _layout, _levels, _operations, _rule, _threads

__all__ = ["ROIAlign"]

_SELF = sys.modules[__name__]  # the adapter that the shared checks ask

_FLOATS = (mindspore.float16, mindspore.bfloat16, mindspore.float32, mindspore.float64)
_INTEGERS = (
    mindspore.uint8, mindspore.uint16, mindspore.uint32, mindspore.uint64,
    mindspore.int8, mindspore.int16, mindspore.int32, mindspore.int64,
)  # fmt: skip


def _is_traced() -> bool:
    """Whether the compiler reads the Python code: for it the comment is the condition."""
    if False:  # @jit.cond: True
        return True
    return False


# Types

float32 = mindspore.float32
byte_types = (mindspore.uint8, mindspore.bool_)
takes_any_form, takes_numpy = True, False


def kind(dtype: Any) -> str:
    if dtype in _FLOATS:
        return "float"
    return "integer" if dtype in _INTEGERS else "other"


@ops.constexpr
def _target() -> str:
    return mindspore.get_context("device_target")


def _check_target() -> None:
    target = _target()
    if target != "CPU":
        raise NotImplementedError(
            f"roialign runs on MindSpore's CPU target, got {target}: "
            "use mindspore.ops.ROIAlign there, "
            "which is the convention 'mindspore' (roi_end_mode=1) or 'mindspore_legacy' (0)"
        )


def check_array(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        _checks.refuse_array(name, "mindspore.Tensor", value)
    _check_target()


def check_out(name: str, out: object, dtype: Any) -> None:
    raise TypeError(f"`{name}` must be None with MindSpore, got {_checks.type_name(out)}")


def check_out_values(name: str, out: object, shape: tuple[int, ...], inputs: list) -> None:
    """There is none: `check_out` refuses all."""


# RoIs


def columns(rows: Tensor) -> tuple[Tensor, Tensor]:
    if rows.shape[0] == 0:  # the compiler slices nothing of no rows
        return ops.zeros((0, rows.shape[1] - 1), rows.dtype), ops.zeros((0,), rows.dtype)
    return rows[:, 1:], rows[:, 0]


def joined(boxes: list[Tensor]) -> Tensor:
    dtype, pieces = boxes[0].dtype if boxes else mindspore.float32, []
    for piece in boxes:
        if piece.dtype != dtype:
            dtype = mindspore.float64  # holds all of them
    for piece in boxes:
        pieces.append(piece.astype(dtype))
    return ops.cat(pieces) if pieces else ops.zeros((0, 4), dtype)


@ops.constexpr
def _repeated(counts: tuple[int, ...]) -> Tensor:
    return Tensor(np.repeat(np.arange(len(counts)), np.array(counts, np.int64)))


def numbered(images: int, each: int, like: Tensor) -> Tensor:
    return _repeated((each,) * images)


def from_numpy(array: np.ndarray, like: Tensor) -> Tensor:
    return Tensor(array)


def as_numpy(boxes: Tensor) -> np.ndarray:
    return boxes.asnumpy()


def repeated(counts: list[int], like: Tensor) -> Tensor:
    return _repeated(tuple(counts))


def split(array: Tensor, counts: list[int]) -> list[Tensor]:
    pieces, start = [], 0
    for count in counts:
        none = ops.zeros((0, array.shape[1]), array.dtype)
        piece = array[start : start + count] if count else none
        pieces.append(piece)
        start += count
    return pieces


def cast(array: Tensor, dtype: Any) -> Tensor:
    return array.astype(dtype)


def with_index_column(d_boxes: Tensor) -> Tensor:
    return ops.cat([ops.zeros((d_boxes.shape[0], 1), d_boxes.dtype), d_boxes], 1)


# Derivatives. `names` says which the arrays of a call are; several maps are one of them, a tuple,
# because MindSpore differentiates no operator of any number of arrays.

_GIVES = _operations.GIVES
_SIBLINGS = {array: _operations.giving(array) for array in _GIVES.values()}
_BESIDE = "numbers", *_operations.BESIDE, "corners"  # these are selectors of "max_corner"
_ORDER = {name: (*_BESIDE, *takes) for name, takes in _operations.TAKES.items()}


def _named(name: str, names: tuple[str, ...], arrays: tuple) -> Any:
    for i in range(len(names)):  # the compiler unrolls it; a dict would stay in the graph
        if names[i] == name:
            return arrays[i]
    return None


def _first(array: Any) -> Any:
    return array[0] if isinstance(array, tuple) else array


def _apply(operation: str, names: tuple[str, ...], arrays: tuple) -> Any:
    """On those of the arrays that the operation takes, to a result of the shape that is there."""
    size, found, taken = (), (), ()
    if operation == "forward":
        size = _named("d_output", names, arrays).shape[1:]
    if operation == "adjoint":
        size = _shapes(_named("features", names, arrays))
    for name in _ORDER[operation]:
        if name in names:
            found, taken = (*found, name), (*taken, _named(name, names, arrays))
    return _call(operation, found, size, taken)


def _shapes(maps: Any) -> tuple:
    return tuple([m.shape for m in maps]) if isinstance(maps, tuple) else maps.shape


def _refused(operation: str, names: tuple[str, ...], boxes: Tensor) -> Tensor:
    """The derivatives in the boxes that are not there."""
    if _is_traced():  # runs only if its result is used; MindSpore's error then has its name
        reason = "has_no_second_derivative_in_the_boxes"
        if "corners" in names:
            reason = "max_corner_has_no_gradient_in_the_boxes"
        return _primitive(reason, ("boxes",), ())(boxes)
    if "corners" in names:
        _checks.has_box_gradient("max_corner")
    return _operations.require_first_order(operation, ("tangent",))


def _gradients(operation, names, wanted, arrays, d_result) -> tuple:
    """In each of the arrays of an operation, None where that is not wanted or has none."""
    given = (_GIVES[operation], *names), (d_result, *arrays)
    gradients = ()
    for i in range(len(names)):
        name, is_wanted, array = names[i], wanted[i], arrays[i]
        gradient = None
        refused = "tangent" in names or "corners" in names or operation == "box_gradient"
        if is_wanted and name == "boxes" and refused:
            gradient = _refused(operation, names, array)
        elif is_wanted and name == "boxes":
            gradient = _apply("box_gradient", *given).astype(array.dtype)
        elif is_wanted and name in _SIBLINGS and _first(array).dtype in _FLOATS:
            gradient = _apply(_SIBLINGS[name], *given)
        gradients += (gradient,)
    return gradients


def _bprop(operation: str, names: tuple[str, ...]) -> Callable:
    """In a graph: all gradients are wanted, what nothing uses is dropped, and zeros are None."""

    def gradients(arrays, d_result):
        filled = ()
        found = _gradients(operation, names, (True,) * len(names), arrays, d_result)
        for i in range(len(names)):
            filled += (_zeros_like(arrays[i]) if found[i] is None else found[i],)
        return filled

    def of_four(a, b, c, d, result, d_result):
        return gradients((a, b, c, d), d_result)

    def of_five(a, b, c, d, e, result, d_result):
        return gradients((a, b, c, d, e), d_result)

    def of_six(a, b, c, d, e, f, result, d_result):
        return gradients((a, b, c, d, e, f), d_result)

    def of_seven(a, b, c, d, e, f, g, result, d_result):
        return gradients((a, b, c, d, e, f, g), d_result)

    return {4: of_four, 5: of_five, 6: of_six, 7: of_seven}[len(names)]


def _zeros_like(array: Any) -> Any:
    if isinstance(array, tuple):
        return tuple([ops.zeros_like(each) for each in array])
    return ops.zeros_like(array)


class _Recorded(_Function):
    """In PyNative mode, which knows what is wanted. It takes no tuples."""

    @staticmethod
    def forward(ctx, call, *flat):
        ctx.call = call
        ctx.save_for_backward(*flat)
        primitive = _primitive(*call, threading.get_ident())
        return primitive(*_grouped(call[1], flat))

    @staticmethod
    def backward(ctx, *d_results):
        operation, names, _ = ctx.call
        arrays = _grouped(names, ctx.saved_tensors)
        wanted = [np.any(each) for each in _grouped(names, ctx.needs_input_grad[1:])]
        d_result = d_results if len(d_results) > 1 else d_results[0]
        found = _gradients(operation, names, wanted, arrays, d_result)
        gradients = ()
        for array, gradient in zip(arrays, found):
            if isinstance(array, tuple):
                gradients += gradient or (None,) * len(array)
            else:
                gradients += (gradient,)
        return None, *gradients


def _flat(arrays: tuple) -> tuple[Tensor, ...]:
    flat: tuple = ()
    for array in arrays:
        flat += array if isinstance(array, tuple) else (array,)
    return flat


def _grouped(names: tuple[str, ...], flat: tuple) -> tuple:
    """`_flat` backwards."""
    several = {"features", "selectors", "corners"}.intersection(names)
    maps = 1 + (len(flat) - len(names)) // max(1, len(several))
    grouped, left = (), flat
    for name in names if maps > 1 else ():
        taken = maps if name in several else 1
        grouped += (left[:taken] if name in several else left[0],)
        left = left[taken:]
    return grouped or flat


# The core's operations as primitives, made at their first call: Ascend's want more to be made.


def _call(operation: str, names: tuple[str, ...], size: tuple, arrays: tuple) -> Any:
    if _is_traced():
        return _primitive(operation, names, size)(*arrays)
    return _Recorded.apply((operation, names, size), *_flat(arrays))


@ops.constexpr
@functools.lru_cache
def _primitive(
    name: str, names: tuple[str, ...], size: tuple, thread: int | None = None
) -> ops.Custom:
    """The core's entry `name`; `size`: a forward's C, P, Q, and the shapes of an adjoint's maps.

    Each thread has its own: MindSpore writes shapes into a primitive's kernel before it runs it.
    """
    several = bool(size) and isinstance(size[0], tuple)
    source = next(each for each in ("d_output", "features", "boxes") if each in names)

    def shape(*inputs):
        boxes = _named("boxes", names, inputs)
        return (boxes[0], *size) if name == "forward" else size or boxes

    def dtype(*inputs):
        found = _first(_named(source, names, inputs)).element_type()
        if found not in _FLOATS or (found != mindspore.float64 and name not in _POOLED):
            found = mindspore.float32
        result = mindspore.TensorType(found)
        return (result,) * len(size) if several else result

    entry = f"{_core.__file__}:roialign_{name}"
    bprop = _bprop(name, names) if name in _ORDER else None
    primitive = ops.Custom(entry, shape, dtype, "aot", bprop)
    # to MindSpore, primitives of equal attributes are the same
    primitive.add_prim_attr("call", str((names, size, thread)))
    return primitive


_POOLED = ("forward", "adjoint")  # their results have the dtype of what they take


# Operations. Their arguments have been checked, but for indices. In a graph these are not read.


@functools.lru_cache
def _vector(*numbers: float) -> Tensor:
    return Tensor(np.array(numbers, np.float64))


@ops.constexpr
def _numbers(scales: tuple[float, ...], rule: tuple[float, ...], layout: str) -> Tensor:
    """The numbers of a call as the core's entries take them."""
    maps = len(scales) // 2 if layout == "NCHW" else -(len(scales) // 2)
    return _vector(_threads.get_num_threads(), maps, *scales, *rule)


def _check_index(name: str, index: Tensor, end: int, least: int = 0) -> None:
    if index.dtype == mindspore.bfloat16:  # NumPy reads it as uint16
        index = index.astype(mindspore.float32)
    elif index.dtype == mindspore.uint16:
        index = index.astype(mindspore.int32)
    _core.check_index(name, index.asnumpy(), end, least)


def _run(operation, size, rois, images, scales, rule, layout, names, arrays, selectors) -> Any:
    """An operation on arrays (K, ...) and maps, in dtypes that the core takes."""
    boxes, index, levels = rois
    traced = _is_traced()
    if index is None:
        index = numbered(boxes.shape[0], boxes.shape[1], boxes)
        boxes = boxes.reshape((index.shape[0], 4))
    if boxes.dtype not in _FLOATS:
        wide = _first(arrays[0]).dtype == mindspore.float64
        boxes = boxes.astype(mindspore.float64 if wide else mindspore.float32)
        if not traced:
            _core.log("`boxes` is converted from integers")
    if not traced:
        _check_index("image_index", index, images)
    if selectors is not None:
        name = "selectors" if rule[_REDUCTION] == _MAX else "corners"
        names, arrays = (name, *names), (_maps(selectors), *arrays)
    if levels is not None:
        levels = levels.reshape(index.shape)
        if not traced:
            _check_index("levels", levels, len(scales) // 2, -1)
        names, arrays = ("levels", *names), (levels, *arrays)
    names = ("numbers", "boxes", "image_index", *names)
    numbers = _numbers(scales, rule, layout)
    return _call(operation, names, size, (numbers, boxes, index, *arrays))


def _maps(maps: Any) -> Any:
    """As a call has them."""
    return tuple(maps) if len(maps) > 1 else maps[0]


_MAX = _rule.REDUCTIONS.index("max")
_REDUCTION = _core.rule_names.index("reduction")


def _selectors(maps: tuple, rule: tuple[float, ...]) -> Any:
    """The maps whose samples are compared, if they are."""
    return maps if rule[_REDUCTION] else None


def forward(maps, rois, output_size, scales, rule, *, layout="NCHW", out=None) -> Tensor:
    images, channels, *_ = _layout.shape_first(maps[0].shape, layout)
    size = _layout.shape_as_given((channels, *output_size), layout)
    given = rois, images, scales, rule, layout
    selectors = _selectors(maps, rule)
    output = _run("forward", size, *given, ("features",), (_maps(maps),), selectors)
    return output.reshape((*rois[0].shape[:-1], *size))


def adjoint(
    d_output, rois, feature_shapes, scales, rule, *, layout="NCHW", selectors=None, out=None
) -> tuple[Tensor, ...]:
    size = _maps([_layout.shape_as_given(shape, layout) for shape in feature_shapes])
    given = rois, feature_shapes[0][0], scales, rule, layout
    d_maps = _run("adjoint", size, *given, ("d_output",), (_rows(d_output, rois),), selectors)
    return d_maps if isinstance(d_maps, tuple) else (d_maps,)


def box_gradient(d_output, maps, rois, scales, rule, *, layout="NCHW") -> Tensor:
    given = rois, maps[0].shape[0], scales, rule, layout
    arrays = _rows(d_output, rois), _maps(maps)
    selectors = _selectors(maps, rule)
    return _run("box_gradient", (), *given, ("d_output", "features"), arrays, selectors)


def _rows(d_output: Tensor, rois: tuple) -> Tensor:
    """(K, ...) of (N, M, ...)"""
    return d_output.reshape((math.prod(rois[0].shape[:-1]), *d_output.shape[-3:]))


def is_view(reshaped: Tensor, array: Tensor) -> bool:
    """Asked of `out` alone."""
    return False


def is_compiling() -> bool:
    return False


def takes_rows(features: object, rois: object) -> bool:
    return False


# In a graph all but tensors are constants. Of these Python finds what the compiler cannot read.

rule = ops.constexpr(_checks.rule)
rotated_rule = ops.constexpr(_checks.rotated_rule)
range_of = ops.constexpr(_levels.range_of)
level_setting = ops.constexpr(_levels.setting)
borders = ops.constexpr(_levels.borders)
_tensor = ops.constexpr(Tensor)


def own_index(index):
    return index if isinstance(index, Tensor) else _tensor(index)


# The layer


class ROIAlign(nn.Cell):
    """MindSpore's RoIAlign as a cell: the numbers and errors of :class:`roialign.ROIAlign`.

    Args:
        pooled_height, pooled_width, spatial_scale, sample_num, roi_end_mode: as there.

    Called with ``features`` (N, C, H, W) and ``rois`` (K, 5), rows
    ``(image_index, x1, y1, x2, y2)`` in image pixels, it gives (K, C, pooled_height, pooled_width)
    in the features' dtype. Gradients reach both, in PyNative and in Graph mode. It has no
    parameters.

    >>> import numpy as np, mindspore, roialign.mindspore
    >>> pool = roialign.mindspore.ROIAlign(2, 2, 0.5)
    >>> features = mindspore.Tensor(np.array([[[[1, 2], [3, 4]]]], np.float32))
    >>> rois = mindspore.Tensor(np.array([[0, 0.2, 0.3, 0.2, 0.3]], np.float32))
    >>> print(pool(features, rois).asnumpy().round(3))
    [[[[1.775 2.025]
       [2.275 2.525]]]]
    """

    def __init__(
        self,
        pooled_height: int,
        pooled_width: int,
        spatial_scale: float,
        sample_num: int = 2,
        roi_end_mode: int = 1,
    ) -> None:
        super().__init__()
        self.operator = roialign.ROIAlign(
            pooled_height, pooled_width, spatial_scale, sample_num, roi_end_mode
        )

    def construct(self, features: Tensor, rois: Tensor) -> Tensor:
        _checks.features(_SELF, "features", features)
        return self.operator(features, rois)

    def extend_repr(self) -> str:
        return repr(self.operator)[len("ROIAlign(") : -1]
