"""The operators ``torch.ops.roialign``, which compilers, exporters and tensor subclasses see.

In the order of registration: schemas, kernels, fake kernels, derivatives, batching.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from roialign import _core
from roialign._operations import DIMENSIONS, ROIS, TAKES

from . import calls, kernels, transforms
from .calls import Call, Result, Tensors

_SCHEMAS = {
    "forward": "(Tensor[] features, Tensor boxes, Tensor image_index, Tensor? levels, "
    "Tensor? tangent, SymInt[] output_size, float[] scales, float[] rule) -> Tensor",
    "adjoint": "(Tensor d_output, Tensor boxes, Tensor image_index, Tensor? levels, "
    "Tensor? tangent, SymInt[] feature_shapes, float[] scales, float[] rule) -> Tensor[]",
    "box_gradient": "(Tensor d_output, Tensor[] features, Tensor boxes, Tensor image_index, "
    "Tensor? levels, float[] scales, float[] rule) -> Tensor",
}


# What each takes first: arrays, in this order.
ORDER = {
    operation: (*[n for n in takes if n != "tangent"], *ROIS, *[n for n in takes if n == "tangent"])
    for operation, takes in TAKES.items()
}


# A call as the arguments of its operator, and back


# AOTInductor writes infinite numbers of a list as words, which it cannot read (torch 2.13).
_LEAST = -sys.float_info.max  # stands for -infinity


def run(call: Call, tensors: Tensors) -> Result:
    d_output, boxes, image_index, levels, tangent, *maps = tensors
    rois, rule = (boxes, image_index, levels), [max(number, _LEAST) for number in call.rule]
    operator = OPERATORS[call.operation]
    if call.operation == "forward":
        return operator(maps, *rois, tangent, call.bins, call.scales, rule)
    if call.operation == "adjoint":
        sizes = [n for shape in calls.result_shapes(call, tensors) for n in shape]
        return tuple(operator(d_output, *rois, tangent, sizes, call.scales, rule))
    return operator(d_output, maps, *rois, call.scales, rule)


# The arguments that are arrays, or what there is for each of them, as a call has it.
_FLAT: dict[str, Callable[..., tuple]] = {
    "forward": lambda features, *rest: (None, *rest[:4], *features),
    "adjoint": lambda *args: args[:5],
    "box_gradient": lambda d_output, features, *rest: (d_output, *rest[:3], None, *features),
}


def _numbers(rule: Sequence[float]) -> list[float]:
    """Of a rule; one of an earlier version may be shorter."""
    numbers = *rule, *_core.rule_defaults[len(rule) :]
    return [-math.inf if number == _LEAST else number for number in numbers]


def _parsed(operation: str, args: Sequence, tensors: Tensors) -> Call:
    """The call of these arguments, `tensors` among them; refuses what is none."""
    *sizes, scales, rule = args[len(ORDER[operation]) :]
    maps, odd = divmod(len(scales), 2)
    expected = {"forward": [2], "adjoint": [4 * maps], "box_gradient": []}[operation]
    given = tensors[len(calls.ORDER) :]
    fits = [
        name not in ORDER[operation] or name in ("levels", "tangent")
        if tensor is None
        else tensor.dim() == len(DIMENSIONS[name])
        for name, tensor in zip(calls.names(tensors), tensors)
    ]
    if (
        not maps
        or odd
        or [len(size) for size in sizes] != expected
        or len(given) != maps * ("features" in TAKES[operation])
        or not all(fits)
    ):
        raise ValueError(f"roialign::{operation}: the arguments do not fit")
    if operation == "adjoint":
        shapes = [sizes[0][i : i + 4] for i in range(0, 4 * maps, 4)]
    else:
        shapes = [features.shape for features in given]
    bins = sizes[0] if operation == "forward" else tensors[0].shape[2:]
    pixels = tuple([tuple(shape[2:]) for shape in shapes])
    return Call(operation, tuple(bins), shapes[0][0], pixels, tuple(scales), tuple(_numbers(rule)))


def _listed(result: Result) -> Tensor | list[Tensor]:
    return list(result) if type(result) is tuple else result


# What is registered of each


def _kernel(operation: str, *args: Any) -> Tensor | list[Tensor]:
    tensors = _FLAT[operation](*args)
    like, boxes, tangent = calls.source(tensors), tensors[1], tensors[4]
    ready = (
        like is not None
        and boxes is not None
        and boxes.is_cpu
        and kernels.home(boxes) is None
        and boxes.dtype in kernels.FLOATS
        and kernels.have_memory(tensors)
    )
    short = ready and tangent is None and boxes.dim() == 2 and like.dim() == 4
    if not short:
        call = _parsed(operation, args, tensors)
        tensors = tensors if ready else _checked(operation, tensors)
    try:
        if short:
            return _on_core(operation, args, tensors, like)
        return _listed(kernels.run(call, tensors))
    except (TypeError, ValueError) as error:
        _parsed(operation, args, tensors)  # its error says more
        raise type(error)(f"roialign::{operation}: {error}") from None


def _on_core(
    operation: str, args: Sequence, tensors: Tensors, like: Tensor
) -> Tensor | list[Tensor]:
    """The short way of most calls: `kernels.run` without a record of the call."""
    *sizes, scales, rule = args[len(ORDER[operation]) :]
    boxes, channels = tensors[1], like.shape[1]
    if operation == "forward":
        shape = boxes.shape[0], channels, *sizes[0]
        out = kernels.laid_out(like, shape, kernels.empty)
    elif operation == "adjoint":
        (n,), out = sizes, []
        for i in range(0, len(n), 4):
            shape = n[i], channels, *n[i + 2 : i + 4]
            out.append(kernels.laid_out(like, shape, kernels.empty))
    else:
        dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
        out = like.new_empty((boxes.shape[0], 4), dtype=dtype)
    kernels.on_core(operation, tensors, scales, _numbers(rule), out)
    return out.to(boxes.dtype) if operation == "box_gradient" else out


def _checked(operation: str, tensors: Tensors) -> Tensors:
    """With copies of what is not aligned; refuses what a kernel would read otherwise."""
    device = calls.source(tensors).device
    for name, tensor in zip(calls.names(tensors), tensors):
        if tensor is not None:
            kernels.check_memory(name, tensor)
            is_bytes = name == "features" and tensor.dtype in kernels.BYTES
            if kernels.kind(tensor.dtype) == "other" and not is_bytes:
                raise TypeError(f"roialign::{operation}: arrays must be of floats or integers")
            if tensor.device != device and tensor.numel():
                raise TypeError(f"roialign::{operation}: tensors must be on one device")
    return [_aligned(*pair) for pair in zip(calls.names(tensors), tensors)]


def _aligned(name: str, tensor: Tensor | None) -> Tensor | None:
    if tensor is None or tensor.data_ptr() % tensor.itemsize == 0:
        return tensor
    _core.log(f"`{name}` is copied: its elements are not aligned")
    return tensor.clone()


def _fake(operation: str, *args: Any) -> Tensor | list[Tensor]:
    """A result of the same shape, dtype and strides, without memory."""
    tensors = _FLAT[operation](*args)
    call = _parsed(operation, args, tensors)
    if operation == "box_gradient":
        _, boxes, *_ = tensors
        dtype = kernels.gradient_dtype(boxes.dtype)
        return boxes.new_empty((boxes.shape[0], 4), dtype=dtype)
    return _listed(kernels.results(call, tensors, Tensor.new_empty))


def _setup_context(operation: str, ctx: Any, inputs: tuple, output: Any) -> None:
    tensors = _FLAT[operation](*inputs)
    transforms.keep(ctx, _parsed(operation, inputs, tensors), tensors)


def _backward(operation: str, ctx: Any, d_result: Any) -> tuple:
    needs = _FLAT[operation](*ctx.needs_input_grad)
    d_results = d_result if operation == "adjoint" else [d_result]
    flat = transforms.backward(run, ctx, needs, d_results)
    gradients = dict(zip(calls.ORDER, flat)) | {"features": list(flat[len(calls.ORDER) :])}
    others = len(ctx.needs_input_grad) - len(ORDER[operation])
    return *[gradients[name] for name in ORDER[operation]], *[None] * others


def _batch(operation: str, info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
    dims, tensors = _FLAT[operation](*in_dims), _FLAT[operation](*args)
    result, axis = _batched(operation, args, info.batch_size, dims, tensors)
    return _listed(result), [axis] * len(result) if operation == "adjoint" else axis


def _batched(operation: str, args: tuple, size: int, dims: Sequence, tensors: Tensors) -> tuple:
    one = [x if dim is None else x.select(dim, 0) for x, dim in zip(tensors, dims)]
    return transforms.batch(run, size, dims, _parsed(operation, args, one), tensors)


def _batch_gradients(operation: str, *args: Any) -> Tensor | list[Tensor]:
    """For ``is_grads_batched=True`` of `torch.autograd.grad`, which has a vmap of its own."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    batched = torch._C._parse_dispatch_key("Batched")
    dims, tensors = [], []
    for x in _FLAT[operation](*args):
        is_batched = x is not None and torch._C._dispatch_keys(x).has(batched)
        dims.append(0 if is_batched else None)
        tensors.append(torch._remove_batch_dim(x, level, 0, 0) if is_batched else x)
    size = len(tensors[dims.index(0)])
    result, axis = _batched(operation, args, size, dims, tensors)
    if operation == "adjoint":
        return [torch._add_batch_dim(each, axis, level) for each in result]
    return torch._add_batch_dim(result, axis, level)


def _register(operation: str) -> Callable:
    name = f"roialign::{operation}.maps"
    torch.library.define(name, _SCHEMAS[operation], tags=(torch.Tag.pt2_compliant_tag,))
    kernel, fake, backward, setup_context, batch = (
        functools.partial(f, operation) for f in (_kernel, _fake, _backward, _setup_context, _batch)
    )
    torch.library.impl(name, ("cpu", "cuda", "privateuseone"))(kernel)  # the last is npu
    torch.library.register_fake(name)(fake)
    torch.library.register_autograd(name, backward, setup_context=setup_context)
    torch.library.register_vmap(name, batch)
    torch.library.impl(name, "Batched")(functools.partial(_batch_gradients, operation))
    return getattr(torch.ops.roialign, operation).maps


OPERATORS = {operation: _register(operation) for operation in _SCHEMAS}
