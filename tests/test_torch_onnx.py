"""Export to ONNX: one standard RoiAlign, and our numbers in ONNX Runtime."""

import functools
import io

import numpy as np
import pytest

import roialign

torch = pytest.importorskip("torch", reason="export to ONNX needs torch")
onnx = pytest.importorskip("onnx", reason="export to ONNX needs onnx")
pytest.importorskip("onnxscript", reason="export to ONNX needs onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="exported models run in onnxruntime")
import roialign.torch  # noqa: E402
from backends import batched, pair  # noqa: E402
from roialign.compat import torchvision  # noqa: E402

# torch's exporter uses what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated:FutureWarning")

DYNAMIC = torch.export.Dim.DYNAMIC
MAP = {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}
ROWS = {0: DYNAMIC}
OWN = {
    "unclamped": {"pixel_offset": 0.25, "input_offset": 0.375, "end_offset": 0.625},
    "clamped": {"pixel_offset": 0.5, "end_offset": 1, "min_size": 1},
    "longer": {"pixel_offset": 0.5, "input_offset": -0.5, "end_offset": 1},
    "longer_clamped": {"end_offset": 1, "min_size": 1},
}
RATIOS = {  # convention: values of sampling_ratio
    "half_pixel": (0, 2), "asymmetric": (0, 3), "openvino_half_pixel": (0, 2),
    "mindspore": (1, 2), "mindspore_legacy": (2,),
    "unclamped": (2,), "clamped": (2,), "longer": (0,), "longer_clamped": (0,),
}  # fmt: skip
CASES = {
    f"{name}-{ratio}-{scale}": {
        "convention": roialign.Convention(**OWN[name]) if name in OWN else name,
        "sampling_ratio": ratio,
        "spatial_scale": scale,
    }
    for name, ratios in RATIOS.items()
    for ratio in ratios
    for scale in (0.25, 0.3)
}
CASES |= {
    f"{name}-max_corner": CASES[name] | {"reduction": "max_corner"}
    for name in ("half_pixel-2-0.25", "asymmetric-0-0.3")
}


class Pool(torch.nn.Module):
    """One output for each of the options, or layers."""

    def __init__(self, *pools):
        super().__init__()
        pool = functools.partial(roialign.roi_align, output_size=(3, 2))
        self.pools = [each if callable(each) else functools.partial(pool, **each) for each in pools]

    def forward(self, features, rois):
        return [pool(features, rois) for pool in self.pools]


def export(model, args, shapes=(MAP, ROWS), **options):
    return torch.onnx.export(
        model.eval(), args, dynamo=True, dynamic_shapes=shapes, verbose=False, **options
    ).model_proto


def run(model, *arrays):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    inputs = [each.name for each in session.get_inputs()]
    return session.run(None, dict(zip(inputs, arrays, strict=True)))


def draw(seed, shape=(2, 3, 9, 11), scale=0.25, whole=True, inverted=False):
    """Features (N, C, H, W) and rois (K, 5): around the map, tiny, empty, of whole pixels."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal(shape, np.float32)
    length = np.array([shape[3], shape[2]]) / scale
    size = np.concatenate(
        [
            rng.uniform(0, 1.5, (30, 2)) * length,
            rng.uniform(0, 0.9 / scale, (15, 2)),  # below a feature pixel
            np.zeros((5, 2)),
            rng.uniform(-0.3, 0, (10 * inverted, 2)) * length,
        ]
    )
    start = rng.uniform(-0.4, 1.2, size.shape) * length
    boxes = np.concatenate([start, start + size], 1)
    if whole:
        edges = [[0, 0, *length], [-4, -4, *length + 4], [4, 8, 4, 8], [4, 8, 8, 12]]
        boxes = np.concatenate([boxes, np.round(boxes), edges])
    index = rng.integers(shape[0], size=len(boxes))
    return features, np.column_stack([index, boxes]).astype(np.float32)


def check(actual, features, rois, size=(3, 2), **options):
    expected = roialign.roi_align(features, rois, size, **options)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    largest = np.abs(features).max()
    unit = 2.0**-11 if features.dtype == np.float16 else 0
    bound = (1e-5 + unit) * largest
    assert np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max(initial=0) <= bound


def check_standard(model, count=1):
    """RoiAlign of ONNX itself, and nothing that is not ONNX's own."""
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert [entry.domain for entry in model.opset_import] == [""]
    assert model.opset_import[0].version >= 16
    nodes = [node for node in model.graph.node if node.op_type == "RoiAlign"]
    assert len(nodes) == count
    return nodes


@pytest.fixture(scope="module")
def exported():
    """The cases of fixed sampling in one model, of adaptive sampling in another."""
    args = tuple(map(torch.from_numpy, draw(0)))
    chosen = [
        {name: each for name, each in CASES.items() if (each["sampling_ratio"] > 0) == fixed}
        for fixed in (False, True)
    ]
    return [(cases, export(Pool(*cases.values()), args)) for cases in chosen]


def test_nodes(exported):
    """And the number of RoIs stays open."""
    for cases, model in exported:
        nodes = check_standard(model, len(cases))
        rois = model.graph.input[1]
        for value in (rois, *model.graph.output):
            assert value.type.tensor_type.shape.dim[0].dim_param
        for node, options in zip(nodes, cases.values(), strict=True):
            each = {a.name: a for a in node.attribute}
            c = roialign.conventions.get(options["convention"], options["convention"])
            mode = b"half_pixel" if c.min_size is None else b"output_half_pixel"
            assert each["coordinate_transformation_mode"].s == mode
            assert each["mode"].s == (b"max" if "reduction" in options else b"avg")
            assert each["sampling_ratio"].i == options["sampling_ratio"]
            assert each["spatial_scale"].f == np.float32(options["spatial_scale"])
            assert (each["output_height"].i, each["output_width"].i) == (3, 2)


@pytest.fixture(scope="module")
def results(exported):
    """By case, inputs and output: of the exported sizes, and of others."""
    results = {name: [] for name in CASES}
    for fixed, (cases, model) in enumerate(exported):
        for scale in (0.25, 0.3):
            inputs = [
                # at scale 1/4 whole pixels are exact, moved or not; ONNX Runtime fails on an
                # inverted box with adaptive sampling
                draw(seed, shape, scale, whole=scale == 0.25, inverted=bool(fixed))
                for seed, shape in enumerate([(2, 3, 9, 11), (3, 3, 14, 6), (1, 3, 1, 5)])
            ]
            features, rois = inputs[0]
            inputs += [(features, rois[:count]) for count in (0, 1)]
            for given in inputs:
                for (name, options), output in zip(cases.items(), run(model, *given), strict=True):
                    if options["spatial_scale"] == scale:
                        results[name].append((given, output))
    return results


@pytest.mark.parametrize("name", CASES)
def test_values(results, name):
    assert len(results[name]) == 5
    for inputs, output in results[name]:
        check(output, *inputs, **CASES[name])


# Forms and types


FIXED = {"convention": "mindspore", "sampling_ratio": 2, "spatial_scale": 0.25}
ADAPTIVE = {"convention": "asymmetric", "sampling_ratio": -1, "spatial_scale": 0.25}


def check_exported(options, *calls, shapes=(MAP, ROWS), **how):
    """The model that is made of the first call gives our numbers for all of them."""
    first = torch.utils._pytree.tree_map(torch.from_numpy, calls[0])
    model = export(Pool(options), first, shapes, **how)
    check_standard(model)
    for features, rois in calls:
        arrays = [rois] if isinstance(rois, np.ndarray) else rois
        check(run(model, features, *arrays)[0], features, rois, **options)
    return model


@pytest.mark.parametrize("features_dtype", [np.float16, np.float32, np.float64, np.uint8])
@pytest.mark.parametrize("boxes_dtype", [np.float32, np.float64, np.int64])
def test_types(features_dtype, boxes_dtype):
    calls = [
        (np.abs(f).astype(features_dtype), r.astype(boxes_dtype)) for f, r in map(draw, (0, 1))
    ]
    check_exported(FIXED, *calls)


@pytest.mark.parametrize("index_dtype", [np.int64, np.int32, np.uint8, None])
def test_pair_and_list(index_dtype):
    features, rois = draw(0)
    boxes, index = rois[:, 1:].copy(), rois[:, 0]
    if index_dtype is None:
        calls = [boxes[:7], boxes[7:]], [boxes[:20], boxes[30:35]]
        shapes, options = ({2: DYNAMIC, 3: DYNAMIC}, [ROWS, ROWS]), ADAPTIVE
    else:
        calls = [(boxes[start:], index[start:].astype(index_dtype)) for start in (0, 5)]
        shapes, options = (MAP, (ROWS, ROWS)), FIXED
    check_exported(options, *((features, each) for each in calls), shapes=shapes)


@pytest.mark.parametrize("opset", [16, 18, 21])  # ONNX Runtime 1.32 has no RoiAlign of 22
def test_opsets(opset):
    model = check_exported(ADAPTIVE, draw(0), opset_version=opset)
    assert model.opset_import[0].version == opset


# Layers


@pytest.mark.parametrize(
    "pool",
    [
        roialign.torch.ROIAlign(3, 2, 0.25),
        roialign.torch.ROIAlign(3, 2, 0.25, 2, 0),
        torchvision.RoIAlign((3, 2), 0.25, 2, aligned=True),
        torchvision.RoIAlign((3, 2), 0.25, 0),
        lambda features, rois: torchvision.roi_align(features, rois, (3, 2), 0.25),
    ],
    ids=["ROIAlign", "ROIAlign-0", "aligned", "not aligned", "roi_align"],
)
def test_layers(pool):
    model = export(Pool(pool), tuple(map(torch.from_numpy, draw(0))))
    check_standard(model)
    features, rois = draw(1, (3, 3, 12, 10))
    expected = pool(torch.from_numpy(features), torch.from_numpy(rois)).numpy()
    np.testing.assert_allclose(run(model, features, rois)[0], expected, rtol=0, atol=5e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:You are using the legacy:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning")
def test_the_exporter_that_traces():
    """Layers, where boxes are shifted before the node too, and a pyramid."""
    model, axes = Both(), {"rois": {0: "K"}, "fine": {2: "H"}, "coarse": {2: "h"}}
    maps = torch.rand(1, 3, 64, 48), torch.rand(1, 3, 32, 24)
    rois = torch.from_numpy(draw(0, (1, 3, 64, 48))[1])
    file = io.BytesIO()
    torch.onnx.export(
        model, (*maps, rois), file, dynamo=False, opset_version=18, dynamic_axes=axes,
        input_names=["fine", "coarse", "rois"],
    )  # fmt: skip
    exported = onnx.load_from_string(file.getvalue())
    check_standard(exported, count=5)
    for count, height in ((114, 64), (3, 72), (0, 56)):
        given = torch.rand(1, 3, height, 48), torch.rand(1, 3, height // 2, 24), rois[:count]
        for actual, expected in zip(
            run(exported, *map(np.asarray, given)), model(*given), strict=True
        ):
            assert expected.any() == bool(len(given[2]))
            np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-5)


class Both(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            [
                roialign.torch.ROIAlign(3, 2, 0.25),
                torchvision.RoIAlign((3, 2), 0.25, 2, aligned=True),
                torchvision.RoIAlign(2, 0.25, 0),
            ]
        )
        self.pyramid = torchvision.MultiScaleRoIAlign(["fine", "coarse"], 3, 2, canonical_scale=40)

    def forward(self, fine, coarse, rois):
        x, boxes = {"fine": fine, "coarse": coarse}, [rois[:, 1:]]
        return *[layer(fine, rois) for layer in self.layers], self.pyramid(x, boxes, [(256, 192)])


def test_eager_and_compiled_calls_are_none_of_onnx():
    model = Pool({"spatial_scale": 0.25})
    features, rois = draw(0)
    args = tuple(map(torch.from_numpy, (features, rois)))
    export(model, args)
    check(model(*args)[0].numpy(), features, rois, spatial_scale=0.25)
    program = torch.export.export(model, args)
    assert "roialign.forward" in str(program.graph)
    check(program.module()(*args)[0].numpy(), features, rois, spatial_scale=0.25)


# What ONNX does not have


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"convention": "mindspore"}, "'mindspore' .*rounds adaptive sampling up"),
        ({"convention": "mindspore_legacy"}, "'mindspore_legacy' .*rounds adaptive sampling up"),
        ({"convention": "mmdet_legacy", "sampling_ratio": 2}, "'mmdet_legacy' .*`min_size`.*0.0"),
        ({"convention": roialign.Convention()}, r" Convention\(.*number of adaptive samples"),
        ({"spatial_scale": (0.5, 0.25)}, r"'half_pixel' .*one `spatial_scale`.* got \(0.5, 0.25\)"),
        ({"dtype": torch.bfloat16}, "'half_pixel' .*no bfloat16"),
        ({"reduction": "max"}, "'max' cannot be exported.*'max_corner'"),
    ],
)
def test_refused(options, reason):
    options = dict(options)
    features, rois = map(torch.from_numpy, draw(0))
    features = features.to(options.pop("dtype", torch.float32))
    with pytest.raises(torch.onnx.OnnxExporterError, match=reason) as error:
        export(Pool(options), (features, rois))
    assert type(error.value.__cause__) is ValueError


