"""OpenVINO: the operator ROIAlign-9, into a given output."""

import os

import numpy as np

os.environ["CI"] = "true"  # else the import forks a process that reports its use, and outlives us
import openvino
from openvino import opset9

PACKAGES = ("openvino",)


def forward(problem):
    size, rois = problem.output_size, problem.rois
    inputs = [problem.features, np.ascontiguousarray(rois[:, 1:]), rois[:, 0].astype(np.int32)]
    parameters = [opset9.parameter(value.shape, value.dtype) for value in inputs]
    numbers = *size, problem.sampling_ratio, problem.spatial_scale, "avg", problem.convention
    model = openvino.Model([opset9.roi_align(*parameters, *numbers)], parameters, "roi_align")
    options = {"INFERENCE_NUM_THREADS": problem.threads, "NUM_STREAMS": 1}
    options |= {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(model, "CPU", options)
    output = np.zeros((len(rois), problem.features.shape[1], *size), np.float32)
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
