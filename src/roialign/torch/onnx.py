"""Export to ONNX. Its operator RoiAlign is `half_pixel`, and `asymmetric` as "output_half_pixel";
on moved boxes it is other conventions too. Its bins are means, or "max_corner".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.jit import is_tracing

from roialign import _core
from roialign._rule import REDUCTIONS, Convention, conventions, vector

from . import calls, kernels
from .calls import Call, Tensors

_MODES = {"avg": "mean", "max": "max_corner"}  # of RoiAlign


def is_exporting() -> bool:
    return torch.onnx.is_in_onnx_export()


# As torch.compiler.assume_constant_result, which imports the compiler: it takes torch's for False.
is_exporting._dynamo_marked_constant = True


def forward(call: Call, tensors: Tensors) -> Tensor:
    """Of each map the rows of its level, by one RoiAlign; the other rows are 0."""
    _, boxes, image_index, levels, *_ = tensors
    maps, _ = calls.maps_of(call, tensors)
    if levels is None:
        return _of_one_map(maps[0], boxes, image_index, call, call.scales)
    shape = boxes.shape[0], maps[0].shape[1], *call.bins
    output = maps[0].new_zeros(shape, dtype=kernels.pooled_dtype(maps[0].dtype))
    for i, features in enumerate(maps):
        rows = torch.nonzero(levels == i).squeeze(1)
        scales = call.scales[2 * i : 2 * i + 2]
        pooled = _of_one_map(features, boxes[rows], image_index[rows], call, scales)
        output = output.index_put((rows,), pooled)
    return output


def _of_one_map(
    features: Tensor, boxes: Tensor, image_index: Tensor, call: Call, scales: tuple[float, ...]
) -> Tensor:
    mode, reduction, shift, end, sampling_ratio = _reading(features.dtype, call.rule, scales)
    # Boxes have the dtype of the features there: float16 would round them.
    dtype = torch.float64 if features.dtype is torch.float64 else torch.float32
    boxes = boxes.to(dtype)
    if shift:
        boxes = boxes + shift
    if end:
        boxes = boxes + boxes.new_tensor([0, 0, end, end])
    attributes = {
        "coordinate_transformation_mode": mode,
        "mode": reduction,
        "output_height": call.bins[0],
        "output_width": call.bins[1],
        "sampling_ratio": sampling_ratio,
        "spatial_scale": scales[0],
    }
    given = features.to(dtype), boxes, image_index.to(torch.int64)
    if is_tracing():  # the exporter that has `dynamo=False`
        output = _Node.apply(*given, attributes)
    else:
        shape = boxes.shape[0], features.shape[1], *call.bins
        output = torch.onnx.ops.symbolic(
            "RoiAlign", given, attributes, dtype=dtype, shape=shape, version=16
        )
    return output.to(kernels.pooled_dtype(features.dtype))


class _Node(torch.autograd.Function):
    """RoiAlign, for the exporter that traces: what it gives, and the node that it is."""

    @staticmethod
    def forward(ctx, features, boxes, image_index, attributes):
        mode, reduction, *bins, ratio, scale = attributes.values()
        name = "half_pixel" if mode == "half_pixel" else "asymmetric"
        rule = vector(conventions[name], ratio, _MODES[reduction])
        images, _, *size = features.shape
        call = Call("forward", tuple(bins), images, (tuple(size),), (scale, scale), rule)
        maps = [features] * (1 + call.selects)
        return kernels.run(call, (None, boxes, image_index, None, None, *maps))

    @staticmethod
    def symbolic(graph, features, boxes, image_index, attributes):
        letters = {str: "s", int: "i", float: "f"}
        named = {f"{name}_{letters[type(value)]}": value for name, value in attributes.items()}
        return graph.op("RoiAlign", features, boxes, image_index, **named)


def _reading(
    dtype: torch.dtype, rule: tuple[float, ...], scales: tuple[float, ...]
) -> tuple[str, str, float, float, int]:
    """Both modes of RoiAlign, what to add to a box's start and to its end, the sampling ratio."""
    c, ratio, reduction, turn = _convention(rule)
    if turn:
        raise ValueError("boxes that turn cannot be exported to ONNX: it has no such operator")
    if reduction == "max":
        raise ValueError(
            "`reduction` 'max' cannot be exported to ONNX: in its RoiAlign the largest weighted "
            "pixel of the samples wins, which is 'max_corner'"
        )
    scale, adaptive = scales[0], ratio == 0
    mode, pixel_offset = ("half_pixel", 0.5) if c.min_size is None else ("output_half_pixel", 0.0)
    reason = None
    if dtype is torch.bfloat16:
        reason = "takes no bfloat16"
    elif scales[1] != scale:
        reason = f"has one `spatial_scale` for y and x, got {scales}"
    elif c.min_size not in (None, 1):
        reason = f"has `min_size` None or 1, got {c.min_size}"
    elif adaptive and c.adaptive == "floor":
        reason = "rounds adaptive sampling up: give a `sampling_ratio` > 0"
    elif adaptive and c.pixel_offset != pixel_offset:  # else coordinates are the same bits
        reason = (
            f"has `pixel_offset` {pixel_offset} with `min_size` {c.min_size}, "
            f"got {c.pixel_offset}; boxes moved by the difference are rounded, which could change "
            "the number of adaptive samples: give a `sampling_ratio` > 0"
        )
    if reason is not None:
        name = next((repr(n) for n, row in conventions.items() if row == c), c)
        raise ValueError(f"`convention` {name} cannot be exported to ONNX here: RoiAlign {reason}")
    # (lo + shift) * s - pixel_offset = (lo + c.input_offset) * s - c.pixel_offset
    shift = c.input_offset + (pixel_offset - c.pixel_offset) / scale
    found = next(name for name, each in _MODES.items() if each == reduction)
    return mode, found, shift, c.end_offset, ratio


def _convention(rule: tuple[float, ...]) -> tuple[Convention, int, str, float]:
    """The record of a rule, its sampling ratio, reduction and turn: `_rule.vector` backwards."""
    numbers = dict(zip(_core.rule_names, rule))
    ratio, reduction, turn = map(numbers.pop, ("sampling_ratio", "reduction", "turn"))
    min_size = numbers["min_size"]
    numbers["min_size"] = None if min_size == -math.inf else min_size
    numbers["adaptive"] = "floor" if numbers["adaptive"] else "ceil"
    return Convention(**numbers), int(ratio), REDUCTIONS[int(reduction)], turn
