"""Triton's interpreter as a device: the operations of a `Problem` on torch tensors in CPU memory.

It takes its time for a program and a step of a loop, not for a lane.
"""

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
import triton

import roialign._ascend.launch
from roialign import _rule
from roialign._rois import Rois
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


def call_once(kernel, grid, inputs, outputs, **constants):
    """As a framework has it whose arrays are made once: an output is new, or the last input."""
    outputs = list(outputs)
    for i, output in enumerate(outputs):
        if not isinstance(output, launch.New):
            assert output is inputs[-1]
            outputs[i] = output.clone()
    return call(kernel, grid, inputs, outputs, **constants)


def _unwritten(new):
    dtype = getattr(torch, new.dtype)
    return torch.full(new.shape, float("nan") if dtype.is_floating_point else -1, dtype=dtype)


def tensor(array):
    """The same memory."""
    if array is None:
        return None
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array(tensor):
    """The same memory."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def rule(problem):
    return _rule.vector(problem.convention, problem.sampling)


def rois(problem, levels=None):
    return Rois(*map(tensor, problem.rois), tensor(levels))


@dataclass(frozen=True)
class Kernels:
    """A module of launches, and what its kernels do.

    A call has the map of a problem; with `levels` also those of `others`, with their scales.
    """

    launch: ModuleType
    narrow: bool  # weights are summed in float32, and there is no float64

    def __str__(self):
        return self.launch.__package__.rpartition("_")[2]

    def forward(
        self, problem, tangent=None, others=(), levels=None, layout=np.asarray, call=wide_call
    ):
        maps, scales = _maps(problem, others)
        output = layout(np.full(problem.output_shape, np.nan, problem.features.dtype))
        result = self.launch.forward(
            call,
            [tensor(layout(each)) for each in maps],
            *(rois(problem, levels), tensor(tangent), scales, rule(problem)),
            _given(output, call),
        )
        return array(result)

    def adjoint(
        self, problem, d_output, tangent=None, others=(), levels=None, layout=np.asarray,
        call=wide_call,
    ):  # fmt: skip
        """Of the map; with others a list."""
        maps, scales = _maps(problem, others)
        d_maps = [layout(np.full(each.shape, np.nan, d_output.dtype)) for each in maps]
        results = self.launch.adjoint(
            call,
            tensor(layout(d_output)),
            *(rois(problem, levels), tensor(tangent), scales, rule(problem)),
            [_given(each, call) for each in d_maps],
        )
        d_maps = list(map(array, results))
        return d_maps if others else d_maps[0]

    def box_gradient(
        self, problem, d_output, others=(), levels=None, layout=np.asarray, call=wide_call
    ):
        maps, scales = _maps(problem, others)
        real = "float64" if problem.features.dtype == np.float64 else "float32"
        return array(
            self.launch.box_gradient(
                call,
                tensor(layout(d_output)),
                [tensor(layout(each)) for each in maps],
                *(rois(problem, levels), scales, rule(problem)),
                _given(np.full(problem.boxes.shape, np.nan, real), call),
            )
        )


def _given(output, call):
    return launch.New(output.shape, output.dtype.name) if call is call_once else tensor(output)


def _maps(problem, others):
    problems = problem, *others
    return [each.features for each in problems], tuple(s for each in problems for s in each.scale)


GPU = Kernels(launch, narrow=False)
ASCEND = Kernels(roialign._ascend.launch, narrow=True)
