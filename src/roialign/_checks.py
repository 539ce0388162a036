"""Argument checks that do not depend on the array library.

Types are checked for all arguments before any value is, and values before image indices, so that
errors come in the order TypeError, ValueError, IndexError. A message names the argument, shows what
came and says what to write. docs/errors.md lists all of them.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from roialign import _layout, _rule
from roialign._graph import IN_GRAPH

if TYPE_CHECKING:
    from roialign._adapter import Adapter

FLOATS = "float16, bfloat16, float32 or float64"
FLOATS_AND_BYTES = "float16, bfloat16, float32, float64, uint8 or bool"
MAX_SIDE = 2**31 - 1  # pixels of a map on one axis
MAX_BINS = 2**31 - 1  # of one RoI
MAX_SAMPLES = 4096  # per bin and axis, where their number is fixed: it bounds the time of a call


def type_name(value: object) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


MOST_SHOWN = 100  # characters


def shown(value: object) -> str:
    """As a message shows it, in one line; Python writes no integer of more than 4300 digits."""
    if IN_GRAPH:  # @jit.cond: True
        return f"{value!r}"
    else:
        try:
            text = " ".join(repr(value).split())
        except ValueError:
            return "<too many digits to show>"
        except Exception as error:  # of the value's own class
            return f"<no repr: {type(error).__name__}>"
        return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


# What to write instead: the ends of messages

_MAKERS = {  # of an array, from what NumPy would make one of
    "torch.Tensor": "torch.as_tensor",
    "jax.Array": "jnp.asarray",
    "mindspore.Tensor": "mindspore.Tensor",
    "cupy.ndarray": "cupy.asarray",
}
_LIBRARIES = "numpy", "torch", "jaxlib", "jax", "mindspore", "cupy"
_STORES = "h5py", "zarr"  # their arrays are files, of which a slice is an array
_GETTERS = "to_numpy()", "compute()", "filled(0)"  # of pandas, Dask, masked arrays


def _way_to_array(name: str, wanted: str, value: Any) -> str:
    if IN_GRAPH:  # @jit.cond: True
        return ""
    else:
        module = type(value).__module__
        library = module.partition(".")[0]
        getter = next((g for g in _GETTERS if hasattr(value, g.partition("(")[0])), None)
        if module.startswith("torch.fx"):
            return ": torch.fx records layers, as roialign.torch.ROIAlign, and no functions"
        if library in _STORES:
            hint, array = "slice it first, ", f"{name}[...]"
        elif getter:
            hint, array = "write ", f"{name}.{getter}"
        elif library in _LIBRARIES and library not in wanted and hasattr(value, "shape"):
            hint, array = "arrays of a call are of one library, ", name
        elif isinstance(value, (list, tuple)) or hasattr(value, "__array__"):
            hint, array = "write ", name
        else:
            return ""
        if array == name or wanted in _MAKERS:
            array = f"{_MAKERS.get(wanted, 'np.asarray')}({array})"
        return f": {hint}{array}"


def cast(name: str, value: Any, dtype: str) -> str:
    """What to write, for tensors of PyTorch too."""
    how = f"astype('{dtype}')" if hasattr(value, "astype") else f"to(torch.{dtype})"
    return f": cast it, {name}.{how}"


def refuse_script(name: str) -> NoReturn:
    raise RuntimeError(
        f"{name} cannot be scripted: use torch.jit.trace, torch.compile or torch.export, or the "
        "layer roialign.torch.ROIAlign"
    )


# Types


def refuse_array(name: str, wanted: str, value: Any) -> NoReturn:
    """What is no array, or not of the library that is `wanted`."""
    hint = _way_to_array(name, wanted, value)
    raise TypeError(f"`{name}` must be a {wanted}, got {type_name(value)}{hint}")


def out_dtype(name: str, got: object, dtype: object) -> None:
    if got != dtype:
        raise TypeError(f"`{name}` must have dtype {dtype}, got {got}")


def integer(name: str, value: Any, expected: str = "an int") -> int:
    """Anything with ``__index__`` but a bool."""
    if type(value) is int:
        return value
    found = _index(value)
    if found is None:
        raise TypeError(f"`{name}` must be {expected}, got {type_name(value)} {shown(value)}")
    return found


def _index(value: Any) -> int | None:
    if IN_GRAPH:  # @jit.cond: True
        return None
    else:
        dtype = str(getattr(value, "dtype", ""))  # some bools have an __index__
        if isinstance(value, bool) or "bool" in dtype.lower():
            return None
        try:
            return operator.index(value)
        except (TypeError, ValueError):  # MindSpore raises this of a tensor with several
            return None


def integers(name: str, value: object) -> tuple[int, ...]:
    """An int, or a tuple or list of them; how many is a question of values."""
    if type(value) is int:
        return value, value
    if isinstance(value, (tuple, list)):
        return tuple([item if type(item) is int else integer(name, item) for item in value])
    return (integer(name, value, "an int or a pair (height, width)"),) * 2


def sequence(name: str, expected: str, value: object) -> None:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"`{name}` must be a tuple {expected}, got {type_name(value)}")


def several(name: str, value: Any, each: str) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Names and values of the items of a sequence or a dict; how many is a question of values."""
    if IN_GRAPH:  # @jit.cond: True
        if not isinstance(value, (tuple, list)):  # its graphs hold no keys
            raise TypeError(f"`{name}` must be a tuple or list in MindSpore's Graph mode")
    elif not isinstance(value, (tuple, list, Mapping)):
        hint = f": for one map write [{name}]" if hasattr(value, "shape") else ""
        raise TypeError(
            f"`{name}` must be a tuple, list or dict with {each} for each map, "
            f"got {type_name(value)}{hint}"
        )
    if not value:
        raise ValueError(f"`{name}` must have {each} for each map, got none")
    if isinstance(value, Mapping):
        return tuple([f"{name}[{key!r}]" for key in value]), tuple(value.values())
    return tuple([f"{name}[{i}]" for i in range(len(value))]), tuple(value)


