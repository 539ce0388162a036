"""The drop-in modules: the signatures of torchvision and detectron2, and their recorded results."""

import copy
import inspect
import io
import itertools
import math
import pickle
import re

import numpy as np
import pytest

import roialign

torch = pytest.importorskip("torch", reason="torch is not installed")

from roialign.compat import detectron2, torchvision  # noqa: E402


def random(seed, *shape, dtype=torch.float32):
    values = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(values).to(dtype)


def random_boxes(seed, count, size=100, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    start, extent = rng.uniform(0, size / 2, (count, 2)), rng.uniform(2, size / 2, (count, 2))
    return torch.from_numpy(np.hstack([start, start + extent])).to(dtype)


# Signatures


@pytest.mark.parametrize(
    "function, expected",
    [
        (
            torchvision.roi_align,
            "input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False",
        ),
        (torchvision.RoIAlign, "output_size, spatial_scale, sampling_ratio, aligned=False"),
        (detectron2.ROIAlign, "output_size, spatial_scale, sampling_ratio, aligned=True"),
        (
            torchvision.MultiScaleRoIAlign,
            "featmap_names, output_size, sampling_ratio, *, canonical_scale=224, canonical_level=4",
        ),
        (torchvision.RoIAlign.forward, "self, input, rois"),
        (detectron2.ROIAlign.forward, "self, input, rois"),
        (torchvision.MultiScaleRoIAlign.forward, "self, x, boxes, image_shapes"),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_signature(function, expected):
    parameters = inspect.signature(function).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert str(inspect.Signature(plain)) == f"({expected})"


LAYERS = [
    "torchvision.RoIAlign(output_size=7, spatial_scale=0.25, sampling_ratio=-1, aligned=False)",
    "torchvision.RoIAlign(output_size=(7, 5), spatial_scale=1, sampling_ratio=2, aligned=True)",
    "detectron2.ROIAlign(output_size=(7, 7), spatial_scale=0.0625, sampling_ratio=0, aligned=True)",
    "torchvision.MultiScaleRoIAlign(featmap_names=['0', '1'], output_size=(7, 7), "
    "sampling_ratio=2)",
    "roialign.torch.ROIAlign(pooled_height=3, pooled_width=2, spatial_scale=0.25, sample_num=2, "
    "roi_end_mode=1)",
]


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy, saved])
@pytest.mark.parametrize("made", LAYERS)
def test_repr_and_copies(made, way):
    layer, expected = eval(made), re.sub(r"^[\w.]+\.", "", made)
    copied = way(layer)
    assert type(copied) is type(layer) and repr(layer) == repr(copied) == expected
    assert f"(1): {expected}\n" in repr(torch.nn.Sequential(torch.nn.ReLU(), layer))
    assert layer.state_dict() == copied.state_dict() == {}
    x, boxes = random(0, 1, 2, 25, 25), random_boxes(1, 6)
    args = x, torch.nn.functional.pad(boxes, (1, 0))
    if isinstance(layer, torchvision.MultiScaleRoIAlign):
        args = {"0": x, "1": x[..., :13, :13]}, [boxes], [(100, 100)]
    assert torch.equal(layer(*args), copied(*args))


# Results: those of `roi_align`, which recorded results of the libraries test


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (4, 0), (1, 1), (0, 0)])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("pool", [torchvision.roi_align, torchvision.RoIAlign, detectron2.ROIAlign])
def test_the_convention_is_the_library_s(pool, aligned, counts):
    """In every form of boxes, with all gradients; no box is rounded to the features' dtype."""
    convention = f"{pool.__module__.rpartition('.')[2]}:aligned={aligned}"
    features = random(0, 2, 3, 20, 20, dtype=torch.float16).requires_grad_()
    boxes = [random_boxes(i, count, 40).requires_grad_() for i, count in enumerate(counts)]
    rows = torch.cat([torch.nn.functional.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])
    for sampling, given in itertools.product((-1, 0, 2), (rows, boxes, tuple(boxes))):
        arguments = (3, 2), 0.5, sampling, aligned
        if pool is torchvision.roi_align:
            output = pool(features, given, *arguments)
        else:
            output = pool(*arguments)(features, given)
        options = {"spatial_scale": 0.5, "sampling_ratio": sampling, "convention": convention}
        # a tuple of two, too, is one for each image
        rois = list(given) if isinstance(given, tuple) else given
        expected = roialign.roi_align(features, rois, (3, 2), **options)
        results = [
            (each, *torch.autograd.grad(each.float().square().sum(), (features, *boxes)))
            for each in (output, expected)
        ]
        assert output.shape == (sum(counts), 3, 3, 2) and output.any() == bool(sum(counts))
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"input": torch.zeros(1, 1, 8, 8).int()}, TypeError, "`features` .*int32"),
        ({"boxes": (torch.zeros(2, 5),)}, ValueError, r"`rois\[0\]` .*\(2, 5\)"),
        ({"boxes": [torch.zeros(2, 4)] * 2}, ValueError, "`rois` .*image, 1, got 2"),
        ({"output_size": 0}, ValueError, "`output_size` .*0"),
        ({"spatial_scale": "1"}, TypeError, "`spatial_scale` .*str"),
        ({"sampling_ratio": 2.0}, TypeError, "`sampling_ratio` .*float"),
    ],
)
def test_errors(change, error, message):
    fine = {"input": torch.zeros(1, 1, 8, 8), "boxes": torch.zeros(1, 5), "output_size": 2}
    torchvision.roi_align(**fine)
    with pytest.raises(error, match=message):
        torchvision.roi_align(**(fine | change))


