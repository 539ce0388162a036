"""Several maps by the public functions: other libraries' poolers, the oracle, and the arguments."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

import roialign
import tolerance
from backends import array, arrays_of, batched, pair, per_image, three
from tolerance import close

GOLDEN = Path(__file__).parent / "golden"
FORMS = [pair, array, per_image, batched]


# Other libraries


class Recorded:
    """One recorded call of another library's pooler."""

    def __init__(self, library, entry):
        self.library, self.entry, self.parameters = library, entry, entry["params"]

    def __str__(self):
        return f"{self.library}-{self.entry['kind']}"

    def load(self):
        with np.load(GOLDEN / self.library / self.entry["file"]) as arrays:
            self.arrays = dict(arrays)
        given, count = self.parameters, len(self.entry["shapes"])
        self.maps = [self.arrays[f"features_{i}"] for i in range(count)]
        self.rois = self.pooled_rois = self.arrays["rois"]
        self.options = {"sampling_ratio": given["sampling_ratio"]}
        self.options["convention"] = "half_pixel"
        if self.library == "mmdet_single_roi_extractor":
            self.rule, ends, level = "mmdet", (0, count - 1), 0
            size = given["finest_scale"]
            scales = [float(np.float32(1 / stride)) for stride in given["featmap_strides"]]
            if given["roi_scale_factor"] and count > 1:
                self.pooled_rois = scaled(self.rois, given["roi_scale_factor"])
        elif self.library == "detectron2_pooler":
            self.rule, ends = "detectron2", (given["min_level"], given["max_level"])
            size, level = given["canonical_box_size"], given["canonical_level"]
            scales = given["scales"]
            if given["pooler_type"] == "ROIAlign":
                self.options["convention"] = "asymmetric"
        else:
            self.rule, ends = "torchvision", (given["k_min"], given["k_max"])
            size, level = given["canonical_scale"], given["canonical_level"]
            scales, self.options["convention"] = given["scales"], "asymmetric"
        self.options["spatial_scales"] = scales
        self.ends = ends
        self.level_options = {
            "rule": self.rule, "canonical_size": size, "canonical_level": level
        }  # fmt: skip


def scaled(rois, factor):
    """About the centre, as mmdet does."""
    start, end, factor = rois[:, 1:3], rois[:, 3:], rois.dtype.type(factor)
    centre, half = (start + end) * rois.dtype.type(0.5), (end - start) * factor
    half = half * rois.dtype.type(0.5)
    return np.concatenate([rois[:, :1], centre - half, centre + half], 1)


def recorded():
    for library in ("torchvision_multiscale", "detectron2_pooler", "mmdet_single_roi_extractor"):
        for entry in json.loads((GOLDEN / library / "manifest.json").read_text())["cases"]:
            if entry["params"].get("pooler_type") != "ROIAlignRotated":
                yield Recorded(library, entry)


RECORDED = {(case.library, case.entry["kind"]): case for case in recorded()}


@pytest.mark.backends("pyramids", "-interprets")
@pytest.mark.parametrize("library, kind", RECORDED)
def test_poolers_of_other_libraries(backend, library, kind):
    case = RECORDED[library, kind]
    case.load()
    count, arrays, size = len(case.maps), case.arrays, case.parameters["output_size"]
    shapes = [features.shape for features in case.maps]
    ends, level_options, options = case.ends, case.level_options, case.options

    def levels_of(rois):
        if count == 1:  # they have no rule there
            return None
        return roialign.assign_levels(rois, ends, **level_options)

    def call(rois, pooled_rois, d_output, *maps):
        levels = levels_of(rois)
        output = roialign.multiscale_roi_align(maps, pooled_rois, size, levels=levels, **options)
        d_maps = roialign.multiscale_roi_align_adjoint(
            d_output, pooled_rois, shapes, levels=levels, **options
        )
        return output, *d_maps

    given = case.rois, case.pooled_rois, arrays["dy"], *case.maps
    output, *d_maps = backend.run(call, *given)
    # the scale of float64 maps is a double here
    exact = output.dtype == np.float64 and case.library == "torchvision_multiscale"
    bound = 1e-9 if exact else 1e-5
    bound *= max(1, *(np.abs(features).max() for features in case.maps))
    close(output, arrays["y"], bound)
    for i, d_features in enumerate(d_maps):
        close(d_features, arrays[f"df_{i}"], bound)
    if count > 1:
        assert np.array_equal(backend.run(levels_of, case.rois), arrays["levels"])


