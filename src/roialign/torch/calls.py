"""A call of an operation: its arrays by their names in `_operations`, a record of all else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from roialign import _operations

Arrays = dict[
    str, "Tensor | tuple[Tensor, ...]"
]  # the tuple is "features"; what is None is not in it
Result = Tensor | tuple[Tensor, ...]  # the adjoint gives a tuple: one for each map

# What each operation takes, in the order of its operator's arguments; and what of it has channels.
ORDER = {
    operation: (
        *[a for a in takes if a != "tangent"],
        *_operations.ROIS,
        *[a for a in takes if a == "tangent"],
    )
    for operation, takes in _operations.TAKES.items()
}
CHANNELS = {
    operation: tuple([a for a in takes if a != "tangent"])
    for operation, takes in _operations.TAKES.items()
}


class Call(NamedTuple):
    """All that is no array."""

    operation: str
    bins: tuple[int, int]  # P, Q
    images: int  # N
    maps: tuple[tuple[int, int], ...]  # H, W of each
    scales: tuple[float, ...]  # scale_y, scale_x of each
    rule: tuple[float, ...]


def source(arrays: Arrays) -> Tensor:
    """An array of the dtype, device and channels of the call."""
    return arrays["d_output"] if "d_output" in arrays else arrays["features"][0]


def result_shapes(call: Call, arrays: Arrays) -> list[tuple[int, ...]]:
    """With the channels that came: a shard of ``d_output`` has fewer than the features."""
    (p, q), channels, count = call.bins, source(arrays).shape[1], arrays["boxes"].shape[0]
    sizes = {"n": call.images, "c": channels, "k": count, "p": p, "q": q}
    return _operations.result_shapes(call.operation, sizes, call.maps)


def tensors(arrays: Arrays) -> list[Tensor]:
    flat = []
    for x in arrays.values():
        if type(x) is tuple:
            flat.extend(x)
        else:
            flat.append(x)
    return flat


def names(arrays: Arrays) -> tuple[str, ...]:
    """Of each of the `tensors`."""
    return tuple([name for name, x in arrays.items() for _ in (x if type(x) is tuple else (x,))])


def named(names: Iterable[str], tensors: Iterable[Tensor]) -> Arrays:
    """The arrays whose `names` and `tensors` these are."""
    arrays: Arrays = {}
    for name, tensor in zip(names, tensors):
        arrays[name] = (*arrays.get(name, ()), tensor) if name == "features" else tensor
    return arrays
