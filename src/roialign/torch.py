"""The PyTorch adapter: which tensors are accepted, the operators, their derivatives and transforms.

In reading order: checks; the kernels on memory; the operators ``torch.ops.roialign``, which
``torch.compile``, ``torch.export`` and tensor subclasses see; the same as ``torch.autograd.Function``,
which eager mode and ``torch.func`` see; the choice between them; the layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

import roialign
from roialign import _checks, _core, _threads
from roialign._conventions import Convention

__all__ = ["ROIAlign"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_CODES = {getattr(torch, name): code for name, code in _core.dtypes.items()}
_LARGE = 4 << 20  # bytes: from here on results live on huge pages


def is_traced() -> bool:
    """Whether a compiler reads the Python code: caches are not for it."""
    return torch.compiler.is_compiling()


# Types


def check_array(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {_checks.type_name(value)}")
    if value.layout is not torch.strided:
        raise TypeError(f"`{name}` must be a dense tensor, got layout {value.layout}")
    if value.device.type not in ("cpu", "meta"):
        raise TypeError(f"`{name}` must be on the CPU, got device {value.device}")


def check_features(name: str, value: object) -> None:
    check_array(name, value)
    if value.dtype not in _FLOATS:
        raise TypeError(
            f"`{name}` must be float16, bfloat16, float32 or float64, got {value.dtype}"
        )


def check_same_dtype(name: str, value: Tensor, other: str, reference: Tensor) -> None:
    if value.dtype != reference.dtype:
        raise TypeError(
            f"`{name}` must have the dtype of `{other}`, {reference.dtype}, got {value.dtype}"
        )


def _check_boxes(name: str, value: object, integers: bool) -> None:
    check_array(name, value)
    if value.dtype not in _FLOATS and not (integers and value.dtype in _INTEGERS):
        wanted = "a float or integer" if integers else "a float"
        raise TypeError(f"`{name}` must have {wanted} dtype, got {value.dtype}")


def _check_index(name: str, value: Tensor) -> None:
    if value.dtype not in _INTEGERS:
        raise TypeError(f"`{name}` must have an integer dtype, got {value.dtype}")


def check_rois(rois: object, integers: bool = True) -> None:
    _checks.rois(
        rois, check_array, lambda name, value: _check_boxes(name, value, integers), _check_index
    )


def check_out(name: str, out: object, dtype: torch.dtype) -> None:
    check_array(name, out)
    if out.dtype != dtype:
        raise TypeError(f"`{name}` must have dtype {dtype}, got {out.dtype}")


# Values


class Rois(NamedTuple):
    """The three forms as one: boxes (K, 4) and an image index (K,)."""

    boxes: Tensor
    image_index: Tensor
    given: object

    def arrays(self) -> list[Tensor]:
        return list(self.given) if isinstance(self.given, (tuple, list)) else [self.given]

    def like_given(self, d_boxes: Tensor) -> Any:
        """A gradient (K, 4) in the form and dtype in which the rois came."""
        if isinstance(self.given, list):
            pieces = torch.split(d_boxes, [len(boxes) for boxes in self.given])
            return [p.to(gradient_dtype(b.dtype)) for p, b in zip(pieces, self.given)]
        if isinstance(self.given, tuple):
            return d_boxes.to(gradient_dtype(self.boxes.dtype))
        d_boxes = d_boxes.to(gradient_dtype(self.given.dtype))
        return torch.nn.functional.pad(d_boxes, (1, 0))


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a gradient in boxes of ``dtype``: float32 for integers."""
    return dtype if dtype in _FLOATS else torch.float32