# Pyramids


def pyramid(seed, images, size, channels=2, strides=(4, 8, 16, 32), dtype=torch.float32):
    height, width = size
    return {
        f"p{i}": random(seed + i, images, channels, -(-height // s), -(-width // s), dtype=dtype)
        for i, s in enumerate(strides)
    }


def by_hand(x, boxes, size, sampling, scales, levels):
    """One call of one map for each box."""
    rows = [torch.cat([b.new_full((1,), i), box]) for i, b in enumerate(boxes) for box in b]
    maps = list(x.values())
    return torch.cat(
        [
            roialign.roi_align(
                maps[level],
                row[None],
                size,
                spatial_scale=scales[level],
                sampling_ratio=sampling,
                convention="asymmetric",
            )
            for row, level in zip(rows, levels, strict=True)
        ]
    )


def fpn_levels(boxes, count, finest=2, scale=224, level=4):
    """Which map, in Python's float64: for boxes that are near no border."""
    result = []
    for x1, y1, x2, y2 in torch.cat(boxes).tolist():
        k = math.floor(level + math.log2(math.sqrt((x2 - x1) * (y2 - y1)) / scale) + 1e-6)
        result.append(min(max(k - finest, 0), count - 1))
    return result


def mixed_boxes(seed, images=2, count=24, dtype=torch.float32):
    """Boxes of all sizes from 8 to 900 pixels, in no order."""
    rng = np.random.default_rng(seed)
    boxes = []
    for _ in range(images):
        start, extent = rng.uniform(0, 100, (count, 2)), 2 ** rng.uniform(3, 9.8, (count, 2))
        boxes.append(torch.from_numpy(np.hstack([start, start + extent])).to(dtype))
    return boxes


SCALES = 1 / 4, 1 / 8, 1 / 16, 1 / 32


@pytest.mark.parametrize("sampling", [2, 0])
def test_pyramid(sampling):
    """The output, and the gradients of maps and boxes."""
    x, boxes = pyramid(0, 2, (1024, 800), dtype=torch.float64), mixed_boxes(1, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (*x.values(), *boxes)]
    levels = fpn_levels(boxes, 4)
    assert set(levels) == {0, 1, 2, 3} and levels != sorted(levels)
    pool = torchvision.MultiScaleRoIAlign(list(x), (3, 2), sampling)
    output = pool(x, boxes, [(500, 800), (1024, 640)])
    expected = by_hand(x, boxes, (3, 2), sampling, SCALES, levels)
    assert torch.equal(output, expected)
    d_output = random(5, *output.shape, dtype=torch.float64)
    grads = torch.autograd.grad(output, inputs, d_output)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, inputs, d_output), strict=True):
        assert actual.any()
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_scales_belong_to_the_call():
    pool = torchvision.MultiScaleRoIAlign(["p0", "p1", "p2", "p3"], 2, 2)
    boxes = mixed_boxes(1)
    for strides, finest in [((4, 8, 16, 32), 2), ((2, 4, 8, 16), 1), ((8, 16, 32, 64), 3)]:
        x = pyramid(0, 2, (512, 640), strides=strides)
        scales, levels = [1 / s for s in strides], fpn_levels(boxes, 4, finest)
        expected = by_hand(x, boxes, 2, 2, scales, levels)
        assert torch.equal(pool(x, boxes, [(512, 640), (500, 300)]), expected)
    # the same maps, of images of twice the size
    expected = by_hand(x, boxes, 2, 2, [s / 2 for s in scales], fpn_levels(boxes, 4, 4))
    assert torch.equal(pool(x, boxes, [(1024, 1280)] * 2), expected)


