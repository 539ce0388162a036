"""Which way a call goes, and the way with a record for the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling
from torch.jit import is_tracing

from roialign import _core

from . import calls, kernels, onnx, operators, sharding, transforms
from .calls import Call, Result, Tensors

# What is private to torch only makes a call shorter: without it the way is the public one.
try:
    from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
    from torch.autograd import forward_ad

    forward_ad._current_level  # noqa: B018

    def is_watched() -> bool:
        """Whether a transform or a mode wants to see the operations."""
        return _are_functorch_transforms_active() or _len_torch_dispatch_stack() > 0

    def in_forward_mode() -> bool:
        return forward_ad._current_level >= 0

except (ImportError, AttributeError):

    def is_watched() -> bool:
        return True

    def in_forward_mode() -> bool:
        return True


def is_traced() -> bool:
    """Whether a compiler or a tracer reads the Python code: memory is not for it."""
    return is_compiling() or is_tracing()


def needs_gradient(tensors: Tensors) -> bool:
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])


def are_plain(tensors: Tensors) -> bool:
    """Whether these are torch's own: with memory, or wrappers that pass for such."""
    return kernels.PLAIN.issuperset(map(type, tensors))


# Ways


class RoIAlign(Function):
    """`kernels.pool` in the graph of a backward: one step, whatever the form of the RoIs."""

    @staticmethod
    def forward(ctx: Any, call: Call, features: Tensor, *rois: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(features if rois[0].requires_grad else None, *rois)
        ctx.call = call
        return kernels.pool(call, features, *rois)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None) -> tuple:
        _, features_move, boxes_move, *index = ctx.needs_input_grad
        features, *rois = ctx.saved_tensors
        d_features = d_rois = None
        if d_output is not None:
            tensors = d_output, *kernels.pair(*rois), None, None
            if features_move:
                (d_features,) = run(ctx.call.to("adjoint"), tensors)
            if boxes_move:
                d_rois = run(ctx.call.to("box_gradient"), (*tensors, features))
                d_rois = d_rois if index else calls.with_index_column(d_rois)
        return None, d_features, d_rois, *[None for _ in index]


class Operation(Function):
    """`kernels.run` in the graph of a backward."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> Result:
        transforms.keep(ctx, call, tensors)
        return kernels.run(call, tensors)

    @staticmethod
    def backward(ctx: Any, *d_results: Tensor | None) -> tuple:
        return None, *transforms.backward(run, ctx, ctx.needs_input_grad[1:], d_results)


class TransformedOperation(Operation):
    """A call as `torch.func` and forward mode see it."""

    @staticmethod
    def forward(call: Call, *tensors: Tensor | None) -> Result:
        on_memory = not is_watched() and are_plain(tensors) and kernels.have_memory(tensors)
        return (kernels if on_memory else operators).run(call, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Result) -> None:
        call, *tensors = inputs
        transforms.keep(ctx, call, tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def jvp(ctx: Any, _call: None, *moved: Tensor | None) -> Result | None:
        return transforms.jvp(run, ctx.call, ctx.saved_tensors, moved)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, call: Call, *tensors: Tensor | None):
        result, axis = transforms.batch(run, info.batch_size, in_dims[1:], call, tensors)
        return result, (axis,) * len(result) if type(result) is tuple else axis


# Without their search for transforms.
_pool_and_record = super(Function, RoIAlign).apply
_run_and_record = super(Function, Operation).apply


def pool(call: Call, features: Tensor, *rois: Tensor, out: Tensor | None = None) -> Tensor:
    """`kernels.pool`, where all is in memory and nobody looks on but autograd."""
    if out is not None:
        return _written(kernels.pool(call, features, *rois, out=out))
    if torch.is_grad_enabled() and (features.requires_grad or rois[0].requires_grad):
        if call.selects:
            return _run_and_record(call, *kernels.flat(call, features, *rois))
        return _pool_and_record(call, features, *rois)
    return kernels.pool(call, features, *rois)


def on_memory(call: Call, tensors: Tensors, out: Result | None = None) -> Result:
    """As `pool`, of any operation."""
    if out is not None:
        return _written(kernels.run(call, tensors, out))
    if call.operation == "forward":
        _, boxes, image_index, levels, tangent, *maps = tensors
        if levels is tangent is None and boxes.is_floating_point() and not call.selects:
            return pool(call, *maps, boxes, image_index)
    if needs_gradient(tensors):
        return _run_and_record(call, *tensors)
    return kernels.run(call, tensors)


def _written(out: Result) -> Result:
    """So that autograd knows: a graph that has kept it refuses its backward."""
    for each in out if type(out) is tuple else (out,):
        torch.autograd.graph.increment_version(each)
    return out


def _transformed(call: Call, tensors: Tensors) -> Result:
    return TransformedOperation.apply(call, *tensors)


def _to_operator(call: Call, tensors: Tensors) -> Result:
    if call.operation == "forward" and onnx.is_exporting():  # ONNX has an operator of its own
        return onnx.forward(call, tensors)
    sharding.register()
    return operators.run(call, tensors)


def _way(tensors: Tensors) -> Callable[..., Result]:
    """The first whose condition the tensors meet."""
    if is_traced() or not are_plain(tensors):  # a compiler, an exporter, subclasses
        return _to_operator
    if is_watched() or in_forward_mode():  # torch.func, forward mode, a mode of dispatch
        return _transformed
    if not kernels.have_memory(tensors):  # it refuses what was freed and has ways for the rest
        return _to_operator
    return on_memory  # most calls


def run(call: Call, tensors: Tensors, out: Result | None = None) -> Result:
    """Writes `out`, if it is given."""
    if out is None:
        return _way(tensors)(call, tensors)
    outs = out if type(out) is tuple else (out,)
    if _way([*tensors, *outs]) is on_memory:
        return on_memory(call, tensors, out)
    results = run(call, tensors)
    if not is_traced():
        _core.log("`out` is copied from another tensor: not all is plain and aligned memory")
    for each, result in zip(outs, results if type(results) is tuple else (results,)):
        each.copy_(result)
    return out
