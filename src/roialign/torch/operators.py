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
    "Tensor? tangent, SymInt[] output_size, float[] scales, float[] rule, "
    "Tensor[]? selectors=None) -> Tensor",
    "adjoint": "(Tensor d_output, Tensor boxes, Tensor image_index, Tensor? levels, "
    "Tensor? tangent, SymInt[] feature_shapes, float[] scales, float[] rule, "
    "Tensor[]? selectors=None) -> Tensor[]",
    "box_gradient": "(Tensor d_output, Tensor[] features, Tensor boxes, Tensor image_index, "
    "Tensor? levels, float[] scales, float[] rule, Tensor[]? selectors=None) -> Tensor",
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
    d_output, boxes, image_index, levels, tangent, *_ = tensors
    maps, selectors = calls.maps_of(call, tensors)
    rule = [max(number, _LEAST) for number in call.rule]
    rois, rest = (boxes, image_index, levels), (call.scales, rule, selectors or None)
    operator = OPERATORS[call.operation]
    if call.operation == "forward":
        return operator(maps, *rois, tangent, call.bins, *rest)
    if call.operation == "adjoint":
        sizes = [n for shape in calls.result_shapes(call, tensors) for n in shape]
        return tuple(operator(d_output, *rois, tangent, sizes, *rest))
    return operator(d_output, maps, *rois, *rest)


# How many arguments there are without the selectors, which may be missing.
LENGTHS = {"forward": 8, "adjoint": 8, "box_gradient": 7}


def _flat(operation: str, *args: Any) -> tuple:
    """The arguments that are arrays, or what there is for each of them, as a call has it."""
    selectors = [each for given in args[LENGTHS[operation] :] for each in given or ()]
    if operation == "adjoint":
        return *args[:5], *selectors
    if operation == "forward":
        features, *rest = args
        return None, *rest[:4], *features, *selectors
    d_output, features, *rest = args
    return d_output, *rest[:3], None, *features, *selectors


def _numbers(rule: Sequence[float]) -> list[float]:
    """Of a rule; one of an earlier version may be shorter."""
    numbers = *rule, *_core.rule_defaults[len(rule) :]
    return [-math.inf if number == _LEAST else number for number in numbers]


def _parsed(operation: str, args: Sequence, tensors: Tensors) -> Call:
    """The call of these arguments, `tensors` among them; refuses what is none."""
    *sizes, scales, rule = args[len(ORDER[operation]) : LENGTHS[operation]]
    maps, odd = divmod(len(scales), 2)
    numbers = tuple(_numbers(rule))
    expected = {"forward": [2], "adjoint": [4 * maps], "box_gradient": []}[operation]
    call = Call(operation, (), 0, ((),) * maps, tuple(scales), numbers)  # sizes are filled in below
    given, selectors = calls.maps_of(call, tensors)
    fits = [
        name not in ORDER[operation] or name in ("levels", "tangent")
        if tensor is None
        else tensor.dim() == len(DIMENSIONS[name])
        for name, tensor in zip(calls.names(call, tensors), tensors)
    ]
    if (
        not maps
        or odd
        or [len(size) for size in sizes] != expected
        or len(given) != maps * ("features" in TAKES[operation])
        or len(selectors) != maps * call.selects
        or not all(fits)
    ):
        raise ValueError(f"roialign::{operation}: the arguments do not fit")
    if operation == "adjoint":
        shapes = [sizes[0][i : i + 4] for i in range(0, 4 * maps, 4)]
    else:
        shapes = [features.shape for features in given]
    call.bins = tuple(sizes[0] if operation == "forward" else tensors[0].shape[2:])
    call.images, call.maps = shapes[0][0], tuple([tuple(shape[2:]) for shape in shapes])
    return call


def _listed(result: Result) -> Tensor | list[Tensor]:
    return list(result) if type(result) is tuple else result


# What is registered of each


def _forward(
    features, boxes, image_index, levels, tangent, output_size, scales, rule, selectors=None
) -> Tensor:
    (like, *_), rois = features, (boxes, image_index)
    shape = boxes.shape[0], like.shape[1], *output_size
    out = kernels.laid_out(like, shape, kernels.empty)
    rest = rule, out, kernels.threads(), selectors
    _core.forward(features, scales, rois, levels, tangent, *rest)
    return out


