"""Inside torchvision's own models and tools, with the real torchvision."""

import contextlib
import io
import pickle
import sys
import threading

import pytest

import roialign
from isolation import printed

torch = pytest.importorskip("torch", reason="torch is not installed")
try:
    import torchvision
except Exception as error:
    pytest.skip(f"torchvision cannot be imported: {error}", allow_module_level=True)

from torchvision.models.feature_extraction import get_graph_node_names  # noqa: E402

from roialign.compat import torchvision as ours  # noqa: E402

theirs, detection = torchvision.ops, torchvision.models.detection
POOLERS = ["roi_heads.box_roi_pool", "roi_heads.mask_roi_pool"]


@pytest.fixture(scope="module")
def model():
    """Mask R-CNN with random weights and few channels, for images of about 64 pixels."""
    torch.manual_seed(0)
    body = torchvision.models.resnet18(norm_layer=theirs.FrozenBatchNorm2d)
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    backbone = detection.backbone_utils.BackboneWithFPN(body, layers, [64, 128, 256, 512], 16)
    few = {"rpn_post_nms_top_n_test": 20, "box_detections_per_img": 5, "box_score_thresh": 0.0}
    built = detection.MaskRCNN(backbone, 3, min_size=64, max_size=96, **few)
    built.roi_heads.mask_head = detection.mask_rcnn.MaskRCNNHeads(16, (16,), 1)
    built.roi_heads.mask_predictor = detection.mask_rcnn.MaskRCNNPredictor(16, 16, 3)
    return built.eval()


IMAGES = [torch.rand(3, 60, 80, generator=torch.Generator().manual_seed(0))]


def assert_close(actual, expected):
    assert actual.keys() == expected.keys() and len(expected["boxes"])
    for name, each in expected.items():
        torch.testing.assert_close(actual[name], each, rtol=1e-4, atol=1e-3)


@pytest.fixture
def counted(monkeypatch):
    """How often this library pooled, and theirs."""
    counts = {"ours": 0, "theirs": 0}

    def counting(who, function):
        def call(*args, **kwargs):
            counts[who] += 1
            return function(*args, **kwargs)

        return call

    for name in ("roi_align", "multiscale_roi_align"):
        monkeypatch.setattr(roialign, name, counting("ours", getattr(roialign, name)))
    operator = counting("theirs", torch.ops.torchvision.roi_align)
    monkeypatch.setattr(torch.ops.torchvision, "roi_align", operator)
    return counts


# Layers that their classes accept


def test_layers_are_theirs():
    pyramid = ours.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    assert isinstance(pyramid, theirs.MultiScaleRoIAlign)
    assert isinstance(ours.RoIAlign(7, 1.0, 2), theirs.RoIAlign)
    assert not isinstance(theirs.RoIAlign(7, 1.0, 2), ours.RoIAlign)


@pytest.mark.parametrize("kind", ["FasterRCNN", "MaskRCNN", "KeypointRCNN"])
def test_models_take_our_poolers(model, kind):
    pools = {"box_roi_pool": ours.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)}
    other = {"MaskRCNN": "mask_roi_pool", "KeypointRCNN": "keypoint_roi_pool"}.get(kind)
    if other:
        pools[other] = ours.MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2)
    built = getattr(detection, kind)(model.backbone, 5, **pools)
    assert all(getattr(built.roi_heads, name) is pool for name, pool in pools.items())
    assert ours.patch(built) == ours.unpatch(built) == []  # built of ours: nothing to undo
    assert all(getattr(built.roi_heads, name) is pool for name, pool in pools.items())


WITHOUT_TORCHVISION = """if True:
    import pickle
    import sys
    import torch

    class Broken:  # as one that was built for another torch
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    sys.meta_path.insert(0, Broken)
    from roialign.compat import torchvision as ours

    layers = pickle.loads(bytes.fromhex(sys.argv[1]))
    for layer, own in zip(layers, (ours.RoIAlign, ours.MultiScaleRoIAlign), strict=True):
        assert type(layer) is own and own.__base__ is torch.nn.Module
        assert layer.state_dict() == {}
    pool, pyramid = layers
    rows, x = torch.tensor([[0.0, 0, 0, 60, 60]]), torch.ones(1, 1, 16, 16)
    assert pool(x, rows).mean() == pyramid({"0": x}, [rows[:, 1:]], [(64, 64)]).mean() == 1
    for refuses in (ours.patch, ours.unpatch, lambda _: ours.replaced().__enter__()):
        try:
            refuses(pyramid)
        except ImportError as error:
            assert str(error).startswith("torchvision cannot be imported: RuntimeError: operator")
        else:
            raise AssertionError
    assert "torchvision" not in sys.modules
    print(pickle.dumps(layers).hex())
"""


def test_saved_with_torchvision_and_loaded_without_and_back():
    pyramid = theirs.MultiScaleRoIAlign(["0", "1"], 7, 2)
    ours.patch(pyramid)
    pyramid({"0": torch.ones(1, 1, 16, 16)}, [torch.zeros(1, 4)], [(64, 64)])
    pickled = pickle.dumps([ours.RoIAlign(7, 0.25, 2), pyramid])
    back = printed("-c", WITHOUT_TORCHVISION, pickled.hex())
    pool, pyramid = pickle.loads(bytes.fromhex(back))
    assert isinstance(pool, theirs.RoIAlign) and isinstance(pyramid, theirs.MultiScaleRoIAlign)
    assert ours.unpatch(pyramid) == [""] and type(pyramid) is theirs.MultiScaleRoIAlign


# Models that were built of theirs


