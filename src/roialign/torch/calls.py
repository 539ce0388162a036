"""A call of an operation: its tensors in one order, and a record of all else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from roialign import _checks, _core, _rule

# The tensors of a call: these, then its maps, "features", if it takes them, and as many
# "selectors", if it has them. None: the call has no such.
ORDER = ("d_output", "boxes", "image_index", "levels", "tangent")
_REDUCTION = _core.rule_names.index("reduction")

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

    @property
    def selects(self) -> bool:
        """Whether bins are their largest samples, so that the call has selectors."""
        return self.rule[_REDUCTION] != 0

    def require_slopes(self) -> None:
        """Refuses a derivative in the boxes where there is none."""
        if self.rule[_REDUCTION] == _rule.REDUCTIONS.index("max_corner"):
            _checks.has_box_gradient("max_corner")

    def to(self, operation: str) -> Call:
        """Another operation of the same maps and bins."""
        return Call(operation, self.bins, self.images, self.maps, self.scales, self.rule)


def flat(arrays: Mapping[str, Any]) -> tuple:
    """In the order of a call's tensors."""
    return *map(arrays.get, ORDER), *arrays.get("features", ()), *arrays.get("selectors", ())


def named(call: Call, tensors: Sequence) -> dict[str, Any]:
    """`flat` backwards: without what is None."""
    arrays = {name: x for name, x in zip(ORDER, tensors) if x is not None}
    for name, maps in zip(("features", "selectors"), maps_of(call, tensors)):
        if not all([x is None for x in maps]):
            arrays[name] = tuple(maps)
    return arrays


def maps_of(call: Call, tensors: Sequence) -> tuple[Sequence, Sequence]:
    """The features and the selectors."""
    maps = tensors[len(ORDER) :]
    if not call.selects:
        return maps, ()
    count = len(maps) - len(call.maps)
    return maps[:count], maps[count:]


def names(call: Call, tensors: Sequence) -> tuple[str, ...]:
    """Of each of the tensors of a call."""
    features, selectors = maps_of(call, tensors)
    return *ORDER, *["features"] * len(features), *["selectors"] * len(selectors)


def source(tensors: Tensors) -> Tensor:
    """One of the dtype, device and channels of the call."""
    return tensors[-1] if tensors[0] is None else tensors[0]


def columns(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.narrow(1, 1, rows.shape[1] - 1), rows.select(1, 0)


def with_index_column(d_boxes: Tensor) -> Tensor:
    return torch.nn.functional.pad(d_boxes, (1, 0))


def result_shapes(call: Call, tensors: Tensors) -> list[tuple[int, ...]]:
    """With the channels that came: a shard of ``d_output`` has fewer than the features."""
    channels = source(tensors).shape[1]
    if call.operation == "adjoint":
        return [(call.images, channels, *size) for size in call.maps]
    return [(tensors[1].shape[0], channels, *call.bins)]
