"""Which way a call goes: the table `ROUTES`, and the way with a record for the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling
from torch.jit import is_tracing

from roialign import _core

from . import calls, kernels, onnx, operators, sharding, transforms
from .calls import Arrays, Call, Result

# What is private to torch only makes a call shorter: without it the way is the public one.
try:
    from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
    from torch._C._functorch import unwrap_if_dead as contents  # of what a transform left
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

    def contents(tensor: Tensor) -> Tensor:
        return tensor


def is_traced() -> bool:
    """Whether a compiler or a tracer reads the Python code: memory is not for it."""
    return is_compiling() or is_tracing()


def needs_gradient(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any([t.requires_grad for t in tensors])


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether these are torch's own, of a device: with memory, or wrappers that pass for such."""
    return all([type(t) in kernels.PLAIN and not t.is_meta for t in tensors])


def has_memory(tensor: Tensor) -> bool:
    """Whether its elements are as they are meant, aligned, where kernels read and write them."""
    return (
        _core.has_memory(tensor)
        and not tensor.is_neg()
        and (tensor.untyped_storage().nbytes() > 0 or not tensor.numel())  # not freed
    )


def have_memory(tensors: Sequence[Tensor]) -> bool:
    return all(map(has_memory, tensors))


def are_in_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether a kernel can have these, and nobody looks on."""
    watched = is_traced() or is_watched() or in_forward_mode()
    return not watched and are_plain(tensors) and have_memory(tensors)


# Ways


class RoIAlign(Function):
    """A call as `torch.func`, forward mode and the graph of a backward see it."""

    @staticmethod
    def forward(call: Call, names: tuple[str, ...], *tensors: Tensor) -> Result:
        run = operators.run
        if not is_watched() and are_plain(tensors) and have_memory(tensors):
            run = kernels.run
        return run(call, calls.named(names, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Result) -> None:
        call, ctx.names, *tensors = inputs
        transforms.keep(ctx, call, ctx.names, tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *d_results: Tensor | None) -> tuple:
        _, _, *needs = ctx.needs_input_grad
        moving = {name for name, need in zip(ctx.names, needs) if need}
        gradients = transforms.backward(run, ctx, moving, d_results)
        maps = iter(gradients.pop("features", ()))
        flat = [next(maps, None) if n == "features" else gradients.get(n) for n in ctx.names]
        return None, None, *flat

    @staticmethod
    def jvp(ctx: Any, *moved: Tensor | None) -> Result | None:
        arrays = calls.named(ctx.names, ctx.saved_tensors)
        return transforms.jvp(run, ctx.call, arrays, calls.named(ctx.names, moved[2:]))

    @staticmethod
    def vmap(info: Any, in_dims: tuple, call: Call, names: tuple[str, ...], *tensors: Tensor):
        dims = calls.named(names, in_dims[2:])
        arrays = {n: transforms.last(x, dims[n]) for n, x in calls.named(names, tensors).items()}
        result, axis = transforms.batch(run, info.batch_size, dims, call, arrays)
        return result, (axis,) * len(result) if type(result) is tuple else axis


_record = super(Function, RoIAlign).apply  # without its search for transforms


def _to_operator(call: Call, arrays: Arrays) -> Result:
    sharding.register()
    return operators.run(call, arrays)


def _to_function(call: Call, arrays: Arrays) -> Result:
    return RoIAlign.apply(call, calls.names(arrays), *calls.tensors(arrays))


def _to_record(call: Call, arrays: Arrays) -> Result:
    return _record(call, calls.names(arrays), *calls.tensors(arrays))


def _to_contents(call: Call, arrays: Arrays) -> Result:
    tensors = [contents(t) for t in calls.tensors(arrays)]
    return run(call, calls.named(calls.names(arrays), tensors))


# The table. The first row whose condition the call and its tensors meet says the way.

ROUTES: tuple[tuple[Callable[[Call, Sequence[Tensor]], bool], Callable], ...] = (
    # most calls: nobody looks on, and nothing is to be remembered
    (lambda call, tensors: are_in_memory(tensors) and not needs_gradient(tensors), kernels.run),
    # an export to ONNX, which has an operator of its own
    (
        lambda call, tensors: is_traced() and call.operation == "forward" and onnx.is_exporting(),
        onnx.forward,
    ),
    # a compiler, subclasses, no values
    (lambda call, tensors: is_traced() or not are_plain(tensors), _to_operator),
    # torch.func, forward mode, a mode of dispatch
    (lambda call, tensors: is_watched() or in_forward_mode(), _to_function),
    # what a transform has left behind
    (lambda call, tensors: any([contents(t) is not t for t in tensors]), _to_contents),
    # zeros or a negation that is not stored, memory that is not aligned or was freed
    (lambda call, tensors: not have_memory(tensors), _to_operator),
    # a backward may come
    (lambda call, tensors: True, _to_record),
)


def run(call: Call, arrays: Arrays, out: Result | None = None) -> Result:
    """Writes `out`, if it is given."""
    tensors = calls.tensors(arrays)
    if out is None:
        return _way(call, tensors)(call, arrays)
    outs = out if type(out) is tuple else (out,)
    if _way(call, [*outs, *tensors]) is kernels.run:
        kernels.run(call, arrays, out)
        for each in outs:  # so that autograd knows: a graph that has kept it refuses its backward
            torch.autograd.graph.increment_version(each)
    else:
        results = run(call, arrays)
        for each, result in zip(outs, results if type(results) is tuple else (results,)):
            each.copy_(result)
    return out


def _way(call: Call, tensors: Sequence[Tensor]) -> Callable[..., Result]:
    for applies, way in ROUTES:
        if applies(call, tensors):
            return way
    raise AssertionError("the last row takes all")
