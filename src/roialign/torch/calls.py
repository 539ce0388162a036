"""A call of an operation: its tensors in one order, and a record of all else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The tensors of a call: these and then its maps, "features". None: the call has no such.
ORDER = ("d_output", "boxes", "image_index", "levels", "tangent")
Tensors = Sequence[Tensor | None]
Result = Tensor | tuple[Tensor, ...]  # the adjoint gives a tuple: one for each map


@dataclass(eq=False, slots=True)
class Call:
    """All that is no tensor. No tuple: `torch.func` would take it apart at each of its steps."""

    operation: str
    bins: tuple[int, int]  # P, Q
    images: int  # N
    maps: tuple[tuple[int, int], ...]  # H, W of each
    scales: tuple[float, ...]  # scale_y, scale_x of each
    rule: tuple[float, ...]

    def to(self, operation: str) -> Call:
        """Another operation of the same maps and bins."""
        return Call(operation, self.bins, self.images, self.maps, self.scales, self.rule)


def flat(arrays: Mapping[str, Any]) -> tuple:
    """In the order of a call's tensors."""
    return *map(arrays.get, ORDER), *arrays.get("features", ())


def named(tensors: Sequence) -> dict[str, Any]:
    """`flat` backwards: without what is None."""
    arrays = {name: x for name, x in zip(ORDER, tensors) if x is not None}
    maps = tuple(tensors[len(ORDER) :])
    return arrays if all([x is None for x in maps]) else {**arrays, "features": maps}


def names(tensors: Sequence) -> tuple[str, ...]:
    """Of each of the tensors of a call."""
    return *ORDER, *["features"] * (len(tensors) - len(ORDER))


def source(tensors: Tensors) -> Tensor:
    """One of the dtype, device and channels of the call."""
    return tensors[-1] if tensors[0] is None else tensors[0]


def columns(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.narrow(1, 1, 4), rows.select(1, 0)


def with_index_column(d_boxes: Tensor) -> Tensor:
    return torch.nn.functional.pad(d_boxes, (1, 0))


def result_shapes(call: Call, tensors: Tensors) -> list[tuple[int, ...]]:
    """With the channels that came: a shard of ``d_output`` has fewer than the features."""
    channels = source(tensors).shape[1]
    if call.operation == "adjoint":
        return [(call.images, channels, *size) for size in call.maps]
    return [(tensors[1].shape[0], channels, *call.bins)]
