"""detectron2's and mmdet's poolers: recorded results, and how they are called."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

import roialign

torch = pytest.importorskip("torch", reason="torch is not installed")

from roialign.compat.detectron2 import ROIAlign, ROIPooler  # noqa: E402
from roialign.compat.mmdet import GenericRoIExtractor, SingleRoIExtractor  # noqa: E402
from test_pyramids import recorded  # noqa: E402
from tolerance import close  # noqa: E402

CASES = [case for case in recorded() if not case.library.startswith("torchvision")]


def pooler_of(case):
    """The layer, as the library was called."""
    given = case.parameters
    if case.library == "detectron2_pooler":
        names = "output_size", "scales", "sampling_ratio", "pooler_type", "canonical_box_size"
        return ROIPooler(*[given[name] for name in names], given["canonical_level"])
    layer = {"type": "RoIAlign"} | {name: given[name] for name in ("output_size", "sampling_ratio")}
    channels, strides = case.maps[0].shape[1], given["featmap_strides"]
    return SingleRoIExtractor(layer, channels, strides, finest_scale=given["finest_scale"])


def pool(case, pooler, maps, rois):
    if isinstance(pooler, ROIPooler):
        boxes = [rois[rois[:, 0] == i, 1:] for i in range(len(maps[0]))]
        boxes[::2] = [SimpleNamespace(tensor=each) for each in boxes[::2]]  # as its `Boxes`
        return pooler(maps, boxes)
    return pooler(maps, rois, case.parameters["roi_scale_factor"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_recorded_results(case):
    """The output and the gradients in the maps. Boxes have gradients too."""
    case.load()
    maps = [torch.from_numpy(features).requires_grad_() for features in case.maps]
    rois = torch.from_numpy(case.rois).requires_grad_()
    output = pool(case, pooler_of(case), maps, rois)
    given = output, [*maps, rois], torch.from_numpy(case.arrays["dy"])
    *d_maps, d_rois = torch.autograd.grad(*given)
    bound = 1e-5 * max(1, *(np.abs(features).max() for features in case.maps))
    close(output.detach().numpy(), case.arrays["y"], bound)
    for i, d_features in enumerate(d_maps):
        close(d_features.numpy(), case.arrays[f"df_{i}"], bound)
    assert d_rois.shape == rois.shape and not d_rois[:, 0].any()


LAYER = {"type": "RoIAlign", "output_size": (2, 3), "sampling_ratio": 2}
EXTRACTOR = {"roi_layer": LAYER, "out_channels": 3, "featmap_strides": [4, 8]}
SEEDED = torch.Generator().manual_seed(0)
MAPS = [torch.rand(2, 3, side, side + 2, generator=SEEDED) for side in (16, 8)]
ROIS = torch.tensor([[0, 1, 2, 30, 40], [1, 2, 2, 9, 9], [1, 0, 0, 60, 60.0]])
BOXES = list(ROIS[:, 1:].split([1, 2]))
POOLERS = {
    "pooler": (ROIPooler((2, 3), (1 / 4, 1 / 8), 2, "ROIAlign", 28), (BOXES,)),
    "single": (SingleRoIExtractor(**EXTRACTOR, finest_scale=16), (ROIS,)),
    "generic": (GenericRoIExtractor(**EXTRACTOR), (ROIS,)),
}


@pytest.mark.parametrize("name", POOLERS)
@pytest.mark.parametrize("way", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
def test_copies(name, way):
    pooler, rois = POOLERS[name]
    copied = way(pooler)
    assert torch.equal(copied(MAPS, *rois), pooler(MAPS, *rois))
    assert repr(copied) == repr(pooler) and copied.state_dict() == {}


@pytest.mark.parametrize("name", POOLERS)
def test_compiled_and_exported(name):
    """As one graph, of any number of rois."""
    pooler, (rois,) = POOLERS[name]
    more = [each.repeat(2, 1) for each in rois] if isinstance(rois, list) else rois.repeat(2, 1)
    torch.compiler.reset()
    compiled = torch.compile(pooler, fullgraph=True, backend="aot_eager")
    dynamic = {0: torch.export.Dim.DYNAMIC}
    shapes = [None] * 2, [dynamic] * 2 if isinstance(rois, list) else dynamic
    exported = torch.export.export(pooler, (MAPS, more), dynamic_shapes=shapes).module()
    for given in (rois, more):
        expected = pooler(MAPS, given)
        assert torch.equal(compiled(MAPS, given), expected)
        assert torch.equal(exported(MAPS, given), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", POOLERS)
def test_dtypes_layouts_and_no_rois(name, dtype):
    """Results have the dtype of the maps, and are contiguous. There may be no boxes."""
    pooler, (rois,) = POOLERS[name]
    maps = [each.to(dtype) for each in MAPS]
    output, exact = pooler(maps, rois), pooler(MAPS, rois)
    bound = 2 * max(torch.finfo(each).eps for each in (dtype, torch.float32))
    assert output.dtype is dtype and torch.allclose(output.float(), exact, rtol=0, atol=bound)
    last = [each.to(memory_format=torch.channels_last) for each in MAPS]
    output = pooler(last, rois)
    assert output.is_contiguous() and torch.allclose(output, exact, atol=1e-6)
    none = [each[:0] for each in rois] if isinstance(rois, list) else rois[:0]
    assert pooler(maps, none).shape == (0, 3, 2, 3) and pooler(maps, none).dtype is dtype


def test_levels_are_those_of_the_library():
    """Of squares that are some last bits smaller than the border, where libraries differ."""
    side = np.float32(112) - np.arange(12, dtype=np.float32) * np.spacing(np.float32(111))
    squares = torch.from_numpy(np.stack([0 * side, 0 * side, side, side], 1))
    maps = [torch.full((1, 1, size, size), float(size)) for size in (56, 28)]
    pooler = ROIPooler(1, (1 / 4, 1 / 8), 2, "ROIAlignV2", 112, 3)
    coarse = pooler(maps, [squares]).flatten() == 28
    assert coarse.tolist() == [True] * 2 + [False] * 10
    extractor = SingleRoIExtractor(LAYER, 1, [4, 8], finest_scale=56)
    coarse = extractor(maps, torch.nn.functional.pad(squares, (1, 0)))[:, 0, 0, 0] == 28
    assert coarse.tolist() == [True] * 8 + [False] * 4


def test_one_map_takes_all_boxes():
    """Also those that have no level, because their area is negative."""
    inverted = torch.tensor([[0, 20, 4, 4, 20.0]])
    (pooler, _), (single, _) = POOLERS["pooler"], POOLERS["single"]
    assert not pooler(MAPS, [inverted[:, 1:], BOXES[0][:0]]).any()
    assert not single(MAPS, inverted).any()
    assert ROIPooler(2, (1 / 4,), 2, "ROIAlignV2")(MAPS[:1], [inverted[:, 1:], BOXES[0][:0]]).any()
    assert single(MAPS[:1], inverted).any()


# detectron2


def test_rows_and_columns_of_several_maps():
    """detectron2 gives as many columns as rows."""
    (pooler, rois), (single, _) = POOLERS["pooler"], POOLERS["single"]
    options = {"spatial_scales": (1 / 4, 1 / 8), "sampling_ratio": 2, "convention": "asymmetric"}
    levels = torch.tensor([1, 0, 1])
    expected = roialign.multiscale_roi_align(MAPS, ROIS, (2, 3), levels=levels, **options)
    assert torch.equal(pooler(MAPS, *rois), expected)
    assert single.map_roi_levels(ROIS, 2).tolist() == levels.tolist()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised():
    layer, rois = ROIAlign((2, 3), 0.25, 2), ROIS
    quantised = torch.quantize_per_tensor(MAPS[0], 1 / 64, 3, torch.quint8)
    output = layer(quantised, rois)
    assert not output.is_quantized and torch.equal(output, layer(quantised.dequantize(), rois))


@pytest.mark.parametrize("scales", [(), (0,), (0.3,), (0.5, 0.5), (0.25, 0.5), (1 / 4, 1 / 16)])
def test_scales_are_a_pyramid(scales):
    with pytest.raises(ValueError, match="`scales` must be powers of 2, each half"):
        ROIPooler(7, scales, 2, "ROIAlignV2")


def test_other_poolers_are_refused():
    with pytest.raises(ValueError, match="`pooler_type` .*'ROIAlignRotated', got 'ROIPool'"):
        ROIPooler(7, (0.5,), 2, "ROIPool")


# mmdet


def pooled(i, rois=ROIS):
    return roialign.roi_align(MAPS[i], rois, (2, 3), spatial_scale=1 / (4 << i), sampling_ratio=2)


def larger(rois, factor):
    size = (factor - 1) / 2 * (rois[:, 3:] - rois[:, 1:3])
    return torch.cat([rois[:, :1], rois[:, 1:3] - size, rois[:, 3:] + size], 1)


@pytest.mark.parametrize("factor", [None, 1.5])
def test_all_maps_are_aggregated(factor):
    rois = ROIS if factor is None else larger(ROIS, factor)
    fine, coarse = pooled(0, rois), pooled(1, rois)
    output = GenericRoIExtractor(**EXTRACTOR)(MAPS, ROIS, factor)
    assert torch.allclose(output, fine + coarse, atol=1e-6)
    both = EXTRACTOR | {"out_channels": 6, "aggregation": "concat"}
    output = GenericRoIExtractor(**both)(MAPS, ROIS, factor)
    assert torch.allclose(output, torch.cat([fine, coarse], 1), atol=1e-6)


def test_modules_of_a_generic_extractor():
    """Before and after the sum. Their weights have the names that mmdet gives them."""
    pre, post = torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 5, 1)
    extractor = GenericRoIExtractor(**EXTRACTOR, pre_cfg=pre, post_cfg=post)
    expected = post(pre(pooled(0)) + pre(pooled(1)))
    assert torch.allclose(extractor(MAPS, ROIS), expected, atol=1e-5)
    assert set(extractor.state_dict()) == {
        f"{at}_module.{name}" for at in ("pre", "post") for name in ("weight", "bias")
    }
    assert torch.equal(extractor(MAPS[:1], ROIS), pooled(0))  # no aggregation
    assert extractor(MAPS, ROIS[:0]).shape == (0, 3, 2, 3)


def test_one_map_has_no_factor():
    single, _ = POOLERS["single"]
    assert torch.equal(single(MAPS[:1], ROIS, 2.0), pooled(0))
    assert single.num_inputs == 2 and single.roi_layers[1].output_size == (2, 3)


@pytest.mark.parametrize("extractor", [SingleRoIExtractor, GenericRoIExtractor])
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"roi_layer": LAYER | {"type": "RoIPool"}}, ValueError, "'type'.*'RoIPool'"),
        ({"roi_layer": LAYER | {"pool_mode": "sum"}}, ValueError, "`pool_mode` .*got 'sum'"),
        ({"roi_layer": LAYER | {"size": 1}}, TypeError, "'size'"),
        ({"out_channels": 4}, ValueError, "`out_channels` .*3, got 4"),
        ({"featmap_strides": [4]}, ValueError, "`feats` .*at most 1 .*got 2"),
    ],
)
def test_errors_of_an_extractor(extractor, change, error, message):
    with pytest.raises(error, match=message):
        extractor(**EXTRACTOR | change)(MAPS, ROIS)


def test_a_configuration_of_mmcv_is_no_module():
    with pytest.raises(TypeError, match="`pre_cfg` must be an nn.Module or None, got dict: build"):
        GenericRoIExtractor(**EXTRACTOR, pre_cfg={"type": "ConvModule"})
    named = SimpleNamespace(__name__="RoIAlign")  # a class, as mmdet's newer configurations have it
    assert SingleRoIExtractor(LAYER | {"type": named}, 3, [4, 8])(MAPS, ROIS).shape[1] == 3