@pytest.mark.backends("pyramids")
def test_levels_by_the_scales(backend):
    """They are torchvision's."""
    (case,) = (c for c in recorded() if str(c) == "torchvision_multiscale-default_canonical")
    case.load()
    assert case.level_options["canonical_size"] == 224

    size, options = case.parameters["output_size"], case.options

    def pool(rois, *maps):
        return roialign.multiscale_roi_align(maps, rois, size, **options)

    close(backend.run(pool, case.rois, *case.maps), case.arrays["y"], 1e-5)


# The definition


def laid_out(array, layout):
    """A copy with channels where the layout has them."""
    if layout == "NHWC":
        array = np.moveaxis(array, -3, -1)
    return np.ascontiguousarray(array)


@pytest.fixture
def four(pyramid):
    """RoIs on a pyramid, as many on each image, in the order of the images."""

    def make(dtype=np.float32, **options):
        p = pyramid(dtype, count=8, **options)
        index = np.repeat([0, 1], 4)
        p.rois = p.problems[0].boxes, index, np.array([1, 0, -1, 1, 0, 0, 1, -1])
        p.problems = [replace(q, boxes=p.rois[0], index=index) for q in p.problems]
        p.options = {
            "spatial_scales": [q.scale for q in p.problems],
            "sampling_ratio": p.problems[0].sampling,
        }
        return p

    return make


def shaped(form, values):
    return values.reshape(2, 4, *values.shape[1:]) if form is batched else values


def together(p, form, layout, container=tuple):
    """All three operations, of d_output, levels, maps and the arrays of rois."""
    options, size, count = p.options | {"layout": layout}, p.problems[0].size, len(p.maps)
    shapes = [laid_out(features, layout).shape for features in p.maps]
    is_named, container_type = container is named, type(container(()))

    def call(d_output, levels, *given):
        maps, rois = container(given[:count]), form(*given[count:])
        output = roialign.multiscale_roi_align(maps, rois, size, levels=levels, **options)
        given_shapes = container(shapes)
        d_maps = roialign.multiscale_roi_align_adjoint(
            d_output, rois, given_shapes, levels=levels, **options
        )
        assert isinstance(d_maps, container_type)
        d_rois = roialign.multiscale_roi_align_box_gradient(
            d_output, maps, rois, levels=levels, **options
        )
        d_maps = tuple(d_maps.values()) if is_named else d_maps
        return output, *d_maps, d_rois

    return call


def named(maps):
    return {f"p{i}": features for i, features in enumerate(maps)}


def arrays_for(p, form, layout):
    boxes, index, levels = p.rois
    d_output = laid_out(shaped(form, p.d_output), layout)
    maps = [laid_out(features, layout) for features in p.maps]
    return d_output, shaped(form, levels), *maps, *arrays_of(form, boxes, index)


