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


def _features(problem, needed=False):
    """The map, or those of a pyramid; as leaves of which a gradient is needed."""
    found = [problem.features]
    if problem.pyramid:
        found = problem.maps(problem.features, lambda tensor: tensor.contiguous())
    found = [tensor.detach().requires_grad_(needed) for tensor in found]
    return found if problem.pyramid else found[0]


def _pooling(problem):
    """A function of the map, or of a list of maps."""
    torch.set_num_threads(problem.threads)
    size, rois, options = problem.output_size, problem.rois, problem.options
    if problem.peer.ours:
        import roialign

        roialign.set_num_threads(problem.threads)
        pool = roialign.multiscale_roi_align if problem.pyramid else roialign.roi_align
        return lambda features: pool(features, rois, size, **options)
    import torchvision.ops as ops

    if problem.pyramid:
        if problem.convention:
            raise ValueError("its pooler of several maps has aligned=False alone")
        names = [f"p{i}" for i in range(len(problem.pyramid))]
        layer = ops.MultiScaleRoIAlign(names, size, problem.sampling_ratio or -1)
        images = [tuple(int(side / problem.spatial_scale) for side in problem.pyramid[0])]
        boxes = [rois[rois[:, 0] == image, 1:] for image in range(len(problem.features))]
        images *= len(boxes)
        return lambda maps: layer(dict(zip(names, maps, strict=True)), boxes, images)
    if problem.peer.way == "deterministic":  # for good: it has the process for itself
        torch.use_deterministic_algorithms(True)
    numbers = problem.spatial_scale, problem.sampling_ratio or -1, problem.convention
    # it takes boxes of the map's dtype alone: under autocast it casts the map, as here
    return lambda features: ops.roi_align(features.float(), rois, size, *numbers).to(features.dtype)


def forward(problem):
    pool = _pooling(problem)
    features = _features(problem, needed=problem.peer.way == "recorded")
    if problem.peer.way == "compiled":
        pool = torch.compile(pool, fullgraph=True)
    call = partial(pool, features)
    return _captured(call) if problem.peer.way == "captured" else call


def backward(problem):
    """By autograd, of an output that is made before."""
    pool, features = _pooling(problem), _features(problem, needed=True)
    # torch's compiled backward, of the deterministic mode, frees what it reads
    keep = problem.peer.way != "deterministic"

    def call(output):
        found = torch.autograd.grad(output, features, problem.d_output, retain_graph=keep)
        return found if problem.pyramid else found[0]

    call.before = lambda: (pool(features),)
    return call


def gradient(problem):
    call = backward(problem)
    return lambda: call(*call.before())


def adjoint(problem):
    if not problem.peer.ours:
        return backward(problem)
    import roialign

    if problem.pyramid:
        function = roialign.multiscale_roi_align_adjoint
        shapes = [features.shape for features in _features(problem)]
    else:
        function, shapes = roialign.roi_align_adjoint, problem.features.shape
    return partial(function, problem.d_output, problem.rois, shapes, **problem.options)


def box_gradient(problem):
    import roialign

    function = roialign.roi_align_box_gradient
    if problem.pyramid:
        function = roialign.multiscale_roi_align_box_gradient
    arguments = problem.d_output, _features(problem), problem.rois
    return partial(function, *arguments, **problem.options)


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
