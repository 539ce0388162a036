"""Paddle: `paddle.vision.ops.roi_align`; its backward by `paddle.grad`, the forward untimed."""

import numpy as np
import paddle

ALIGNED = {"asymmetric": False, "half_pixel": True}


def array(result):
    return result.numpy()


def versions():
    return {"paddlepaddle": paddle.__version__}


def _roi_align(problem, features):
    if problem.convention not in ALIGNED:
        raise ValueError(f"has no {problem.convention}")
    index = problem.rois[:, 0].astype(np.int32)
    if (np.diff(index) < 0).any():
        raise ValueError("wants the boxes in the order of their images")
    boxes = paddle.to_tensor(problem.rois[:, 1:].copy())
    counts = paddle.to_tensor(np.bincount(index, minlength=len(features)).astype(np.int32))
    return lambda: paddle.vision.ops.roi_align(
        features,
        boxes,
        counts,
        problem.output_size,
        problem.spatial_scale,
        problem.sampling_ratio or -1,
        ALIGNED[problem.convention],
    )


def forward(problem):
    roi_align = _roi_align(problem, paddle.to_tensor(problem.features))

    def call():
        with paddle.no_grad():
            return roi_align()

    return call


def adjoint(problem):
    features = paddle.to_tensor(problem.features, stop_gradient=False)
    output = _roi_align(problem, features)()
    d_output = paddle.to_tensor(problem.d_output)
    return lambda: paddle.grad(output, features, d_output, retain_graph=True)[0]