@pytest.mark.backends("pyramids", "nhwc", "batched")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [*tolerance.DTYPES, np.dtype(np.uint8)], ids=str)
@pytest.mark.parametrize("sampling", [2, 0])
def test_against_the_oracle(backend, four, dtype, form, layout, sampling):
    """Each map has its own RoIs, with the bits that calls of one map have; -1 has zeros."""
    p = four(dtype, sampling=sampling, channels=5 if "interprets" in backend.traits else 19)
    container = {pair: tuple, array: list}.get(form, named)
    if backend.name == "mindspore.graph" and container is named:  # which takes none
        container = tuple
    call, given = together(p, form, layout, container), arrays_for(p, form, layout)
    output, *d_maps, d_rois = backend.run(call, *given)
    back = (lambda a: np.moveaxis(a, -1, -3)) if layout == "NHWC" else lambda a: a
    if form is batched:
        assert output.shape[:2] == (2, 4) and d_rois.shape == (2, 4, 4)
    output = back(output).reshape(p.d_output.shape)
    d_boxes = np.concatenate(d_rois) if form is per_image else d_rois[..., -4:].reshape(8, 4)
    boxes, index, levels = p.rois
    for level, problem in enumerate(p.problems):
        on = levels == level
        alone = replace(problem, boxes=boxes[on], index=index[on])
        g, d_features = p.d_output[on], back(d_maps[level])
        assert d_features.shape == problem.features.shape
        if dtype != np.uint8:
            backend.check(alone, g, output[on], d_features, d_boxes[on])
        if "exact" in backend.traits:
            alike = [back(laid_out(a, layout)) for a in (p.maps[level], g)]
            single = three(alone)(*alike, boxes[on], index[on])
            for actual, expected in zip((output[on], d_features, d_boxes[on]), single, strict=True):
                assert actual.tobytes() == expected.tobytes() and expected.any()
    assert not output[levels < 0].any() and not d_boxes[levels < 0].any()


@pytest.mark.backends("pyramids", "grad")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("form", [pair, batched])
def test_gradients(backend, four, form, layout):
    """By differentiation they are those of the adjoint and of the box gradient."""
    p = four(np.float64)
    g, levels, *given = arrays_for(p, form, layout)
    _, *d_maps, d_boxes = together(p, form, layout)(g, levels, *given)
    boxes, *index = given[2:]
    g, levels, *index = backend.array((g, levels, *index))
    size, options = p.problems[0].size, p.options | {"layout": layout, "levels": levels}

    def loss(boxes, *maps):
        output = roialign.multiscale_roi_align(maps, form(boxes, *index), size, **options)
        return (output * g).sum()

    own = backend.array((boxes, *given[:2]))
    found = backend.numpy(backend.grad(loss, (0, 1, 2))(*own))
    for actual, expected in zip(found, (d_boxes, *d_maps), strict=True):
        close(actual, expected, 1e-9)
        assert expected.any()


# Levels and boxes that may be anything


@pytest.mark.backends("pyramids")
def test_no_rois(backend, pyramid):
    p = pyramid(np.float32, count=0)
    output, *d_maps, d_boxes = backend.run(p.together, p.d_output, *p.maps, *p.rois)
    assert output.shape == p.d_output.shape and d_boxes.shape == (0, 4)
    for d, m in zip(d_maps, p.maps, strict=True):
        assert d.shape == m.shape and not d.any()


@pytest.mark.backends("pyramids")
@pytest.mark.parametrize("levels", [None, [0, 0, 0, 0], [-1, 0, -1, 0], [-1, -1, -1, -1]])
def test_one_map(backend, pyramid, levels):
    """Without levels all are 0; -1 is no map there too."""
    p = pyramid(np.float32, count=4)
    (problem, _), levels = p.problems, None if levels is None else np.array(levels)
    options, size = {"spatial_scales": [problem.scale], "sampling_ratio": 2}, problem.size

    def call(features, g, boxes, index, levels=None):
        rois, shapes = (boxes, index), [features.shape]
        (d_features,) = roialign.multiscale_roi_align_adjoint(
            g, rois, shapes, levels=levels, **options
        )
        output = roialign.multiscale_roi_align([features], rois, size, levels=levels, **options)
        d_boxes = roialign.multiscale_roi_align_box_gradient(
            g, [features], rois, levels=levels, **options
        )
        return output, d_features, d_boxes

    on = slice(None) if levels is None else levels >= 0
    given = [] if levels is None else [levels]
    output, d_features, d_boxes = backend.run(
        call, problem.features, p.d_output, *problem.rois, *given
    )
    boxes, index = problem.rois
    alone = replace(problem, boxes=boxes[on], index=index[on])
    backend.check(alone, p.d_output[on], output[on], d_features, d_boxes[on])
    off = np.setdiff1d(np.arange(4), np.arange(4)[on])
    assert not output[off].any() and not d_boxes[off].any()


