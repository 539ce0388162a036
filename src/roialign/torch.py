"""The PyTorch adapter: which tensors are accepted, the operators, their derivatives and transforms.

In reading order: checks; the kernels on memory; the operators ``torch.ops.roialign``, which
``torch.compile``, ``torch.export`` and tensor subclasses see; the same as ``torch.autograd.Function``,
which eager mode and ``torch.func`` see; the choice between them; the layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling
from torch.jit import is_tracing

import roialign
from roialign import _checks, _conventions, _core, _threads
from roialign._conventions import Rule

__all__ = ["ROIAlign"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_LARGE = 4 << 20  # bytes: from here on results live on huge pages


def _is_traced() -> bool:
    """Whether a compiler or a tracer reads the Python code: memory is not for it."""
    return is_compiling() or is_tracing()


def _triton_module(tensor: Tensor) -> str | None:
    """Whose kernels are for the tensor's device: None on the CPU, which has the core."""
    if tensor.is_cpu:
        return None
    if tensor.is_cuda:  # of NVIDIA or AMD
        return "launch"
    return "dense" if tensor.device.type == "npu" else None  # on Ascend


_core.accept(Tensor)  # it reads tensors as they are, by DLPack's functions in C


# Types


def are_ordinary(features: object, rois: object) -> bool:
    """Whether no check of the types and shapes of these can fail, and the core reads them as they are."""
    return (
        type(features) is Tensor
        and type(rois) is Tensor
        and not (_is_traced() or _watched() or features.is_neg() or rois.is_neg())
        and _core.are_ordinary(features, rois)
        and features.untyped_storage().nbytes() > 0  # not freed
        and rois.untyped_storage().nbytes() > 0
    )


def _is_freed(tensor: Tensor | None) -> bool:
    """Whether its storage was emptied: its address, then a small number or 0, is no memory."""
    if type(tensor) not in _PLAIN:
        return False
    try:
        return not tensor.untyped_storage().nbytes() and tensor.numel() > 0
    except NotImplementedError:  # a transform's wrapper
        return False


def check_array(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {_checks.type_name(value)}")
    if value.is_nested or value.layout is not torch.strided:
        got = "a nested one" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"`{name}` must be a dense tensor, got {got}")
    if _triton_module(value) == "dense":
        if os.environ.get("ROIALIGN_NPU") != "1":
            raise TypeError(
                f"`{name}` must be on the CPU or a GPU, got device {value.device}: there use "
                "torch_npu.npu_roi_align; ROIALIGN_NPU=1 allows experimental kernels that have run "
                "on no device"
            )
    elif not (value.is_cpu or value.is_cuda or value.is_meta):
        raise TypeError(f"`{name}` must be on the CPU or a GPU, got device {value.device}")
    if not is_compiling() and _is_freed(value):
        raise TypeError(f"`{name}` must be in memory, got a tensor whose storage was freed")


def check_features(name: str, value: object) -> None:
    check_array(name, value)
    _checks.features_dtype(name, value.dtype, value.dtype in _FLOATS)
    if value.dtype is torch.float64 and _triton_module(value) == "dense":
        raise TypeError(
            f"`{name}` must be float16, bfloat16 or float32 on {value.device}, got float64"
        )


def _check_boxes(name: str, value: object, integers: bool) -> None:
    check_array(name, value)
    ok = value.dtype in _FLOATS or (integers and value.dtype in _INTEGERS)
    _checks.boxes_dtype(name, value.dtype, ok, integers)


def _check_index(name: str, value: Tensor) -> None:
    _checks.index_dtype(name, value.dtype, value.dtype in _INTEGERS)


def check_rois(rois: object, integers: bool = True) -> None:
    _checks.rois(
        rois, check_array, lambda name, value: _check_boxes(name, value, integers), _check_index
    )


def check_out(name: str, out: object, dtype: torch.dtype) -> None:
    check_array(name, out)
    if out.dtype != dtype:
        raise TypeError(f"`{name}` must have dtype {dtype}, got {out.dtype}")


# Values


