"""mmcv's layers, and rotated boxes in detectron2's and mmdet's: recorded results, and pyramids."""

import copy
import pickle

import numpy as np
import pytest

import roialign

torch = pytest.importorskip("torch", reason="torch is not installed")

from conftest import golden_cases, rotated_cases  # noqa: E402
from roialign.compat import detectron2, mmcv, mmdet  # noqa: E402

CASES = [case for case in golden_cases() if case.library.startswith("mmcv")]
TURNED = [case for case in rotated_cases() if not case.library.startswith("openvino")]


def layer_of(case):
    given, name = case.entry["params"], case.entry["params"]["op"].rsplit(".")[-1]
    size, sampling = given["output_size"], given["sampling_ratio"]
    scale = float(np.float32(given["spatial_scale"]))  # as they do, for float64 too
    if name == "ROIAlignRotated":
        return detectron2.ROIAlignRotated(size, scale, sampling)
    if name == "RoIAlignRotated":
        return mmcv.RoIAlignRotated(size, scale, sampling, given["aligned"], given["clockwise"])
    return mmcv.RoIAlign(size, scale, sampling, given["pool_mode"], given["aligned"])


@pytest.mark.parametrize("case", [*CASES, *TURNED], ids=str)
def test_recorded_results(case):
    """The output, and the gradient in the input; rois have gradients too."""
    features = torch.from_numpy(case.features).requires_grad_()
    rois = torch.from_numpy(case.rois).requires_grad_()
    layer = layer_of(case)
    output = layer(features, rois)
    assert output.is_contiguous()
    case.check_forward(output.detach().numpy())
    if "df" in case.arrays and case.entry["kind"] != "edge_minus_one":
        d_output = torch.from_numpy(case.d_output)
        d_features, d_rois = torch.autograd.grad(output, [features, rois], d_output)
        case.check_adjoint(d_features.numpy())
        assert d_rois.shape == rois.shape and not d_rois[:, 0].any()


RANDOM = torch.Generator().manual_seed(0)
MAPS = [torch.rand(2, 3, 64 >> i, 80 >> i, generator=RANDOM) for i in range(2)]
ROIS = torch.tensor(
    [[0, 90, 100, 200, 180, 30.0], [1, 60, 70, 40, 30, -70], [1, 20, 30, 9, 12, 200]]
)
LAYERS = [
    mmcv.RoIAlign(7, 0.25, pool_mode="max", aligned=False),
    mmcv.RoIAlignRotated((3, 2), 0.5, 2, clockwise=True),
    detectron2.ROIAlignRotated((3, 2), 0.25, 0),
]
TEXTS = [
    "RoIAlign(output_size=(7, 7), spatial_scale=0.25, sampling_ratio=0, pool_mode=max, "
    "aligned=False, use_torchvision=False)",
    "RoIAlignRotated(output_size=(3, 2), spatial_scale=0.5, sampling_ratio=2, aligned=True, "
    "clockwise=True)",
    "ROIAlignRotated(output_size=(3, 2), spatial_scale=0.25, sampling_ratio=0)",
]


@pytest.mark.parametrize("layer, text", list(zip(LAYERS, TEXTS, strict=True)))
@pytest.mark.parametrize("way", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
def test_text_and_copies(layer, text, way):
    copied, rois = way(layer), ROIS[:, :5] if "pool_mode" in text else ROIS
    assert repr(layer) == repr(copied) == text
    assert torch.equal(layer(MAPS[0], rois), copied(MAPS[0], rois))
    assert torch.equal(
        torch.compile(layer, backend="aot_eager")(MAPS[0], rois), copied(MAPS[0], rois)
    )
    with pytest.raises(RuntimeError, match="cannot be scripted: use torch.jit.trace"):
        torch.jit.script(layer)


def on_their_maps(pool):
    """The RoIs, of which the first alone is large: the other rows come from the finer map."""
    return torch.cat([pool(MAPS[1], 1 / 8)[:1], pool(MAPS[0], 1 / 4)[1:]])


def test_detectron2s_pooler():
    pooler = detectron2.ROIPooler(3, (1 / 4, 1 / 8), 2, "ROIAlignRotated", 150, 3)
    boxes = [ROIS[ROIS[:, 0] == i, 1:] for i in range(2)]
    expected = on_their_maps(lambda x, scale: detectron2.ROIAlignRotated(3, scale, 2)(x, ROIS))
    assert torch.equal(pooler(MAPS, boxes), expected)
    one = detectron2.ROIPooler(3, (1 / 4,), 2, "ROIAlignRotated")
    assert torch.equal(one(MAPS[:1], boxes), detectron2.ROIAlignRotated(3, 0.25, 2)(MAPS[0], ROIS))


@pytest.mark.parametrize("factor", [None, 1.5])
def test_mmdets_extractors(factor):
    layer = {"type": "RoIAlignRotated", "output_size": 3, "sampling_ratio": 2, "clockwise": True}
    rois = ROIS.clone()
    rois[:, 3:5] *= factor or 1

    def pool(x, scale):
        return mmcv.roi_align_rotated(x, rois, 3, scale, 2, clockwise=True)

    single = mmdet.SingleRoIExtractor(layer, 3, [4, 8])
    assert torch.equal(single(MAPS, ROIS, factor), on_their_maps(pool))
    both = mmdet.GenericRoIExtractor(roi_layer=layer, out_channels=3, featmap_strides=[4, 8])
    expected = pool(MAPS[0], 1 / 4) + pool(MAPS[1], 1 / 8)
    assert torch.allclose(both(MAPS, ROIS, factor), expected)


@pytest.mark.parametrize("extractor", [mmdet.SingleRoIExtractor, mmdet.GenericRoIExtractor])
def test_the_largest_samples_of_a_pyramid(extractor):
    layer = {"type": "RoIAlign", "output_size": 3, "sampling_ratio": 2, "pool_mode": "max"}
    rois = torch.tensor([[0, 8, 8, 200, 180.0], [1, 9, 8, 60, 50]])
    fine, coarse = (
        roialign.roi_align(x, rois, 3, spatial_scale=scale, sampling_ratio=2, reduction="max")
        for x, scale in zip(MAPS, (1 / 4, 1 / 8), strict=True)
    )
    single = extractor is mmdet.SingleRoIExtractor
    expected = torch.cat([coarse[:1], fine[1:]]) if single else fine + coarse
    pooled = extractor(roi_layer=layer, out_channels=3, featmap_strides=[4, 8])(MAPS, rois)
    assert torch.equal(pooled, expected)


def test_errors():
    with pytest.raises(ValueError, match="`pool_mode` must be .*'max', got 'sum'"):
        mmcv.RoIAlign(7, pool_mode="sum")
    with pytest.raises(ValueError, match="at most 4096"):
        mmcv.RoIAlignRotated(7, 1.0, 5000)
    with pytest.raises(NotImplementedError, match="second derivative in the boxes"):
        boxes = ROIS.clone().requires_grad_()
        output = LAYERS[1](MAPS[0], boxes)
        (first,) = torch.autograd.grad(output.sum(), boxes, create_graph=True)
        torch.autograd.grad(first.sum(), boxes)
    assert np.isfinite(LAYERS[0](MAPS[0], ROIS[:, :5]).numpy()).all()
