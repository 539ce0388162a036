"""Derivatives and batching of a call, as the table of operations says.

`run(call, tensors)` makes the calls that they consist of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from roialign import _operations
from roialign._operations import BESIDE, DIMENSIONS, GIVES, TAKES

from . import calls
from .calls import Call, Result, Tensors

Run = Callable[[Call, Tensors], Result]

# The gradients of each operation: in which array, by which operation.
_GRADIENTS = {
    operation: {
        **{name: _operations.giving(name) for name in takes},
        "boxes": _operations.giving("tangent"),
    }
    for operation, takes in TAKES.items()
}


# Derivatives


def keep(ctx: Any, call: Call, tensors: Tensors) -> None:
    """For `backward`. What alone needs a gradient is not kept: a call is linear in that."""
    pairs = list(zip(calls.names(call, tensors), tensors))
    moving = {name for name, x in pairs if x is not None and x.requires_grad}
    moving.intersection_update(_GRADIENTS[call.operation])
    unneeded = moving - {"boxes"} if len(moving) == 1 else ()
    ctx.set_materialize_grads(False)  # a gradient that is None: the result does not count
    ctx.save_for_backward(*[None if name in unneeded else x for name, x in pairs])
    ctx.call = call


def backward(run: Run, ctx: Any, needs: Sequence[bool], d_results: Tensors) -> tuple:
    """The gradients in those tensors that need one, but in no index and no selector."""
    features, selectors = calls.maps_of(ctx.call, needs)
    gradients = {"features": [None] * len(features), "selectors": [None] * len(selectors)}
    if all([d is None for d in d_results]):
        return calls.flat(gradients)
    call, arrays = ctx.call, calls.named(ctx.call, ctx.saved_tensors)
    gives = GIVES[call.operation]
    arrays[gives] = _filled(call, d_results) if gives == "features" else d_results[0]
    moving = {name for name, need in zip(calls.names(call, needs), needs) if need}
    for name, operation in _GRADIENTS[call.operation].items():
        if name in moving:
            if name == "boxes":
                call.require_slopes()
                _operations.require_first_order(call.operation, arrays)
            taken = {n: x for n, x in arrays.items() if n in (*BESIDE, *TAKES[operation])}
            gradients[name] = run(call.to(operation), calls.flat(taken))
    return calls.flat(gradients)


def jvp(run: Run, call: Call, tensors: Tensors, moved: Tensors) -> Result | None:
    """The derivative along the tangents `moved`, of which any may be None."""
    known = _GRADIENTS[call.operation]
    along = {name: x for name, x in calls.named(call, moved).items() if name in known}
    if "features" in along:
        along["features"] = _filled(call, along["features"])
    if "boxes" in along:
        call.require_slopes()
    total = None
    for given in _operations.terms(call.operation, calls.named(call, tensors), along):
        term = run(call, calls.flat(given))
        if total is None:
            total = term
        else:
            total = tuple(map(torch.add, total, term)) if type(term) is tuple else total + term
    return total


def _filled(call: Call, maps: Tensors) -> tuple[Tensor, ...]:
    """Zeros where one of the maps is None."""
    like = next(each for each in maps if each is not None)
    shapes = [(call.images, like.shape[1], *size) for size in call.maps]
    return tuple([like.new_zeros(s) if m is None else m for m, s in zip(maps, shapes)])


# Batching: calls are one call of more channels, or of more RoIs.


def batch(
    run: Run, size: int, dims: Sequence[int | None], call: Call, tensors: Tensors
) -> tuple[Result, int]:
    """The results of `size` calls like this one, and the axis that counts the calls in them.

    `dims`: which axis counts them in the tensors, or None.
    """
    names, lengths = calls.names(call, tensors), {}
    into = _operations.folded(call.operation, [n for n, d in zip(names, dims) if d is not None])
    folded = []
    for name, x, dim in zip(names, tensors, dims):
        if x is not None:
            x = x if dim is None else x.movedim(dim, -1)
            lengths.update(zip(DIMENSIONS[name], x.shape))
            if into[name] is not None:
                x = x.unsqueeze(-1).expand(*x.shape, size) if dim is None else x
                if name == "image_index" and into["features"] == "n":
                    x = _numbered(x, call.images)
                axis = DIMENSIONS[name].index(into[name])
                x = x.movedim(-1, axis).flatten(axis, axis + 1)
        folded.append(x)
    images = size * call.images if into["features"] == "n" else call.images
    result = run(dataclasses.replace(call, images=images), folded)

    lengths["n"] = call.images
    gives = GIVES[call.operation]
    axis, counted = DIMENSIONS[gives].index(into[gives]), (size, lengths[into[gives]])
    if type(result) is tuple:
        return tuple([each.unflatten(axis, counted) for each in result]), axis
    return result.unflatten(axis, counted), axis


def _numbered(index: Tensor, images: int) -> Tensor:
    """The image indices (K, calls) in the images of all calls; -1 where one is bad."""
    whole = index.to(torch.int64)
    fine = (index >= 0) & (index < images) & (index == whole)
    offsets = images * torch.arange(index.shape[-1], device=index.device)
    return torch.where(fine, whole + offsets, -1)