def parse_rois(rois: Any, images: int) -> Rois:
    _checks.roi_shapes(rois, images)
    if isinstance(rois, tuple):
        return Rois(*rois, rois)
    if isinstance(rois, list):
        if not rois:
            return Rois(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), rois)
        index = [boxes.new_full((len(boxes),), i, dtype=torch.int64) for i, boxes in enumerate(rois)]
        # Boxes of different dtypes meet in float64, which holds all of them.
        if any(boxes.dtype != rois[0].dtype for boxes in rois):
            return Rois(torch.cat([boxes.double() for boxes in rois]), torch.cat(index), rois)
        return Rois(torch.cat(rois), torch.cat(index), rois)
    return Rois(rois[:, 1:], rois[:, 0], rois)


def check_out_values(name: str, out: Tensor, shape: tuple[int, ...], inputs: list[Tensor]) -> None:
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"`{name}` must have shape {tuple(shape)}, got {tuple(out.shape)}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (out, *inputs)):
        raise RuntimeError(f"`{name}` must be None where a gradient is needed: call under no_grad()")
    if _overlaps_itself(out):
        raise ValueError(f"`{name}` must not overlap itself, got strides {out.stride()}")
    for tensor in inputs:
        if _share_memory(out, tensor):
            raise ValueError(f"`{name}` must not overlap an input, got overlapping memory")


def _overlaps_itself(tensor: Tensor) -> bool:
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    while tensor.dim():
        if _share_memory(tensor[:1], tensor[1:]):
            return True
        tensor = tensor[0]
    return False


def _share_memory(a: Tensor, b: Tensor) -> bool:
    try:
        return np.shares_memory(_bytes_of(a), _bytes_of(b), max_work=10**6)
    except RuntimeError:  # numpy.exceptions.TooHardError: not proven to be disjoint
        return True


