"""The drop-in modules: the signatures of other libraries, and torchvision's recorded results."""

import copy
import inspect
import io
import itertools
import pickle
import re

import numpy as np
import pytest

import roialign

torch = pytest.importorskip("torch", reason="torch is not installed")

from roialign.compat import detectron2, mmcv, mmdet, torchvision  # noqa: E402
from test_pyramids import recorded  # noqa: E402


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
        (detectron2.ROIAlignRotated, "output_size, spatial_scale, sampling_ratio"),
        (
            mmcv.RoIAlign,
            "output_size, spatial_scale=1.0, sampling_ratio=0, pool_mode='avg', aligned=True, "
            "use_torchvision=False",
        ),
        (
            mmcv.roi_align,
            "input, rois, output_size, spatial_scale=1.0, sampling_ratio=0, pool_mode='avg', "
            "aligned=True",
        ),
        (
            mmcv.RoIAlignRotated,
            "output_size, spatial_scale, sampling_ratio=0, aligned=True, clockwise=False",
        ),
        (
            mmcv.roi_align_rotated,
            "input, rois, output_size, spatial_scale, sampling_ratio=0, aligned=True, "
            "clockwise=False",
        ),
        (
            torchvision.MultiScaleRoIAlign,
            "featmap_names, output_size, sampling_ratio, *, canonical_scale=224, "
            "canonical_level=4, scales=None, aligned=False",
        ),
        (
            detectron2.ROIPooler,
            "output_size, scales, sampling_ratio, pooler_type, canonical_box_size=224, "
            "canonical_level=4",
        ),
        (
            mmdet.SingleRoIExtractor,
            "roi_layer, out_channels, featmap_strides, finest_scale=56, init_cfg=None",
        ),
        (mmdet.GenericRoIExtractor, "aggregation='sum', pre_cfg=None, post_cfg=None, **kwargs"),
        (torchvision.RoIAlign.forward, "self, input, rois"),
        (detectron2.ROIAlign.forward, "self, input, rois"),
        (torchvision.MultiScaleRoIAlign.forward, "self, x, boxes, image_shapes"),
        (detectron2.ROIPooler.forward, "self, x, box_lists"),
        (mmdet.SingleRoIExtractor.forward, "self, feats, rois, roi_scale_factor=None"),
        (mmdet.GenericRoIExtractor.forward, "self, feats, rois, roi_scale_factor=None"),
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
    "detectron2.ROIPooler(output_size=(7, 7), scales=(0.25, 0.125), sampling_ratio=0, "
    "pooler_type='ROIAlignV2')",
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
    if isinstance(layer, detectron2.ROIPooler):
        args = [x, x[..., :13, :13]], [boxes]
    assert torch.equal(layer(*args), copied(*args))


# TorchScript and torch.fx


class Called(torch.nn.Module):
    """A layer in a module whose inputs are tensors."""

    def __init__(self, layer, kind):
        super().__init__()
        self.layer, self.kind = layer, kind

    def forward(self, fine, coarse, boxes, others):
        if self.kind is torchvision.MultiScaleRoIAlign:
            maps = {"0": fine, "another": others, "1": coarse}
            return self.layer(maps, [boxes, others], [(100, 100), (80, 90)])
        if self.kind in (roialign.torch.ROIAlign, detectron2.ROIAlign):
            return self.layer(fine, torch.nn.functional.pad(boxes, (1, 0)))
        return self.layer(fine, [boxes, others])


def through_a_file(program):
    file = io.BytesIO()
    torch.jit.save(program, file)
    file.seek(0)
    return torch.jit.load(file)


def scripted(layer, _):
    return Called(through_a_file(torch.jit.script(layer)), type(layer))


def traced(layer, given):
    return through_a_file(torch.jit.trace(Called(layer, type(layer)), given))


def symbolic(layer, _):
    return saved(torch.fx.symbolic_trace(Called(layer, type(layer))))