class Rois(NamedTuple):
    """The three forms as one: boxes (K, 4) and an image index (K,), or ordinary rows (K, 5) and None."""

    boxes: Tensor
    image_index: Tensor | None
    given: object

    def arrays(self) -> list[Tensor]:
        return list(self.given) if isinstance(self.given, (tuple, list)) else [self.given]

    def like_given(self, d_boxes: Tensor) -> Any:
        """A gradient (K, 4) in the form and dtype in which the rois came."""
        if isinstance(self.given, list):
            pieces = torch.split(d_boxes, [len(boxes) for boxes in self.given])
            return [p.to(gradient_dtype(b.dtype)) for p, b in zip(pieces, self.given)]
        if isinstance(self.given, tuple):
            return d_boxes.to(gradient_dtype(self.boxes.dtype))
        d_boxes = d_boxes.to(gradient_dtype(self.given.dtype))
        return torch.nn.functional.pad(d_boxes, (1, 0))


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a gradient in boxes of ``dtype``: float32 for integers."""
    return dtype if dtype in _FLOATS else torch.float32


def parse_rois(rois: Any, images: int) -> Rois:
    _checks.roi_shapes(rois, images)
    if isinstance(rois, tuple):
        return Rois(*rois, rois)
    if isinstance(rois, list):
        if not rois:
            return Rois(*_columns(torch.zeros(0, 5, device="cpu")), rois)
        index = [b.new_full((b.shape[0],), i, dtype=torch.int64) for i, b in enumerate(rois)]
        # Boxes of different dtypes meet in float64, which holds all of them.
        if any(boxes.dtype != rois[0].dtype for boxes in rois):
            return Rois(torch.cat([boxes.double() for boxes in rois]), torch.cat(index), rois)
        return Rois(torch.cat(rois), torch.cat(index), rois)
    return Rois(*_columns(rois), rois)


def _columns(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.narrow(1, 1, 4), rows.select(1, 0)


def check_out_values(name: str, out: Tensor, shape: tuple[int, ...], inputs: list[Tensor]) -> None:
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"`{name}` must have shape {tuple(shape)}, got {tuple(out.shape)}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (out, *inputs)):
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


def _is_channels_last(tensor: Tensor) -> bool:
    """Channels next to each other in memory, in a tensor where that means something."""
    if tensor.is_contiguous():
        return False
    _, channels, height, width = tensor.shape
    return channels > 1 and height * width > 1 and tensor.stride(1) == 1


def _result(like: Tensor, shape: tuple[int, ...], empty: Callable) -> Tensor:
    """``empty(like, shape)``, but with channels innermost in memory if they are in `like`."""
    if not _is_channels_last(like):
        return empty(like, tuple(shape))
    n, c, h, w = shape
    return empty(like, (n, h, w, c)).permute(0, 3, 1, 2)


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    size = math.prod(shape) * like.itemsize
    if not like.is_cpu:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    if size >= _LARGE:
        _checks.size("output", shape)
        return torch.from_numpy(_core.allocate(size)).view(like.dtype).view(shape)
    return torch.empty(shape, dtype=like.dtype, device="cpu")


# Kernels: the core, or those of the GPU, on the tensors' memory


def _stored(tensor: Tensor) -> Tensor:
    """With its values in memory, which those of a lazy negation are not, and aligned there."""
    return _aligned(tensor.resolve_neg() if tensor.is_neg() else tensor)


def _aligned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.data_ptr() % tensor.itemsize else tensor


def _run(name, arrays, boxes, index, tangent, rule, result) -> Tensor:
    """Writes ``result`` by the kernels of its device; on the CPU raises where they refuse an index."""
    coordinate = torch.float64 if arrays[0].dtype is torch.float64 else torch.float32
    if index is not None:
        boxes = _stored(boxes) if boxes.dtype in _FLOATS else boxes.to(coordinate)
        index, arrays = _stored(index), [_stored(array) for array in arrays]
    if tangent is not None:
        tangent = _stored(tangent.to(coordinate).contiguous())
    module = _triton_module(result)
    if module is not None:
        return _run_triton(module, name, arrays, boxes, index, tangent, rule, result)
    if index is None:
        rois = boxes
    else:
        rois = boxes, index if index.dtype in _FLOATS else index.to(torch.int64)
    tangents = () if name == "box_gradient" else (tangent,)
    threads = min(_threads.get_num_threads(), torch.get_num_threads())
    target = _aligned(result)
    bad = getattr(_core, name)(*arrays, rois, *tangents, rule, target, threads)
    if bad >= 0:
        images = (result if name == "adjoint" else arrays[-1]).shape[0]
        got = (boxes[bad, 0] if index is None else index[bad]).item()
        raise IndexError(
            f"`image_index` of RoI {bad} must be an integer in [0, {images}), got {got}"
        )
    if target is not result:
        result.copy_(target)
    return result


def _run_triton(module, name, arrays, boxes, index, tangent, rule, result) -> Tensor:
    """A RoI of no image adds nothing: an error would have to wait for the device."""
    if not all([tensor.numel() for tensor in (result, boxes, *arrays)]):
        return result.zero_()
    if index is None:
        boxes, index = _columns(boxes)
    sums = torch.float64
    if module == "dense":  # for devices without float64
        boxes, sums = boxes.float(), torch.float32
        index = index.float() if index.dtype in _FLOATS else index.long()
    operation = getattr(_operations(module), name)
    with _device_of(result):
        if name == "box_gradient":
            partial = operation(_launch, *arrays, boxes, index, rule)
            return result.copy_(partial.sum(0, dtype=sums))
        return operation(_launch, *arrays, boxes, index, tangent, rule, result)


@functools.cache
def _operations(name: str):
    """The module of `_triton`."""
    try:
        return importlib.import_module(f"roialign._triton.{name}")
    except ImportError as error:
        raise ImportError(
            "roialign needs Triton for tensors on a GPU: pip install 'roialign[gpu]'"
        ) from error


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device the current one, on which kernels are launched."""
    if tensor.is_cpu:  # the kernels are interpreted
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def _launch(kernel, grid, inputs, outputs, **constants) -> list[Tensor]:
    """One kernel on the current stream of the device (`_triton.launch`)."""
    results = [
        output
        if isinstance(output, Tensor)
        else torch.empty(output.shape, dtype=getattr(torch, output.dtype), device=inputs[0].device)
        for output in outputs
    ]
    kernel[grid](*inputs, *results, **constants)
    return results


