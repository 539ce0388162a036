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

    def forward(self, problem, tangent=None, **options):
        return self._run("forward", problem, None, tangent, **options)

    def adjoint(self, problem, d_output, tangent=None, **options):
        """Of the map; with others a list."""
        d_maps = self._run("adjoint", problem, d_output, tangent, **options)
        return d_maps if options.get("others") else d_maps[0]

    def box_gradient(self, problem, d_output, **options):
        return self._run("box_gradient", problem, d_output, **options)

    def _run(
        self, operation, problem, d_output, tangent=None, others=(), levels=None, layout=np.asarray,
        call=wide_call,
    ):  # fmt: skip
        problems, dtype = (problem, *others), problem.features.dtype
        maps = [tensor(layout(each.features)) for each in problems]
        scales = tuple(s for each in problems for s in each.scale)
        given, numbers = rois(problem, levels), (scales, rule(problem))
        g = None if d_output is None else tensor(layout(d_output))

        def new(shape, dtype=dtype, layout=layout):
            if call is call_once:
                return launch.New(shape, np.dtype(dtype).name)
            return tensor(layout(np.full(shape, np.nan, dtype)))

        if operation == "forward":
            arguments = maps, given, tensor(tangent), *numbers, new(problem.output_shape)
        elif operation == "adjoint":
            d_maps = [new(each.features.shape) for each in problems]
            arguments = g, given, tensor(tangent), *numbers, d_maps
        else:
            real = "float64" if dtype == np.float64 else "float32"
            arguments = g, maps, given, *numbers, new(problem.boxes.shape, real, np.asarray)
        results = getattr(self.launch, operation)(call, *arguments)
        return list(map(array, results)) if operation == "adjoint" else array(results)


GPU = Kernels(launch, narrow=False)
ASCEND = Kernels(roialign._ascend.launch, narrow=True)