@pytest.mark.parametrize("program", [scripted, traced, symbolic])
@pytest.mark.parametrize("made", [made for made in LAYERS if "ROIPooler" not in made])
def test_programs(made, program):
    """Other sizes than those of the trace, with gradients."""
    layer = eval(made.replace("spatial_scale=1,", "spatial_scale=1.0,"))
    called, programs = Called(layer, type(layer)), []
    for height, width, count in ((25, 25, 6), (24, 40, 3), (26, 26, 0)):
        fine, coarse = random(0, 2, 2, height, width), random(1, 2, 2, height // 2, width // 2)
        given = fine, coarse, random_boxes(2, count), random_boxes(3, 2)
        given = [each.requires_grad_() for each in given]
        programs = programs or [program(layer, tuple(given))]
        results = []
        for pool in (*programs, called):
            output = pool(*given)
            chosen = [t for t in given if t is not coarse or "Multi" in made]
            gradients = torch.autograd.grad(output.square().sum(), chosen, allow_unused=True)
            results.append([output, *[g for g in gradients if g is not None]])
        assert len(results[0]) >= 3 and results[0][0].any() == bool(len(results[0][0]))
        assert all(map(torch.equal, *results))


def test_programs_take_rows_and_lists():
    layer, features = torchvision.RoIAlign(2, 0.5, 2), random(0, 3, 2, 9, 9)
    boxes = [random_boxes(i, count, 20) for i, count in enumerate((2, 0, 1))]
    rows = torch.cat([torch.nn.functional.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])
    for given in (rows, boxes):
        traced = torch.jit.trace(layer, (features, given))
        for program in (torch.jit.script(layer), traced, torch.jit.script(torchvision.roi_align)):
            options = () if program.__class__ is not torch.jit.ScriptFunction else (2, 0.5, 2)
            assert torch.equal(program(features, given, *options), layer(features, rows))


def test_layers_that_cannot_be_scripted_say_so():
    layer = {"type": "RoIAlign", "output_size": 7}
    for refused in (
        detectron2.ROIPooler(7, (0.25, 0.125), 0, "ROIAlignV2"),
        mmdet.SingleRoIExtractor(layer, 3, [4, 8]),
        mmdet.GenericRoIExtractor(roi_layer=layer, out_channels=3, featmap_strides=[4, 8]),
    ):
        name = f"roialign.compat.{refused.__module__.rpartition('.')[2]}.{type(refused).__name__}"
        for scripted in (refused, torch.nn.Sequential(refused)):
            with pytest.raises(RuntimeError, match=f"^{name} cannot be scripted: use torch.jit.tr"):
                torch.jit.script(scripted)


def test_programs_raise_what_layers_raise():
    pool = torch.jit.script(torchvision.MultiScaleRoIAlign(["a"], 2, 2))
    with pytest.raises(Exception, match="ValueError: `x` must have a map of `featmap_names`"):
        pool({"b": torch.ones(1, 1, 4, 4)}, [torch.zeros(1, 4)], [(16, 16)])
    pool = torch.jit.script(torchvision.RoIAlign(2, 1.0, 2))
    with pytest.raises(Exception, match="IndexError: `image_index` .*got 1"):
        pool(torch.ones(1, 1, 4, 4), [torch.zeros(1, 4)] * 2)


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
        ({"boxes": (torch.zeros(2, 5),)}, ValueError, r"`boxes\[0\]` .*\(2, 5\)"),
        ({"boxes": [torch.zeros(2, 4)] * 2}, IndexError, "`image_index` .*got 1"),
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


@pytest.mark.parametrize("layer", [torchvision.RoIAlign, detectron2.ROIAlign])
def test_more_samples_than_4096_are_refused(layer):
    for call in (lambda n: layer(2, 1.0, n), lambda n: torchvision.MultiScaleRoIAlign(["a"], 2, n)):
        with pytest.raises(ValueError, match="`sampling_ratio` must be at most 4096, got 4097"):
            call(4097)
        call(4096)


# Pyramids


CASES = {case.entry["kind"]: case for case in recorded() if case.library.startswith("torchvision")}


def recorded_call(kind):
    """A case, its maps by name, the boxes of each image, and the layer."""
    (case := CASES[kind]).load()
    maps = {f"p{i}": torch.from_numpy(features) for i, features in enumerate(case.maps)}
    rois, given = torch.from_numpy(case.rois), case.parameters
    boxes = [rois[rois[:, 0] == i, 1:] for i in range(len(case.maps[0]))]
    canonical = {name: given[name] for name in ("canonical_scale", "canonical_level")}
    arguments = list(maps), given["output_size"], given["sampling_ratio"]
    return case, maps, boxes, torchvision.MultiScaleRoIAlign(*arguments, **canonical)


@pytest.mark.parametrize("kind", CASES)
def test_pyramid(kind):
    """The output and all gradients are those of `multiscale_roi_align` and the recorded levels,
    which recorded results of torchvision test."""
    case, x, boxes, pool = recorded_call(kind)
    leaves = [t.requires_grad_() for t in (*x.values(), *boxes)]
    output = pool(x, boxes, case.parameters["image_shapes"])
    levels = torch.from_numpy(case.arrays["levels"]) if len(x) > 1 else None
    size, options = case.parameters["output_size"], case.options | {"levels": levels}
    expected = roialign.multiscale_roi_align(list(x.values()), boxes, size, **options)
    results = [
        (each, *torch.autograd.grad(each.square().sum(), leaves)) for each in (output, expected)
    ]
    assert all(map(torch.equal, *results)) and output.any()


class OfImages(torch.nn.Module):
    """A pyramid of maps made of the image."""

    def __init__(self):
        super().__init__()
        self.pool = torchvision.MultiScaleRoIAlign(["fine", "coarse"], 2, 2)

    def forward(self, image, boxes):
        fine = torch.nn.functional.max_pool2d(image, 4)
        x = {"fine": fine, "coarse": torch.nn.functional.max_pool2d(fine, 2)}
        return self.pool(x, [boxes], [image.shape[-2:]])


IMAGES = [
    (random(i, 1, 2, *size), random_boxes(i, count, 400))
    for i, (*size, count) in enumerate([(64, 96, 5), (96, 64, 4), (90, 160, 6), (130, 62, 9)])
]


@pytest.mark.parametrize("dynamic, graphs", [(None, 2), (True, 1)])
def test_a_pyramid_is_compiled_as_one_graph(dynamic, graphs):
    """For sizes that change it is compiled again once."""
    torch.compiler.reset()
    made, pool = [], OfImages()
    compiled = torch.compile(
        pool, fullgraph=True, dynamic=dynamic, backend=lambda graph, _: made.append(graph) or graph
    )
    for given in IMAGES:
        assert torch.equal(compiled(*given), pool(*given))
    assert len(made) == graphs
    torch.compiler.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_a_pyramid_is_exported_for_images_of_any_size(strict):
    dynamic, pool = torch.export.Dim.DYNAMIC, OfImages()
    shapes = {2: dynamic, 3: dynamic}, {0: dynamic}
    program = torch.export.export(pool, IMAGES[0], dynamic_shapes=shapes, strict=strict).module()
    for given in IMAGES:
        assert torch.equal(program(*given), pool(*given))


def test_boxes_of_any_dtype_have_a_size():
    """300 * 300 is no float16."""
    x = {name: torch.full((1, 1, side, side), float(side)) for name, side in (("a", 64), ("b", 32))}
    box, pool = torch.tensor([[0, 0, 300, 300]]), torchvision.MultiScaleRoIAlign(["a", "b"], 1, 1)
    for dtype in (torch.float16, torch.int64, torch.float64):
        for scale, side in ((1200, 64), (600, 32), (150, 32)):
            pool.canonical_scale = scale
            assert pool(x, [box.to(dtype)], [(256, 256)]).item() == side


def test_maps_by_name():
    case, x, boxes, _ = recorded_call("typical_3maps")
    shapes = case.parameters["image_shapes"]
    pool = torchvision.MultiScaleRoIAlign(["p2", "p1"], 2, 2)  # the order is that of x
    chosen = {"p1": x["p1"], "p2": x["p2"]}
    assert torch.equal(pool(x, boxes, shapes), pool(chosen, boxes, shapes))
    one = torchvision.MultiScaleRoIAlign(["p1"], 2, 2)(x, boxes, shapes)
    assert torch.equal(one, torchvision.roi_align(x["p1"], boxes, 2, 1 / 8, 2))


def test_lists_shorter_and_longer_than_the_images():
    features, boxes = random(0, 2, 1, 9, 9), random_boxes(0, 3, 20)
    expected = torchvision.roi_align(features, torch.nn.functional.pad(boxes, (1, 0)), 2, 0.25)
    for given in ([boxes], [boxes, boxes[:0], boxes[:0]]):
        pool = torchvision.MultiScaleRoIAlign(["a"], 2, -1)
        for pooled in (
            torchvision.roi_align(features, given, 2, 0.25),
            pool({"a": features}, given, [(36, 36)] * 2),
        ):
            assert torch.equal(pooled, expected) and pooled.any()
    assert torchvision.roi_align(features, [], 2).shape == (0, 1, 2, 2)
    assert pool({"a": features}, [], [(36, 36)]).shape == (0, 1, 2, 2)


def test_what_a_pyramid_shows_of_its_last_call():
    case, x, boxes, pool = recorded_call("typical_3maps")
    shapes = case.parameters["image_shapes"]
    assert pool.scales is pool.map_levels is None
    for names, finest, coarsest in (("p0", "p1"), 2, 3), (("p1", "p2"), 3, 4):
        pool.featmap_names = list(names)
        pool(x, boxes, shapes)
        assert pool.scales == [2.0**-finest, 2.0**-coarsest]
        mapper = pool.map_levels
        assert (mapper.k_min, mapper.k_max) == (finest, coarsest)
        assert (mapper.s0, mapper.lvl0) == (pool.canonical_scale, pool.canonical_level)
        levels = roialign.assign_levels(
            boxes, (finest, coarsest), canonical_size=mapper.s0, canonical_level=mapper.lvl0
        )
        assert torch.equal(mapper(boxes), levels)


def test_scales_and_aligned_of_a_pyramid():
    _, x, boxes, _ = recorded_call("typical_3maps")
    options = {"sampling_ratio": 2, "convention": "torchvision:aligned=True"}
    scales = [0.3, 0.15, 0.07]
    expected = roialign.multiscale_roi_align(
        list(x.values()), boxes, 3, spatial_scales=scales, **options,
        levels=roialign.assign_levels(boxes, (2, 4), canonical_size=30),
    )  # fmt: skip
    pool = torchvision.MultiScaleRoIAlign(
        list(x), 3, 2, canonical_scale=30, scales=scales, aligned=True
    )
    for each in (pool, torch.jit.script(pool)):
        assert torch.equal(each(x, boxes, [(0, 0)]), expected)
    assert pool.scales == scales
    assert f"scales={scales}, aligned=True)" in repr(pool)
    with pytest.raises(ValueError, match="`scales` must be 2, one for each map, got 3"):
        pool({name: x[name] for name in ("p0", "p1")}, boxes, [])
    pool.given_scales = [1 / 4, 1 / 16, 1 / 32]
    with pytest.raises(ValueError, match="no level between them"):
        pool(x, boxes, [])
    for wrong, error in ((4, TypeError), ([(1, 2)], TypeError), ([0.0], ValueError)):
        with pytest.raises(error, match="`scales"):
            torchvision.MultiScaleRoIAlign(["a"], 3, 2, scales=wrong)


@pytest.mark.parametrize(
    "first, pooled", [(torch.bfloat16, torch.bfloat16), (torch.uint8, torch.float32)]
)
def test_the_first_map_has_the_dtype(first, pooled):
    case, x, boxes, pool = recorded_call("typical_3maps")
    shapes = case.parameters["image_shapes"]
    x["p0"] = (9 + 2 * x["p0"]).to(first)
    output = pool(x, boxes, shapes)
    assert output.dtype is pooled
    exact = pool({name: features.float() for name, features in x.items()}, boxes, shapes)
    assert torch.equal(output, exact.to(pooled))


def test_no_boxes():
    case, x, boxes, pool = recorded_call("batch3")
    none = pool(x, [each[:0] for each in boxes], case.parameters["image_shapes"])
    assert none.shape == (0, *case.arrays["y"].shape[1:])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": {"c": torch.zeros(1, 1, 8, 8)}}, r"`x` .*\['a', 'b'\], got \['c'\]"),
        (
            {"x": {"a": torch.zeros(1, 1, 8, 8), "b": torch.zeros(1, 1, 16, 16)}},
            r"`x` .*coarse.*\[0.125, 0.25\]",
        ),
        ({"x": {"a": torch.zeros(1, 1, 0, 8)}}, r"`x` .*\[0\]"),
        ({"image_shapes": []}, r"`image_shapes` .*\[\]"),
        ({"image_shapes": [(0, 8)]}, r"`image_shapes` .*\[0\]"),
        ({"image_shapes": [(float("inf"), 8)]}, r"`image_shapes` .*\[inf\]"),
        (
            {"x": {"a": torch.zeros(1, 1, 16, 16), "b": torch.zeros(1, 1, 4, 4)}},
            r"`x` .*no level between them.*\[0.25, 0.0625\]",
        ),
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