@pytest.mark.backends("pyramids")
@pytest.mark.parametrize(
    "dtype, level", [("int8", 2), ("int32", -2), ("uint8", 255), ("int64", 2**40)]
)
def test_a_level_that_is_none(backend, four, dtype, level):
    """An error, which writes nothing, or no map: as for a bad image index. -1 never is one."""
    p = four()
    boxes, index, levels = p.rois
    levels = levels.clip(0 if dtype == "uint8" else -1).astype(dtype)
    options = p.options

    def pool(levels, boxes, index, *maps, out=None):
        return roialign.multiscale_roi_align(
            maps, (boxes, index), 2, levels=levels, out=out, **options
        )

    right = backend.run(pool, levels, boxes, index, *p.maps)
    levels[3] = level
    if "raises" in backend.traits:
        out = backend.array(np.full_like(right, np.nan)) if "out" in backend.traits else None
        with pytest.raises(IndexError, match=rf"`levels` of RoI 3 .* \[-1, 2\), got {level}"):
            pool(*backend.array((levels, boxes, index, *p.maps)), out=out)
        assert out is None or np.isnan(backend.numpy(out)).all()
    else:
        output = backend.run(pool, levels, boxes, index, *p.maps)
        assert right[3].any() and not output[3].any()
        close(np.delete(output, 3, 0), np.delete(right, 3, 0), 1e-5)


@pytest.mark.backends("pyramids")
def test_hostile_boxes(backend, four):
    """Their levels are those of their sizes, their rows finite; none disturbs another."""
    p = four()
    boxes, index, _ = p.rois
    boxes, scales = boxes.astype(np.float32), (1 / 2, 1 / 4)
    hostile = [[0, 0, -5, 9], [np.nan] * 4, [0, 0, np.inf, 1], [-9e30, -9e30, 9e30, 9e30]]
    boxes[1::2] = hostile
    g = np.ones((8, 3, 2, 2), np.float32)

    def call(boxes, index, g, *maps):
        rois, shapes = (boxes, index), [features.shape for features in maps]
        options = {"spatial_scales": scales}
        return (
            roialign.multiscale_roi_align(maps, rois, 2, **options),
            *roialign.multiscale_roi_align_adjoint(g, rois, shapes, **options),
            roialign.multiscale_roi_align_box_gradient(g, maps, rois, **options),
        )

    results = backend.run(call, boxes, index, g, *p.maps)
    assert all(np.isfinite(result).all() for result in results)
    fair = call(boxes[::2], index[::2], g[::2], *p.maps)
    close(results[0][::2], fair[0], 1e-5)
    close(results[-1][::2], fair[-1], 1e-4)
    assert not results[0][1:4:2].any() and not results[-1][1:4:2].any()


@given(st.data())
def test_any_pyramid(data):
    """As many calls of one map each, bit for bit."""
    draw, rng = data.draw, np.random.default_rng(data.draw(st.integers(0, 2**32)))
    dtype, count = draw(st.sampled_from(tolerance.DTYPES)), draw(st.integers(0, 12))
    images, channels = draw(st.integers(1, 3)), draw(st.integers(0, 17))
    sides = draw(st.lists(st.tuples(*[st.integers(1, 20)] * 2), min_size=1, max_size=4))
    maps = [rng.standard_normal((images, channels, *side)).astype(dtype) for side in sides]
    scale = st.floats(2.0**-5, 2)
    scales = [draw(scale | st.tuples(scale, scale)) for _ in maps]
    boxes = draw(st.sampled_from([1, 20, 200])) * rng.standard_normal((count, 4)).astype(np.float32)
    index, levels = rng.integers(images, size=count), rng.integers(-1, len(maps), size=count)
    size = draw(st.tuples(*[st.integers(1, 4)] * 2))
    sampling = {"sampling_ratio": draw(st.integers(0, 3))}
    options = sampling | {"spatial_scales": scales, "levels": levels}
    shapes = [features.shape for features in maps]
    output = roialign.multiscale_roi_align(maps, (boxes, index), size, **options)
    d_maps = roialign.multiscale_roi_align_adjoint(output, (boxes, index), shapes, **options)
    assert not output[levels < 0].any()
    for level, (features, scale) in enumerate(zip(maps, scales, strict=True)):
        on = levels == level
        rois, own = (boxes[on], index[on]), sampling | {"spatial_scale": scale}
        expected = roialign.roi_align(features, rois, size, **own)
        assert output[on].tobytes() == expected.tobytes()
        expected = roialign.roi_align_adjoint(output[on], rois, features.shape, **own)
        assert d_maps[level].tobytes() == expected.tobytes()


