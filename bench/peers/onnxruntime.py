"""ONNX Runtime: the operator RoiAlign of opset 16, through an I/O binding (no output is made).

From a pyramid: one operator for each map, whose rows are then put into the order of the RoIs.
"""

import numpy as np
import onnxruntime
from onnx.parser import parse_model

PACKAGES = ("onnxruntime", "onnx")
TYPES = {"float32": "float", "int64": "int64"}


def forward(problem):
    inputs, nodes = {}, []
    mode = {"mean": "avg", "max_corner": "max"}[problem.operation.reduction]
    shape = (len(problem.rois), problem.features.shape[1], *problem.output_size)
    maps, scales, levels = [problem.features], [problem.spatial_scale], np.zeros(shape[0])
    if problem.pyramid:
        maps, scales = problem.maps(problem.features, np.ascontiguousarray), problem.scales
        levels = np.array(problem.levels)
    for i, (features, scale) in enumerate(zip(maps, scales, strict=True)):
        rois = problem.rois[levels == i]
        inputs[f"features{i}"] = features
        inputs[f"boxes{i}"] = np.ascontiguousarray(rois[:, 1:])
        inputs[f"image_index{i}"] = rois[:, 0].astype(np.int64)
        result = f"rows{i}" if problem.pyramid else "output"
        nodes.append(f"""{result} = RoiAlign <
            mode = "{mode}", sampling_ratio = {problem.sampling_ratio},
            output_height = {shape[2]}, output_width = {shape[3]}, spatial_scale = {scale},
            coordinate_transformation_mode = "{problem.convention}">
            (features{i}, boxes{i}, image_index{i})""")
    if problem.pyramid:
        inputs["place"] = np.argsort(np.argsort(levels, kind="stable"))
        rows = ", ".join(f"rows{i}" for i in range(len(maps)))
        nodes.append(f"all = Concat <axis = 0> ({rows}) output = Gather <axis = 0> (all, place)")
    given = [f"{TYPES[array.dtype.name]}{[*array.shape]} {name}" for name, array in inputs.items()]
    text = f"""<ir_version: 8, opset_import: ["" : 16]>
        roi_align ({", ".join(given)}) => (float{[*shape]} output) {{ {" ".join(nodes)} }}"""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = problem.threads, 1
    model, on = parse_model(text).SerializeToString(), ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model, options, providers=on)
    output, binding = np.zeros(shape, np.float32), session.io_binding()
    for name, value in inputs.items():
        binding.bind_cpu_input(name, value)
    binding.bind_output("output", "cpu", 0, np.float32, shape, output.ctypes.data)

    def call():
        session.run_with_iobinding(binding)
        return output

    call.held = inputs  # the binding holds addresses
    return call