def _forward_kernel(features, boxes, index, tangent, output_size, *rule, out=None) -> Tensor:
    if out is None:
        shape = (boxes.shape[0], features.shape[1], *output_size)
        out = _result(features, shape, _empty)
    return _run("forward", (features,), boxes, index, tangent, rule, out)


def _adjoint_shape(d_output: Tensor, feature_shape: tuple[int, ...]) -> tuple[int, ...]:
    """With the channels that came: a shard of ``d_output`` has fewer than the features."""
    return (feature_shape[0], d_output.shape[1], *feature_shape[2:])


def _adjoint_kernel(d_output, boxes, index, tangent, feature_shape, *rule, out=None) -> Tensor:
    if out is None:
        shape = _adjoint_shape(d_output, feature_shape)
        out = _result(d_output, shape, _empty)
    return _run("adjoint", (d_output,), boxes, index, tangent, rule, out)


def _box_gradient_kernel(d_output, features, boxes, index, *rule) -> Tensor:
    coordinate = torch.float64 if features.dtype is torch.float64 else torch.float32
    d_boxes = torch.empty(boxes.shape[0], 4, dtype=coordinate, device=features.device)
    _run("box_gradient", (d_output, features), boxes, index, None, rule, d_boxes)
    return d_boxes.to(gradient_dtype(boxes.dtype))


_KERNELS = {
    "forward": _forward_kernel,
    "adjoint": _adjoint_kernel,
    "box_gradient": _box_gradient_kernel,
}


def _operator_kernel(name: str) -> Callable:
    def kernel(*args):
        _check_fit(name, *args)
        if any(map(_is_freed, args[:_TENSORS])):
            for argument, tensor in zip(_OPERATORS[name]._schema.arguments, args[:_TENSORS]):
                if tensor is not None:
                    check_array(argument.name, tensor)
        return _KERNELS[name](*args)

    return kernel


def _check_fit(name, *args) -> None:
    """An operator is called with any arguments; the core refuses what does not fit, a GPU cannot."""
    arrays, (boxes, index, *rest) = _check_ranks(name, *args)
    array, vectors = arrays[0], [boxes, *[t for t in rest if t is not None]]
    count = (boxes if name == "forward" else array).shape[:1]
    fit = arrays[-1].shape[1] == array.shape[1] and index.shape == count
    if not fit or any([t.shape != (*count, 4) for t in vectors]):
        raise ValueError(f"roialign::{name}: the map, the boxes and the pooled array do not fit")
    if array.dtype not in _FLOATS or arrays[-1].dtype != array.dtype:
        raise TypeError(f"roialign::{name}: arrays must be of one float dtype")
    if any([t.dtype not in _FLOATS + _INTEGERS for t in (index, *vectors)]):
        raise TypeError(f"roialign::{name}: boxes and indices must be floats or integers")
    if any([t.device != array.device for t in (*arrays, index, *vectors) if t.numel()]):
        raise TypeError(f"roialign::{name}: tensors must be on one device")


