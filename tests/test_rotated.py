"""Boxes that are turned about their centre."""

import functools
import math

import numpy as np
import pytest

import oracle
import roialign
import tolerance
from backends import array, per_image

pytestmark = pytest.mark.backends("rotated")
DEGREE = math.pi / 180
SCALE = 0.75


def draw(seed=0, dtype=np.float64, channels=5, count=6, shape=(2, 9, 12)):
    """Features, boxes (x, y, width, height, degrees) in and around the map, image index."""
    rng = np.random.default_rng(seed)
    images, height, width = shape
    values = rng.standard_normal((images, channels, height, width))
    features = (100 * values.clip(0, 2.5) if dtype in tolerance.BYTES else values).astype(dtype)
    boxes = np.concatenate(
        [
            rng.uniform(-2, width + 2, (count, 1)),
            rng.uniform(-2, height + 2, (count, 1)),
            np.exp(rng.uniform(-1, 2.5, (count, 2))),
            rng.uniform(-400, 400, (count, 1)),
        ],
        1,
    )
    wide = np.float64 if dtype == np.float64 else np.float32
    return features, boxes.astype(wide), rng.integers(0, images, count)


def run(backend, features, boxes, index, g, size=(3, 2), **options):
    """The result, and its gradients (in floats alone that in the features)."""

    def operations(features, boxes, index, g):
        rois = boxes, index
        output = roialign.roi_align_rotated(features, rois, size, **options)
        d_boxes = roialign.roi_align_rotated_box_gradient(g, features, rois, **options)
        d_features = roialign.roi_align_rotated_adjoint(g, rois, features.shape, **options)
        return output, d_boxes, d_features

    return backend.run(operations, features, boxes, index, g)


def gradient(count, channels, dtype=np.float64, size=(3, 2), seed=1):
    g = np.random.default_rng(seed).standard_normal((count, channels, *size))
    return g.astype(np.float32 if dtype in tolerance.BYTES else dtype)


@pytest.mark.backends("rotated", "fast")
def test_golden(backend, golden_rotated):
    case = golden_rotated
    aligned = "aligned=False" not in case.library.replace("_false", "=False")
    options = {
        "spatial_scale": float(np.float32(case.parameter("spatial_scale"))),
        "sampling_ratio": case.parameter("sampling_ratio"),
        "convention": "half_pixel" if aligned else "asymmetric",
        "angle": case.entry["angle"].split(",")[0].split(";")[0],
        "clockwise": any(case.entry["params"].get(f"clockwise{end}") for end in ("", "_mode")),
    }
    size, rois, shape = case.parameter("output_size"), case.rois, case.features.shape

    def pool(features, rois):
        return roialign.roi_align_rotated(features, rois, size, **options)

    def adjoint(d_output, rois):
        return roialign.roi_align_rotated_adjoint(d_output, rois, shape, **options)

    output = backend.run(pool, case.features, rois)
    assert output.dtype == case.features.dtype
    case.check_forward(output)
    if "df" in case.arrays:
        case.check_adjoint(backend.run(adjoint, case.arrays["dy"], rois))


@functools.cache
def expected_of(dtype, channels, sampling, name):
    given = draw(channels, dtype, channels)
    convention = roialign.conventions[name]
    return given, *oracle.rotated(*given, (3, 2), SCALE, sampling, convention, DEGREE)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "reversed"])
@pytest.mark.parametrize(
    "channels, sampling, name", [(1, 2, "half_pixel"), (5, 0, "asymmetric"), (45, 5, "half_pixel")]
)
@pytest.mark.parametrize("dtype", [*tolerance.DTYPES, *tolerance.BYTES], ids=str)
def test_definition(backend, layouts, dtype, channels, sampling, name, layout):
    (features, boxes, index), expected, pixels = expected_of(dtype, channels, sampling, name)
    g = gradient(len(boxes), channels, dtype)
    options = {"spatial_scale": SCALE, "sampling_ratio": sampling, "convention": name}
    given = layouts[layout](features)
    if dtype in tolerance.BYTES:

        def pool(features, boxes, index):
            return roialign.roi_align_rotated(features, (boxes, index), (3, 2), **options)

        output = backend.run(pool, given, boxes, index)
    else:
        output, _, d_features = run(backend, given, boxes, index, g, **options)
    terms = 8 + max(len({p[:2] for p in bin_}) for each in pixels for bin_ in each)
    sums, unit, least = tolerance.TABLE[np.dtype(dtype)]
    rounding = terms * tolerance.TABLE[sums][1]
    size = np.abs(features.astype(np.float64)).max()
    problem = oracle.Problem(features, boxes[:, :4], index, (3, 2), (SCALE, SCALE))
    bound = rounding * size + unit * np.abs(expected) + least
    tolerance.check(output, expected, backend.bound(problem, bound, size))
    if dtype in tolerance.BYTES:
        return
    d_expected, magnitude = np.zeros(features.shape), np.zeros(features.shape)
    for k, each in enumerate(pixels):
        for bin_, (p, q) in zip(each, np.ndindex(3, 2), strict=True):
            for r, c, w in bin_:
                d_expected[index[k], :, r, c] += w * g[k, :, p, q].astype(float)
                magnitude[index[k], :, r, c] += w * np.abs(g[k, :, p, q].astype(float))
    bound = 64 * tolerance.TABLE[sums][1] * magnitude + unit * np.abs(d_expected) + least
    step = np.abs(g.astype(np.float64)).sum((0, 2, 3)).max()
    tolerance.check(d_features, d_expected, backend.bound(problem, bound, step))


