"""The short way of a call on one map and rows (K, 5): one record in the graph, no views of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from roialign import _core
from roialign._rois import Rois

from . import adapter, kernels, routes
from .calls import Call


def takes_rows(features: object, rois: object) -> bool:
    return (
        type(features) is Tensor
        and type(rois) is Tensor
        and not (routes.is_traced() or routes.is_watched() or routes.in_forward_mode())
        and not (features.is_neg() or rois.is_neg())
        and _core.takes_rows(features, rois)
        and features.untyped_storage().nbytes() > 0  # not freed
        and rois.untyped_storage().nbytes() > 0
    )


def forward_rows(features, rows, output_size, scales, rule, out) -> Tensor:
    images, _, *size = features.shape
    call = Call("forward", output_size, images, (size,), scales, rule)
    if out is None:
        if routes.needs_gradient((features, rows)):
            return _record(call, features, rows)
        return _pool(call, features, rows)
    if out.device != features.device or not routes.have_memory((out,)):
        rois = Rois(*adapter.columns(rows))
        return adapter.forward((features,), rois, output_size, scales, rule, out=out)
    _pool(call, features, rows, out)
    torch.autograd.graph.increment_version(out)
    return out


def _pool(call: Call, features: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
    if kernels.home(features) is not None:
        boxes, image_index = adapter.columns(rows)
        arrays = {"features": (features,), "boxes": boxes, "image_index": image_index}
        return kernels.run(call, arrays, out)
    if out is None:
        shape = rows.shape[0], features.shape[1], *call.bins
        out = kernels.laid_out(features, shape, kernels.empty)
    threads = kernels.threads()
    _core.forward(features, call.scales, rows, None, None, call.rule, out, threads)
    return out


class RoIAlignRows(Function):
    @staticmethod
    def forward(ctx: Any, call: Call, features: Tensor, rows: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(features if rows.requires_grad else None, rows)
        ctx.call = call
        return _pool(call, features, rows)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None) -> tuple:
        d_features = d_rows = None
        if d_output is not None:
            features, rows = ctx.saved_tensors
            (_, *rest), (boxes, image_index) = ctx.call, adapter.columns(rows)
            rois = {"boxes": boxes, "image_index": image_index}
            if ctx.needs_input_grad[1]:
                call = Call("adjoint", *rest)
                (d_features,) = routes.run(call, {"d_output": d_output, **rois})
            if ctx.needs_input_grad[2]:
                arrays = {"d_output": d_output, "features": (features,), **rois}
                d_boxes = routes.run(Call("box_gradient", *rest), arrays)
                d_rows = adapter.with_index_column(d_boxes)
        return None, d_features, d_rows


_record = super(Function, RoIAlignRows).apply
