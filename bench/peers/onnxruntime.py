"""ONNX Runtime: the operator RoiAlign of opset 16, through an I/O binding (no output is made)."""

import numpy as np
import onnxruntime
from onnx.parser import parse_model

PACKAGES = ("onnxruntime", "onnx")


def forward(problem):
    shape = (len(problem.rois), problem.features.shape[1], *problem.output_size)
    text = f"""<ir_version: 8, opset_import: ["" : 16]>
        roi_align (float{[*problem.features.shape]} features, float[{shape[0]}, 4] boxes,
                   int64[{shape[0]}] image_index) => (float{[*shape]} output) {{
            output = RoiAlign <mode = "avg", output_height = {shape[2]}, output_width = {shape[3]},
                sampling_ratio = {problem.sampling_ratio}, spatial_scale = {problem.spatial_scale},
                coordinate_transformation_mode = "{problem.convention}">
                (features, boxes, image_index) }}"""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = problem.threads, 1
    model, on = parse_model(text).SerializeToString(), ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model, options, providers=on)
    output, binding = np.zeros(shape, np.float32), session.io_binding()
    inputs = {
        "features": problem.features,
        "boxes": np.ascontiguousarray(problem.rois[:, 1:]),
        "image_index": problem.rois[:, 0].astype(np.int64),
    }
    for name, value in inputs.items():
        binding.bind_cpu_input(name, value)
    binding.bind_output("output", "cpu", 0, np.float32, shape, output.ctypes.data)

    def call():
        session.run_with_iobinding(binding)
        return output

    call.held = inputs  # the binding holds addresses
    return call
