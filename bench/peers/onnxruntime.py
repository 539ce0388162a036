"""ONNX Runtime: the operator RoiAlign of opset 16, through an I/O binding (no output is made)."""

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

MODES = {"asymmetric": "output_half_pixel", "half_pixel": "half_pixel"}
array = np.asarray


def versions():
    return {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}


def forward(problem):
    if problem.convention not in MODES:
        raise ValueError(f"has no {problem.convention}")
    P, Q = problem.output_size
    K, C = len(problem.rois), problem.features.shape[1]
    inputs = {
        "features": problem.features,
        "boxes": np.ascontiguousarray(problem.rois[:, 1:]),
        "image_index": problem.rois[:, 0].astype(np.int64),
    }
    kinds = {"features": TensorProto.FLOAT, "boxes": TensorProto.FLOAT}
    node = helper.make_node(
        "RoiAlign",
        list(inputs),
        ["output"],
        mode="avg",
        output_height=P,
        output_width=Q,
        sampling_ratio=problem.sampling_ratio,
        spatial_scale=problem.spatial_scale,
        coordinate_transformation_mode=MODES[problem.convention],
    )
    graph = helper.make_graph(
        [node],
        "roi_align",
        [
            helper.make_tensor_value_info(name, kinds.get(name, TensorProto.INT64), value.shape)
            for name, value in inputs.items()
        ],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, (K, C, P, Q))],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 16)])

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = problem.threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    output = np.zeros((K, C, P, Q), np.float32)
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_cpu_input(name, value)
    binding.bind_output("output", "cpu", 0, np.float32, output.shape, output.ctypes.data)

    def call():
        session.run_with_iobinding(binding)
        return output

    call.held = inputs  # the binding holds addresses
    return call
