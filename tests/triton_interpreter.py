"""Triton's interpreter as a device: the operations of a `Problem` on torch tensors in CPU memory.

It takes its time for a program and a step of a loop, not for a lane.
"""

import numpy as np
import torch
import triton

from roialign import _conventions
from roialign._triton import kernels, launch
from tolerance import BFLOAT16


def call(kernel, grid, inputs, outputs, **constants):
    """Runs a kernel; what it is to make is NaN or -1 before."""
    arrays = [_unwritten(o) if isinstance(o, launch.New) else o for o in outputs]
    with np.errstate(all="ignore"):  # NaN and overflow are silent on a GPU
        kernel[grid](*inputs, *arrays, **constants)
    return arrays


def wide_call(kernel, grid, inputs, outputs, **constants):
    """With the taps of all RoIs in one program for an axis."""
    if kernel is kernels.axis_taps:
        grid, constants["BLOCK_K"] = (2,), triton.next_power_of_2(len(inputs[0]))
    return call(kernel, grid, inputs, outputs, **constants)


def _unwritten(new):
    dtype = getattr(torch, new.dtype)
    return torch.full(new.shape, float("nan") if dtype.is_floating_point else -1, dtype=dtype)


def tensor(array):
    """The same memory."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def rule(problem):
    return _conventions.rule(**problem.options).numbers


def forward(problem, tangent=None, layout=np.asarray, call=wide_call):
    output = layout(np.full(problem.output_shape, np.nan, problem.features.dtype))
    features, tangent = layout(problem.features), None if tangent is None else tensor(tangent)
    launch.forward(
        call, tensor(features), *map(tensor, problem.rois), tangent, rule(problem), tensor(output)
    )
    return output


def adjoint(problem, d_output, tangent=None, layout=np.asarray, call=wide_call):
    d_features = layout(np.full(problem.features.shape, np.nan, d_output.dtype))
    d_output, tangent = layout(d_output), None if tangent is None else tensor(tangent)
    launch.adjoint(
        call,
        tensor(d_output),
        *map(tensor, problem.rois),
        tangent,
        rule(problem),
        tensor(d_features),
    )
    return d_features


def box_gradient(problem, d_output, layout=np.asarray, call=wide_call):
    arrays = tensor(layout(d_output)), tensor(layout(problem.features)), *map(tensor, problem.rois)
    partial = launch.box_gradient(call, *arrays, rule(problem))
    return partial.numpy().sum(0, np.float64).astype(problem.boxes.dtype)