def alike(name: str, value: Any, other: str, expected: Any) -> None:
    """What `several` took has the keys, or the length, of another."""
    mappings = isinstance(value, Mapping), isinstance(expected, Mapping)
    if mappings[0] != mappings[1] or (
        list(value) != list(expected) if mappings[0] else len(value) != len(expected)
    ):
        raise ValueError(f"`{name}` must have an array for each of `{other}`, got {len(value)}")


def mapping(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` must be a dict, got {type_name(value)}")


def text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a str, got {type_name(value)}")


def flag(name: str, value: Any) -> bool:
    """As other libraries take it: an int too, or a scalar of an array library."""
    if not isinstance(value, int) and getattr(value, "shape", None) != ():
        raise TypeError(f"`{name}` must be a bool, got {type_name(value)}")
    return bool(value)


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
    hint = cast(name, value, "float32")
    raise TypeError(f"`{name}` must be {accepted}, got {value.dtype}{hint}")


def pooled_dtype(adapter: Adapter, name: str, value: Any) -> Any:
    """Checks features that are only read, so may be bytes; gives the dtype of their pooled ones."""
    adapter.check_array(name, value)
    if adapter.kind(value.dtype) == "float":
        return value.dtype
    if value.dtype in adapter.byte_types:
        return adapter.float32
    refuse_dtype(name, value, FLOATS_AND_BYTES if adapter.byte_types else FLOATS)


def same_dtype(name: str, dtype: object, other: str, expected: object) -> None:
    if dtype != expected:
        raise TypeError(
            f"`{name}` must be {expected} to fit `{other}`, got {dtype}: cast one of them"
        )


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
    height, width = value
    if height < 1 or width < 1 or height * width > MAX_BINS:
        bin_count(name, height)
        bin_count(name, width)
        raise ValueError(f"`{name}` must have at most {MAX_BINS} bins, got {value}")
    return value


def samples(name: str, value: Any) -> int:
    value = integer(name, value)
    if value > MAX_SAMPLES:
        raise ValueError(
            f"`{name}` must be at most {MAX_SAMPLES}, got {shown(value)}: 0 adapts to the box"
        )
    return value


def scales(name: str, value: tuple[float, ...]) -> tuple[float, float]:
    if len(value) != 2:
        raise ValueError(f"`{name}` must be a number or a pair (scale_y, scale_x), got {value}")
    for scale in value:
        if not 0 < scale < math.inf:
            raise ValueError(f"`{name}` must be finite and > 0, got {scale}")
    return value


def d_output(
    got: Sequence[int], counts: tuple[int, ...], channels: int, layout: str = "NCHW"
) -> None:
    """`counts`: the leading dimensions, (K,) or (N, M)."""
    first = _layout.shape_first(got, layout) if len(got) == len(counts) + 3 else (0,)
    if first[:-2] != (*counts, channels) or min(first[-2:]) < 1:
        names = _layout.shape_as_given((*counts, channels, "P", "Q"), layout)
        refuse_shape("d_output", f"({', '.join(map(str, names))})", got)
    bins("d_output", first[-2:])


def refuse_shape(name: str, expected: str, got: Sequence[int], hint: str = "") -> NoReturn:
    raise ValueError(f"`{name}` must have shape {expected}, got {tuple(got)}{hint}")


def feature_shape(
    value: tuple[int, ...], name: str = "feature_shape", layout: str = "NCHW"
) -> tuple[int, ...]:
    """With channels first."""
    if len(value) != 4 or min(value) < 0:
        raise ValueError(f"`{name}` must be {_layout.shown('NCHW', layout)}, got {shown(value)}")
    size(name, value)
    return _layout.shape_first(value, layout)


def map_shape(name: str, got: Sequence[int], layout: str) -> tuple[int, ...]:
    """With channels first."""
    if len(got) != 4:
        hint = f": add a batch axis: {name}[None]" if len(got) == 3 else ""
        refuse_shape(name, _layout.shown("NCHW", layout), got, hint)
    return _layout.shape_first(got, layout)


def maps_fit(names: Sequence[str], shapes: Sequence[tuple[int, ...]], layout: str) -> None:
    """Maps of a pyramid have the same images and channels."""
    for name, other in zip(names[1:], shapes[1:]):
        if other[:2] != shapes[0][:2]:
            first, got = [_layout.shape_as_given(each, layout) for each in (shapes[0], other)]
            raise ValueError(
                f"`{name}` must have the images and channels of `{names[0]}`, {first}, got {got}"
            )


def size(name: str, shape: Sequence[int]) -> None:
    """The bytes of an array are counted in 63 bits, by most libraries without regard to a 0.

    While a compiler reads, a side may not be known.
    """
    if math.prod([side for side in shape if type(side) is int and side]) >= 2**60:
        raise ValueError(f"`{name}` must have fewer than 2**60 elements, got {shown(tuple(shape))}")


def pixels(name: str, shape: Sequence[int], rois: int, layout: str = "NCHW") -> None:
    """RoIs need an image and pixels to sample, as many as 32 bits count; channels may be none.

    How many RoIs there are is asked last: while a compiler reads, it may not be known, nor a side.
    """
    images, _, *sides = shape
    if not (images and sides[0] and sides[1]) and rois:
        raise ValueError(
            f"`{name}` must have at least one image and one pixel where there are RoIs, "
            f"got {_layout.shape_as_given(shape, layout)}"
        )
    for side in sides:
        if isinstance(side, int) and side > MAX_SIDE and rois:
            raise ValueError(
                f"`{name}` must be at most {MAX_SIDE} high and wide, "
                f"got {_layout.shape_as_given(shape, layout)}"
            )


# Both


def rule(
    spatial_scale: object,
    sampling_ratio: object,
    convention: object,
    reduction: Any,
    layout: object = "NCHW",
    maps: int | None = None,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The arguments that all operations share, as scales and rule: types first, then values.

    Comes after the type checks of the other arguments and before the checks of their values.
    `maps`: how many `spatial_scales` there are to be; None: one `spatial_scale`.
    """
    several = maps is not None
    name = "spatial_scales" if several else "spatial_scale"
    if several:
        sequence(name, "or list, with a scale for each map", spatial_scale)
    given = list(spatial_scale) if several else [spatial_scale]  # type: ignore[call-overload]
    names = [f"{name}[{i}]" for i in range(len(given))] if several else [name]
    pairs = [reals(each, value) for each, value in zip(names, given)]
    ratio = integer("sampling_ratio", sampling_ratio)
    if not isinstance(convention, (str, _rule.Convention)):
        raise TypeError(f"`convention` must be a name or a Convention, got {type_name(convention)}")
    text("reduction", reduction)
    text("layout", layout)
    if several and len(given) != maps:
        raise ValueError(f"`{name}` must be {maps}, one for each map, got {len(given)}")
    one_of("reduction", reduction, _rule.REDUCTIONS)
    one_of("layout", layout, _layout.LAYOUTS)
    checked = [scales(each, pair) for each, pair in zip(names, pairs)]
    samples("sampling_ratio", ratio)
    flat = tuple([scale for pair in checked for scale in pair])
    return flat, _rule.of(convention, ratio, reduction)


def rotated_rule(
    spatial_scale: object,
    sampling_ratio: object,
    convention: object,
    angle: object,
    clockwise: object,
    layout: object,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`rule`, of boxes that are turned."""
    text("angle", angle)
    if not isinstance(clockwise, bool):
        raise TypeError(f"`clockwise` must be a bool, got {type_name(clockwise)}")
    flat, straight = rule(spatial_scale, sampling_ratio, convention, "mean", layout)
    one_of("angle", angle, ("degrees", "radians"))
    if flat[0] != flat[1]:
        raise ValueError(f"`spatial_scale` must be one number for boxes that turn, got {flat}")
    turn = math.pi / 180 if angle == "degrees" else 1.0
    return flat, _rule.turned(straight, -turn if clockwise else turn)


def has_box_gradient(reduction: str) -> None:
    if reduction == "max_corner":
        raise NotImplementedError(
            "`reduction` 'max_corner' has no gradient in the boxes: take 'max', or the boxes as "
            "constants"
        )


def one_of(name: str, value: Any, accepted: Iterable[str]) -> None:
    text(name, value)
    if value not in accepted:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, accepted))}, got {shown(value)}"
        )
