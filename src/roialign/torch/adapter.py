"""What `_adapter` asks of a library: which tensors are accepted, forms of RoIs, the operations."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from roialign import _checks, _core, numpy as _numpy

from . import calls, kernels, routes
from .calls import Call, Result, columns as columns, with_index_column as with_index_column

float32 = torch.float32
byte_types = kernels.BYTES
takes_any_form = takes_numpy = False


# Types


def check_array(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        _checks.refuse_array(name, "torch.Tensor", value)
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
    _checks.out_dtype(name, out.dtype, dtype)


# Values


def check_out_values(name: str, out: Tensor, shape: tuple[int, ...], inputs: list[Tensor]) -> None:
    if tuple(out.shape) != tuple(shape):
        _checks.refuse_shape(name, str(tuple(shape)), out.shape)
    if routes.needs_gradient([out, *inputs]):
        raise RuntimeError(
            f"`{name}` must be None where a gradient is needed: call under no_grad()"
        )
    memory = [np.asarray(_Addresses(tensor)) for tensor in (out, *inputs)]
    _numpy.check_overlaps(name, memory[0], memory[1:])


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


def is_view(reshaped: Tensor, array: Tensor) -> bool:
    return reshaped.data_ptr() == array.data_ptr()


# Forms of RoIs


def joined(boxes: list[Tensor]) -> Tensor:
    if not boxes:
        return torch.zeros(0, 4, device="cpu")
    if any(each.dtype != boxes[0].dtype for each in boxes):  # float64 holds all of them
        boxes = [each.double() for each in boxes]
    return torch.cat(boxes)


def repeated(counts: list[int], like: Tensor) -> Tensor:
    index = [like.new_full((count,), i, dtype=torch.int64) for i, count in enumerate(counts)]
    return torch.cat(index) if index else like.new_zeros(0, dtype=torch.int64)


def numbered(images: int, each: int, like: Tensor) -> Tensor:
    ones = like.new_ones((images, each), dtype=torch.int64)  # a DTensor, if that is one
    return (ones.cumsum(0) - 1).flatten()


def from_numpy(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device)


def as_numpy(boxes: Tensor) -> np.ndarray | None:
    is_seen = routes.is_traced() or routes.is_watched() or not routes.are_plain((boxes,))
    if is_seen or not boxes.is_cpu or not kernels.have_memory((boxes,)):
        return None
    return boxes.detach().numpy()


def split(array: Tensor, counts: list[int]) -> Sequence[Tensor]:
    return torch.split(array, counts)


def cast(array: Tensor, dtype: torch.dtype) -> Tensor:
    return array if array.dtype is dtype else array.to(dtype)


# Operations


def takes_rows(features: object, rois: object) -> bool:
    return (
        not (routes.is_traced() or routes.is_watched() or routes.in_forward_mode())
        and type(features) is Tensor
        and type(rois) is Tensor
        and not (features.is_neg() or rois.is_neg())
        and _core.takes_rows(features, rois)
        and features.untyped_storage().nbytes() > 0  # not freed
        and rois.untyped_storage().nbytes() > 0
    )


def forward_rows(features, rows, output_size, scales, rule, out) -> Tensor | None:
    if out is not None:
        if out.device != features.device or not kernels.have_memory((out,)):
            return None
        shape = (rows.shape[0], features.shape[1], *output_size)
        check_out_values("out", out, shape, [features, rows])
    images, _, *size = features.shape
    call = Call("forward", output_size, images, (size,), scales, rule)
    return routes.pool(call, features, rows, out=out)


def forward(maps, rois, output_size, scales, rule, *, layout="NCHW", out=None) -> Tensor:
    shapes = [m.shape for m in maps]
    return _run("forward", (None, *rois, None, *maps), output_size, shapes, scales, rule, maps, out)


def adjoint(
    d_output, rois, feature_shapes, scales, rule, *, layout="NCHW", selectors=None, out=None
) -> tuple[Tensor, ...]:
    tensors, bins = (d_output, *rois, None), d_output.shape[2:]
    return _run("adjoint", tensors, bins, feature_shapes, scales, rule, selectors, out)


def box_gradient(d_output, maps, rois, scales, rule, *, layout="NCHW") -> Tensor:
    tensors, shapes = (d_output, *rois, None, *maps), [m.shape for m in maps]
    return _run("box_gradient", tensors, d_output.shape[2:], shapes, scales, rule, maps)


def _run(operation, tensors, bins, shapes, scales, rule, selectors, out=None) -> Result:
    """Checks that all are on the device of the first; an empty list of rois has none."""
    sizes = tuple([shape[2:] for shape in shapes])
    call = Call(operation, bins, shapes[0][0], sizes, scales, rule)
    if call.selects:
        tensors = *tensors, *selectors
    device = calls.source(tensors).device
    outs = out if type(out) is tuple else (out,)
    for i, tensor in enumerate((*tensors, *outs)):
        if tensor is not None and tensor.device != device and tensor.numel():
            name = {**dict(enumerate(calls.names(call, tensors))), 1: "rois"}.get(i, "out")
            raise TypeError(
                f"`{name}` must be on the device of "
                f"`{'d_output' if tensors[0] is not None else 'features'}`, {device}, "
                f"got {tensor.device}"
            )
    return routes.run(call, tensors, out)
