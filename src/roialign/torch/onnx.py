"""Export to ONNX. Its operator RoiAlign is `half_pixel`, and `asymmetric` as "output_half_pixel";
on moved boxes it is other conventions too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from roialign import _core
from roialign._rule import Convention, conventions

from . import kernels
from .calls import Call, Tensors


def is_exporting() -> bool:
    return torch.onnx.is_in_onnx_export()


# As torch.compiler.assume_constant_result, which imports the compiler: it takes torch's for False.
is_exporting._dynamo_marked_constant = True


def forward(call: Call, tensors: Tensors) -> Tensor:
    if len(call.maps) > 1:
        raise NotImplementedError(
            f"RoiAlign of ONNX has one map, got {len(call.maps)}: pool from each map by itself"
        )
    _, boxes, image_index, _, _, features = tensors
    mode, shift, end, sampling_ratio = _reading(features.dtype, call)
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
            "output_height": call.bins[0],
            "output_width": call.bins[1],
            "sampling_ratio": sampling_ratio,
            "spatial_scale": call.scales[0],
        },
        dtype=dtype,
        shape=(boxes.shape[0], features.shape[1], *call.bins),
        version=16,
    )
    return output.to(kernels.pooled_dtype(features.dtype))


def _reading(dtype: torch.dtype, call: Call) -> tuple[str, float, float, int]:
    """The mode of RoiAlign, what to add to a box's start and to its end, and the sampling ratio."""
    c, ratio = _convention(call.rule)
    scale, adaptive = call.scales[0], ratio == 0
    mode, pixel_offset = ("half_pixel", 0.5) if c.min_size is None else ("output_half_pixel", 0.0)
    reason = None
    if dtype is torch.bfloat16:
        reason = "takes no bfloat16"
    elif call.scales[1] != scale:
        reason = f"has one `spatial_scale` for y and x, got {call.scales}"
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
    return mode, shift, c.end_offset, ratio


def _convention(rule: tuple[float, ...]) -> tuple[Convention, int]:
    """The record of a rule, and its sampling ratio: `_rule.vector` backwards."""
    numbers = dict(zip(_core.rule_names, rule))
    ratio = int(numbers.pop("sampling_ratio"))
    min_size = numbers["min_size"]
    numbers["min_size"] = None if min_size == -math.inf else min_size
    numbers["adaptive"] = "floor" if numbers["adaptive"] else "ceil"
    return Convention(**numbers), ratio
