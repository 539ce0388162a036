"""The operators ``torch.ops.roialign``, which compilers, exporters and tensor subclasses see.

In the order of registration: schemas, kernels, fake kernels, derivatives, batching.
"""

from __future__ import annotations

import functools
import math
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from roialign import _core
from roialign._operations import DIMENSIONS

from . import calls, kernels, transforms
from .calls import CHANNELS, ORDER, Arrays, Call, Result

_SCHEMAS = {
    "forward": "(Tensor[] features, Tensor boxes, Tensor image_index, Tensor? levels, "
    "Tensor? tangent, SymInt[] output_size, float[] scales, float[] rule) -> Tensor",
    "adjoint": "(Tensor d_output, Tensor boxes, Tensor image_index, Tensor? levels, "
    "Tensor? tangent, SymInt[] feature_shapes, float[] scales, float[] rule) -> Tensor[]",
    "box_gradient": "(Tensor d_output, Tensor[] features, Tensor boxes, Tensor image_index, "
    "Tensor? levels, float[] scales, float[] rule) -> Tensor",
}


# A call as the arguments of its operator, and back


# AOTInductor writes infinite numbers of a list as words, which it cannot read (torch 2.13).
_LEAST = -sys.float_info.max  # stands for -infinity


def run(call: Call, arrays: Arrays) -> Result:
    sizes: list = []
    if call.operation == "forward":
        sizes = [call.bins]
    elif call.operation == "adjoint":
        sizes = [[n for shape in calls.result_shapes(call, arrays) for n in shape]]
    given = [arrays.get(name) for name in ORDER[call.operation]]
    rule = [max(number, _LEAST) for number in call.rule]
    result = OPERATORS[call.operation](*given, *sizes, call.scales, rule)
    return tuple(result) if call.operation == "adjoint" else result


def _parsed(operation: str, args: Sequence, batched: int = 0) -> tuple[Call, Arrays]:
    """Arrays may have an axis more, if they are `batched`."""
    order = ORDER[operation]
    *sizes, scales, rule = args[len(order) :]
    arrays = {name: x for name, x in zip(order, args) if x is not None}
    if "features" in arrays:
        arrays["features"] = tuple(arrays["features"])
    maps, odd = divmod(len(scales), 2)
    expected = {"forward": [2], "adjoint": [4 * maps], "box_gradient": []}[operation]
    if (
        not maps
        or odd
        or [len(size) for size in sizes] != expected
        or len(arrays.get("features", scales[::2])) != maps
        or not {*arrays, "levels", "tangent"}.issuperset(order)
        or not all([_has_rank(n, t, batched) for n, t in _named(arrays)])
    ):
        _refuse_to_fit(operation)
    if operation == "adjoint":
        shapes = [sizes[0][i : i + 4] for i in range(0, 4 * maps, 4)]
    else:
        shapes = [features.shape for features in arrays["features"]]
    bins = sizes[0] if operation == "forward" else arrays["d_output"].shape[2:4]
    pixels = tuple([tuple(shape[2:4]) for shape in shapes])
    numbers = [-math.inf if number == _LEAST else number for number in rule]
    rule = *numbers, *_core.rule_defaults[len(numbers) :]  # of another version it may be shorter
    return Call(operation, tuple(bins), shapes[0][0], pixels, tuple(scales), rule), arrays


def _named(arrays: Arrays) -> zip[tuple[str, Tensor]]:
    return zip(calls.names(arrays), calls.tensors(arrays))


def _has_rank(name: str, tensor: Tensor | None, batched: int) -> bool:
    return tensor is not None and 0 <= tensor.dim() - len(DIMENSIONS[name]) <= batched


def _refuse_to_fit(operation: str) -> None:
    raise ValueError(f"roialign::{operation}: the maps, the boxes and the pooled array do not fit")


