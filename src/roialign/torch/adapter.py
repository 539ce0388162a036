"""What `_adapter` asks of a library: which tensors are accepted, forms of RoIs, the operations."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from roialign import _checks
from roialign._rois import Rois

from . import calls, kernels, routes
from .calls import Arrays, Call

float32 = torch.float32


# Types


def check_array(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {_checks.type_name(value)}")
    if value.is_nested or value.layout is not torch.strided:
        got = "a nested one" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"`{name}` must be a dense tensor, got {got}")
    if kernels.home(value) == "_ascend":
        if os.environ.get("ROIALIGN_NPU") != "1":
            raise TypeError(
                f"`{name}` must be on the CPU or a GPU, got device {value.device}: there use "
                "torch_npu.npu_roi_align; ROIALIGN_NPU=1 allows experimental kernels that have run "
                "on no device"
            )
    elif not (value.is_cpu or value.is_cuda or value.is_meta):
        raise TypeError(f"`{name}` must be on the CPU or a GPU, got device {value.device}")
    if not is_compiling():
        kernels.check_memory(name, value)


def check_out(name: str, out: object, dtype: torch.dtype) -> None:
    check_array(name, out)
    if out.dtype != dtype:
        raise TypeError(f"`{name}` must have dtype {dtype}, got {out.dtype}")


# Values


def check_out_values(name: str, out: Tensor, shape: tuple[int, ...], inputs: list[Tensor]) -> None:
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"`{name}` must have shape {tuple(shape)}, got {tuple(out.shape)}")
    if routes.needs_gradient([out, *inputs]):
        raise RuntimeError(
            f"`{name}` must be None where a gradient is needed: call under no_grad()"
        )
    if _overlaps_itself(out):
        raise ValueError(f"`{name}` must not overlap itself, got strides {out.stride()}")
    for tensor in inputs:
        if _share_memory(out, tensor):
            raise ValueError(f"`{name}` must not overlap an input, got overlapping memory")


def _overlaps_itself(tensor: Tensor) -> bool:
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    while tensor.dim():
        if _share_memory(tensor[:1], tensor[1:]):
            return True
        tensor = tensor[0]
    return False


def _share_memory(a: Tensor, b: Tensor) -> bool:
    try:
        return np.shares_memory(*map(np.asarray, (_Addresses(a), _Addresses(b))), max_work=10**6)
    except RuntimeError:  # numpy.exceptions.TooHardError: not proven to be disjoint
        return True


class _Addresses:
    """A tensor's elements for NumPy to compare, wherever they are: it reads none of them."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.itemsize
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "shape": tuple(tensor.shape),
            "strides": tuple([size * step for step in tensor.stride()]),
            "data": (tensor.data_ptr(), True),
        }


# Forms of RoIs


def columns(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.narrow(1, 1, 4), rows.select(1, 0)


def joined(boxes: list[Tensor]) -> Tensor:
    if not boxes:
        return torch.zeros(0, 4, device="cpu")
    if any(each.dtype != boxes[0].dtype for each in boxes):  # float64 holds all of them
        boxes = [each.double() for each in boxes]
    return torch.cat(boxes)


def repeated(counts: list[int], like: Tensor) -> Tensor:
    index = [like.new_full((count,), i, dtype=torch.int64) for i, count in enumerate(counts)]
    return torch.cat(index) if index else like.new_zeros(0, dtype=torch.int64)


def split(array: Tensor, counts: list[int]) -> Sequence[Tensor]:
    return torch.split(array, counts)


def cast(array: Tensor, dtype: torch.dtype) -> Tensor:
    return array.to(dtype)


def with_index_column(d_boxes: Tensor) -> Tensor:
    return torch.nn.functional.pad(d_boxes, (1, 0))


# Operations


def forward(maps, rois, output_size, scales, rule, *, out=None) -> Tensor:
    arrays = _arrays({"features": tuple(maps)}, rois)
    _check_devices(arrays, out)
    call = Call("forward", output_size, *_sizes([m.shape for m in maps]), scales, rule)
    return routes.run(call, arrays, out)


def adjoint(d_output, rois, feature_shapes, scales, rule, *, out=None) -> tuple[Tensor, ...]:
    arrays = _arrays({"d_output": d_output}, rois)
    _check_devices(arrays, out and out[0])
    call = Call("adjoint", d_output.shape[2:], *_sizes(feature_shapes), scales, rule)
    return routes.run(call, arrays, out)


def box_gradient(d_output, maps, rois, scales, rule) -> Tensor:
    arrays = _arrays({"d_output": d_output, "features": tuple(maps)}, rois)
    _check_devices(arrays)
    sizes = _sizes([m.shape for m in maps])
    return routes.run(Call("box_gradient", d_output.shape[2:], *sizes, scales, rule), arrays)


def _sizes(shapes: Sequence[Sequence[int]]) -> tuple[int, tuple]:
    """N, and H and W of each map."""
    return shapes[0][0], tuple([shape[2:] for shape in shapes])


def _arrays(arrays: Arrays, rois: Rois) -> Arrays:
    arrays["boxes"], arrays["image_index"], levels = rois
    if levels is not None:
        arrays["levels"] = levels
    return arrays


def _check_devices(arrays: Arrays, out: Tensor | None = None) -> None:
    """All are on that of the first; an empty list of rois has none."""
    tensors = calls.tensors(arrays) if out is None else [*calls.tensors(arrays), out]
    device = tensors[0].device
    if all([t.device == device for t in tensors]):
        return
    names = [*calls.names(arrays), "out"]
    for name, tensor in zip(names, tensors):
        if tensor.device != device and tensor.numel():
            raise TypeError(
                f"`{'rois' if name == 'boxes' else name}` must be on the device of `{names[0]}`, "
                f"{device}, got {tensor.device}"
            )
