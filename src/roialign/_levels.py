"""Which map of a pyramid a RoI is pooled from: the level rules of docs/spec.md.

They are other libraries' rules, to the last bit. Those take a square root and a logarithm of every
area. Roots and logarithms of devices are not exact, so here areas are compared with borders, which
are found on the host.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from roialign import _checks
from roialign._graph import IN_GRAPH, graph_adapter

if TYPE_CHECKING:
    from roialign._adapter import Adapter


class _Rule(NamedTuple):
    dtypes: tuple[str, ...]  # in which it computes; areas of other boxes are float32
    inner: float  # added to the size in canonical sizes
    outer: float  # added to the level
    relative: bool  # the logarithm is rounded before the canonical level is added, not after


RULES = {
    "torchvision": _Rule(("float32", "float64"), 0.0, 1e-6, False),
    "detectron2": _Rule(("float32",), 1e-8, 0.0, False),
    "mmdet": _Rule(("float16", "float32", "float64"), 1e-6, 0.0, True),
}
MOST_LEVELS = 64
LARGEST_LEVEL = 2**20


@functools.lru_cache
def borders(
    name: str, dtype: str, finest: int, coarsest: int, canonical_size: float, canonical_level: int
) -> tuple[float, ...]:
    """The least area of each level, in the dtype in which the rule computes.

    >>> borders("torchvision", "float32", 2, 4, 224.0, 4)
    (0.0, 12543.98046875, 50175.9296875)
    """
    rule, real = RULES[name], np.dtype(dtype).type
    constant = np.float32 if real is np.float16 else real  # as PyTorch has numbers beside arrays
    size, inner, outer = [float(constant(c)) for c in (canonical_size, rule.inner, rule.outer)]
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")  # in the order of areas
    base = 0 if rule.relative else canonical_level

    def rounded(value: Any) -> float:
        return float(real(value))

    def area(at: int) -> float:
        return float(np.array(at, bits).view(real))

    def level(at: int) -> float:
        ratio = rounded(rounded(rounded(math.sqrt(area(at))) / size) + inner)
        log = rounded(math.log2(ratio)) if ratio else -math.inf
        return rounded(rounded(base + log) + outer) + canonical_level - base

    def border(wanted: int) -> float:
        low, high = 0, int(np.array(np.inf, real).view(bits))
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if level(middle) >= wanted else (middle + 1, high)
        return area(low)

    with np.errstate(all="ignore"):
        return 0.0, *[border(wanted) for wanted in range(finest + 1, coarsest + 1)]


def _borders(*setting: Any) -> tuple[float, ...]:
    return borders(*setting)


# torch's compiler takes them as they are, instead of reading how they are found.
_borders._dynamo_marked_constant = True  # type: ignore[attr-defined]


def assign(
    adapter: Adapter,
    boxes: Any,
    rule: str,
    finest: int,
    coarsest: int,
    canonical_size: float,
    canonical_level: int,
) -> Any:
    """The levels of boxes (..., 4), from 0; -1 where the area is negative or NaN."""
    dtype = str(boxes.dtype).rpartition(".")[2].lower()
    if dtype not in RULES[rule].dtypes:
        boxes, dtype = adapter.cast(boxes, adapter.float32), "float32"
    setting = finest, coarsest, canonical_size, canonical_level
    if IN_GRAPH:  # @jit.cond: True
        return _assign(boxes, graph_adapter().borders(rule, dtype, *setting))
    finest, coarsest, level = map(operator.index, (finest, coarsest, canonical_level))
    # and fabs: torch's compiler takes a number for fixed if C reads it
    least = _borders(rule, dtype, finest, coarsest, math.fabs(canonical_size), level)
    array = adapter.as_numpy(boxes)
    if array is None:
        return _assign(boxes, least)
    with np.errstate(all="ignore"):
        return adapter.from_numpy(_assign(array, least), boxes)


def by_scales(adapter: Adapter, boxes: Any, scales: Sequence[float]) -> Any:
    """torchvision's, for maps of these scales."""
    if IN_GRAPH:  # @jit.cond: True
        finest, coarsest = graph_adapter().range_of(scales)
    else:
        finest, coarsest = range_of(scales)
    return assign(adapter, boxes, "torchvision", finest, coarsest, 224.0, 4)


def _assign(boxes: Any, least: Sequence[float]) -> Any:
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    return sum([area >= border for border in least], -1)


def setting(
    level_range: Any, rule: Any, canonical_size: Any, canonical_level: Any
) -> tuple[str, int, int, float, int]:
    """The arguments of `roialign.assign_levels`, checked, as `assign` takes them."""
    _checks.sequence("level_range", "(finest, coarsest)", level_range)
    levels = _checks.integers("level_range", level_range)
    _checks.text("rule", rule)
    size = _checks.real("canonical_size", canonical_size)
    level = _checks.integer("canonical_level", canonical_level)
    _checks.one_of("rule", rule, RULES)
    if len(levels) != 2 or not 0 <= levels[1] - levels[0] < MOST_LEVELS:
        raise ValueError(
            "`level_range` must be (finest, coarsest), from fine to coarse and with at most "
            f"{MOST_LEVELS} levels, got {_checks.shown(levels)}"
        )
    for name, number in (("level_range", levels[0]), ("canonical_level", level)):
        if not -LARGEST_LEVEL <= number <= LARGEST_LEVEL:
            raise ValueError(
                f"`{name}` must be between -{LARGEST_LEVEL} and {LARGEST_LEVEL}, "
                f"got {_checks.shown(number)}"
            )
    if not 0 < size < math.inf:
        raise ValueError(f"`canonical_size` must be finite and > 0, got {size}")
    return rule, *levels, size, level


def range_of(scales: Sequence[float]) -> tuple[int, int]:
    """The levels of maps of which each is half as large as the one before.

    Args:
        scales: y and x of each map.

    >>> range_of((0.25, 0.25, 0.125, 0.125))
    (2, 3)
    """
    powers = [math.frexp(scale) for scale in scales]
    exact = all(mantissa == 0.5 for mantissa, _ in powers)
    found = [1 - exponent for _, exponent in powers]
    if not exact or found != [found[0] + i // 2 for i in range(len(found))]:
        pairs = tuple(zip(scales[::2], scales[1::2]))
        raise ValueError(
            "`levels` must be given where `spatial_scales` are not powers of 2 of which each is "
            f"half of the one before, got scales (y, x) {pairs}"
        )
    return found[0], found[-1]
