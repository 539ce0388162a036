"""PyTorch, on the CPU or a GPU: ours on its tensors, and `torchvision.ops.roi_align`."""

from functools import partial

import numpy as np
import torch

PACKAGES = ("roialign", "torch", "triton", "torchvision")


def given(array, device):
    if array.dtype.name == "bfloat16":  # which torch does not know from NumPy
        array = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.as_tensor(array, device=device)


def array(result):
    return result.detach().float().cpu().numpy()


def _pooling(problem):
    """A function of the map."""
    torch.set_num_threads(problem.threads)
    size, rois, options = problem.output_size, problem.rois, problem.options
    if problem.peer.ours:
        import roialign

        roialign.set_num_threads(problem.threads)
        return lambda features: roialign.roi_align(features, rois, size, **options)
    from torchvision.ops import roi_align

    if problem.peer.way == "deterministic":  # for good: it has the process for itself
        torch.use_deterministic_algorithms(True)
    numbers = problem.spatial_scale, problem.sampling_ratio or -1, problem.convention
    # it takes boxes of the map's dtype alone: under autocast it casts the map, as here
    return lambda features: roi_align(features.float(), rois, size, *numbers).to(features.dtype)


def forward(problem):
    pool, features = _pooling(problem), problem.features
    if problem.peer.way == "recorded":
        features = features.detach().requires_grad_()
    if problem.peer.way == "compiled":
        pool = torch.compile(pool, fullgraph=True)
    call = partial(pool, features)
    return _captured(call) if problem.peer.way == "captured" else call


def backward(problem):
    """By autograd, of an output that is made before."""
    pool, features = _pooling(problem), problem.features.detach().requires_grad_()
    # torch's compiled backward, of the deterministic mode, frees what it reads
    keep = problem.peer.way != "deterministic"

    def call(output):
        return torch.autograd.grad(output, features, problem.d_output, retain_graph=keep)[0]

    call.before = lambda: (pool(features),)
    return call


def gradient(problem):
    call = backward(problem)
    return lambda: call(*call.before())


def adjoint(problem):
    if not problem.peer.ours:
        return backward(problem)
    import roialign

    arguments = problem.d_output, problem.rois, problem.features.shape
    return partial(roialign.roi_align_adjoint, *arguments, **problem.options)


def box_gradient(problem):
    import roialign

    arguments = problem.d_output, problem.features, problem.rois
    return partial(roialign.roi_align_box_gradient, *arguments, **problem.options)


def nothing(problem):
    empty = torch.compile(lambda features: features.view(-1), fullgraph=True)
    return partial(empty, problem.features)


def _captured(call):
    """A replay of what a call launches."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay():
        graph.replay()
        return result

    return replay