@pytest.mark.parametrize("sampling", [0, 2, 40])
@pytest.mark.parametrize("name", ["half_pixel", "asymmetric"])
def test_gradients(backend, sampling, name):
    """<G, forward> = <F, adjoint>; and the gradient in the boxes by differences."""
    features, boxes, index = draw(3, count=20)
    g = gradient(20, 5)
    options = {"sampling_ratio": sampling, "convention": name}
    output, d_boxes, d_features = run(backend, features, boxes, index, g, **options)
    assert np.vdot(output, g) == pytest.approx(np.vdot(features, d_features), abs=1e-11)
    direction = np.random.default_rng(2).standard_normal(boxes.shape)
    moved = np.concatenate([boxes + 1e-7 * direction, boxes - 1e-7 * direction])

    def pool(features, boxes, index):
        return roialign.roi_align_rotated(features, (boxes, index), (3, 2), **options)

    ends = np.split(backend.run(pool, features, moved, np.tile(index, 2)), 2)
    slopes = np.einsum("kcpq,kcpq->k", ends[0] - ends[1], g) / 2e-7
    close = np.isclose(slopes, (d_boxes * direction).sum(1), rtol=1e-5, atol=1e-5)
    assert close.sum() >= 18  # a sample may be next to a pixel's position, where slopes jump


def test_angle_zero(backend):
    """It is the operator that is not turned, where no box is smaller than `min_size`."""
    features, boxes, index = draw(4)
    boxes[:, 4] = 0
    corners = np.concatenate(
        [boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2], 1
    )
    g = gradient(len(boxes), 5)
    output, d_boxes, d_features = run(backend, features, boxes, index, g)
    same = backend.roi_align(features, (corners, index), (3, 2))
    tolerance.close(output, same)
    tolerance.close(d_features, backend.roi_align_adjoint(g, (corners, index), features.shape))
    d_corners = roialign.roi_align_box_gradient(g, features, (corners, index))
    x1, y1, x2, y2 = d_corners.T
    for number, expected in enumerate((x1 + x2, y1 + y2, (x2 - x1) / 2, (y2 - y1) / 2)):
        tolerance.close(d_boxes[:, number], expected)


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("name", ["half_pixel", "asymmetric"])
def test_quarter_turns(backend, turns, name):
    """A box that is turned by 90 degrees on a map that is turned has the bins that it had."""
    features, boxes, index = draw(5, shape=(2, 11, 11))
    boxes[:, 2:4] = boxes[:, 2:4].clip(1)
    middle = 5 + roialign.conventions[name].pixel_offset
    turned = boxes.copy()
    for _ in range(turns):  # counter-clockwise, y down: (x, y) to (y, -x)
        x, y = turned[:, 0] - middle, turned[:, 1] - middle
        turned[:, 0], turned[:, 1] = middle + y, middle - x
    turned[:, 4] += 90 * turns
    options = {"sampling_ratio": 2, "convention": name}

    def pool(features, boxes, index):
        return roialign.roi_align_rotated(features, (boxes, index), 3, **options)

    output = backend.run(pool, features, boxes, index)
    around = backend.run(pool, np.rot90(features, turns, (2, 3)).copy(), turned, index)
    tolerance.close(around, output)


def test_units_and_directions(backend):
    features, boxes, index = draw(6)

    def pool(boxes, **options):
        return roialign.roi_align_rotated(features, (boxes, index), 2, **options)

    radians = boxes * [1, 1, 1, 1, DEGREE]
    tolerance.close(pool(radians, angle="radians"), pool(boxes))
    mirrored = boxes * [1, 1, 1, 1, -1]
    np.testing.assert_array_equal(pool(mirrored, clockwise=True), pool(boxes))
    tolerance.close(pool(boxes + np.array([0, 0, 0, 0, 360])), pool(boxes))


def test_constant_map(backend):
    features, boxes, index = draw(7, np.float32)
    boxes[:, :2], boxes[:, 2:4] = [6, 4.5], boxes[:, 2:4].clip(0.5, 4)
    output, d_boxes, _ = run(
        backend, np.ones_like(features), boxes, index, gradient(6, 5, np.float32)
    )
    np.testing.assert_allclose(output, 1, atol=1e-6)
    np.testing.assert_allclose(d_boxes, 0, atol=1e-5)


