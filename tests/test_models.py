"""Whole models of torchvision with its poolers and with ours: results, losses and gradients."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
try:
    import torchvision
except Exception as error:
    pytest.skip(f"torchvision cannot be imported: {error}", allow_module_level=True)

from roialign.compat import torchvision as ours  # noqa: E402

detection = torchvision.models.detection
SIZES = [(100, 140), (90, 130)]
MODES = ["float32", "channels_last", "bfloat16"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small calls."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


KINDS = ["FasterRCNN", "MaskRCNN", "KeypointRCNN"]
DETECTIONS = {"FasterRCNN": 50, "MaskRCNN": 50, "KeypointRCNN": 15}  # each a heat map, enlarged


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    """With random weights, a small body and few channels; boxes of 7 to 56 pixels have levels."""
    torch.manual_seed(0)
    body = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    backbone = detection.backbone_utils.BackboneWithFPN(body, layers, [64, 128, 256, 512], 32)
    pool = lambda size: torchvision.ops.MultiScaleRoIAlign(  # noqa: E731
        list(layers.values()), size, 2, canonical_scale=28
    )
    options = {"min_size": 96, "max_size": 160, "box_roi_pool": pool(7), "box_score_thresh": 0.0}
    options |= {"rpn_post_nms_top_n_train": 100, "rpn_post_nms_top_n_test": 100}
    options |= {"box_detections_per_img": DETECTIONS[request.param]}
    built = getattr(detection, request.param)(backbone, 3, **options)
    heads = built.roi_heads
    if heads.has_mask():
        heads.mask_roi_pool = pool(14)
        heads.mask_head = detection.mask_rcnn.MaskRCNNHeads(32, (16, 16), 1)
        heads.mask_predictor = detection.mask_rcnn.MaskRCNNPredictor(16, 16, 3)
    if heads.has_keypoint():
        heads.keypoint_roi_pool = pool(14)
        heads.keypoint_head = detection.keypoint_rcnn.KeypointRCNNHeads(32, (16, 16))
        heads.keypoint_predictor = detection.keypoint_rcnn.KeypointRCNNPredictor(16, 17)
    return built


@pytest.fixture(params=MODES)
def mode(request, model):
    """torchvision cannot compute the loss of keypoints from a head whose channels are last."""
    last = model.backbone if model.roi_heads.has_keypoint() else model
    if request.param == "channels_last":
        last.to(memory_format=torch.channels_last)
        features = model.backbone(torch.rand(1, 3, 64, 64))["0"]
        assert features.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=request.param == "bfloat16"):
        yield request.param
    last.to(memory_format=torch.contiguous_format)


def objects(height, width):
    """Targets of an image: boxes, labels, masks and keypoints."""
    share = torch.tensor([[0.03, 0.05, 0.4, 0.7], [0.1, 0.1, 0.8, 0.6], [0.4, 0.4, 0.6, 0.8]])
    boxes = share * torch.tensor([width, height] * 2)
    masks = torch.zeros(3, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y1 + 3 : y2 - 2, x1 + 1 : x2 - 4] = 1
    start, extent = boxes[:, None, :2], boxes[:, None, 2:] - boxes[:, None, :2]
    points = torch.cat([start + extent * torch.rand(3, 17, 2), torch.ones(3, 17, 1)], 2)
    return {"boxes": boxes, "labels": torch.tensor([1, 2, 1]), "masks": masks, "keypoints": points}


def with_both(model, run):
    """What `run` gives with their poolers, and with ours, from the same random numbers."""
    torch.manual_seed(0)
    expected = run()
    assert all(name.startswith("roi_heads.") for name in ours.patch(model))
    torch.manual_seed(0)
    with ours.replaced():
        actual = run()
    assert len(ours.unpatch(model)) == (1 if type(model) is detection.FasterRCNN else 2)
    return expected, actual


# Of results, losses and gradients; the last bits of bfloat16 are worth 2^-8
TOLERANCE = {"float32": 1e-4, "channels_last": 1e-4, "bfloat16": 2**-6}


def test_heads(model, mode, monkeypatch):
    """Of the same proposals and features. ReLU is smooth here, because a last bit that moves one of
    many numbers across its kink changes a whole derivative."""
    relu = lambda x, inplace=False: torch.nn.functional.softplus(x)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "relu", relu)
    torch.manual_seed(1)
    features = [torch.randn(2, 32, -(-100 // step), -(-140 // step)) for step in (4, 8, 16, 32)]
    if mode == "channels_last":
        features = [each.to(memory_format=torch.channels_last) for each in features]
    if mode == "bfloat16":
        features = [each.bfloat16() for each in features]
    features = {str(i): each.requires_grad_() for i, each in enumerate(features)}
    start, extent = 50 * torch.rand(2, 60, 2), 6 * 2 ** (4 * torch.rand(2, 60, 1))
    proposals, targets = list(torch.cat([start, start + extent], 2)), [objects(*s) for s in SIZES]
    leaves = features | dict(model.roi_heads.named_parameters())
    leaves.pop("keypoint_predictor.kps_score_lowres.bias", None)  # 0: softmax does not see it

    def run():
        model.train()
        _, losses = model.roi_heads(features, proposals, SIZES, targets)
        gradients = torch.autograd.grad(sum(losses.values()), leaves.values())
        model.eval()
        with torch.no_grad():
            results, _ = model.roi_heads(features, proposals, SIZES)
        return losses, dict(zip(leaves, gradients, strict=True)), results

    (losses, gradients, results), (own_losses, own_gradients, own_results) = with_both(model, run)
    bound = TOLERANCE[mode]
    for name, gradient in gradients.items():
        difference = (own_gradients[name] - gradient).float().norm() / gradient.float().norm()
        assert difference <= bound, name
    for one, own in ((losses, own_losses), *zip(results, own_results, strict=True)):
        for name in one:
            if name == "keypoints":  # places of maxima: near ties swap, and their scores are equal
                same = torch.isclose(own[name], one[name], rtol=bound, atol=bound).all(-1)
                assert same.float().mean() >= 0.99
                continue
            torch.testing.assert_close(own[name], one[name], rtol=bound, atol=bound, msg=name)
    assert len(results[0]["boxes"]) >= 15


def found_again(actual, expected, pixels):
    """For each detection the one that is like it, and whether it has its label and its box."""
    apart = (expected["boxes"][:, None] - actual["boxes"]).abs().amax(2).float()
    apart += 1e9 * (expected["labels"][:, None] != actual["labels"])
    return apart.argmin(1), apart.amin(1) <= pixels


def test_whole(model, mode):
    """A training step and an inference."""
    torch.manual_seed(1)
    images, targets = [torch.rand(3, *size) for size in SIZES], [objects(*size) for size in SIZES]

    def run():
        model.train()
        losses = model(images, targets)
        model.zero_grad()
        sum(losses.values()).backward()
        model.eval()
        with torch.no_grad():
            return losses, model(images)

    (losses, results), (own_losses, own_results) = with_both(model, run)
    exact = mode != "bfloat16"
    bound = 1e-5 if exact else TOLERANCE[mode]
    for name, loss in losses.items():
        torch.testing.assert_close(own_losses[name], loss, rtol=bound, atol=bound)
    every = []
    for actual, expected in zip(own_results, results, strict=True):
        like, found = found_again(actual, expected, 0.01 if exact else 1.0)
        assert len(found) == len(actual["boxes"]) >= 15
        every.append(found)
        for name in expected.keys() - {"boxes"}:
            own, one = actual[name][like][found].float(), expected[name][found].float()
            close = (own - one).abs() <= TOLERANCE[mode] * one.abs().amax().clamp(min=1)
            assert close.float().mean() >= 0.99, name
    assert torch.cat(every).float().mean() >= 0.99  # near ties may swap
