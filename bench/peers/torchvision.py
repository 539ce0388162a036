"""torchvision: `torchvision.ops.roi_align`; its backward by autograd, the forward untimed."""

import torch
import torchvision
from torchvision.ops import roi_align

LAYOUTS = ("nchw", "nhwc")
ALIGNED = {"asymmetric": False, "half_pixel": True}


def array(result):
    return result.numpy()


def versions():
    roi_align(torch.zeros(1, 1, 1, 1), torch.zeros(1, 5), 1)  # the operators may be missing
    return {"torchvision": torchvision.__version__, "torch": torch.__version__}


def _roi_align(problem, features):
    if problem.convention not in ALIGNED:
        raise ValueError(f"has no {problem.convention}")
    torch.set_num_threads(problem.threads)
    rois = torch.from_numpy(problem.rois)
    return lambda: roi_align(
        features,
        rois,
        problem.output_size,
        problem.spatial_scale,
        problem.sampling_ratio or -1,
        ALIGNED[problem.convention],
    )


def forward(problem):
    call = _roi_align(problem, torch.from_numpy(problem.features))
    return torch.inference_mode()(call)


def adjoint(problem):
    features = torch.from_numpy(problem.features).requires_grad_()
    output = _roi_align(problem, features)()
    d_output = torch.from_numpy(problem.d_output)
    return lambda: torch.autograd.grad(output, features, d_output, retain_graph=True)[0]