def test_boxes_that_turn_are_refused():
    def pool(features, rois):
        return roialign.roi_align_rotated(features, rois.repeat(1, 2)[:, :6], (3, 2))

    features, rois = map(torch.from_numpy, draw(0))
    with pytest.raises(torch.onnx.OnnxExporterError, match="boxes that turn"):
        export(Pool(pool), (features, rois))


class Levels(torch.nn.Module):
    """By the public function: what it makes of the levels is beside it."""

    def __init__(self, form, **options):
        super().__init__()
        self.form, self.options = form, {"sampling_ratio": 2, "convention": "asymmetric"} | options

    def forward(self, fine, coarse, boxes, levels):
        first = 0 if self.form is batched else torch.zeros_like(boxes[:, 0]).long()
        rois = boxes if self.form is batched else (boxes, first)
        options = self.options | {"levels": levels, "spatial_scales": (1 / 8, 1 / 16)}
        pooled = roialign.multiscale_roi_align([fine, coarse], rois, (3, 2), **options)
        del options["levels"]
        return pooled, roialign.multiscale_roi_align([fine, coarse], rois, (3, 2), **options)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("form", [pair, batched])
def test_levels(form, layout):
    """Given, where -1 is 0, and by the scales: any number of RoIs on each map."""
    rng = np.random.default_rng(0)
    shapes = [(1, 3, 64, 48), (1, 3, 32, 24)]
    maps = [torch.from_numpy(rng.standard_normal(shape, np.float32)) for shape in shapes]
    if layout == "NHWC":
        maps = [features.permute(0, 2, 3, 1).contiguous() for features in maps]
    boxes = np.concatenate([rng.uniform(0, 100, (40, 2)), rng.uniform(100, 500, (40, 2))], 1)
    boxes = torch.from_numpy(boxes.astype(np.float32))
    levels = torch.from_numpy(rng.integers(-1, 2, 40))
    rows = (lambda x, n: x[None, :n]) if form is batched else lambda x, n: x[:n]
    axis = {int(form is batched): DYNAMIC}
    model = Levels(form, layout=layout)
    given = *maps, rows(boxes, 40), rows(levels, 40)
    exported = export(model, given, (None, None, axis, axis))
    check_standard(exported, count=4)
    for count in (40, 3, 0):
        given = *maps, rows(boxes, count), rows(levels, count)
        for actual, expected in zip(
            run(exported, *map(np.asarray, given)), model(*given), strict=True
        ):
            assert expected.any() or not count
            np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-5)
    off = rows(levels, 40) < 0
    assert off.any() and not model(*maps, rows(boxes, 40), rows(levels, 40))[0][off].any()


class Pyramid(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = torchvision.MultiScaleRoIAlign(["fine", "coarse"], 3, 2)

    def forward(self, fine, coarse, first, second):
        x = {"fine": fine, "coarse": coarse}
        return self.pool(x, [first, second], [(512, 512)] * 2)


def test_pyramid():
    """Any number of boxes on each map, none too."""
    maps = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 32, 32)
    small = torch.tensor([[8.0, 8, 40, 40], [10, 20, 70, 50]])
    large = torch.tensor([[0.0, 0, 400, 400], [10, 20, 500, 400], [0, 0, 300, 511]])
    shapes = (None, None, ROWS, ROWS)
    model = export(Pyramid(), (*maps, small, large), shapes)
    check_standard(model, count=2)
    for boxes in ((small, large), (large, small[:1]), (small, small)):
        (actual,) = run(model, *[each.numpy() for each in (*maps, *boxes)])
        expected = Pyramid()(*maps, *boxes).numpy()
        assert actual.shape == expected.shape
        assert np.abs(actual - expected).max() <= 1e-5