def test_forms(backend):
    """Rows (K, 6), a pair and a list; gradients have the form of the boxes."""
    features, boxes, index = draw(8, np.float32, shape=(3, 9, 12))
    index = np.sort(index) // 2 * 2  # none on image 1
    rows = np.concatenate([index[:, None], boxes], 1).astype(np.float32)
    images = [boxes[index == i] for i in range(3)]
    expected, d_boxes, _ = run(backend, features, boxes, index, gradient(6, 5, np.float32))
    g = gradient(6, 5, np.float32)

    def operations_of(form):
        def operations(features, g, *rois):
            output = roialign.roi_align_rotated(features, form(*rois), (3, 2))
            return output, roialign.roi_align_rotated_box_gradient(g, features, form(*rois))

        return operations

    for form, rois in ((array, [rows]), (per_image, images)):
        output, d_rois = backend.run(operations_of(form), features, g, *rois)
        bound = 0 if "exact" in backend.traits else 1e-5
        tolerance.close(output, expected, bound)
        if form is array:
            assert not d_rois[:, 0].any()
            d_rois = d_rois[:, 1:]
        tolerance.close(np.concatenate([*d_rois]).reshape(-1, 5), d_boxes, bound)
    none = roialign.roi_align_rotated(features[:0], [], 2)
    assert none.shape == (0, 5, 2, 2)
    out = np.empty_like(expected)
    assert roialign.roi_align_rotated(features, rows, (3, 2), out=out) is out
    last = roialign.roi_align_rotated(features.transpose(0, 2, 3, 1), rows, (3, 2), layout="NHWC")
    np.testing.assert_allclose(last.transpose(0, 3, 1, 2), expected, atol=1e-6)


@pytest.mark.backends("rotated", "-slow")
def test_threads(backend):
    features, boxes, index = draw(9, np.float32, channels=40, count=300, shape=(3, 30, 31))
    g, results = gradient(300, 40, np.float32), []
    for threads in (1, 2, 5):
        with backend.threads(threads):
            results.append(run(backend, features, boxes, index, g))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert one.tobytes() == two.tobytes()


@pytest.mark.backends("rotated", "-slow")
def test_many_pixels(backend):
    """More than are kept for a call: the same as box after box, bit for bit."""
    features, boxes, index = draw(10, np.float32, channels=2, count=30, shape=(1, 500, 600))
    boxes[:, 2:4] = 700
    g = gradient(30, 2, np.float32)
    together = run(backend, features, boxes, index, g)
    for k in (0, 29):
        alone = run(backend, features, boxes[k : k + 1], index[:1], g[k : k + 1])
        for one, all_ in zip(alone[:2], together[:2], strict=True):
            np.testing.assert_array_equal(one[0], all_[k])


def test_hostile_boxes(backend):
    """In time and memory bounded by the map, and finite."""
    ends = [0, -1, 3.5, 1e9, -1e9, 3e38, np.inf, -np.inf, np.nan]
    angles = [0, 45.0, 1e30, np.nan]
    boxes = np.array(np.meshgrid(*[ends] * 4, angles)).reshape(5, -1).T[::11].astype(np.float32)
    features = np.random.default_rng(0).standard_normal((1, 3, 6, 7)).astype(np.float32)
    index, g = np.zeros(len(boxes), np.int64), gradient(len(boxes), 3, np.float32, (2, 2))
    for sampling, convention in ((0, "half_pixel"), (3, "half_pixel"), (3, "asymmetric")):
        options = {"sampling_ratio": sampling, "convention": convention}
        results = run(backend, features, boxes, index, g, (2, 2), **options)
        assert all(np.isfinite(result).all() for result in results)
        output, d_boxes, _ = results
        assert not output[np.isnan(boxes).any(1)].any()
        assert not d_boxes[~np.isfinite(boxes).all(1)].any()
        empty = (boxes[:, 2:4] < 0).any(1)
        assert sampling or not output[empty].any()


FEATURES, BOXES = np.ones((1, 2, 4, 4), np.float32), np.ones((3, 5), np.float32)
INDEX = np.zeros(3, np.int64)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"rois": np.ones((3, 5), np.float32)}, ValueError, r"`rois` .*\(K, 6\), got \(3, 5\)"),
        ({"rois": (np.ones((3, 4)), INDEX)}, ValueError, r"`boxes` .*\(K, 5\), got \(3, 4\)"),
        ({"rois": [np.ones((3, 6))]}, ValueError, r"`rois\[0\]` .*\(K, 5\), got \(3, 6\)"),
        ({"rois": np.ones((1, 3, 5))}, ValueError, r"`rois` .*\(K, 6\), got \(1, 3, 5\)"),
        ({"rois": (BOXES, INDEX + 1)}, IndexError, "RoI 0"),
        ({"angle": "turns"}, ValueError, "'degrees', 'radians', got 'turns'"),
        ({"angle": 1}, TypeError, "`angle` must be a str, got int"),
        ({"clockwise": 1}, TypeError, "`clockwise` must be a bool, got int"),
        ({"spatial_scale": (1.0, 0.5)}, ValueError, "`spatial_scale` must be one number"),
        ({"convention": "mindspore"}, ValueError, "no input_offset and no end_offset"),
        ({"sampling_ratio": 4097}, ValueError, "at most 4096"),
    ],
)
def test_errors(backend, changed, error, message):
    given = {"features": FEATURES, "rois": (BOXES, INDEX), "output_size": 2} | changed
    with pytest.raises(error, match=message):
        roialign.roi_align_rotated(**given)