def _check_ranks(name, *args) -> tuple[list[Tensor], list[Tensor | None]]:
    """The arrays; boxes, image index and the tangent, if the operator takes one. All are there."""
    size = () if name == "box_gradient" else args[_TENSORS]
    count = 2 if name == "box_gradient" else 1
    arrays, rois = list(args[:count]), list(args[count:_TENSORS])
    ranks = [*[4] * count, 2, 1, 2]
    if (
        len(size) != {"forward": 2, "adjoint": 4, "box_gradient": 0}[name]
        or any([tensor is None for tensor in (*arrays, *rois[:2])])
        or any([t is not None and t.dim() != n for t, n in zip(args[:_TENSORS], ranks)])
    ):
        raise ValueError(f"roialign::{name}: the map, the boxes and the pooled array do not fit")
    return arrays, rois


# Derivatives, the same for the operators and the functions below. An operation is linear in all that is
# no box; with a tangent it is linear in the tangent too. Each rule takes what its operation took.


def _second_order() -> None:
    raise NotImplementedError(
        "roialign has no second derivative in the boxes: detach() them where a gradient is "
        "differentiated again"
    )


class Derivatives(NamedTuple):
    """What `torch.library` and `Function` ask for: setup_context, backward, jvp."""

    context: Callable
    backward: Callable
    jvp: Callable


def _pair(name: str) -> Derivatives:
    """Of "forward" or "adjoint", which are each other's gradient in the array that they take."""
    is_forward = name == "forward"
    sibling = "adjoint" if is_forward else "forward"

    def context(ctx, inputs, output):
        array, boxes, index, tangent, size, *rule = inputs
        moves = boxes.requires_grad or (tangent is not None and tangent.requires_grad)
        ctx.set_materialize_grads(
            False
        )  # None says that an input does not move, or an output not count
        ctx.save_for_backward(array if moves else None, boxes, index, tangent)
        ctx.save_for_forward(array, boxes, index, tangent)
        ctx.size, ctx.rule = tuple(size), rule
        ctx.array_size = tuple(array.shape) if is_forward else tuple(array.shape[2:])

    def backward(ctx, d_result):
        array, boxes, index, tangent = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_array = d_boxes = d_tangent = None
        if d_result is None:
            needs = [False] * len(needs)
        if needs[0]:
            d_array = _call(sibling, d_result, boxes, index, tangent, ctx.array_size, *ctx.rule)
        if needs[1] and tangent is not None:
            _second_order()
        if needs[1] or needs[3]:
            d_output, features = (d_result, array) if is_forward else (array, d_result)
            gradient = _call("box_gradient", d_output, features, boxes, index, *ctx.rule)
            d_boxes, d_tangent = (gradient, None) if needs[1] else (None, gradient)
        return d_array, d_boxes, None, d_tangent, None, *[None] * len(ctx.rule)

    def jvp(ctx, t_array, t_boxes, _t_index, t_tangent, *_):
        array, boxes, index, tangent = ctx.saved_tensors
        if t_boxes is not None and tangent is not None:
            _second_order()
        terms = [(t_array, tangent), (array, t_boxes), (array, t_tangent)]
        given = (t_array, t_boxes, t_tangent)
        return _sum(
            _call(name, a, boxes, index, v, ctx.size, *ctx.rule)
            for (a, v), t in zip(terms, given)
            if t is not None
        )

    return Derivatives(context, backward, jvp)


def _sum(terms: Iterable[Tensor]) -> Tensor | None:
    return functools.reduce(torch.add, terms) if (terms := list(terms)) else None


def _box_gradient_context(ctx, inputs, output) -> None:
    d_output, features, boxes, index, *rule = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_output, features, boxes, index)
    ctx.save_for_forward(d_output, features, boxes, index)
    ctx.rule = rule


def _box_gradient_backward(ctx, v):
    d_output, features, boxes, index = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dd_output = d_features = None
    if v is None:
        needs = [False] * len(needs)
    if needs[0]:
        bins = tuple(d_output.shape[2:])
        dd_output = _call("forward", features, boxes, index, v, bins, *ctx.rule)
    if needs[1]:
        shape = tuple(features.shape)
        d_features = _call("adjoint", d_output, boxes, index, v, shape, *ctx.rule)
    if needs[2]:
        _second_order()
    return dd_output, d_features, None, None, *[None] * len(ctx.rule)


def _box_gradient_jvp(ctx, t_d_output, t_features, t_boxes, *_):
    d_output, features, boxes, index = ctx.saved_tensors
    if t_boxes is not None:
        _second_order()
    pairs = [(t_d_output, features), (d_output, t_features)]
    return _sum(
        _call("box_gradient", d, f, boxes, index, *ctx.rule)
        for d, f in pairs
        if d is not None and f is not None
    )


_DERIVATIVES = {
    "forward": _pair("forward"),
    "adjoint": _pair("adjoint"),
    "box_gradient": Derivatives(_box_gradient_context, _box_gradient_backward, _box_gradient_jvp),
}


