"""Derivatives and batching of a call, as the table of operations says.

`run(call, arrays)` makes the calls that they consist of.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from roialign import _operations

from . import calls
from .calls import ORDER, Arrays, Call, Result

Run = Callable[[Call, Arrays], Result]


# Derivatives


_DIFFERENTIABLE = {name: (*takes, "boxes") for name, takes in _operations.TAKES.items()}


def keep(ctx: Any, call: Call, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """For `backward`: an array only where the gradient in another one needs it."""
    known = _DIFFERENTIABLE[call.operation]
    moving = {n for n, t in zip(names, tensors) if t.requires_grad and n in known}
    needed = [n in _operations.ROIS or len(moving) > (n in moving) for n in names]
    ctx.set_materialize_grads(False)  # a gradient that is None: the result does not count
    ctx.save_for_backward(*itertools.compress(tensors, needed))
    ctx.call, ctx.kept = call, tuple(itertools.compress(names, needed))


def backward(
    run: Run, ctx: Any, moving: Collection[str], d_results: Sequence[Tensor | None]
) -> dict[str, Result]:
    """The gradients in those arrays that are `moving`, but in no index."""
    if all([d is None for d in d_results]):
        return {}
    call, arrays = ctx.call, calls.named(ctx.kept, ctx.saved_tensors)
    gives = _operations.GIVES[call.operation]
    arrays[gives] = _filled(call, d_results) if gives == "features" else d_results[0]
    gradients = {}
    for name in _DIFFERENTIABLE[call.operation]:
        if name not in moving:
            continue
        if name == "boxes":
            _operations.require_first_order(call.operation, arrays)
        operation = _operations.giving("tangent" if name == "boxes" else name)
        given = {name: arrays[name] for name in ORDER[operation] if name in arrays}
        gradients[name] = run(call._replace(operation=operation), given)
    return gradients


def jvp(run: Run, call: Call, arrays: Arrays, moved: Mapping[str, Any]) -> Result | None:
    """The derivative along the tangents `moved`, of which any may be None."""
    moved = {
        name: moved[name] for name in _DIFFERENTIABLE[call.operation] if _is_any(moved.get(name))
    }
    if "features" in moved:
        moved["features"] = _filled(call, moved["features"])
    total = None
    for given in _operations.terms(call.operation, arrays, moved):
        term = run(call, given)
        if total is None:
            total = term
        else:
            total = tuple(map(torch.add, total, term)) if type(term) is tuple else total + term
    return total


def _is_any(x: Any) -> bool:
    """Whether it is not None; of maps, one of them."""
    return any(map(_is_any, x)) if isinstance(x, (tuple, list)) else x is not None


def _filled(call: Call, maps: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Zeros where one of the maps is None."""
    like = next(each for each in maps if each is not None)
    shapes = [(call.images, like.shape[1], *size) for size in call.maps]
    return tuple([like.new_zeros(s) if m is None else m for m, s in zip(maps, shapes)])


# Batching: calls are one call of more channels, or of more RoIs. The axis that counts calls is the
# last of an array, until it is folded. `dim` is where it was, or None; of maps, a sequence.


def last(x: Any, dim: Any) -> Any:
    if isinstance(x, (tuple, list)):
        return tuple(map(last, x, dim))
    return x if dim is None else x.movedim(dim, -1)


def _spread(x: Any, dim: Any, size: int) -> Any:
    """The same in all calls, if it has no axis that counts them."""
    if type(x) is tuple:
        return tuple([_spread(each, d, size) for each, d in zip(x, dim)])
    return x.unsqueeze(-1).expand(*x.shape, size) if dim is None else x


def _fold(x: Any, axis: int) -> Any:
    if type(x) is tuple:
        return tuple([_fold(each, axis) for each in x])
    return x.movedim(-1, axis).flatten(axis, axis + 1)


def batch(
    run: Run, size: int, dims: Mapping[str, Any], call: Call, arrays: Arrays
) -> tuple[Result, int]:
    """The results of `size` calls like this one, and the axis that counts the calls in them."""
    into = _operations.folded(call.operation, [n for n in arrays if _is_any(dims[n])])
    folded = {}
    for name, x in arrays.items():
        if into[name] is not None:
            x = _spread(x, dims[name], size)
            if name == "image_index" and into["features"] == "n":
                x = _numbered(x, call.images)
            x = _fold(x, _operations.DIMENSIONS[name].index(into[name]))
        folded[name] = x
    images = size * call.images if into["features"] == "n" else call.images
    result = run(call._replace(images=images), folded)

    gives = _operations.GIVES[call.operation]
    lengths = {"n": call.images, "c": calls.source(arrays).shape[1], "k": arrays["boxes"].shape[0]}
    axis, counted = _operations.DIMENSIONS[gives].index(into[gives]), (size, lengths[into[gives]])
    if type(result) is tuple:
        return tuple([each.unflatten(axis, counted) for each in result]), axis
    return result.unflatten(axis, counted), axis


def _numbered(index: Tensor, images: int) -> Tensor:
    """The image indices (K, calls) in the images of all calls; -1 where one is bad."""
    whole = index.to(torch.int64)
    fine = (index >= 0) & (index < images) & (index == whole)
    offsets = images * torch.arange(index.shape[-1], device=index.device)
    return torch.where(fine, whole + offsets, -1)
