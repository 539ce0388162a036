"""Layers as one operator each: what TorchScript calls, and what tracers write down.

The kernels are the layers' own functions of Python, so all else of them is as there.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor

import roialign
from roialign import _checks


@torch.jit.unused  # TorchScript need not read it, nor the next
def is_traced() -> bool:
    """Whether `torch.jit.trace` writes down what is called. ONNX's exporter takes its steps."""
    return torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export()


@torch.jit.unused
def is_recorded(given: Any) -> bool:
    """As `is_traced`, or `torch.fx` does so: with a proxy for a tensor, or in a dict of them."""
    first = next(iter(given.values()), None) if isinstance(given, dict) else given
    return isinstance(first, torch.fx.Proxy) or is_traced()


def refuse(layer: torch.nn.Module) -> None:
    """As ``__prepare_scriptable__`` of a layer whose arguments TorchScript has no types for."""
    name = f"{type(layer).__module__}.{type(layer).__qualname__}"
    _checks.refuse_script(name)


def register(name: str, schema: str, function: Callable[..., Tensor]) -> None:
    """``torch.ops.roialign.<name>``, which calls `function`."""
    torch.library.define(f"roialign::{name}", schema)
    torch.library.impl(f"roialign::{name}", "CompositeImplicitAutograd")(function)


register(
    "ROIAlign",
    "(Tensor features, Tensor rois, int pooled_height, int pooled_width, float spatial_scale, "
    "int sample_num, int roi_end_mode) -> Tensor",
    lambda features, rois, *given: roialign.ROIAlign(*given)(features, rois),
)
