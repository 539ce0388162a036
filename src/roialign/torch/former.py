"""The operators of roialign 0.1, by the names that programs exported by it call: to say so."""

from __future__ import annotations

from typing import Any

import torch

# Their leading arguments: what loads a program takes those that it finds.
_SCHEMAS = {
    "forward": "(Tensor features, Tensor boxes, Tensor image_index) -> Tensor",
    "adjoint": "(Tensor d_output, Tensor boxes, Tensor image_index) -> Tensor",
    "box_gradient": "(Tensor d_output, Tensor features, Tensor boxes) -> Tensor",
}


def _refuse(*args: Any) -> None:
    raise RuntimeError(
        "this was exported by roialign 0.1, whose operators are gone: export it again"
    )


for _operation, _schema in _SCHEMAS.items():
    torch.library.define(f"roialign::{_operation}", _schema)
    torch.library.impl(f"roialign::{_operation}", "CompositeImplicitAutograd")(_refuse)
