"""The operations on memory: by the core on the CPU, by the kernels for its device elsewhere."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from roialign import _checks, _core, _threads

from . import calls
from .calls import Call, Result, Tensors

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BYTES = (torch.uint8, torch.bool)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_KINDS = {**dict.fromkeys(FLOATS, "float"), **dict.fromkeys(_INTEGERS, "integer")}
PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
_LARGE = 4 << 20  # bytes: from here on results live on huge pages

_core.accept(Tensor)  # it reads tensors as they are, by DLPack's functions in C


def home(tensor: Tensor) -> str | None:
    """The folder of the kernels for the tensor's device; None on the CPU, which has the core."""
    if tensor.is_cpu:
        return None
    if tensor.is_cuda:  # of NVIDIA or AMD
        return "_triton"
    return "_ascend" if tensor.device.type == "npu" else None


def kind(dtype: torch.dtype) -> str:
    return _KINDS.get(dtype, "other")


def have_memory(tensors: Tensors) -> bool:
    """Whether their elements are as they are meant, aligned, where kernels read and write them.

    Not so: meta tensors, what a transform left behind, zeros or a negation that is not stored.
    """
    for t in tensors:
        if t is not None and (
            not _core.has_memory(t)
            or t.is_neg()
            or (not t.untyped_storage().nbytes() and t.numel())  # freed
        ):
            return False
    return True


def check_memory(name: str, tensor: Tensor) -> None:
    """Raises if its storage was emptied: its address, then a small number or 0, is no memory."""
    try:
        freed = type(tensor) in PLAIN and not tensor.untyped_storage().nbytes() and tensor.numel()
    except NotImplementedError:  # a transform's wrapper
        return
    if freed:
        raise TypeError(f"`{name}` must be in memory, got a tensor whose storage was freed")


# Results


def results(call: Call, tensors: Tensors, empty: Callable[..., Tensor]) -> Result:
    """Of "forward" and "adjoint", not written yet; `empty(like, shape, dtype=)` makes a tensor."""
    like = calls.source(tensors)
    shapes = calls.result_shapes(call, tensors)
    if call.operation == "adjoint":
        return tuple([laid_out(like, shape, empty) for shape in shapes])
    return laid_out(like, *shapes, empty)


def pooled_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of what features of ``dtype`` are pooled to."""
    return torch.float32 if dtype in BYTES else dtype


def laid_out(like: Tensor, shape: tuple[int, ...], empty: Callable) -> Tensor:
    """One, with channels innermost in memory if they are so in `like` and that means something."""
    dtype = pooled_dtype(like.dtype)
    if not like.is_contiguous():
        _, channels, height, width = like.shape
        if channels > 1 and height * width > 1 and like.stride(1) == 1:
            n, c, h, w = shape
            return empty(like, (n, h, w, c), dtype=dtype).permute(0, 3, 1, 2)
    return empty(like, shape, dtype=dtype)


def empty(like: Tensor, shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
    if like.is_cpu and (size := math.prod(shape) * dtype.itemsize) >= _LARGE:
        _checks.size("output", shape)
        return torch.from_numpy(_core.allocate(size)).view(dtype).view(shape)
    return like.new_empty(shape, dtype=dtype)


def coordinate(dtype: torch.dtype) -> torch.dtype:
    """In which boxes are read for arrays of ``dtype``."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a gradient in boxes of ``dtype``: float32 for integers."""
    return dtype if dtype in FLOATS else torch.float32


# Operations


