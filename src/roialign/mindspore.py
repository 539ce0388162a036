"""The MindSpore adapter: which tensors are accepted, the operators, their derivatives, the layer.

In reading order: checks; the rules of differentiation; the primitives, which are entries of the core;
the operations; what a graph has in place of the public functions; the layer. MindSpore's compiler reads
the source of all that runs in a graph, and knows a part of Python only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common import _Function

import roialign
from roialign import _checks, _core, _threads
from roialign._conventions import Rule

__all__ = ["ROIAlign"]

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


def are_ordinary(features: object, rois: object) -> bool:
    """No call has fewer checks here: MindSpore's own work outweighs them."""
    return False


@ops.constexpr
def _target() -> str:
    return mindspore.get_context("device_target")


def _check_target() -> None:
    target = _target()
    if target != "CPU":
        raise NotImplementedError(
            f"roialign runs on MindSpore's CPU target, got {target}: use mindspore.ops.ROIAlign there, "
            "which is the convention 'mindspore' (roi_end_mode=1) or 'mindspore_legacy' (0)"
        )


def check_array(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a mindspore.Tensor, got {_checks.type_name(value)}")


def check_features(name: str, value: object) -> None:
    check_array(name, value)
    _check_target()
    _checks.features_dtype(name, value.dtype, value.dtype in _FLOATS)


def _check_float_boxes(name: str, value: object) -> None:
    check_array(name, value)
    _checks.boxes_dtype(name, value.dtype, value.dtype in _FLOATS, False)


def _check_boxes(name: str, value: object) -> None:
    check_array(name, value)
    _checks.boxes_dtype(name, value.dtype, value.dtype in _FLOATS + _INTEGERS, True)


def _check_index(name: str, value: Tensor) -> None:
    _checks.index_dtype(name, value.dtype, value.dtype in _INTEGERS)


def check_rois(rois: object, integers: bool = True) -> None:
    _checks.rois(rois, check_array, _check_boxes if integers else _check_float_boxes, _check_index)


def check_out(name: str, out: object, dtype: Any) -> None:
    raise TypeError(f"`{name}` must be None with MindSpore, got {_checks.type_name(out)}")


# Values


class Rois(NamedTuple):
    """The three forms as one: boxes (K, 4) and an image index (K,)."""

    boxes: Tensor
    image_index: Tensor
    given: object

    def like_given(self, d_boxes: Tensor) -> Any:
        """A gradient (K, 4) in the form and dtype in which the rois came."""
        return _like_given(self.given, d_boxes)


def parse_rois(rois: Any, images: int) -> Rois:
    return Rois(*_boxes_and_index(rois, images), rois)


def _boxes_and_index(rois: Any, images: int) -> tuple[Tensor, Tensor]:
    _checks.roi_shapes(rois, images)
    if isinstance(rois, tuple):
        return rois
    if not isinstance(rois, list):
        if rois.shape[0] == 0:  # the compiler slices nothing of no rows
            return ops.zeros((0, 4), rois.dtype), ops.zeros((0,), rois.dtype)
        return rois[:, 1:], rois[:, 0]
    dtype, counts, pieces = rois[0].dtype if rois else mindspore.float32, (), []
    for boxes in rois:
        counts += (boxes.shape[0],)
        if boxes.dtype != dtype:
            dtype = mindspore.float64  # holds all of them
    for boxes in rois:
        pieces.append(boxes.astype(dtype))
    return ops.cat(pieces) if pieces else ops.zeros((0, 4), dtype), _repeated(counts)


@ops.constexpr
def _repeated(counts: tuple[int, ...]) -> Tensor:
    """Each image's number as often as it has boxes."""
    return Tensor(np.repeat(np.arange(len(counts)), np.array(counts, np.int64)))


def _like_given(rois: Any, d_boxes: Tensor) -> Any:
    if isinstance(rois, tuple):
        return d_boxes.astype(gradient_dtype(rois[0].dtype))
    if not isinstance(rois, list):
        d_boxes = d_boxes.astype(gradient_dtype(rois.dtype))
        return ops.cat([ops.zeros((d_boxes.shape[0], 1), d_boxes.dtype), d_boxes], 1)
    pieces, start = [], 0
    for boxes in rois:
        end = start + boxes.shape[0]
        piece = d_boxes[start:end] if end > start else ops.zeros((0, 4), d_boxes.dtype)
        pieces.append(piece.astype(gradient_dtype(boxes.dtype)))
        start = end
    return pieces


def gradient_dtype(dtype: Any) -> Any:
    """Of a gradient in boxes of ``dtype``: float32 for integers."""
    return dtype if dtype in _FLOATS else mindspore.float32


# Derivatives. A rule takes which of the gradients are wanted, what its operation took, and the gradient
# of its result. "forward" and "adjoint" take (array, boxes, image_index, tangent, rule); a tangent
# (K, 4) asks for the derivative along it.


def _second_order(boxes: Tensor) -> Tensor:
    if _is_traced():  # runs only if its result is used; MindSpore's error then has its name
        return _primitive("has_no_second_derivative_in_the_boxes", ())(boxes)
    raise NotImplementedError(
        "roialign has no second derivative in the boxes: stop_gradient() them where a gradient is "
        "differentiated again"
    )


def _in_boxes(wanted, d_output, features, boxes, index, tangent, rule):
    """Of "forward" and "adjoint": in the boxes, and in the tangent."""
    d_boxes = d_tangent = None
    has_tangent = tangent.ndim == 2
    if wanted[1] and has_tangent:
        d_boxes = _second_order(boxes)
    elif wanted[1]:
        d_boxes = _call("box_gradient", (), d_output, features, boxes, index, rule)
        d_boxes = d_boxes.astype(boxes.dtype)
    if wanted[3] and has_tangent:
        d_tangent = _call("box_gradient", (), d_output, features, boxes, index, rule)
    return d_boxes, d_tangent


def _forward_gradients(wanted, features, boxes, index, tangent, rule, d_output):
    d_features = None
    if wanted[0]:
        d_features = _call("adjoint", features.shape, d_output, boxes, index, tangent, rule)
    d_boxes, d_tangent = _in_boxes(wanted, d_output, features, boxes, index, tangent, rule)
    return d_features, d_boxes, None, d_tangent, None


def _adjoint_gradients(wanted, d_output, boxes, index, tangent, rule, d_features):
    dd_output = None
    if wanted[0]:
        dd_output = _call("forward", d_output.shape[2:], d_features, boxes, index, tangent, rule)
    d_boxes, d_tangent = _in_boxes(wanted, d_output, d_features, boxes, index, tangent, rule)
    return dd_output, d_boxes, None, d_tangent, None


def _box_gradient_gradients(wanted, d_output, features, boxes, index, rule, v):
    dd_output = d_features = d_boxes = None
    if wanted[0]:
        dd_output = _call("forward", d_output.shape[2:], features, boxes, index, v, rule)
    if wanted[1]:
        d_features = _call("adjoint", features.shape, d_output, boxes, index, v, rule)
    if wanted[2]:
        d_boxes = _second_order(boxes)
    return dd_output, d_features, d_boxes, None, None


# In a graph a rule is the `bprop` of a primitive: all gradients are wanted, the compiler drops those
# that nothing uses, and zeros stand for None.

_ALL = (True,) * 5


def _forward_bprop(features, boxes, index, tangent, rule, output, d_output):
    inputs = features, boxes, index, tangent, rule
    return _filled(inputs, _forward_gradients(_ALL, *inputs, d_output))


def _adjoint_bprop(d_output, boxes, index, tangent, rule, output, d_features):
    inputs = d_output, boxes, index, tangent, rule
    return _filled(inputs, _adjoint_gradients(_ALL, *inputs, d_features))


def _box_gradient_bprop(d_output, features, boxes, index, rule, output, v):
    inputs = d_output, features, boxes, index, rule
    return _filled(inputs, _box_gradient_gradients(_ALL, *inputs, v))


def _filled(inputs, gradients):
    filled = ()
    for i in range(len(inputs)):
        filled += (ops.zeros_like(inputs[i]) if gradients[i] is None else gradients[i],)
    return filled


_BPROPS = {
    "forward": _forward_bprop,
    "adjoint": _adjoint_bprop,
    "box_gradient": _box_gradient_bprop,
}


# In PyNative mode a rule is the `backward` of a function, which knows what is wanted.


def _function(gradients: Callable) -> type[_Function]:
    def forward(ctx, primitive, *inputs):
        ctx.save_for_backward(*inputs)
        return primitive(*inputs)

    def backward(ctx, d_result):
        wanted = ctx.needs_input_grad[1:]
        return None, *gradients(wanted, *ctx.saved_tensors, d_result)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(gradients.__name__, (_Function,), methods)


_FUNCTIONS = {
    "forward": _function(_forward_gradients),
    "adjoint": _function(_adjoint_gradients),
    "box_gradient": _function(_box_gradient_gradients),
}


# The core's operations as primitives. They are made at their first call: Ascend's want more to be made.


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
            return (inputs[1][0], inputs[0][1], *size)
        return size if name == "adjoint" else inputs[2 if name == "box_gradient" else 0]

    def dtype(*inputs):
        if name != "box_gradient":
            return inputs[0]
        wide = inputs[0].element_type() == mindspore.float64
        return mindspore.TensorType(mindspore.float64 if wide else mindspore.float32)

    entry = f"{_core.__file__}:roialign_{name}"
    primitive = ops.Custom(entry, shape, dtype, "aot", _BPROPS.get(name))
    primitive.add_prim_attr(
        "size", size
    )  # to MindSpore, primitives of equal attributes are the same
    return primitive


# Operations. Their arguments have been checked, but for the image index.


@functools.lru_cache
def _rule_tensor(numbers: tuple[float | int | None, ...], threads: int) -> Tensor:
    """The numbers of the rule, and of the threads that may work, as the core's entries take them."""
    *numbers, least, floor = numbers
    return Tensor(np.array([*numbers, math.nan if least is None else least, floor, threads]))


def _numbers(rule: Rule) -> Tensor:
    return _rule_tensor(rule.numbers, _threads.get_num_threads())


def _native(boxes: Tensor, index: Tensor, array: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """In dtypes that the core takes; indices are read here, except in a graph."""
    if boxes.dtype not in _FLOATS:
        wide = array.dtype == mindspore.float64
        boxes = boxes.astype(mindspore.float64 if wide else mindspore.float32)
    if not _is_traced():
        _check_image_index(index, images)
    if index.dtype not in _FLOATS:
        index = index.astype(mindspore.int64)
    return boxes, index


def _check_image_index(index: Tensor, images: int) -> None:
    readable = index.astype(mindspore.float32) if index.dtype == mindspore.bfloat16 else index
    values = readable.asnumpy()
    bad = np.flatnonzero(~((values >= 0) & (values < images) & (values == np.floor(values))))
    if len(bad):
        raise IndexError(
            f"`image_index` of RoI {bad[0]} must be an integer in [0, {images}), "
            f"got {values[bad[0]]}"
        )


_NO_TANGENT = Tensor(np.zeros(1, np.float32))


def _forward(features, boxes, index, bins, rule):
    rois = _native(boxes, index, features, features.shape[0])
    return _call("forward", bins, features, *rois, _NO_TANGENT, rule)


def _adjoint(d_output, boxes, index, feature_shape, rule):
    rois = _native(boxes, index, d_output, feature_shape[0])
    return _call("adjoint", feature_shape, d_output, *rois, _NO_TANGENT, rule)


def _box_gradient(d_output, features, boxes, index, rule):
    rois = _native(boxes, index, features, features.shape[0])
    return _call("box_gradient", (), d_output, features, *rois, rule)


def forward(
    features: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    output_size: tuple[int, int],
    rule: Rule,
    *,
    out: None = None,
) -> Tensor:
    """Pooled features (K, C, P, Q)."""
    return _forward(features, boxes, image_index, output_size, _numbers(rule))


def adjoint(
    d_output: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    feature_shape: tuple[int, ...],
    rule: Rule,
    *,
    out: None = None,
) -> Tensor:
    """The gradient in the features (N, C, H, W)."""
    return _adjoint(d_output, boxes, image_index, feature_shape, _numbers(rule))


def box_gradient(
    d_output: Tensor, features: Tensor, boxes: Tensor, image_index: Tensor, rule: Rule
) -> Tensor:
    """The gradient in the boxes (K, 4), x1 y1 x2 y2, of the coordinate type."""
    return _box_gradient(d_output, features, boxes, image_index, _numbers(rule))


# Graph mode: what the compiler reads in place of the public functions, with their checks in their
# order. All but tensors are constants there, and checked by Python while it compiles.


@ops.constexpr
def _integers(name: str, value: Any) -> tuple[int, ...]:
    return _checks.integers(name, value)


@ops.constexpr
def _bins(value: tuple[int, ...]) -> tuple[int, int]:
    return _checks.bins("output_size", value)


@ops.constexpr
def _feature_shape(value: tuple[int, ...]) -> tuple[int, ...]:
    return _checks.feature_shape(value)


@ops.constexpr
def _rule_in_graph(given: tuple) -> Tensor:
    return _numbers(_checks.rule(*given))


@ops.constexpr
def _with_pixels(rule: Tensor, name: str, shape: tuple[int, ...], count: int) -> Tensor:
    """The rule, after a check: the compiler warns of a call on constants whose result nobody uses."""
    _checks.pixels(name, shape, count)
    return rule


def roi_align_in_graph(features, rois, output_size, rule, out):
    check_features("features", features)
    check_rois(rois)
    bins = _integers("output_size", output_size)
    if out is not None:
        check_out("out", out, features.dtype)
    rule = _rule_in_graph(rule)
    return _pool(features, rois, _bins(bins), rule)


def seed_in_graph(features, rois, bins, rule):
    check_features("features", features)
    check_array("rois", rois)
    check_rois(rois, integers=False)
    return _pool(features, rois, bins, _rule_in_graph(rule))


def _pool(features, rois, bins, rule):
    _checks.shape("features", "(N, C, H, W)", features.shape, features.ndim == 4)
    boxes, index = _boxes_and_index(rois, features.shape[0])
    rule = _with_pixels(rule, "features", features.shape, boxes.shape[0])
    return _forward(features, boxes, index, bins, rule)


def roi_align_adjoint_in_graph(d_output, rois, feature_shape, rule, features, out):
    check_features("d_output", d_output)
    if features is not None:
        check_features("features", features)
        _checks.same_dtype("features", features.dtype, "d_output", d_output.dtype)
    check_rois(rois)
    _checks.sequence("feature_shape", "(N, C, H, W)", feature_shape)
    shape = _integers("feature_shape", feature_shape)
    if out is not None:
        check_out("out", out, d_output.dtype)
    rule = _rule_in_graph(rule)
    shape = _feature_shape(shape)
    boxes, index = _boxes_and_index(rois, shape[0])
    _checks.d_output(d_output.shape, boxes.shape[0], shape[1])
    rule = _with_pixels(rule, "feature_shape", shape, boxes.shape[0])
    if features is not None:
        _checks.shape("features", str(shape), features.shape, features.shape == shape)
    return _adjoint(d_output, boxes, index, shape, rule)


def roi_align_box_gradient_in_graph(d_output, features, rois, rule, out):
    check_features("d_output", d_output)
    check_features("features", features)
    _checks.same_dtype("d_output", d_output.dtype, "features", features.dtype)
    check_rois(rois)
    if out is not None:
        check_out("out", out, features.dtype)
    rule = _rule_in_graph(rule)
    _checks.shape("features", "(N, C, H, W)", features.shape, features.ndim == 4)
    boxes, index = _boxes_and_index(rois, features.shape[0])
    _checks.d_output(d_output.shape, boxes.shape[0], features.shape[1])
    rule = _with_pixels(rule, "features", features.shape, boxes.shape[0])
    return _like_given(rois, _box_gradient(d_output, features, boxes, index, rule))


# The layer


class ROIAlign(nn.Cell):
    """MindSpore's RoIAlign as a cell: the numbers and errors of :class:`roialign.ROIAlign`.

    Args:
        pooled_height, pooled_width, spatial_scale, sample_num, roi_end_mode: as there.

    Called with ``features`` (N, C, H, W) and ``rois`` (K, 5), rows ``(image_index, x1, y1, x2, y2)``
    in image pixels, it gives (K, C, pooled_height, pooled_width) in the features' dtype. Gradients
    reach both, in PyNative and in Graph mode. It has no parameters.

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
        check_features("features", features)
        return self.operator(features, rois)

    def extend_repr(self) -> str:
        return repr(self.operator)[len("ROIAlign(") : -1]