# Arguments


MAPS = np.ones((2, 3, 8, 9), np.float32), np.ones((2, 3, 4, 5), np.float32)
ROIS, LEVELS = np.array([[0, 1, 1, 6, 5], [1, 0, 2, 7, 6.5]], np.float32), np.array([0, 1])
G = np.ones((2, 3, 2, 2), np.float32)
MAPS_ARGUMENTS = [
    (MAPS[0], TypeError, "`feature_maps` must be a tuple, list or dict.*ndarray"),
    ([], ValueError, "`feature_maps` .*none"),
    ([MAPS[0], None], TypeError, r"`feature_maps\[1\]` must be a numpy.ndarray, got NoneType"),
    ({"p2": MAPS[0], "p3": "map"}, TypeError, r"`feature_maps\['p3'\]` .*str"),
    ([MAPS[0], MAPS[1].astype(int)], TypeError, r"`feature_maps\[1\]` must be float16.*int64"),
    ([MAPS[0], MAPS[1].astype("f8")], TypeError, r"`feature_maps\[1\]` must be float32.*float64"),
    ([MAPS[0], MAPS[1][0]], ValueError, r"`feature_maps\[1\]` .*\(N, C, H, W\), got \(3, 4, 5\)"),
    ([MAPS[0], MAPS[1][:, :2]], ValueError, r"`feature_maps\[1\]` .*channels .*\(2, 2, 4, 5\)"),
    ([MAPS[0], MAPS[1][:1]], ValueError, r"`feature_maps\[1\]` .*images .*\(1, 3, 4, 5\)"),
    ([MAPS[0], MAPS[1][:, :, :0]], ValueError, r"`feature_maps\[1\]` .*pixel"),
]
OPTIONS = [
    ("spatial_scales", 0.25, TypeError, "`spatial_scales` must be a tuple or list.*float"),
    ("spatial_scales", (0.5, "1"), TypeError, r"`spatial_scales\[1\]` .*str '1'"),
    ("spatial_scales", (0.5, (0.25, None)), TypeError, r"`spatial_scales\[1\]` .*None"),
    ("spatial_scales", (0.5,), ValueError, "`spatial_scales` must be 2, one for each map, got 1"),
    ("spatial_scales", (0.5, 0), ValueError, r"`spatial_scales\[1\]` .*0"),
    ("spatial_scales", (0.5, (1, 2, 3)), ValueError, r"`spatial_scales\[1\]` .*\(1.*\)"),
    ("levels", LEVELS.tolist(), TypeError, "`levels` must be a numpy.ndarray, got list"),
    ("levels", LEVELS.astype("f4"), TypeError, "`levels` must have an integer dtype, got float32"),
    ("levels", LEVELS[:1], ValueError, r"`levels` .*\(2,\), got \(1,\)"),
    ("levels", LEVELS[None], ValueError, r"`levels` .*\(2,\), got \(1, 2\)"),
    ("levels", LEVELS + 1, IndexError, r"`levels` of RoI 1 .*\[-1, 2\), got 2"),
    ("layout", "NWHC", ValueError, "`layout`.*NWHC"),
    ("convention", "fpn", ValueError, "`convention`.*fpn"),
]
# where levels follow from the scales
NO_LEVELS = [(0.5, 0.125), (0.5, 0.5), (0.25, 0.5), (0.3, 0.15), (0.5, (0.25, 0.5))]
OPTIONS += [("scales_alone", s, ValueError, "`levels` must be given .*powers") for s in NO_LEVELS]


