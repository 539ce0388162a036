"""OpenVINO: the operator ROIAlign-9, into a given output."""

import os

import numpy as np

os.environ["CI"] = "true"  # else the import forks a process that reports its use, and outlives us
import openvino  # noqa: E402
from openvino import opset9  # noqa: E402

MODES = {"asymmetric": "asymmetric", "half_pixel": "half_pixel_for_nn"}
array = np.asarray


def versions():
    return {"openvino": openvino.__version__}


def forward(problem):
    if problem.convention not in MODES:
        raise ValueError(f"has no {problem.convention}")
    P, Q = problem.output_size
    inputs = [
        problem.features,
        np.ascontiguousarray(problem.rois[:, 1:]),
        problem.rois[:, 0].astype(np.int32),
    ]
    parameters = [opset9.parameter(value.shape, value.dtype) for value in inputs]
    node = opset9.roi_align(
        *parameters,
        P,
        Q,
        problem.sampling_ratio,
        problem.spatial_scale,
        "avg",
        MODES[problem.convention],
    )
    compiled = openvino.Core().compile_model(
        openvino.Model([node], parameters, "roi_align"),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": problem.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    output = np.zeros((len(problem.rois), problem.features.shape[1], P, Q), np.float32)
    request = compiled.create_infer_request()
    for position, value in enumerate(inputs):
        request.set_input_tensor(position, openvino.Tensor(value, shared_memory=True))
    request.set_output_tensor(0, openvino.Tensor(output, shared_memory=True))

    def call():
        request.start_async()
        request.wait()
        return output

    call.held = inputs  # the tensors do not own what they share
    return call