def _bytes_of(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _is_channels_last(tensor: Tensor) -> bool:
    """Channels next to each other in memory, in a tensor where that means something."""
    _, channels, height, width = tensor.shape
    return (
        channels > 1
        and height * width > 1
        and tensor.stride(1) == 1
        and not tensor.is_contiguous()
    )


def _stored(like: Tensor, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How a result (N, C, H, W) lies in memory, and the axes that show it: innermost channels stay so."""
    n, c, h, w = shape
    return ((n, h, w, c), (0, 3, 1, 2)) if _is_channels_last(like) else ((n, c, h, w), (0, 1, 2, 3))


def _empty_like(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    stored, axes = _stored(like, shape)
    size = math.prod(stored) * like.itemsize
    if _LARGE <= size < 2**62:
        result = torch.from_numpy(_core.allocate(size)).view(like.dtype).view(stored)
    else:
        result = torch.empty(stored, dtype=like.dtype)
    return result.permute(axes)


# Kernels: the core on the tensors' memory


def _rule(
    spatial_scale: tuple[float, float], sampling_ratio: int, c: Convention
) -> tuple[float | int | None, ...]:
    """The numbers that every operation takes, flat: operators have no records."""
    return (
        *spatial_scale,
        max(-1, min(sampling_ratio, 2**62)),
        c.pixel_offset,
        c.input_offset,
        c.end_offset,
        c.min_size,
        c.adaptive == "floor",
    )


def _memory(tensor: Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    return tensor.data_ptr(), _CODES[tensor.dtype], tensor.shape, tensor.stride()


def _run(operation, arrays, boxes, index, tangent, rule, result) -> Tensor:
    """Calls the core, which writes ``result``; raises where it refuses an image index."""
    arrays = [a.resolve_neg() for a in arrays]
    coordinate = torch.float64 if arrays[0].dtype is torch.float64 else torch.float32
    boxes = boxes.resolve_neg() if boxes.dtype in _FLOATS else boxes.to(coordinate)
    index = index.resolve_neg() if index.dtype in _FLOATS else index.to(torch.int64)
    rois = (_memory(boxes), _memory(index))
    if operation is not _core.box_gradient:
        if tangent is not None:
            tangent = tangent.to(coordinate).contiguous().resolve_neg()
        rois += (None if tangent is None else _memory(tangent),)
    threads = min(_threads.get_num_threads(), torch.get_num_threads())
    bad = operation(*map(_memory, arrays), *rois, rule, _memory(result), threads)
    if bad >= 0:
        images = (result if operation is _core.adjoint else arrays[-1]).shape[0]
        raise IndexError(
            f"`image_index` of RoI {bad} must be an integer in [0, {images}), got {index[bad].item()}"
        )
    return result


def _forward_kernel(features, boxes, index, tangent, output_size, *rule, out=None) -> Tensor:
    if out is None:
        out = _empty_like(features, (boxes.shape[0], features.shape[1], *output_size))
    return _run(_core.forward, (features,), boxes, index, tangent, rule, out)


def _adjoint_kernel(d_output, boxes, index, tangent, feature_shape, *rule, out=None) -> Tensor:
    if out is None:
        out = _empty_like(d_output, feature_shape)
    return _run(_core.adjoint, (d_output,), boxes, index, tangent, rule, out)


def _box_gradient_kernel(d_output, features, boxes, index, *rule) -> Tensor:
    coordinate = torch.float64 if features.dtype is torch.float64 else torch.float32
    d_boxes = torch.empty(boxes.shape[0], 4, dtype=coordinate)
    _run(_core.box_gradient, (d_output, features), boxes, index, None, rule, d_boxes)
    return d_boxes.to(gradient_dtype(boxes.dtype))


_KERNELS = {
    "forward": _forward_kernel,
    "adjoint": _adjoint_kernel,
    "box_gradient": _box_gradient_kernel,
}


# Derivatives, the same for the operators and the functions below. An operation is linear in all that is
# no box; with a tangent it is linear in the tangent too. Each rule takes what its operation took.


def _second_order() -> None:
    raise NotImplementedError(
        "roialign has no second derivative in the boxes: detach() them where a gradient is "
        "differentiated again"
    )


class Derivatives(NamedTuple):
    """What `torch.library` and `Function` ask for: setup_context, backward, jvp."""

    context: Callable
    backward: Callable
    jvp: Callable


def _pair(name: str) -> Derivatives:
    """Of "forward" or "adjoint", which are each other's gradient in the array that they take."""
    is_forward = name == "forward"
    sibling = "adjoint" if is_forward else "forward"

    def context(ctx, inputs, output):
        array, boxes, index, tangent, size, *rule = inputs
        moves = boxes.requires_grad or (tangent is not None and tangent.requires_grad)
        ctx.set_materialize_grads(False)  # None says that an input does not move, or an output not count
        ctx.save_for_backward(array if moves else None, boxes, index, tangent)
        ctx.save_for_forward(array, boxes, index, tangent)
        ctx.size, ctx.rule = tuple(size), rule
        ctx.array_size = tuple(array.shape) if is_forward else tuple(array.shape[2:])

    def backward(ctx, d_result):
        array, boxes, index, tangent = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_array = d_boxes = d_tangent = None
        if d_result is None:
            needs = [False] * len(needs)
        if needs[0]:
            d_array = _call(sibling, d_result, boxes, index, tangent, ctx.array_size, *ctx.rule)
        if needs[1] and tangent is not None:
            _second_order()
        if needs[1] or needs[3]:
            d_output, features = (d_result, array) if is_forward else (array, d_result)
            gradient = _call("box_gradient", d_output, features, boxes, index, *ctx.rule)
            d_boxes, d_tangent = (gradient, None) if needs[1] else (None, gradient)
        return d_array, d_boxes, None, d_tangent, None, *[None] * len(ctx.rule)

    def jvp(ctx, t_array, t_boxes, _t_index, t_tangent, *_):
        array, boxes, index, tangent = ctx.saved_tensors
        if t_boxes is not None and tangent is not None:
            _second_order()
        terms = [(t_array, tangent), (array, t_boxes), (array, t_tangent)]
        given = (t_array, t_boxes, t_tangent)
        return _sum(
            _call(name, a, boxes, index, v, ctx.size, *ctx.rule)
            for (a, v), t in zip(terms, given)
            if t is not None
        )

    return Derivatives(context, backward, jvp)


def _sum(terms: Iterable[Tensor]) -> Tensor | None:
    return functools.reduce(torch.add, terms) if (terms := list(terms)) else None


def _box_gradient_context(ctx, inputs, output) -> None:
    d_output, features, boxes, index, *rule = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_output, features, boxes, index)
    ctx.save_for_forward(d_output, features, boxes, index)
    ctx.rule = rule


def _box_gradient_backward(ctx, v):
    d_output, features, boxes, index = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dd_output = d_features = None
    if v is None:
        needs = [False] * len(needs)
    if needs[0]:
        bins = tuple(d_output.shape[2:])
        dd_output = _call("forward", features, boxes, index, v, bins, *ctx.rule)
    if needs[1]:
        shape = tuple(features.shape)
        d_features = _call("adjoint", d_output, boxes, index, v, shape, *ctx.rule)
    if needs[2]:
        _second_order()
    return dd_output, d_features, None, None, *[None] * len(ctx.rule)


def _box_gradient_jvp(ctx, t_d_output, t_features, t_boxes, *_):
    d_output, features, boxes, index = ctx.saved_tensors
    if t_boxes is not None:
        _second_order()
    pairs = [(t_d_output, features), (d_output, t_features)]
    return _sum(
        _call("box_gradient", d, f, boxes, index, *ctx.rule)
        for d, f in pairs
        if d is not None and f is not None
    )


_DERIVATIVES = {
    "forward": _pair("forward"),
    "adjoint": _pair("adjoint"),
    "box_gradient": Derivatives(_box_gradient_context, _box_gradient_backward, _box_gradient_jvp),
}


# Batching: one more axis in front becomes more images and more RoIs.


def _expand(tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    if dim is None:
        return tensor.expand(batch, *tensor.shape)
    return tensor.movedim(dim, 0)


def _image_offsets(index: Tensor, images: int) -> Tensor:
    """Indices (B, K) into the images of every batch, one after another; bad ones stay bad."""
    offsets = images * torch.arange(len(index), device=index.device).unsqueeze(1)
    return torch.where(index < 0, index, index + offsets)


def _checked_index(index: Tensor, dim: int | None, batch: int, images: int) -> Tensor:
    """(B, K) int64, -1 where it is no image."""
    index = _expand(index, dim, batch)
    fine = (index >= 0) & (index < images) & (index == index.to(torch.int64))
    return torch.where(fine, index.to(torch.int64), -1)


def _flat(tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    return _expand(tensor, dim, batch).flatten(0, 1)


def _forward_vmap(info, dims, features, boxes, index, tangent, output_size, *rule):
    batch = info.batch_size
    images = features.shape[0 if dims[0] is None else 1 if dims[0] == 0 else 0]
    index = _checked_index(index, dims[2], batch, images)
    if dims[0] is not None:
        index, features = _image_offsets(index, images), _flat(features, dims[0], batch)
    if tangent is not None:
        tangent = _flat(tangent, dims[3], batch)
    boxes = _flat(boxes, dims[1], batch)
    output = _call("forward", features, boxes, index.flatten(), tangent, output_size, *rule)
    return output.unflatten(0, (batch, -1)), 0


def _adjoint_vmap(info, dims, d_output, boxes, index, tangent, feature_shape, *rule):
    batch, images = info.batch_size, feature_shape[0]
    index = _image_offsets(_checked_index(index, dims[2], batch, images), images)
    if tangent is not None:
        tangent = _flat(tangent, dims[3], batch)
    d_output, boxes = _flat(d_output, dims[0], batch), _flat(boxes, dims[1], batch)
    shape = (batch * images, *feature_shape[1:])
    d_features = _call("adjoint", d_output, boxes, index.flatten(), tangent, shape, *rule)
    return d_features.unflatten(0, (batch, images)), 0


def _box_gradient_vmap(info, dims, d_output, features, boxes, index, *rule):
    batch = info.batch_size
    images = features.shape[0 if dims[1] is None else 1 if dims[1] == 0 else 0]
    index = _checked_index(index, dims[3], batch, images)
    if dims[1] is not None:
        index, features = _image_offsets(index, images), _flat(features, dims[1], batch)
    d_output, boxes = _flat(d_output, dims[0], batch), _flat(boxes, dims[2], batch)
    d_boxes = _call("box_gradient", d_output, features, boxes, index.flatten(), *rule)
    return d_boxes.unflatten(0, (batch, -1)), 0


_VMAPS = {"forward": _forward_vmap, "adjoint": _adjoint_vmap, "box_gradient": _box_gradient_vmap}


# Operators. Fake kernels give results of the same shape, dtype and strides, without memory.


def _fake(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    stored, axes = _stored(like, shape)
    return like.new_empty(stored).permute(axes)


def _forward_fake(features, boxes, index, tangent, output_size, *rule):
    return _fake(features, (boxes.shape[0], features.shape[1], *output_size))


def _adjoint_fake(d_output, boxes, index, tangent, feature_shape, *rule):
    return _fake(d_output, tuple(feature_shape))


def _box_gradient_fake(d_output, features, boxes, index, *rule):
    return boxes.new_empty((boxes.shape[0], 4), dtype=gradient_dtype(boxes.dtype))


_FAKES = {"forward": _forward_fake, "adjoint": _adjoint_fake, "box_gradient": _box_gradient_fake}

_RULE = (
    "float scale_y, float scale_x, int sampling_ratio, float pixel_offset, float input_offset, "
    "float end_offset, float? min_size, bool adaptive_floor"
)
_SCHEMAS = {
    "forward": "(Tensor features, Tensor boxes, Tensor image_index, Tensor? tangent, "
    f"SymInt[] output_size, {_RULE}) -> Tensor",
    "adjoint": "(Tensor d_output, Tensor boxes, Tensor image_index, Tensor? tangent, "
    f"SymInt[] feature_shape, {_RULE}) -> Tensor",
    "box_gradient": "(Tensor d_output, Tensor features, Tensor boxes, Tensor image_index, "
    f"{_RULE}) -> Tensor",
}


def _register(name: str) -> type[Function]:
    """Defines the operator ``roialign::name``; returns the same as a `Function`."""
    operator, derivatives = f"roialign::{name}", _DERIVATIVES[name]
    torch.library.define(operator, _SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(operator, "cpu")(_KERNELS[name])
    torch.library.register_fake(operator)(_FAKES[name])
    torch.library.register_vmap(operator, _VMAPS[name])
    torch.library.register_autograd(
        operator, derivatives.backward, setup_context=_operator_context(derivatives.context)
    )
    methods = {
        "forward": lambda *args: _operate(name, args),
        "setup_context": derivatives.context,
        "backward": derivatives.backward,
        "jvp": derivatives.jvp,
        "vmap": _VMAPS[name],
    }
    return type(name, (Function,), {key: staticmethod(value) for key, value in methods.items()})


def _operator_context(context: Callable) -> Callable:
    """An operator has no forward mode: its context keeps nothing for it."""

    def setup_context(ctx, inputs, output):
        ctx.save_for_forward = lambda *tensors: None
        context(ctx, inputs, output)

    return setup_context


_FUNCTIONS = {name: _register(name) for name in _SCHEMAS}


# The choice. What is private to torch only makes a call shorter: without it the way is the public one.

try:
    from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
    from torch.autograd import forward_ad

    forward_ad._current_level  # noqa: B018

    def _watched() -> bool:
        """Whether a transform or a mode wants to see the operations."""
        return _are_functorch_transforms_active() or _len_torch_dispatch_stack() > 0

    def _in_forward_mode() -> bool:
        return forward_ad._current_level >= 0

except (ImportError, AttributeError):

    def _watched() -> bool:
        return True

    def _in_forward_mode() -> bool:
        return True


def _has_memory(tensors: list[Tensor]) -> bool:
    """Whether these are tensors themselves, on the CPU: no subclass, no meta tensor."""
    return all(
        type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in tensors
    )


def _operate(name: str, args: tuple) -> Tensor:
    """Without derivatives: on memory, or by the operator."""
    if not _watched() and _has_memory([a for a in args if isinstance(a, Tensor)]):
        return _KERNELS[name](*args)
    return getattr(torch.ops.roialign, name)(*args)


def _call(name: str, *args) -> Tensor:
    tensors = [a for a in args if isinstance(a, Tensor)]
    if is_traced() or not _has_memory(tensors):
        return getattr(torch.ops.roialign, name)(*args)
    differentiated = torch.is_grad_enabled() and any([t.requires_grad for t in tensors])
    if differentiated or _watched() or _in_forward_mode():
        return _FUNCTIONS[name].apply(*args)
    return _KERNELS[name](*args)


# Operations. Their arguments have been checked, but for the image index.


def forward(
    features: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    output_size: tuple[int, int],
    *,
    spatial_scale: tuple[float, float],
    sampling_ratio: int,
    convention: Convention,
    out: Tensor | None = None,
) -> Tensor:
    """Pooled features (K, C, P, Q)."""
    rule = _rule(spatial_scale, sampling_ratio, convention)
    args = (features, boxes, image_index, None, output_size, *rule)
    return _into(out, "forward", args)


def adjoint(
    d_output: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    feature_shape: tuple[int, ...],
    *,
    spatial_scale: tuple[float, float],
    sampling_ratio: int,
    convention: Convention,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient in the features (N, C, H, W)."""
    rule = _rule(spatial_scale, sampling_ratio, convention)
    args = (d_output, boxes, image_index, None, feature_shape, *rule)
    return _into(out, "adjoint", args)


def box_gradient(
    d_output: Tensor,
    features: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    *,
    spatial_scale: tuple[float, float],
    sampling_ratio: int,
    convention: Convention,
) -> Tensor:
    """The gradient in the boxes (K, 4), x1 y1 x2 y2, in their dtype."""
    rule = _rule(spatial_scale, sampling_ratio, convention)
    return _call("box_gradient", d_output, features, boxes, image_index, *rule)


def _into(out: Tensor | None, name: str, args: tuple) -> Tensor:
    if out is None:
        return _call(name, *args)
    if _watched() or _in_forward_mode() or not _has_memory([out, *args[:3]]):
        return out.copy_(_call(name, *args))
    return _KERNELS[name](*args, out=out)


# The layer


class ROIAlign(torch.nn.Module):
    """MindSpore's RoIAlign as a layer; coming from torchvision or detectron2, use `roialign.compat`.

    Args:
        pooled_height, pooled_width, spatial_scale, sample_num, roi_end_mode: as in
            :class:`roialign.ROIAlign`, with the same errors.

    Called with ``features`` (N, C, H, W) and ``rois`` (K, 5), rows ``(image_index, x1, y1, x2, y2)``
    in image pixels, it gives (K, C, pooled_height, pooled_width) in the features' dtype. Gradients
    reach both. It has no parameters and an empty ``state_dict``.

    >>> import torch, roialign.torch
    >>> pool = roialign.torch.ROIAlign(2, 2, 0.5)
    >>> features = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    >>> rois = torch.tensor([[0, 0.2, 0.3, 0.2, 0.3]])
    >>> pool(features, rois)
    tensor([[[[1.7750, 2.0250],
              [2.2750, 2.5250]]]])
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

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        check_features("features", features)
        return self.operator(features, rois)

    def extra_repr(self) -> str:
        return repr(self.operator)[len("ROIAlign(") : -1]

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            "roialign.torch.ROIAlign cannot be scripted: use torch.compile or torch.export"
        )
