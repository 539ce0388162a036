"""OpenVINO: the operators ROIAlign-9 and ROIAlignRotated-15, into a given output."""

import os

import numpy as np

os.environ["CI"] = "true"  # else the import forks a process that reports its use, and outlives us
import openvino
from openvino import opset9, opset15

from bench.peers import OPENVINO

PACKAGES = ("openvino",)


def forward(problem):
    size, rois = problem.output_size, problem.rois
    boxes = np.ascontiguousarray(rois[:, 1:])
    numbers = *size, problem.sampling_ratio, problem.spatial_scale
    if problem.operation.rotated:
        if problem.convention != OPENVINO["half_pixel"]:
            raise ValueError("its rotated boxes have half_pixel alone")
        operator, numbers = opset15.roi_align_rotated, (*numbers, False)  # not clockwise
        boxes[:, 4] = np.deg2rad(boxes[:, 4])
    else:
        mode = {"mean": "avg", "max": "max"}[problem.operation.reduction]
        operator, numbers = opset9.roi_align, (*numbers, mode, problem.convention)
    inputs = [problem.features, boxes, rois[:, 0].astype(np.int32)]
    parameters = [opset9.parameter(value.shape, value.dtype) for value in inputs]
    model = openvino.Model([operator(*parameters, *numbers)], parameters, "roi_align")
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