def pooled_levels(pool, boxes, strides=(4, 8, 16, 32), size=1024):
    """The maps that boxes come from: every map shows its own number."""
    names = pool.featmap_names
    x = {
        name: torch.full((1, 1, size // stride, size // stride), float(i))
        for i, (name, stride) in enumerate(zip(names, strides, strict=True))
    }
    return pool(x, [boxes], [(size, size)]).amax((1, 2, 3)).tolist()


def square(size, dtype=torch.float32):
    return torch.tensor([[0, 0, size, size]], dtype=dtype)


@pytest.mark.parametrize("canonical_scale, canonical_level", [(224, 4), (100, 3), (256, 5)])
def test_borders_of_levels(canonical_scale, canonical_level):
    pool = torchvision.MultiScaleRoIAlign(
        ["a", "b", "c", "d"],
        1,
        1,
        canonical_scale=canonical_scale,
        canonical_level=canonical_level,
    )
    for level in range(2, 6):
        border = canonical_scale * 2.0 ** (level - canonical_level)
        below = border * 2**-1e-3  # a thousandth of a level
        just_below = border * 2**-4e-7  # nearer than 1e-6 of a level: on the border
        sizes = [border, just_below, below]
        expected = [level - 2, level - 2, max(level - 3, 0)]
        for dtype in torch.float32, torch.float64:
            boxes = torch.cat([square(size, dtype) for size in sizes])
            assert pooled_levels(pool, boxes) == expected
    smallest, greatest = square(1e-3), square(1e3)
    assert pooled_levels(pool, torch.cat([greatest, smallest])) == [3, 0]


def test_the_border_of_float32_is_that_of_torchvision():
    # floor(4 + log2(s / 224) + 1e-6), every operation in float32, of sizes next to the border
    steps = np.arange(-200, 201, dtype=np.int32)
    for border in 112, 224, 448:
        sizes = (np.float32(border).view(np.int32) + steps).view(np.float32)
        s = torch.sqrt(torch.from_numpy(sizes) * torch.from_numpy(sizes))
        k = torch.floor(4 + torch.log2(s / 224) + torch.tensor(1e-6, dtype=torch.float32))
        assert len(set(k.tolist())) == 2
        boxes = torch.from_numpy(np.stack([sizes * 0, sizes * 0, sizes, sizes], 1))
        pool = torchvision.MultiScaleRoIAlign(["a", "b", "c", "d"], 1, 1)
        assert pooled_levels(pool, boxes) == (k - 2).tolist()


def test_small_float_boxes_have_areas():
    # 300 * 300 is no float16
    pool = torchvision.MultiScaleRoIAlign(["a", "b", "c", "d"], 1, 1)
    assert pooled_levels(pool, square(300, torch.float16)) == [2]
    assert pooled_levels(pool, square(300, torch.int64)) == [2]


def test_every_box_has_a_map():
    pool = torchvision.MultiScaleRoIAlign(["a", "b"], 1, 1)
    boxes = torch.tensor([[0.0, 0, 16, 16], [50, 0, 40, 20], [20, 20, 20, 20], [0, 0, 500, 500]])
    # 1 at the finest, 2 beyond a missing level
    x = {"a": torch.full((1, 1, 64, 64), 1.0), "b": torch.full((1, 1, 16, 16), 2.0)}
    assert pool(x, [boxes], [(512, 512)]).flatten().tolist() == [1, 1, 1, 2]
    nan = pool(x, [torch.full((1, 4), math.nan)], [(512, 512)])
    assert nan.item() == 0


def test_maps_by_name():
    x, boxes = pyramid(0, 2, (512, 512)), mixed_boxes(1)
    pool = torchvision.MultiScaleRoIAlign(["p3", "p1"], 2, 2)  # the order is that of x
    chosen = {"p1": x["p1"], "p3": x["p3"]}
    assert torch.equal(pool(x, boxes, [(512, 512)] * 2), pool(chosen, boxes, [(512, 512)] * 2))
    one = torchvision.MultiScaleRoIAlign(["p2"], 2, 2)(x, boxes, [(512, 512)] * 2)
    assert torch.equal(one, torchvision.roi_align(x["p2"], boxes, 2, 1 / 16, 2))


@pytest.mark.parametrize(
    "first, pooled", [(torch.bfloat16, torch.bfloat16), (torch.uint8, torch.float32)]
)
def test_the_first_map_has_the_dtype(first, pooled):
    x, boxes = pyramid(0, 2, (256, 256)), mixed_boxes(1)
    x["p0"] = (9 + 2 * x["p0"]).to(first)
    pool = torchvision.MultiScaleRoIAlign(list(x), 2, 2)
    output = pool(x, boxes, [(256, 256)] * 2)
    assert output.dtype is pooled
    exact = pool({k: v.float() for k, v in x.items()}, boxes, [(256, 256)] * 2)
    assert torch.equal(output, exact.to(pooled))


def test_pyramid_with_few_boxes():
    x = pyramid(0, 3, (256, 256))
    pool = torchvision.MultiScaleRoIAlign(list(x), (3, 2), 2)
    none = torch.zeros(0, 4)
    assert pool(x, [none] * 3, [(256, 256)] * 3).shape == (0, 2, 3, 2)
    box = torch.tensor([[10.0, 20, 200, 210]])
    output = pool(x, [none, box, none], [(256, 256)] * 3)
    row = torch.nn.functional.pad(box, (1, 0), value=1)
    assert torch.equal(output, torchvision.roi_align(x["p1"], row, (3, 2), 1 / 8, 2))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": {"c": torch.zeros(1, 1, 8, 8)}}, r"`x` .*\['a', 'b'\], got \['c'\]"),
        (
            {"x": {"a": torch.zeros(1, 1, 8, 8), "b": torch.zeros(1, 1, 16, 16)}},
            r"`x` .*coarse.*\[8, 16\]",
        ),
        ({"x": {"a": torch.zeros(1, 1, 0, 8)}}, r"`x` .*\[0\]"),
        ({"image_shapes": []}, r"`image_shapes` .*\[\]"),
        ({"image_shapes": [(0, 8)]}, r"`image_shapes` .*\[\(0, 8\)\]"),
        ({"boxes": []}, "`boxes` .*1, got 0"),
        ({"boxes": [torch.zeros(2, 5)]}, r"`boxes\[0\]` .*\(2, 5\)"),
        ({"boxes": [torch.zeros(4)]}, r"`boxes\[0\]` .*\(4,\)"),
        ({"boxes": torch.zeros(1, 5)}, r"`boxes\[0\]` .*\(5,\)"),
    ],
)
def test_errors_of_a_pyramid(change, message):
    fine = {
        "x": {"a": torch.zeros(1, 1, 16, 16), "b": torch.zeros(1, 1, 8, 8)},
        "boxes": [torch.zeros(2, 4)],
        "image_shapes": [(64, 64)],
    }
    pool = torchvision.MultiScaleRoIAlign(["a", "b"], 2, 2)
    pool(**fine)
    with pytest.raises(ValueError, match=message):
        pool(**(fine | change))
    freed = torch.zeros(9)[1:].view(2, 4)
    freed.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match=r"`boxes\[0\]` must be in memory"):
        pool(**(fine | {"boxes": [freed]}))


@pytest.mark.parametrize("size", [7, (7, 7), [7, 7], np.array(7), np.array([7, 7])], ids=repr)
def test_the_output_size_of_a_pyramid(size):
    assert torchvision.MultiScaleRoIAlign(["a"], size, 2).output_size == (7, 7)
    for wrong in (7.0, True, None):
        with pytest.raises(TypeError, match="`output_size` must be an int or a pair"):
            torchvision.MultiScaleRoIAlign(["a"], wrong, 2)
