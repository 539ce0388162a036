"""The MindSpore adapter: which tensors are accepted, the operators, their derivatives, the layer.

In reading order: checks; the rules of differentiation; the primitives, which are entries of the
core; the operations; what a graph has in place of the public functions; the layer. MindSpore's
compiler reads the source of all that runs in a graph, and knows a part of Python only.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common import _Function

import roialign
from roialign import _checks, _core, _operations, _rois, _threads

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
byte_types = ()


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
        raise TypeError(f"`{name}` must be a mindspore.Tensor, got {_checks.type_name(value)}")
    _check_target()


def check_out(name: str, out: object, dtype: Any) -> None:
    raise TypeError(f"`{name}` must be None with MindSpore, got {_checks.type_name(out)}")


def check_out_values(name: str, out: object, shape: tuple[int, ...], inputs: list) -> None:
    """There is none: `check_out` refuses all."""


# RoIs


def columns(rows: Tensor) -> tuple[Tensor, Tensor]:
    if rows.shape[0] == 0:  # the compiler slices nothing of no rows
        return ops.zeros((0, 4), rows.dtype), ops.zeros((0,), rows.dtype)
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


def repeated(counts: list[int], like: Tensor) -> Tensor:
    return _repeated(tuple(counts))


def split(array: Tensor, counts: list[int]) -> list[Tensor]:
    pieces, start = [], 0
    for count in counts:
        piece = array[start : start + count] if count else ops.zeros((0, 4), array.dtype)
        pieces.append(piece)
        start += count
    return pieces


def cast(array: Tensor, dtype: Any) -> Tensor:
    return array.astype(dtype)


def with_index_column(d_boxes: Tensor) -> Tensor:
    return ops.cat([ops.zeros((d_boxes.shape[0], 1), d_boxes.dtype), d_boxes], 1)


# Derivatives, of one map. Where there is no tangent, there is a vector in its place.

_INPUTS = {
    name: ("numbers", "boxes", "image_index", *takes) for name, takes in _operations.TAKES.items()
}
_GIVES = _operations.GIVES
_SIBLINGS = {array: _operations.giving(array) for array in _GIVES.values()}


def _second_order(operation: str, boxes: Tensor) -> Tensor:
    if _is_traced():  # runs only if its result is used; MindSpore's error then has its name
        return _primitive("has_no_second_derivative_in_the_boxes", ())(boxes)
    return _operations.require_first_order(operation, ("tangent",))


def _named(name: str, names: tuple[str, ...], arrays: tuple[Tensor, ...]) -> Tensor:
    for i in range(len(names)):  # the compiler unrolls it; a dict would stay in the graph
        if names[i] == name:
            return arrays[i]
    return arrays[0]


def _apply(operation: str, names: tuple[str, ...], arrays: tuple[Tensor, ...]) -> Tensor:
    size, inputs = (), ()
    if operation == "forward":
        size = _named("d_output", names, arrays).shape[2:]
    if operation == "adjoint":
        size = _named("features", names, arrays).shape
    for name in _INPUTS[operation]:
        inputs += (_named(name, names, arrays),)
    return _call(operation, size, *inputs)


def _gradients(operation, wanted, inputs, d_result):
    """In each of the inputs of an operation, None where that is not wanted or has none."""
    names, gradients = _INPUTS[operation], ()
    given = (_GIVES[operation], *names), (d_result, *inputs)
    has_tangent = _named("tangent", *given).ndim == 2
    for i in range(len(names)):
        gradient = None
        if wanted[i] and names[i] == "boxes" and (has_tangent or operation == "box_gradient"):
            gradient = _second_order(operation, inputs[i])
        elif wanted[i] and names[i] == "boxes":
            gradient = _apply("box_gradient", *given).astype(inputs[i].dtype)
        elif wanted[i] and names[i] in _SIBLINGS and (has_tangent or names[i] != "tangent"):
            gradient = _apply(_SIBLINGS[names[i]], *given)
        gradients += (gradient,)
    return gradients


def _bprop(operation: str) -> Callable:
    """In a graph: all gradients are wanted, what nothing uses is dropped, and zeros are None."""

    def bprop(a, b, c, d, e, result, d_result):
        inputs, filled = (a, b, c, d, e), ()
        gradients = _gradients(operation, (True,) * 5, inputs, d_result)
        for i in range(5):
            filled += (ops.zeros_like(inputs[i]) if gradients[i] is None else gradients[i],)
        return filled

    return bprop


def _function(operation: str) -> type[_Function]:
    """In PyNative mode, which knows what is wanted."""

    def forward(ctx, primitive, *inputs):
        ctx.save_for_backward(*inputs)
        return primitive(*inputs)

    def backward(ctx, d_result):
        wanted = ctx.needs_input_grad[1:]
        return None, *_gradients(operation, wanted, ctx.saved_tensors, d_result)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(operation, (_Function,), methods)


_BPROPS = {name: _bprop(name) for name in _INPUTS}
_FUNCTIONS = {name: _function(name) for name in _INPUTS}


# The core's operations as primitives, made at their first call: Ascend's want more to be made.


def _call(name: str, size: tuple[int, ...], *inputs: Tensor) -> Tensor:
    primitive = _primitive(name, size)
    if _is_traced():
        return primitive(*inputs)
    return _FUNCTIONS[name].apply(primitive, *inputs)


@ops.constexpr
@functools.lru_cache
def _primitive(name: str, size: tuple[int, ...]) -> ops.Custom:
    """The core's entry `name`; `size` is the bins of a forward, the feature shape of an adjoint."""

    def shape(*inputs):
        if name == "forward":
            return (inputs[1][0], inputs[3][1], *size)
        return size if name == "adjoint" else inputs[1 if name == "box_gradient" else 0]

    def dtype(*inputs):
        if name in ("forward", "adjoint"):
            return inputs[3]
        wide = inputs[3 if name == "box_gradient" else 0].element_type() == mindspore.float64
        return mindspore.TensorType(mindspore.float64 if wide else mindspore.float32)

    entry = f"{_core.__file__}:roialign_{name}"
    primitive = ops.Custom(entry, shape, dtype, "aot", _BPROPS.get(name))
    primitive.add_prim_attr(
        "size", size
    )  # to MindSpore, primitives of equal attributes are the same
    return primitive