# Batching: one more axis in front becomes more images and more RoIs.


def _expand(tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    if dim is None:
        return tensor.expand(batch, *tensor.shape)
    return tensor.movedim(dim, 0)


def _image_offsets(index: Tensor, images: int) -> Tensor:
    """Indices (B, K) into the images of every batch, one after another; bad ones stay bad."""
    offsets = images * torch.arange(len(index), device=index.device).unsqueeze(1)
    return torch.where(index < 0, index, index + offsets)


def _checked_index(index: Tensor, dim: int | None, batch: int, images: int) -> Tensor:
    """(B, K) int64, -1 where it is no image."""
    index = _expand(index, dim, batch)
    fine = (index >= 0) & (index < images) & (index == index.to(torch.int64))
    return torch.where(fine, index.to(torch.int64), -1)


def _length(tensor: Tensor, dim: int | None) -> int:
    """Of the first axis but the batch."""
    return tensor.shape[1 if dim == 0 else 0]


def _flat(tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    return _expand(tensor, dim, batch).flatten(0, 1)


def _forward_vmap(info, dims, features, boxes, index, tangent, output_size, *rule):
    batch = info.batch_size
    images, count = _length(features, dims[0]), _length(boxes, dims[1])
    index = _checked_index(index, dims[2], batch, images)
    if dims[0] is not None:
        index, features = _image_offsets(index, images), _flat(features, dims[0], batch)
    if tangent is not None:
        tangent = _flat(tangent, dims[3], batch)
    boxes = _flat(boxes, dims[1], batch)
    output = _call("forward", features, boxes, index.flatten(), tangent, output_size, *rule)
    return output.unflatten(0, (batch, count)), 0


def _adjoint_vmap(info, dims, d_output, boxes, index, tangent, feature_shape, *rule):
    batch, images = info.batch_size, feature_shape[0]
    index = _image_offsets(_checked_index(index, dims[2], batch, images), images)
    if tangent is not None:
        tangent = _flat(tangent, dims[3], batch)
    d_output, boxes = _flat(d_output, dims[0], batch), _flat(boxes, dims[1], batch)
    shape = (batch * images, *feature_shape[1:])
    d_features = _call("adjoint", d_output, boxes, index.flatten(), tangent, shape, *rule)
    return d_features.unflatten(0, (batch, images)), 0


def _box_gradient_vmap(info, dims, d_output, features, boxes, index, *rule):
    batch = info.batch_size
    images, count = _length(features, dims[1]), _length(boxes, dims[2])
    index = _checked_index(index, dims[3], batch, images)
    if dims[1] is not None:
        index, features = _image_offsets(index, images), _flat(features, dims[1], batch)
    d_output, boxes = _flat(d_output, dims[0], batch), _flat(boxes, dims[2], batch)
    d_boxes = _call("box_gradient", d_output, features, boxes, index.flatten(), *rule)
    return d_boxes.unflatten(0, (batch, count)), 0


_VMAPS = {"forward": _forward_vmap, "adjoint": _adjoint_vmap, "box_gradient": _box_gradient_vmap}


# Operators. Fake kernels give results of the same shape, dtype and strides, without memory.


def _forward_fake(features, boxes, index, tangent, output_size, *rule):
    shape = (boxes.shape[0], features.shape[1], *output_size)
    return _result(features, shape, Tensor.new_empty)


def _adjoint_fake(d_output, boxes, index, tangent, feature_shape, *rule):
    return _result(d_output, _adjoint_shape(d_output, feature_shape), Tensor.new_empty)


def _box_gradient_fake(d_output, features, boxes, index, *rule):
    return boxes.new_empty((boxes.shape[0], 4), dtype=gradient_dtype(boxes.dtype))


def _operator_fake(name: str) -> Callable:
    def fake(*args):
        _check_ranks(name, *args)
        return _FAKES[name](*args)

    return fake


_FAKES = {"forward": _forward_fake, "adjoint": _adjoint_fake, "box_gradient": _box_gradient_fake}

_TENSORS = 4  # the first arguments of each operation: tensors, or None
_RULE = (
    "float scale_y, float scale_x, int sampling_ratio, float pixel_offset, float input_offset, "
    "float end_offset, float? min_size, bool adaptive_floor"
)
_SCHEMAS = {
    "forward": "(Tensor features, Tensor boxes, Tensor image_index, Tensor? tangent, "
    f"SymInt[] output_size, {_RULE}) -> Tensor",
    "adjoint": "(Tensor d_output, Tensor boxes, Tensor image_index, Tensor? tangent, "
    f"SymInt[] feature_shape, {_RULE}) -> Tensor",
    "box_gradient": "(Tensor d_output, Tensor features, Tensor boxes, Tensor image_index, "
    f"{_RULE}) -> Tensor",
}


def _register(name: str) -> type[Function]:
    """Defines the operator ``roialign::name``; returns the same as a `Function`."""
    operator, derivatives = f"roialign::{name}", _DERIVATIVES[name]
    torch.library.define(operator, _SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(operator, ("cpu", "cuda", "privateuseone"))(  # the last is npu
        _operator_kernel(name)
    )
    torch.library.register_fake(operator)(_operator_fake(name))
    torch.library.register_vmap(operator, _VMAPS[name])
    torch.library.register_autograd(
        operator, derivatives.backward, setup_context=_operator_context(derivatives.context)
    )
    methods = {
        "forward": lambda *args: _operate(name, args),
        "setup_context": derivatives.context,
        "backward": derivatives.backward,
        "jvp": derivatives.jvp,
        "vmap": _VMAPS[name],
    }
    return type(name, (Function,), {key: staticmethod(value) for key, value in methods.items()})


def _operator_context(context: Callable) -> Callable:
    """An operator has no forward mode: its context keeps nothing for it."""

    def setup_context(ctx, inputs, output):
        ctx.save_for_forward = lambda *tensors: None
        context(ctx, inputs, output)

    return setup_context


_FUNCTIONS = {name: _register(name) for name in _SCHEMAS}


# Sharding: which shards of DTensors the operators compute on (docs/distributed.md).


def _shard() -> None:
    """Registers the rules, if there can be a DTensor; its module is slow to import."""
    if "torch.distributed.tensor" in sys.modules:
        _register_sharding()


_shard._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, without its import


@functools.cache
def _register_sharding() -> None:
    try:
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
        from torch.distributed.tensor.experimental import register_sharding

        schema_info = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    except (ImportError, AttributeError):  # another torch: DTensor says that it has no rule
        return

    whole, rows, channels, terms = Replicate(), Shard(0), Shard(1), Partial()
    rules = {  # the result, the arrays, each tensor of the RoIs
        "forward": [
            (whole, [whole], whole),
            (rows, [whole], rows),
            (channels, [channels], whole),
        ],
        "adjoint": [
            (whole, [whole], whole),
            (terms, [rows], rows),
            (channels, [channels], whole),
        ],
        "box_gradient": [
            (whole, [whole, whole], whole),
            (rows, [rows, whole], rows),
            (terms, [channels, channels], whole),
        ],
    }
    for name, choices in rules.items():
        operator = getattr(torch.ops.roialign, name).default
        register_sharding(operator)(functools.partial(_placements, choices))
        # DTensor remembers a decision by the arguments from this one on: the sizes count.
        schema_info[operator] = dataclasses.replace(schema_info[operator], static_argnum=_TENSORS)


def _placements(choices: list, *args) -> list[tuple[list, list]]:
    """Of one operator's result and arguments, in each of the choices; None: not a tensor."""

    def of_arguments(arrays, rois):
        given = [rois if t is not None else None for t in args[len(arrays) : _TENSORS]]
        return [*arrays, *given, *[None] * (len(args) - _TENSORS)]

    return [([result], of_arguments(arrays, rois)) for result, arrays, rois in choices]


_shard()


# The choice. What is private to torch only makes a call shorter: without it the way is the public one.

try:
    from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
    from torch._C._functorch import unwrap_if_dead as _alive  # what a transform that ended left
    from torch.autograd import forward_ad

    forward_ad._current_level  # noqa: B018

    def _watched() -> bool:
        """Whether a transform or a mode wants to see the operations."""
        return _are_functorch_transforms_active() or _len_torch_dispatch_stack() > 0

    def _in_forward_mode() -> bool:
        return forward_ad._current_level >= 0

except (ImportError, AttributeError):

    def _watched() -> bool:
        return True

    def _in_forward_mode() -> bool:
        return True

    def _alive(tensor: Tensor) -> Tensor:
        return tensor


def _are_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether these are torch's own tensors on the CPU or a GPU, or wrappers that pass for such."""
    return all([t is None or (type(t) in _PLAIN and not t.is_meta) for t in tensors])


def _have_memory(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether the elements of these are where a kernel can read and write them."""
    return _are_plain(tensors) and all(
        [t is None or _core.has_memory(t) and not _is_freed(t) for t in tensors]
    )


# `apply` without the part that looks for transforms and binds arguments by their names.
_RECORDED = {name: super(Function, function).apply for name, function in _FUNCTIONS.items()}
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_OPERATORS = {name: getattr(torch.ops.roialign, name).default for name in _SCHEMAS}


def _needs_gradient(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])


def _operate(name: str, args: tuple) -> Tensor:
    """Without derivatives: on memory, or by the operator."""
    if not _watched() and _have_memory(args[:_TENSORS]):
        return _KERNELS[name](*args)
    return _OPERATORS[name](*args)


def _call(name: str, *args) -> Tensor:
    tensors = args[:_TENSORS]
    if _is_traced() or not _are_plain(tensors):
        _shard()
        return _OPERATORS[name](*args)
    if _watched() or _in_forward_mode():
        return _FUNCTIONS[name].apply(*args)
    tensors = [None if t is None else _alive(t) for t in tensors]
    if not _have_memory(tensors):
        return _OPERATORS[name](*args)
    if _needs_gradient(tensors):
        return _RECORDED[name](*tensors, *args[_TENSORS:])
    return _KERNELS[name](*tensors, *args[_TENSORS:])


class _Rows(Function):
    """The operation "forward" of ordinary rows: one record in the graph, and no views."""

    @staticmethod
    def forward(ctx, features, rows, output_size, rule):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(features if rows.requires_grad else None, rows)
        ctx.feature_shape, ctx.rule = tuple(features.shape), rule
        return _forward_kernel(features, rows, None, None, output_size, *rule)

    @staticmethod
    def backward(ctx, d_output):
        features, rows = ctx.saved_tensors
        d_features = d_rows = None
        if d_output is not None:
            rois = _columns(rows)
            if ctx.needs_input_grad[0]:
                d_features = _call("adjoint", d_output, *rois, None, ctx.feature_shape, *ctx.rule)
            if ctx.needs_input_grad[1]:
                d_boxes = _call("box_gradient", d_output, features, *rois, *ctx.rule)
                d_rows = torch.nn.functional.pad(d_boxes, (1, 0))
        return d_features, d_rows, None, None


_record_rows = super(Function, _Rows).apply


def _forward_rows(features, rows, output_size, rule, out) -> Tensor:
    if _needs_gradient((features, rows)):
        return _record_rows(features, rows, output_size, rule)
    output = _forward_kernel(features, rows, None, None, output_size, *rule, out=out)
    return output if out is None else _written(out)


def _written(out: Tensor) -> Tensor:
    """So that autograd knows: a graph that has kept `out` is refused its backward."""
    torch.autograd.graph.increment_version(out)
    return out


# Operations. Their arguments have been checked, but for devices and the image index.


def _check_devices(name: str, array: Tensor, **others: Tensor | None) -> None:
    for other, tensor in others.items():
        if tensor is None or tensor.device == array.device:
            continue
        if tensor.numel():  # an empty list of rois has no device
            raise TypeError(
                f"`{other}` must be on the device of `{name}`, {array.device}, got {tensor.device}"
            )


def forward(
    features: Tensor,
    boxes: Tensor,
    image_index: Tensor | None,
    output_size: tuple[int, int],
    rule: Rule,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Pooled features (K, C, P, Q)."""
    if image_index is None:
        same = out is None or out.device == features.device
        if same and not _in_forward_mode() and _have_memory((out,)):
            return _forward_rows(features, boxes, output_size, rule.numbers, out)
        boxes, image_index = _columns(boxes)
    _check_devices("features", features, rois=boxes, image_index=image_index, out=out)
    if _is_traced() and _is_onnx_export():
        return _onnx_forward(features, boxes, image_index, output_size, rule)
    args = (features, boxes, image_index, None, output_size, *rule.numbers)
    return _into(out, "forward", args)


def adjoint(
    d_output: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    feature_shape: tuple[int, ...],
    rule: Rule,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient in the features (N, C, H, W)."""
    _check_devices("d_output", d_output, rois=boxes, image_index=image_index, out=out)
    args = (d_output, boxes, image_index, None, feature_shape, *rule.numbers)
    return _into(out, "adjoint", args)


def box_gradient(
    d_output: Tensor,
    features: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    rule: Rule,
) -> Tensor:
    """The gradient in the boxes (K, 4), x1 y1 x2 y2, in their dtype."""
    _check_devices("d_output", d_output, features=features, rois=boxes, image_index=image_index)
    return _call("box_gradient", d_output, features, boxes, image_index, *rule.numbers)


def _into(out: Tensor | None, name: str, args: tuple) -> Tensor:
    if out is None:
        return _call(name, *args)
    direct = not (_is_traced() or _watched() or _in_forward_mode())
    if not (direct and _have_memory((out, *args[:_TENSORS]))):
        return out.copy_(_call(name, *args))
    _KERNELS[name](*args, out=out)
    return _written(out)


# Export to ONNX. Its operator RoiAlign is `half_pixel`, and `asymmetric` as "output_half_pixel"; on
# moved boxes it is other conventions too.


def _is_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


# As torch.compiler.assume_constant_result, which imports the compiler: it takes torch's for False.
_is_onnx_export._dynamo_marked_constant = True


def _onnx_rule(dtype: torch.dtype, rule: Rule) -> tuple[str, float, float]:
    """The mode of RoiAlign, and what to add to a box's start and to its end."""
    c, scale, adaptive = rule.convention, rule.spatial_scale[0], rule.sampling_ratio <= 0
    mode, pixel_offset = ("half_pixel", 0.5) if c.min_size is None else ("output_half_pixel", 0.0)
    reason = None
    if dtype is torch.bfloat16:
        reason = "takes no bfloat16"
    elif rule.spatial_scale[1] != scale:
        reason = f"has one `spatial_scale` for y and x, got {rule.spatial_scale}"
    elif c.min_size not in (None, 1):
        reason = f"has `min_size` None or 1, got {c.min_size}"
    elif adaptive and c.adaptive == "floor":
        reason = "rounds adaptive sampling up: give a `sampling_ratio` > 0"
    elif adaptive and c.pixel_offset != pixel_offset:  # else coordinates are the same bits
        reason = (
            f"has `pixel_offset` {pixel_offset} with `min_size` {c.min_size}, got {c.pixel_offset}; "
            "boxes moved by the difference are rounded, which could change the number of adaptive "
            "samples: give a `sampling_ratio` > 0"
        )
    if reason is not None:
        name = next((repr(n) for n, row in _conventions.conventions.items() if row == c), c)
        raise ValueError(f"`convention` {name} cannot be exported to ONNX here: RoiAlign {reason}")
    # (lo + shift) * s - pixel_offset = (lo + c.input_offset) * s - c.pixel_offset
    shift = c.input_offset + (pixel_offset - c.pixel_offset) / scale
    return mode, shift, c.end_offset


def _onnx_forward(
    features: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    output_size: tuple[int, int],
    rule: Rule,
) -> Tensor:
    mode, shift, end = _onnx_rule(features.dtype, rule)
    # Boxes have the dtype of the features there: float16 would round them.
    dtype = torch.float64 if features.dtype is torch.float64 else torch.float32
    boxes = boxes.to(dtype)
    if shift:
        boxes = boxes + shift
    if end:
        boxes = boxes + boxes.new_tensor([0, 0, end, end])
    output = torch.onnx.ops.symbolic(
        "RoiAlign",
        (features.to(dtype), boxes, image_index.to(torch.int64)),
        {
            "coordinate_transformation_mode": mode,
            "mode": "avg",
            "output_height": output_size[0],
            "output_width": output_size[1],
            "sampling_ratio": max(0, rule.sampling_ratio),
            "spatial_scale": rule.spatial_scale[0],
        },
        dtype=dtype,
        shape=(boxes.shape[0], features.shape[1], *output_size),
        version=16,
    )
    return output.to(features.dtype)


# The layer


class ROIAlign(torch.nn.Module):
    """MindSpore's RoIAlign as a layer; coming from torchvision or detectron2, use `roialign.compat`.

    Args:
        pooled_height, pooled_width, spatial_scale, sample_num, roi_end_mode: as in
            :class:`roialign.ROIAlign`, with the same errors.

    Called with ``features`` (N, C, H, W) and ``rois`` (K, 5), rows ``(image_index, x1, y1, x2, y2)``
    in image pixels, it gives (K, C, pooled_height, pooled_width) in the features' dtype. Gradients
    reach both. It has no parameters and an empty ``state_dict``.

    >>> import torch, roialign.torch
    >>> pool = roialign.torch.ROIAlign(2, 2, 0.5)
    >>> features = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    >>> rois = torch.tensor([[0, 0.2, 0.3, 0.2, 0.3]])
    >>> pool(features, rois)
    tensor([[[[1.7750, 2.0250],
              [2.2750, 2.5250]]]])
    """

    def __init__(
        self,
        pooled_height: int,
        pooled_width: int,
        spatial_scale: float,
        sample_num: int = 2,
        roi_end_mode: int = 1,
    ) -> None:
        super().__init__()
        self.operator = roialign.ROIAlign(
            pooled_height, pooled_width, spatial_scale, sample_num, roi_end_mode
        )

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        check_features("features", features)
        return self.operator(features, rois)

    def extra_repr(self) -> str:
        return repr(self.operator)[len("ROIAlign(") : -1]

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            "roialign.torch.ROIAlign cannot be scripted: use torch.compile or torch.export"
        )
