"""The rules of the RoiAlign nodes of an ONNX model, each run by ONNX Runtime on probes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from roialign._identify import Identification, identify

NEWEST = 21  # of which ONNX Runtime has the operator; those of later opsets are the same


def identify_nodes(path: Any) -> Iterator[tuple[str, dict[str, Any], Identification]]:
    """Name, attributes and rule of each node.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no model, or ONNX Runtime refuses a node.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        model = onnx.ModelProto()
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)
    if opset is None:
        raise ValueError(f"`path` must be an ONNX model with operators of ONNX, got {path}")
    for i, node in enumerate(n for n in model.graph.node if n.op_type == "RoiAlign"):
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        attributes = {k: v.decode() if isinstance(v, bytes) else v for k, v in given.items()}
        name = node.name or f"RoiAlign {i}"
        try:
            function = _alone(node, min(opset, NEWEST))
        except Exception as error:  # the runtime's own, of any kind
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{name} must be a node that ONNX Runtime runs: {reason}") from None
        scale = float(attributes.get("spatial_scale", 1.0))
        yield name, attributes, identify(function, spatial_scale=scale)


def _alone(node: Any, opset: int) -> Any:
    """A function of features and rois: a model of this node alone."""
    copy = helper.make_node("RoiAlign", ["features", "boxes", "index"], ["output"])
    copy.attribute.extend(node.attribute)
    types = TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64
    inputs = [
        helper.make_tensor_value_info(name, kind, [None] * rank)
        for name, kind, rank in zip(copy.input, types, (4, 2, 1))
    ]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, [None] * 4)
    graph = helper.make_graph([copy], "RoiAlign", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # the errors are ours to say
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )

    def function(features: np.ndarray, rois: np.ndarray) -> Any:
        index = rois[:, 0].astype(np.int64)
        return session.run(None, {"features": features, "boxes": rois[:, 1:], "index": index})[0]

    return function