# Operations. Their arguments have been checked, but for the image index.


@functools.lru_cache
def _vector(scales: tuple[float, ...], rule: tuple[float, ...], threads: int) -> Tensor:
    """The numbers of a call as the core's entries take them."""
    return Tensor(np.array([threads, len(scales) // 2, *scales, *rule]))


def _numbers(scales: tuple[float, ...], rule: tuple[float, ...]) -> Tensor:
    return _vector(scales, rule, _threads.get_num_threads())


_NO_TANGENT = Tensor(np.zeros(1, np.float32))


def _run(operation, size, boxes, index, images, numbers, *arrays) -> Tensor:
    """An operation on one map, in dtypes that the core takes. In a graph no index is read."""
    if boxes.dtype not in _FLOATS:
        wide = arrays[0].dtype == mindspore.float64
        boxes = boxes.astype(mindspore.float64 if wide else mindspore.float32)
        if not _is_traced():
            _core.log("`boxes` is converted from integers")
    if not _is_traced():
        readable = index  # by NumPy, in which uint16 stands for bfloat16
        if index.dtype == mindspore.bfloat16:
            readable = index.astype(mindspore.float32)
        elif index.dtype == mindspore.uint16:
            readable = index.astype(mindspore.int32)
        _core.check_index("image_index", readable.asnumpy(), images)
    return _call(operation, size, numbers, boxes, index, *arrays)


def _forward(features, boxes, index, bins, numbers):
    return _run("forward", bins, boxes, index, features.shape[0], numbers, features, _NO_TANGENT)


def _adjoint(d_output, boxes, index, shape, numbers):
    return _run("adjoint", shape, boxes, index, shape[0], numbers, d_output, _NO_TANGENT)


def _box_gradient(d_output, features, boxes, index, numbers):
    images = features.shape[0]
    return _run("box_gradient", (), boxes, index, images, numbers, d_output, features)


def is_compiling() -> bool:
    return False


def takes_rows(features: object, rois: object) -> bool:
    return False


def forward(maps, rois, output_size, scales, rule, *, out=None) -> Tensor:
    (features,) = maps
    return _forward(features, rois.boxes, rois.image_index, output_size, _numbers(scales, rule))


def adjoint(d_output, rois, feature_shapes, scales, rule, *, out=None) -> tuple[Tensor]:
    (shape,) = feature_shapes
    numbers = _numbers(scales, rule)
    return (_adjoint(d_output, rois.boxes, rois.image_index, shape, numbers),)


def box_gradient(d_output, maps, rois, scales, rule) -> Tensor:
    (features,) = maps
    numbers = _numbers(scales, rule)
    return _box_gradient(d_output, features, rois.boxes, rois.image_index, numbers)


# Graph mode: what the compiler reads in place of the public functions, with their checks in their
# order. All but tensors are constants there, and checked by Python while it compiles.


_integers = ops.constexpr(_checks.integers)
_bins = ops.constexpr(_checks.bins)
_feature_shape = ops.constexpr(_checks.feature_shape)


@ops.constexpr
def _numbers_in_graph(given: tuple) -> Tensor:
    return _numbers(*_checks.rule(*given))


@ops.constexpr
def _with_pixels(numbers: Tensor, name: str, shape: tuple[int, ...], count: int) -> Tensor:
    """The numbers, after a check: the compiler warns of a call whose result nobody uses."""
    _checks.pixels(name, shape, count)
    return numbers


def roi_align_in_graph(features, rois, output_size, rule, out):
    _checks.features(_SELF, "features", features)
    _rois.check(_SELF, rois)
    bins = _integers("output_size", output_size)
    if out is not None:
        check_out("out", out, features.dtype)
    numbers = _numbers_in_graph(rule)
    return _pool(features, rois, _bins("output_size", bins), numbers)


def layer_in_graph(features, rois, bins, rule):
    _checks.features(_SELF, "features", features)
    check_array("rois", rois)
    _rois.check(_SELF, rois, False)
    return _pool(features, rois, bins, _numbers_in_graph(rule))


def _pool(features, rois, bins, numbers):
    _checks.shape("features", "(N, C, H, W)", features.shape, features.ndim == 4)
    boxes, index = _rois.boxes_and_index(_SELF, rois, features.shape[0])
    numbers = _with_pixels(numbers, "features", features.shape, boxes.shape[0])
    return _forward(features, boxes, index, bins, numbers)


def roi_align_adjoint_in_graph(d_output, rois, feature_shape, rule, features, out):
    _checks.features(_SELF, "d_output", d_output)
    if features is not None:
        _checks.features(_SELF, "features", features)
        _checks.same_dtype("features", features.dtype, "d_output", d_output.dtype)
    _rois.check(_SELF, rois)
    _checks.sequence("feature_shape", "(N, C, H, W)", feature_shape)
    shape = _integers("feature_shape", feature_shape)
    if out is not None:
        check_out("out", out, d_output.dtype)
    numbers = _numbers_in_graph(rule)
    shape = _feature_shape(shape)
    boxes, index = _rois.boxes_and_index(_SELF, rois, shape[0])
    _checks.d_output(d_output.shape, boxes.shape[0], shape[1])
    numbers = _with_pixels(numbers, "feature_shape", shape, boxes.shape[0])
    if features is not None:
        _checks.shape("features", str(shape), features.shape, features.shape == shape)
    return _adjoint(d_output, boxes, index, shape, numbers)


def roi_align_box_gradient_in_graph(d_output, features, rois, rule, out):
    _checks.features(_SELF, "d_output", d_output)
    _checks.features(_SELF, "features", features)
    _checks.same_dtype("d_output", d_output.dtype, "features", features.dtype)
    _rois.check(_SELF, rois)
    if out is not None:
        check_out("out", out, features.dtype)
    numbers = _numbers_in_graph(rule)
    _checks.shape("features", "(N, C, H, W)", features.shape, features.ndim == 4)
    boxes, index = _rois.boxes_and_index(_SELF, rois, features.shape[0])
    _checks.d_output(d_output.shape, boxes.shape[0], features.shape[1])
    numbers = _with_pixels(numbers, "features", features.shape, boxes.shape[0])
    d_boxes = _box_gradient(d_output, features, boxes, index, numbers)
    return _rois.like_given(_SELF, rois, d_boxes)


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
