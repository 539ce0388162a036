"""MindSpore: the CPU kernels of ROIAlign and ROIAlignGrad, in PyNative mode."""

import mindspore
from mindspore.ops import operations
from mindspore.ops.operations import _grad_ops

mindspore.set_context(mode=mindspore.PYNATIVE_MODE, device_target="CPU")
DTYPES = ("float32", "float16")
MODES = {"mindspore": 1, "mindspore_legacy": 0}


def array(result):
    return result.asnumpy()


def versions():
    return {"mindspore": mindspore.__version__}


def _mode(problem, modes):
    if problem.convention not in modes:
        raise ValueError(f"has no {problem.convention}")
    return modes[problem.convention]


def _finished(result):
    mindspore.runtime.synchronize()
    return result


def forward(problem):
    mode = _mode(problem, MODES)
    operator = operations.ROIAlign(
        *problem.output_size, problem.spatial_scale, problem.sampling_ratio, mode
    )
    features, rois = mindspore.Tensor(problem.features), mindspore.Tensor(problem.rois)
    return lambda: _finished(operator(features, rois))


def adjoint(problem):
    _mode(problem, {"mindspore": 1})  # its backward knows no other mode
    operator = _grad_ops.ROIAlignGrad(
        *problem.output_size, problem.spatial_scale, problem.sampling_ratio
    )
    d_output, rois = mindspore.Tensor(problem.d_output), mindspore.Tensor(problem.rois)
    shape = problem.features.shape
    return lambda: _finished(operator(d_output, rois, shape))
