"""Where the channels are in the shape of maps and of results: views, never copies.

The operations take channels first. A layout is "NCHW", which is that, or "NHWC".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LAYOUTS = ("NCHW", "NHWC")


def channels_first(array: Any, layout: str) -> Any:
    """An array (..., H, W, C) of this layout as (..., C, H, W)."""
    return array if layout == "NCHW" else array.swapaxes(-1, -3).swapaxes(-1, -2)


def as_given(array: Any, layout: str) -> Any:
    """What `channels_first` gave, in its layout again."""
    return array if layout == "NCHW" else array.swapaxes(-1, -2).swapaxes(-1, -3)


def shape_first(shape: Sequence[Any], layout: str) -> tuple[Any, ...]:
    """
    >>> shape_first((2, 8, 9, 3), "NHWC")
    (2, 3, 8, 9)
    """
    shape = tuple(shape)
    return shape if layout == "NCHW" else (*shape[:-3], shape[-1], shape[-3], shape[-2])


def shape_as_given(shape: Sequence[Any], layout: str) -> tuple[Any, ...]:
    """
    >>> shape_as_given((2, 3, 8, 9), "NHWC")
    (2, 8, 9, 3)
    """
    shape = tuple(shape)
    return shape if layout == "NCHW" else (*shape[:-3], shape[-2], shape[-1], shape[-3])


def shown(names: str, layout: str) -> str:
    """
    >>> shown("NCHW", "NHWC")
    '(N, H, W, C)'
    """
    return f"({', '.join(shape_as_given(names, layout))})"