def _adjoint(
    d_output, boxes, image_index, levels, tangent, feature_shapes, scales, rule, selectors=None
) -> list[Tensor]:
    rois, channels, out = (boxes, image_index), d_output.shape[1], []
    for i in range(0, len(feature_shapes), 4):
        images, _, height, width = feature_shapes[i : i + 4]
        shape = images, channels, height, width
        out.append(kernels.laid_out(d_output, shape, kernels.empty))
    rest = rule, out, kernels.threads(), selectors
    _core.adjoint(d_output, scales, rois, levels, tangent, *rest)
    return out


def _box_gradient(
    d_output, features, boxes, image_index, levels, scales, rule, selectors=None
) -> Tensor:
    rois, real = (boxes, image_index), kernels.coordinate(d_output.dtype)
    out = d_output.new_empty(boxes.shape, dtype=real)
    rest = rule, out, kernels.threads(), selectors
    _core.box_gradient(d_output, features, scales, rois, levels, *rest)
    return out.to(boxes.dtype)


# The short way of most calls.
_ON_CORE = {"forward": _forward, "adjoint": _adjoint, "box_gradient": _box_gradient}


def _kernel(operation: str, *args: Any) -> Tensor | list[Tensor]:
    tensors = _flat(operation, *args)
    kept = [t is None or t.untyped_storage().nbytes() for t in tensors]  # not freed
    if tensors[1] is not None and kernels.home(tensors[1]) is None and all(kept):
        try:
            return _ON_CORE[operation](*args)
        except (AttributeError, TypeError, ValueError):  # the core refuses what it does not read
            pass
    call = _parsed(operation, args, tensors)
    tensors = _checked(call, tensors)
    try:
        return _listed(kernels.run(call, tensors))
    except (TypeError, ValueError) as error:
        raise type(error)(f"roialign::{operation}: {error}") from None


def _checked(call: Call, tensors: Tensors) -> Tensors:
    """With copies of what is not aligned; refuses what a kernel would read otherwise."""
    operation, device = call.operation, calls.source(tensors).device
    names = calls.names(call, tensors)
    for name, tensor in zip(names, tensors):
        if tensor is not None:
            kernels.check_memory(name, tensor)
            is_bytes = name in ("features", "selectors") and tensor.dtype in kernels.BYTES
            if kernels.kind(tensor.dtype) == "other" and not is_bytes:
                raise TypeError(f"roialign::{operation}: arrays must be of floats or integers")
            if tensor.device != device and tensor.numel():
                raise TypeError(f"roialign::{operation}: tensors must be on one device")
    return [_aligned(*pair) for pair in zip(names, tensors)]


def _aligned(name: str, tensor: Tensor | None) -> Tensor | None:
    if tensor is None or tensor.data_ptr() % tensor.itemsize == 0:
        return tensor
    _core.log(f"`{name}` is copied: its elements are not aligned")
    return tensor.clone()


def _fake(operation: str, *args: Any) -> Tensor | list[Tensor]:
    """A result of the same shape, dtype and strides, without memory."""
    tensors = _flat(operation, *args)
    call = _parsed(operation, args, tensors)
    if operation == "box_gradient":
        _, boxes, *_ = tensors
        dtype = kernels.gradient_dtype(boxes.dtype)
        return boxes.new_empty(boxes.shape, dtype=dtype)
    return _listed(kernels.results(call, tensors, Tensor.new_empty))


def _setup_context(operation: str, ctx: Any, inputs: tuple, output: Any) -> None:
    tensors = _flat(operation, *inputs)
    transforms.keep(ctx, _parsed(operation, inputs, tensors), tensors)


def _backward(operation: str, ctx: Any, d_result: Any) -> tuple:
    needs = _flat(operation, *ctx.needs_input_grad)
    d_results = d_result if operation == "adjoint" else [d_result]
    flat = transforms.backward(run, ctx, needs, d_results)
    features, _ = calls.maps_of(ctx.call, flat)
    gradients = dict(zip(calls.ORDER, flat)) | {"features": list(features)}
    others = ctx.needs_input_grad[len(ORDER[operation]) :]
    none = [[None] * len(need) if type(need) is list else None for need in others]
    return *[gradients[name] for name in ORDER[operation]], *none


def _batch(operation: str, info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
    dims, tensors = _flat(operation, *in_dims), _flat(operation, *args)
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
    for x in _flat(operation, *args):
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
