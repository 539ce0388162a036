"""ONNX Runtime: the operator RoiAlign of opset 16, through an I/O binding (no output is made)."""

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

PACKAGES = ("onnxruntime", "onnx")


def forward(problem):
    inputs = {
        "features": problem.features,
        "boxes": np.ascontiguousarray(problem.rois[:, 1:]),
        "image_index": problem.rois[:, 0].astype(np.int64),
    }
    shape = len(problem.rois), problem.features.shape[1], *problem.output_size
    kinds = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in inputs.items()}
    node = helper.make_node(
        "RoiAlign",
        list(inputs),
        ["output"],
        mode="avg",
        output_height=shape[2],
        output_width=shape[3],
        sampling_ratio=problem.sampling_ratio,
        spatial_scale=problem.spatial_scale,
        coordinate_transformation_mode=problem.convention,
    )
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "roi_align",
        [tensor(name, kinds[name], value.shape) for name, value in inputs.items()],
        [tensor("output", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 16)])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = problem.threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    output = np.zeros(shape, np.float32)
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_cpu_input(name, value)
    binding.bind_output("output", "cpu", 0, np.float32, shape, output.ctypes.data)

    def call():
        session.run_with_iobinding(binding)
        return output

    call.held = inputs  # the binding holds addresses
    return call