def _check_fit(call: Call, arrays: Arrays) -> None:
    """Operators are called with any arguments: the core refuses what does not fit, a GPU cannot."""
    p, q = call.bins
    lengths = {"n": call.images, "p": p, "q": q, "xy": 4}
    dtype, device = calls.source(arrays).dtype, calls.source(arrays).device
    for name, tensor in _named(arrays):
        for dimension, length in zip(DIMENSIONS[name], tensor.shape):
            if dimension not in "hw" and lengths.setdefault(dimension, length) != length:
                _refuse_to_fit(call.operation)
    for name, tensor in _named(arrays):
        if name in CHANNELS[call.operation] and (
            tensor.dtype != dtype or kernels.kind(dtype) != "float"
        ):
            raise TypeError(f"roialign::{call.operation}: arrays must be of one float dtype")
        if kernels.kind(tensor.dtype) == "other":
            raise TypeError(
                f"roialign::{call.operation}: boxes and indices must be floats or integers"
            )
        if tensor.device != device and tensor.numel():
            raise TypeError(f"roialign::{call.operation}: tensors must be on one device")
        kernels.check_memory(name, tensor)


def _listed(result: Result) -> Tensor | list[Tensor]:
    return list(result) if type(result) is tuple else result


# What is registered of each


def _kernel(operation: str, *args: Any) -> Tensor | list[Tensor]:
    call, arrays = _parsed(operation, args)
    _check_fit(call, arrays)
    aligned = [t.clone() if t.data_ptr() % t.itemsize else t for t in calls.tensors(arrays)]
    return _listed(kernels.run(call, calls.named(calls.names(arrays), aligned)))


def _fake(operation: str, *args: Any) -> Tensor | list[Tensor]:
    """A result of the same shape, dtype and strides, without memory."""
    call, arrays = _parsed(operation, args)
    if operation == "box_gradient":
        boxes = arrays["boxes"]
        dtype = kernels.gradient_dtype(boxes.dtype)
        return boxes.new_empty((boxes.shape[0], 4), dtype=dtype)
    return _listed(kernels.results(call, arrays, Tensor.new_empty))


def _setup_context(operation: str, ctx: Any, inputs: tuple, output: Any) -> None:
    call, arrays = _parsed(operation, inputs)
    transforms.keep(ctx, call, calls.names(arrays), calls.tensors(arrays))


def _backward(operation: str, ctx: Any, d_result: Any) -> tuple:
    needs = dict(zip(ORDER[operation], ctx.needs_input_grad))
    moving = [name for name, need in needs.items() if (any(need) if name == "features" else need)]
    d_results = d_result if operation == "adjoint" else [d_result]
    gradients = transforms.backward(run, ctx, moving, d_results)
    if "features" in needs:
        gradients["features"] = list(gradients.get("features", [None] * len(needs["features"])))
    others = len(ctx.needs_input_grad) - len(needs)
    return *[gradients.get(name) for name in needs], *[None] * others


def _batch(operation: str, info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
    count = len(ORDER[operation])
    arrays = list(map(transforms.last, args[:count], in_dims))
    dims = dict(zip(ORDER[operation], in_dims))
    call = _parsed(operation, (*arrays, *args[count:]), batched=1)
    result, axis = transforms.batch(run, info.batch_size, dims, *call)
    return _listed(result), [axis] * len(result) if operation == "adjoint" else axis


def _batch_gradients(operation: str, *args: Any) -> Tensor | list[Tensor]:
    """For ``is_grads_batched=True`` of `torch.autograd.grad`, which has a vmap of its own."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    batched, sizes = torch._C._parse_dispatch_key("Batched"), []

    def unwrapped(x: Any) -> tuple[Any, Any]:
        """With the axis of the batch, and which that is."""
        if isinstance(x, (tuple, list)):
            return tuple(zip(*map(unwrapped, x)))
        if x is None or not torch._C._dispatch_keys(x).has(batched):
            return x, None
        x = torch._remove_batch_dim(x, level, 0, 0)
        sizes.append(len(x))
        return x, 0

    count = len(ORDER[operation])
    arrays, dims = zip(*map(unwrapped, args[:count]))
    info = types.SimpleNamespace(batch_size=sizes[0])
    result, axes = _batch(operation, info, dims, *arrays, *args[count:])
    if operation == "adjoint":
        return [torch._add_batch_dim(t, axis, level) for t, axis in zip(result, axes)]
    return torch._add_batch_dim(result, axes, level)


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