def test_patch_and_unpatch(model, counted):
    (expected,) = model(IMAGES)
    assert counted == {"ours": 0, "theirs": 8}
    pools = [model.get_submodule(name) for name in POOLERS]
    states = [dict(vars(pool)) for pool in pools]
    assert ours.patch(model) == POOLERS
    assert ours.patch(model) == []
    assert [model.get_submodule(name) for name in POOLERS] == pools
    assert all(type(pool) is ours.MultiScaleRoIAlign for pool in pools)
    assert_close(*model(IMAGES), expected)
    assert counted == {"ours": 2, "theirs": 8}
    copied = pickle.loads(pickle.dumps(pools[0]))
    assert ours.unpatch(copied) == [""] and type(copied) is theirs.MultiScaleRoIAlign
    assert ours.unpatch(model) == POOLERS
    assert ours.unpatch(model) == []
    assert all(type(pool) is theirs.MultiScaleRoIAlign for pool in pools)
    assert [dict(vars(pool)) for pool in pools] == states


def test_patch_one_layer_with_its_hooks():
    layer = theirs.RoIAlign(2, 1.0, 2).eval()
    seen = []
    layer.register_forward_hook(lambda *args: seen.append(type(args[0])))
    assert ours.patch(torch.nn.ModuleDict({"a": layer, "b": layer})) == ["a"]
    layer(torch.ones(1, 1, 4, 4), torch.zeros(1, 5))
    assert seen == [ours.RoIAlign] and not layer.training
    assert ours.unpatch(layer) == [""] and type(layer) is theirs.RoIAlign


def test_patch_leaves_other_classes_alone():
    class Own(theirs.MultiScaleRoIAlign):
        pass

    layers = Own(["0"], 2, 2), theirs.PSRoIAlign(2, 1.0, 2), torch.nn.ReLU()
    assert ours.patch(torch.nn.ModuleList(layers)) == []
    with pytest.raises(TypeError, match="`model` must be a torch.nn.Module, got list"):
        ours.patch(list(layers))


def targets(images, boxes=2):
    corners = torch.tensor([[4.0, 5, 40, 50], [10, 10, 70, 30]])[:boxes]
    masks = torch.zeros(len(corners), *images[0].shape[1:], dtype=torch.uint8)
    masks[:, 10:30, 10:40] = 1
    return [{"boxes": corners, "labels": torch.ones(boxes).long(), "masks": masks} for _ in images]


def test_replaced(model, counted):
    """In training: two poolers of four maps, and the targets of the masks of an image."""
    model.train()
    try:
        torch.manual_seed(0)
        expected = model(IMAGES, targets(IMAGES))
        assert counted == {"ours": 0, "theirs": 9}
        torch.manual_seed(0)
        with ours.replaced():
            actual = model(IMAGES, targets(IMAGES))
        assert counted == {"ours": 9, "theirs": 9}
    finally:
        model.eval()
    for name, loss in expected.items():
        torch.testing.assert_close(actual[name], loss, rtol=1e-5, atol=1e-5)


def named_roi_align():
    return theirs.roi_align, theirs.poolers.roi_align, detection.roi_heads.roi_align


def test_replaced_is_undone(monkeypatch):
    own, late = named_roi_align(), type(torchvision)("torchvision.late")
    with ours.replaced():
        assert set(named_roi_align()) == {ours.roi_align}
        with contextlib.suppress(ZeroDivisionError), ours.replaced():
            1 / 0  # noqa: B018
        assert set(named_roi_align()) == {ours.roi_align}
        monkeypatch.setitem(sys.modules, late.__name__, late)  # imported only now
        exec("from torchvision.ops import roi_align", vars(late))
    assert named_roi_align() == own and late.roi_align is own[0]


def test_replaced_until_the_last_leaves():
    own, entered, leave = named_roi_align(), threading.Event(), threading.Event()

    @ours.replaced()
    def inside():
        entered.set()
        leave.wait(60)

    other = threading.Thread(target=inside)
    with ours.replaced():
        other.start()
        assert entered.wait(60)
    assert set(named_roi_align()) == {ours.roi_align}
    leave.set()
    other.join()
    assert named_roi_align() == own


# Programs of whole models, and of their tools


def saved_script(model):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.filterwarnings("ignore:RCNN always returns:UserWarning")
def test_a_scripted_model(model):
    """Also of images of another size."""
    ours.patch(model)
    try:
        program = saved_script(model)
        assert "torchvision_multiscale_roi_align" in str(program.roi_heads.inlined_graph)
        for images in (IMAGES, [torch.rand(3, 90, 50)]):
            _, actual = program(images)
            assert_close(*actual, *model(images))
    finally:
        ours.unpatch(model)


def test_graph_node_names():
    pools = ours.RoIAlign(2, 1.0, 2), ours.MultiScaleRoIAlign(["0"], 2, 2)
    for pool, inputs in zip(pools, ("input rois", "x boxes image_shapes"), strict=True):
        for *names, last in get_graph_node_names(pool):
            assert names == inputs.split() and last not in names


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_model_in_onnx(model):
    """By the exporter that traces, because the other one cannot export torchvision's own."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="it runs exported models")
    file = io.BytesIO()
    ours.patch(model)
    try:
        torch.onnx.export(
            model, (IMAGES,), file, dynamo=False, input_names=["image"],
            dynamic_axes={"image": [1, 2]}, opset_version=18,
        )  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # no warnings of shapes that the exporter fixed
        session = onnxruntime.InferenceSession(file.getvalue(), options)
        for image in (IMAGES[0], torch.rand(3, 90, 50)):
            outputs = map(torch.from_numpy, session.run(None, {"image": image.numpy()}))
            (expected,) = model([image])
            assert_close(dict(zip(expected, outputs, strict=True)), expected)
    finally:
        ours.unpatch(model)
