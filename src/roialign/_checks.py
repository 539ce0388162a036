"""Argument checks that do not depend on the array library.

Types are checked for all arguments before any value is, and values before image indices, so that
errors come in the order TypeError, ValueError, IndexError. A message names the argument and shows
what came.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from roialign import _rule

if TYPE_CHECKING:
    from roialign._adapter import Adapter

REDUCTIONS = ("mean",)
FLOATS = "float16, bfloat16, float32 or float64"
FLOATS_AND_BYTES = "float16, bfloat16, float32, float64, uint8 or bool"
MAX_SIDE = 2**31 - 1  # pixels of a map on one axis
MAX_BINS = 2**31 - 1  # of one RoI
MAX_SAMPLES = 4096  # per bin and axis, where their number is fixed: it bounds the time of a call


def type_name(value: object) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def shown(value: object) -> str:
    """As a message shows it; Python writes no integer of more than 4300 digits."""
    try:
        return repr(value)
    except ValueError:
        return "<too many digits to show>"


# Types


def integer(name: str, value: Any, expected: str = "an int") -> int:
    """Anything with ``__index__`` but a bool."""
    if type(value) is int:
        return value
    dtype = str(getattr(value, "dtype", ""))  # some bools have an __index__
    if not isinstance(value, bool) and "bool" not in dtype.lower():
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"`{name}` must be {expected}, got {type_name(value)} {shown(value)}")


def integers(name: str, value: object) -> tuple[int, ...]:
    """An int, or a tuple or list of them; how many is a question of values."""
    if isinstance(value, (tuple, list)):
        return tuple([integer(name, item) for item in value])
    return (integer(name, value, "an int or a pair (height, width)"),) * 2


def sequence(name: str, expected: str, value: object) -> None:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"`{name}` must be a tuple {expected}, got {type_name(value)}")


def real(name: str, value: Any, expected: str = "a real number") -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be {expected}, got {type_name(value)} {shown(value)}")
    return _rule.float_of(value)


def reals(name: str, value: object) -> tuple[float, ...]:
    """A real number, or a tuple or list of them; how many is a question of values."""
    if type(value) is float:
        return (value, value)
    if isinstance(value, (tuple, list)):
        return tuple([real(name, item) for item in value])
    return (real(name, value, "a number or a pair (scale_y, scale_x)"),) * 2


def features(adapter: Adapter, name: str, value: Any, accepted: str = FLOATS) -> None:
    adapter.check_array(name, value)
    if adapter.kind(value.dtype) != "float":
        refuse_dtype(name, value, accepted)


def refuse_dtype(name: str, value: Any, accepted: str) -> NoReturn:
    raise TypeError(
        f"`{name}` must be {accepted}, got {value.dtype}: cast it to float32 or float64"
    )


def pooled_dtype(adapter: Adapter, value: Any) -> Any:
    """Checks features that are only read, so may be bytes; gives the dtype of their pooled ones."""
    adapter.check_array("features", value)
    if adapter.kind(value.dtype) == "float":
        return value.dtype
    if value.dtype in adapter.byte_types:
        return adapter.float32
    refuse_dtype("features", value, FLOATS_AND_BYTES if adapter.byte_types else FLOATS)


def same_dtype(name: str, dtype: object, other: str, expected: object) -> None:
    if dtype != expected:
        raise TypeError(f"`{name}` must be {expected} to fit `{other}`, got {dtype}")


def exactly(name: str, value: object, kind: type) -> None:
    """As MindSpore's operator checks: a Python ``kind``, no bool, no other type's NumPy scalar."""
    if not isinstance(value, kind) or isinstance(value, bool):
        article = "an" if kind is int else "a"
        raise TypeError(
            f"`{name}` must be {article} {kind.__name__}, got {type_name(value)} {shown(value)}: "
            f"write {kind.__name__}(...)"
        )


# Values


def bin_count(name: str, value: int) -> None:
    if not 1 <= value <= MAX_BINS:
        limit = "at least 1" if value < 1 else f"at most {MAX_BINS}"
        raise ValueError(f"`{name}` must be {limit}, got {shown(value)}")


def bins(name: str, value: tuple[int, ...]) -> tuple[int, int]:
    if len(value) != 2:
        raise ValueError(f"`{name}` must be an int or a pair (height, width), got {shown(value)}")
    for count in value:
        bin_count(name, count)
    if value[0] * value[1] > MAX_BINS:
        raise ValueError(f"`{name}` must have at most {MAX_BINS} bins, got {value}")
    return value


def samples(name: str, value: int) -> None:
    if value > MAX_SAMPLES:
        raise ValueError(
            f"`{name}` must be at most {MAX_SAMPLES}, got {shown(value)}: 0 adapts to the box"
        )


def scales(name: str, value: tuple[float, ...]) -> tuple[float, float]:
    if len(value) != 2:
        raise ValueError(f"`{name}` must be a number or a pair (scale_y, scale_x), got {value}")
    for scale in value:
        if not 0 < scale < math.inf:
            raise ValueError(f"`{name}` must be finite and > 0, got {scale}")
    return value


def d_output(shape_: Sequence[int], count: int, channels: int) -> None:
    if len(shape_) != 4 or shape_[0] != count or shape_[1] != channels or min(shape_[2:]) < 1:
        shape("d_output", f"({count}, {channels}, P, Q)", shape_, False)
    bins("d_output", tuple(shape_[2:]))


def shape(name: str, expected: str, got: Sequence[int], ok: bool) -> None:
    if not ok:
        raise ValueError(f"`{name}` must have shape {expected}, got {tuple(got)}")


def feature_shape(value: tuple[int, ...]) -> tuple[int, ...]:
    if len(value) != 4 or min(value) < 0:
        raise ValueError(f"`feature_shape` must be (N, C, H, W), got {shown(value)}")
    size("feature_shape", value)
    return value


def size(name: str, shape: Sequence[int]) -> None:
    """The bytes of an array are counted in 63 bits, by most libraries without regard to a 0.

    While a compiler reads, a side may not be known.
    """
    if math.prod([side for side in shape if isinstance(side, int) and side]) >= 2**60:
        raise ValueError(f"`{name}` must have fewer than 2**60 elements, got {shown(tuple(shape))}")


def pixels(name: str, shape: Sequence[int], rois: int) -> None:
    """RoIs need an image and pixels to sample, as many as 32 bits count; channels may be none.

    How many RoIs there are is asked last: while a compiler reads, it may not be known, nor a side.
    """
    images, _, *sides = shape
    if not (images and sides[0] and sides[1]) and rois:
        raise ValueError(
            f"`{name}` must have at least one image and one pixel where there are RoIs, "
            f"got {tuple(shape)}"
        )
    for side in sides:
        if isinstance(side, int) and side > MAX_SIDE and rois:
            raise ValueError(
                f"`{name}` must be at most {MAX_SIDE} high and wide, got {tuple(shape)}"
            )


# Both


def rule(
    spatial_scale: object, sampling_ratio: object, convention: object, reduction: object
) -> tuple[tuple[float, float], tuple[float, ...]]:
    """The arguments that all operations share, as scales and rule: types first, then values.

    Comes after the type checks of the other arguments and before the checks of their values.
    """
    scale = reals("spatial_scale", spatial_scale)
    ratio = integer("sampling_ratio", sampling_ratio)
    if not isinstance(convention, (str, _rule.Convention)):
        raise TypeError(f"`convention` must be a name or a Convention, got {type_name(convention)}")
    if not isinstance(reduction, str):
        raise TypeError(f"`reduction` must be a str, got {type_name(reduction)}")
    if reduction not in REDUCTIONS:
        accepted = ", ".join(map(repr, REDUCTIONS))
        raise ValueError(f"`reduction` must be one of {accepted}, got {reduction!r}")
    scale = scales("spatial_scale", scale)
    samples("sampling_ratio", ratio)
    return scale, _rule.vector(_rule.resolve(convention), ratio)
