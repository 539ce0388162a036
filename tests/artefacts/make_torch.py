"""Makes what later versions must load: exports of PyTorch, to ONNX too, and pickles of all layers.

python tests/artefacts/make_torch.py    # in this folder, named after the version
"""

import pickle
from pathlib import Path

import numpy as np
import torch

import roialign
import roialign.torch
from roialign.compat import detectron2, torchvision

FOLDER = Path(__file__).parent
PROGRAMS = {
    "fixed": {"spatial_scale": 0.5, "sampling_ratio": 2, "convention": "asymmetric"},
    "adaptive": {"spatial_scale": 0.25, "convention": "half_pixel"},
}
LAYERS = {
    "convention": roialign.Convention(pixel_offset=0.25, min_size=1.5, adaptive="floor"),
    "ROIAlign": roialign.ROIAlign(3, 2, 0.5, 2, 0),
    "torch.ROIAlign": roialign.torch.ROIAlign(3, 2, 0.5),
    "torchvision.RoIAlign": torchvision.RoIAlign((3, 2), 0.5, 2, True),
    "torchvision.MultiScaleRoIAlign": torchvision.MultiScaleRoIAlign(["0", "1"], 3, 2),
    "detectron2.ROIAlign": detectron2.ROIAlign(3, 0.5, 2),
}


def inputs():
    random = np.random.default_rng(0)
    start = 20 * random.random((4, 2))
    boxes = np.concatenate([start, start + 1 + 12 * random.random((4, 2))], 1)
    rois = np.concatenate([[[0], [1], [1], [0]], boxes], 1).astype(np.float32)
    return random.standard_normal((2, 3, 12, 15)).astype(np.float32), rois


class Pool(torch.nn.Module):
    def __init__(self, options):
        super().__init__()
        self.options = options

    def forward(self, features, rois):
        return roialign.roi_align(features, rois, (3, 2), **self.options)


def main():
    count = torch.export.Dim("count", min=2)
    dynamic = {"features": None, "rois": {0: count}}
    for name, options in PROGRAMS.items():
        arguments = tuple(map(torch.from_numpy, inputs()))
        path = f"{FOLDER}/torch-{roialign.__version__}-{name}"
        program = torch.export.export(Pool(options), arguments, dynamic_shapes=dynamic)
        for node in program.graph.nodes:  # the folders of who made it
            node.meta.pop("stack_trace", None)
        torch.export.save(program, f"{path}.pt2")
        made = torch.onnx.export(Pool(options), arguments, dynamo=True, dynamic_shapes=dynamic)
        model = made.model_proto
        for node in model.graph.node:
            del node.metadata_props[:]
        Path(f"{path}.onnx").write_bytes(model.SerializeToString())
    for name, layer in LAYERS.items():
        Path(f"{FOLDER}/pickle-{roialign.__version__}-{name}.pkl").write_bytes(pickle.dumps(layer))


if __name__ == "__main__":
    main()
