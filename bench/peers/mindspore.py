"""MindSpore on the CPU: `mindspore.ops.ROIAlign` and ours, in PyNative or in Graph mode."""

import mindspore
from mindspore import Tensor, nn, ops
from mindspore.ops.operations import _grad_ops

PACKAGES = ("roialign", "mindspore")
MODES = {"mindspore": mindspore.PYNATIVE_MODE, "mindspore graph": mindspore.GRAPH_MODE}


def given(array, device):
    return Tensor(array)


def array(result):
    return result.asnumpy()


class Pool(nn.Cell):
    def __init__(self, problem):
        super().__init__()
        mindspore.set_context(mode=MODES[problem.peer.process], device_target="CPU")
        layer = ops.ROIAlign
        if problem.peer.ours:
            import roialign.mindspore

            roialign.set_num_threads(problem.threads)
            layer = roialign.mindspore.ROIAlign
        self.operator = layer(*_numbers(problem), problem.convention)

    def construct(self, features, rois):
        return self.operator(features, rois)


class Gradient(nn.Cell):
    """The features' gradient of a weighted sum. PyNative mode makes all there are."""

    def __init__(self, problem):
        super().__init__()
        self.pool, self.d_output = Pool(problem), problem.d_output
        self.gradient = mindspore.grad(self.loss)

    def loss(self, features, rois):
        return (self.pool(features, rois) * self.d_output).sum()

    def construct(self, features, rois):
        return self.gradient(features, rois)


def _numbers(problem):
    return *problem.output_size, problem.spatial_scale, problem.sampling_ratio


def _finished(function, *arguments):
    def call():
        result = function(*arguments)
        mindspore.runtime.synchronize()
        return result

    return call


def forward(problem):
    return _finished(Pool(problem), problem.features, problem.rois)


def gradient(problem):
    return _finished(Gradient(problem), problem.features, problem.rois)


def adjoint(problem):
    operator = _grad_ops.ROIAlignGrad(*_numbers(problem))  # of roi_end_mode 1 alone
    return _finished(operator, problem.d_output, problem.rois, problem.features.shape)