def call(operation, maps=MAPS, **changed):
    scales = changed.pop("scales_alone", None)
    options = {"spatial_scales": (0.5, 0.25), "levels": LEVELS} | changed
    if scales:
        options |= {"spatial_scales": scales, "levels": None}
    if operation == "forward":
        return roialign.multiscale_roi_align(maps, ROIS, 2, **options)
    if operation == "adjoint":
        shapes = [features.shape for features in maps]
        return roialign.multiscale_roi_align_adjoint(G, ROIS, shapes, **options)
    return roialign.multiscale_roi_align_box_gradient(G, maps, ROIS, **options)


@pytest.mark.parametrize("operation", ["forward", "box_gradient"])
@pytest.mark.parametrize("maps, error, message", MAPS_ARGUMENTS)
def test_errors_of_maps(operation, maps, error, message):
    with pytest.raises(error, match=message):
        call(operation, maps)


@pytest.mark.parametrize("operation", ["forward", "adjoint", "box_gradient"])
@pytest.mark.parametrize("name, value, error, message", OPTIONS)
def test_errors_of_options(operation, name, value, error, message):
    with pytest.raises(error, match=message):
        call(operation, **{name: value})


@pytest.mark.parametrize(
    "shapes, error, message",
    [
        (4, TypeError, "`feature_shapes` must be a tuple, list or dict.*int"),
        ((), ValueError, "`feature_shapes` .*none"),
        ((2, 3, 4, 5), TypeError, r"`feature_shapes\[0\]` must be a tuple.*int"),
        ([(2, 3, 8, 9), (2, 3, 4.0, 5)], TypeError, r"`feature_shapes\[1\]` .*4.0"),
        ([(2, 3, 8, 9), (2, 3, 4)], ValueError, r"`feature_shapes\[1\]` .*\(2, 3, 4\)"),
        ([(2, 3, 8, 9), (2, 4, 4, 5)], ValueError, r"`feature_shapes\[1\]` .*\(2, 4, 4, 5\)"),
        ([(2, 4, 8, 9), (2, 4, 4, 5)], ValueError, r"`d_output` .*\(2, 4, P, Q\)"),
    ],
)
def test_errors_of_shapes(shapes, error, message):
    with pytest.raises(error, match=message):
        roialign.multiscale_roi_align_adjoint(
            G, ROIS, shapes, spatial_scales=(0.5, 0.25), levels=LEVELS
        )


def outs():
    return [np.full_like(features, np.nan) for features in MAPS]


@pytest.mark.parametrize(
    "out, error, message",
    [
        (MAPS[0], TypeError, "`out` must be a tuple, list or dict"),
        (outs()[:1], ValueError, "`out` must have an array for each of `feature_shapes`, got 1"),
        (named(outs()), ValueError, "`out` must have an array for each of `feature_shapes`"),
        ([outs()[0], outs()[1].astype("f8")], TypeError, r"`out\[1\]` must have dtype float32"),
        (outs()[::-1], ValueError, r"`out\[0\]` must have shape \(2, 3, 8, 9\)"),
    ],
)
def test_errors_of_out(out, error, message):
    with pytest.raises(error, match=message):
        call("adjoint", out=out)


def test_out_does_not_overlap_itself():
    """Two results in one memory."""
    memory = np.zeros(2 * 3 * 8 * 9, np.float32)
    overlapping = [memory.reshape(2, 3, 8, 9), memory[:120].reshape(2, 3, 4, 5)]
    with pytest.raises(ValueError, match=r"`out\[1\]` must not overlap"):
        call("adjoint", out=overlapping)
    assert not memory.any()