def run(call: Call, tensors: Tensors, out: Result | None = None) -> Result:
    """Writes `out`, if it is given. On the CPU raises where an image index or a level is bad.

    Of tensors that have memory and are aligned there.
    """
    d_output, boxes, image_index, levels, tangent, *_ = tensors
    maps, selectors = calls.maps_of(call, tensors)
    operation, like, dtype = call.operation, calls.source(tensors), boxes.dtype
    real = coordinate(like.dtype)
    if dtype not in FLOATS:
        boxes = converted("boxes", boxes, real)
    if tangent is not None:
        tangent = tangent.to(real, copy=True).contiguous()
    if operation == "box_gradient":
        out = like.new_empty(boxes.shape, dtype=real)
    elif out is None:
        out = results(call, tensors, empty)
    if home(like) is None:
        given = call.scales, (boxes, image_index), levels
        rest = call.rule, out, threads(), selectors or None
        if operation == "forward":
            _core.forward(maps, *given, tangent, *rest)
        elif operation == "adjoint":
            _core.adjoint(d_output, *given, tangent, *rest)
        else:
            _core.box_gradient(d_output, maps, *given, *rest)
    else:
        # its kernels read floats
        maps = [
            converted("features", m, real) if m.dtype in BYTES else m for m in (*maps, *selectors)
        ]
        rois = boxes, image_index, levels
        _on_device(like, call, (d_output, *rois, tangent), out, maps)
    if operation == "box_gradient" and dtype is not real:
        return out.to(gradient_dtype(dtype))
    return out


def converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    _core.log(f"`{name}` is converted from {tensor.dtype} to {dtype}")
    return tensor.to(dtype)


def pool(call: Call, features: Tensor, *rois: Tensor, out: Tensor | None = None) -> Tensor:
    """`run` for most calls: forward, from one map. RoIs are of floats: rows (K, 5), or a pair."""
    if home(features) is not None:
        return run(call, flat(call, features, *rois), out)
    if out is None:
        out = laid_out(features, (rois[0].shape[0], features.shape[1], *call.bins), empty)
    given = rois[0] if len(rois) == 1 else rois
    _core.forward(features, call.scales, given, None, None, call.rule, out, threads())
    return out


def flat(call: Call, features: Tensor, *rois: Tensor) -> tuple[Tensor | None, ...]:
    """The tensors of a forward of one map, whose selectors are the features themselves."""
    return None, *pair(*rois), None, None, *[features] * (1 + call.selects)


def pair(*rois: Tensor) -> tuple[Tensor, ...]:
    """Boxes (K, 4) and image index of rows (K, 5), or as they are."""
    return calls.columns(*rois) if len(rois) == 1 else rois


def threads() -> int:
    return min(_threads.get_num_threads(), torch.get_num_threads())


# Kernels of a device


def _on_device(like: Tensor, call: Call, tensors: Tensors, out: Result, maps: Tensors) -> None:
    folder, operation = home(like), call.operation
    if folder == "_ascend" and (call.selects or tensors[1].shape[1] != 4):
        raise NotImplementedError(
            f"largest samples and boxes that turn are not there on {like.device}: take "
            "`roi_align` with `reduction` 'mean', or tensors on the CPU"
        )
    if _core.logging:
        _core.log(f"{operation} on {like.device} by the kernels of roialign.{folder}")
    if folder == "_ascend":  # for devices without float64
        if like.dtype is torch.float64:
            name = "features" if operation == "forward" else "d_output"
            raise TypeError(
                f"`{name}` must be float16, bfloat16 or float32 on {like.device}, got float64"
            )
        d_output, boxes, index, *rest = tensors
        index = index.float() if index.dtype in FLOATS else index.long()
        tensors = d_output, boxes.float(), index, *rest
    results = out if isinstance(out, tuple) else (out,)
    arrays = [*tensors, *results, *maps]
    launches, compiled = _launches(folder)
    kinds = tuple([None if t is None else (t.shape, t.stride(), t.dtype) for t in arrays])
    with _device_of(like):
        given = len(results), kinds, call.scales, call.rule
        kept = compiled.operation_of(launches, operation, *given)
        compiled.run(kept, arrays, functools.partial(_made, like.device))
        if not kept.steps:
            for result in results:
                result.zero_()


@functools.cache
def _launches(folder: str) -> tuple[ModuleType, ModuleType]:
    """Which kernels run on a device, and what launches them."""
    try:
        from roialign._triton import compiled

        return importlib.import_module(f"roialign.{folder}.launch"), compiled
    except ImportError as error:
        raise ImportError(
            "roialign needs Triton for tensors on a GPU: pip install 'roialign[gpu]'"
        ) from error


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device the current one, on which kernels are launched."""
    if tensor.is_cpu:  # the kernels are interpreted
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def _made(device: torch.device, shape: tuple[int, ...], dtype: str) -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device=device)
