"""Conventions by name, and the rule: the vector of numbers that kernels take.

The numbers are those of docs/spec.md, "The rule".
"""

from __future__ import annotations

import difflib
import math
import numbers
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from roialign import _core

__all__ = ["Convention", "conventions"]


def float_of(value: Any) -> float:
    """Infinite where it is too large for a float."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How a box in image pixels becomes sample positions in feature pixels.

    On one axis, for a box from ``lo`` to ``hi`` (image pixels) and a scale ``s``::

        a    = (lo + input_offset) * s - pixel_offset
        b    = (hi + input_offset + end_offset) * s - pixel_offset
        size = max(b - a, min_size)            # no max if min_size is None

    Args:
        pixel_offset: subtracted from both ends, in feature pixels. 0.5 if pixel centres are at half
            coordinates.
        input_offset: added to both ends, in image pixels.
        end_offset: added to the end, in image pixels. 1 if the last pixel of a box is inside it.
        min_size: least size of a box in feature pixels, or None.
        adaptive: how the number of samples per bin is made from the length of the bin where
            ``sampling_ratio <= 0``: rounded up ("ceil"), or rounded down and at least 1 ("floor").

    Raises:
        TypeError: a number is not a real number, or ``adaptive`` not a str.
        ValueError: a number is not finite, ``min_size`` is negative, or ``adaptive`` is neither
            "ceil" nor "floor".

    >>> import roialign
    >>> roialign.Convention(pixel_offset=0.5) == roialign.conventions["half_pixel"]
    True
    """

    pixel_offset: float = 0.0
    input_offset: float = 0.0
    end_offset: float = 0.0
    min_size: float | None = None
    adaptive: str = "ceil"

    def __post_init__(self) -> None:
        if not isinstance(self.adaptive, str):
            raise TypeError(f"`adaptive` must be a str, got {type(self.adaptive).__name__}")
        names = [field.name for field in fields(self) if field.name != "adaptive"]
        for name in names:
            value = getattr(self, name)
            if name == "min_size" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"`{name}` must be a real number, got {type(value).__name__}")
            object.__setattr__(self, name, float_of(value))
        for name in names:
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"`{name}` must be finite, got {value}")
        if self.min_size is not None and self.min_size < 0:
            raise ValueError(f"`min_size` must not be negative, got {self.min_size}")
        if self.adaptive not in ("ceil", "floor"):
            raise ValueError(f"`adaptive` must be 'ceil' or 'floor', got {self.adaptive!r:.100}")


Convention.__module__ = "roialign"  # what pickles and pages call it


# Canonical name: (numbers, the names by which users of other libraries know it). Of these names
# docs/conventions.md says which were measured, and of which the code of the library was read.
_ROWS: dict[str, tuple[Convention, tuple[str, ...]]] = {
    "mindspore": (
        Convention(end_offset=1, adaptive="floor"),
        ("mindspore:roi_end_mode=1", "cann:roi_end_mode=1"),
    ),
    "mindspore_legacy": (
        Convention(min_size=1, adaptive="floor"),
        ("mindspore:roi_end_mode=0",),
    ),
    "asymmetric": (
        Convention(min_size=1),
        (
            "torchvision:aligned=False",
            "detectron2:aligned=False",
            "mmcv:aligned=False",
            "mxnet:aligned=False",
            "paddle:aligned=False",
            "ncnn:aligned=0",
            "onnx:output_half_pixel",
            "onnx:opset=10",
            "openvino:asymmetric",
            "tensorrt:output_half_pixel",
            "caffe2:aligned=False",
            "detectron",
        ),
    ),
    "half_pixel": (
        Convention(pixel_offset=0.5),
        (
            "torchvision:aligned=True",
            "detectron2:aligned=True",
            "mmcv:aligned=True",
            "mxnet:aligned=True",
            "paddle:aligned=True",
            "ncnn:aligned=1",
            "onnx:half_pixel",
            "onnx:opset=16",
            "onnx:opset=22",
            "openvino:half_pixel_for_nn",
            "tensorrt:half_pixel",
            "cann:roi_end_mode=2",
        ),
    ),
    "openvino_half_pixel": (
        Convention(pixel_offset=0.5, input_offset=0.5),
        ("openvino:half_pixel",),
    ),
    "mmdet_legacy": (
        Convention(end_offset=1, min_size=0),
        ("mmdet:v0.6", "mmdet:v1"),
    ),
}


def _unknown(name: Any) -> str:
    """The message: it lists the settings of the library that is named."""
    wanted = str(name).lower()
    library = wanted.partition(":")[0]
    own = [known for known in conventions if known.partition(":")[0] == library]
    near = own or difflib.get_close_matches(wanted, conventions) or list(_ROWS)
    nearest = ", ".join(map(repr, near))
    return f"`convention` {name!r:.100} is unknown; the nearest names are {nearest}"


class _Records(dict[str, Convention]):
    def __missing__(self, name: Any) -> Convention:
        raise KeyError(_unknown(name))


conventions: Mapping[str, Convention] = MappingProxyType(
    _Records(
        {name: row for name, (row, _) in _ROWS.items()}
        | {alias: row for row, aliases in _ROWS.values() for alias in aliases}
    )
)
"""Read-only: a record for each name. Aliases, ``library:setting``, come after canonical names."""


REDUCTIONS = ("mean", "max", "max_corner")  # in the order of their numbers
_WORDS = {None: -math.inf, "ceil": 0.0, "floor": 1.0}  # of a Convention, as numbers


def vector(
    convention: Convention, sampling_ratio: int, reduction: str = "mean"
) -> tuple[float, ...]:
    """The rule as kernels take it: the numbers that the core names, in its order.

    >>> import roialign
    >>> vector(roialign.conventions["mindspore"], 2)
    (2.0, 0.0, 0.0, 1.0, -inf, 1.0, 0.0, 0.0)
    """
    given = vars(convention) | {
        "sampling_ratio": float(max(0, sampling_ratio)),
        "reduction": float(REDUCTIONS.index(reduction)),
        "turn": 0.0,
    }
    return tuple([_WORDS.get(given[name], given[name]) for name in _core.rule_names])


def of(convention: str | Convention, sampling_ratio: int, reduction: str) -> tuple[float, ...]:
    """The vector of what ``convention=`` names, or is."""
    if isinstance(convention, Convention):
        return vector(convention, sampling_ratio, reduction)
    if convention not in conventions:
        raise ValueError(_unknown(convention))
    return _of_name(convention, operator.index(sampling_ratio), reduction)


def turned(rule: tuple[float, ...], turn: float) -> tuple[float, ...]:
    """The rule for boxes with an angle: `turn` radians in its unit, counter-clockwise.

    Raises:
        ValueError: its numbers move the ends of a box, which such a box has not.
    """
    numbers = dict(zip(_core.rule_names, rule))
    if numbers["input_offset"] or numbers["end_offset"]:
        raise ValueError(
            "`convention` must have no input_offset and no end_offset for boxes that turn, got "
            f"{numbers['input_offset']} and {numbers['end_offset']}"
        )
    return tuple((numbers | {"turn": turn}).values())


def _of_name(name: str, sampling_ratio: int, reduction: str) -> tuple[float, ...]:
    return vector(conventions[name], sampling_ratio, reduction)


# As torch.compiler.assume_constant_result, without its import: no guards on each of the numbers.
# Of numbers that are constant: torch's compiler takes those for such that C reads.
_of_name._dynamo_marked_constant = True  # type: ignore[attr-defined]
