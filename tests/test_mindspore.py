"""MindSpore: NumPy's numbers in PyNative and Graph mode, and its own operator beside ours."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import oracle
import roialign
import tolerance

mindspore = pytest.importorskip("mindspore", reason="the MindSpore adapter's tests need mindspore")
from mindspore import Tensor, nn, ops  # noqa: E402

import roialign.mindspore  # noqa: E402

MODES = {"pynative": mindspore.PYNATIVE_MODE, "graph": mindspore.GRAPH_MODE}


@pytest.fixture(params=MODES)
def mode(request):
    mindspore.set_context(mode=MODES[request.param])
    yield request.param
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The compiler writes a file where it fails."""
    monkeypatch.chdir(tmp_path)


class Net(nn.Cell):
    """A function as a network: Graph mode compiles it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def construct(self, *inputs):
        return self.function(*inputs)


def tensor(array):
    """The same values and dtype; ml_dtypes' bfloat16 is MindSpore's."""
    if array.dtype == tolerance.BFLOAT16:
        return Tensor(array.astype(np.float32)).astype(mindspore.bfloat16)
    return Tensor(np.ascontiguousarray(array))


def array(tensor):
    if tensor.dtype == mindspore.bfloat16:
        return tensor.astype(mindspore.float32).asnumpy().astype(tolerance.BFLOAT16)
    return tensor.asnumpy()


def same(actual, expected):
    """Bit for bit, and of one dtype."""
    actual = array(actual)
    return actual.dtype == expected.dtype and actual.tobytes() == expected.tobytes()


def pooling(problem):
    """A function of features, boxes and image index."""
    size, options = problem.size, problem.options

    def pool(features, boxes, index):
        return roialign.roi_align(features, (boxes, index), size, **options)

    return pool


def arguments(problem):
    return tensor(problem.features), tensor(problem.boxes), tensor(problem.index)


@pytest.fixture
def problem(make_problem):
    """In float64, away from kinks: for derivatives."""
    return make_problem(dtype=np.float64, shape=(2, 3, 9, 11), count=4, inside=True)


# Values


def test_documentation_example():
    # of mindspore.ops.ROIAlign, with one import changed
    from roialign import ROIAlign

    features = Tensor(np.array([[[[1.0, 2.0], [3.0, 4.0]]]]), mindspore.float32)
    rois = Tensor(np.array([[0, 0.2, 0.3, 0.2, 0.3]]), mindspore.float32)
    roi_align = ROIAlign(2, 2, 0.5, 2)
    output = roi_align(features, rois)
    expected = np.array([[[[1.775, 2.025], [2.275, 2.525]]]], np.float32)
    assert type(output) is Tensor and output.dtype == mindspore.float32
    np.testing.assert_allclose(output.asnumpy(), expected, rtol=2**-23, atol=0)
    theirs = mindspore.ops.ROIAlign(2, 2, 0.5, 2)(features, rois)
    np.testing.assert_allclose(output.asnumpy(), theirs.asnumpy(), rtol=2**-22, atol=0)


@pytest.mark.parametrize("dtype", tolerance.DTYPES, ids=str)
@pytest.mark.parametrize("sampling", [0, 2])
def test_oracle(mode, make_problem, convention, dtype, sampling):
    problem = make_problem(
        convention=convention, dtype=dtype, sampling=sampling, shape=(2, 19, 9, 7)
    )
    pool, (features, boxes, index) = pooling(problem), arguments(problem)
    g, shape = problem.draw_output(), problem.features.shape
    rule = problem.options

    def three(d_output, features, boxes, index):
        rois = boxes, index
        return (
            pool(features, boxes, index),
            roialign.roi_align_adjoint(d_output, rois, shape, **rule),
            roialign.roi_align_box_gradient(d_output, features, rois, **rule),
        )

    output, d_features, d_boxes = Net(three)(tensor(g), features, boxes, index)
    expected = oracle.forward(problem)
    tolerance.check(array(output), expected, tolerance.forward(problem, expected))
    expected = oracle.adjoint(problem, g)
    tolerance.check(array(d_features), expected, tolerance.adjoint(problem, g, expected))
    expected = oracle.box_gradient(problem, g)
    tolerance.check(array(d_boxes), expected, tolerance.box_gradient(problem, g, expected))
    assert same(output, roialign.roi_align(problem.features, problem.rois, problem.size, **rule))
    assert same(d_features, roialign.roi_align_adjoint(g, problem.rois, shape, **rule))
    d_rois = roialign.roi_align_box_gradient(g, problem.features, problem.rois, **rule)
    assert same(d_boxes, d_rois)


LAYOUTS = {
    "channels_last": lambda t: t.transpose(0, 2, 3, 1).contiguous().transpose(0, 3, 1, 2),
    "sliced": lambda t: ops.repeat_interleave(t, 2, 3)[..., ::2],
    "offset": lambda t: ops.cat([t[:1], t])[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(make_problem, layout):
    problem = make_problem()
    features, boxes, index = arguments(problem)
    moved = LAYOUTS[layout](features)
    strided = ops.cat([boxes, boxes], 1)[:, 2:6]  # x2, y2, x1, y1
    rolled = strided[:, 2:], strided[:, :2]
    boxes = ops.cat(rolled, 1) if layout == "offset" else ops.cat([boxes[:, :0], boxes], 1)
    assert moved.is_contiguous() == (layout == "offset")
    output = pooling(problem)(moved, boxes, index)
    assert same(output, pooling_in_numpy(problem))
    g = LAYOUTS[layout](tensor(problem.draw_output()))
    d_features = roialign.roi_align_adjoint(
        g, (boxes, index), problem.features.shape, **problem.options
    )
    expected = roialign.roi_align_adjoint(
        problem.draw_output(), problem.rois, problem.features.shape, **problem.options
    )
    assert same(d_features, expected)


def pooling_in_numpy(problem):
    return roialign.roi_align(problem.features, problem.rois, problem.size, **problem.options)


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("roi_end_mode", [0, 1])
def test_beside_their_operator(mode, roi_end_mode, number):
    random = np.random.default_rng((number, roi_end_mode))
    n, c, h, w = random.integers(1, 4), random.integers(1, 20), *random.integers(4, 24, 2)
    count, bins = random.integers(1, 12), random.integers(1, 8, 2).tolist()
    scale, samples = float(random.choice([1.0, 0.5, 0.25, 0.3])), int(random.integers(1, 4))
    start = random.uniform(-2, [w, h], (count, 2)) / scale
    boxes = np.concatenate([start, start + random.uniform(0.2, [w, h], (count, 2)) / scale], 1)
    rois = np.column_stack([random.integers(0, n, count), boxes]).astype(np.float32)
    values = random.standard_normal((n, c, h, w)).astype(np.float32)
    features, rois = Tensor(values), Tensor(rois)
    d_output = Tensor(random.standard_normal((count, c, *bins)).astype(np.float32))
    arguments = *bins, scale, samples, roi_end_mode
    ours, theirs = roialign.mindspore.ROIAlign(*arguments), mindspore.ops.ROIAlign(*arguments)

    def loss_of_ours(features, rois):
        return (ours(features, rois) * d_output).sum()

    def loss_of_theirs(features, rois):
        return (theirs(features, rois) * d_output).sum()

    atol = tolerance.PEERS[np.dtype(np.float32)][0] * np.abs(values).max()
    expected = Net(theirs)(features, rois).asnumpy()
    np.testing.assert_allclose(Net(ours)(features, rois).asnumpy(), expected, rtol=0, atol=atol)
    assert expected.any()
    d_features = mindspore.grad(Net(loss_of_ours))(features, rois).asnumpy()
    if roi_end_mode == 1:
        expected = mindspore.grad(Net(loss_of_theirs))(features, rois).asnumpy()
    else:  # theirs is that of roi_end_mode 1: the forward is linear, so differences are exact
        direction = random.standard_normal(values.shape).astype(np.float32)
        along = (ours(Tensor(direction), rois) * d_output).sum().asnumpy()
        terms = np.abs(d_features * direction).sum()
        np.testing.assert_allclose(np.vdot(d_features, direction), along, rtol=0, atol=1e-5 * terms)
        expected = oracle_adjoint(ours, values, rois, d_output)
    atol = 1e-5 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(d_features, expected, rtol=0, atol=atol)


def oracle_adjoint(layer, values, rois, d_output):
    rois, operator = rois.asnumpy(), layer.operator
    problem = oracle.Problem(
        values, rois[:, 1:], rois[:, 0].astype(int),
        (operator.pooled_height, operator.pooled_width), (operator.spatial_scale,) * 2,
        operator.sample_num, roialign.conventions["mindspore_legacy"],
    )  # fmt: skip
    return oracle.adjoint(problem, d_output.asnumpy())


BOXES_DTYPES = [mindspore.float16, mindspore.bfloat16, mindspore.float32, mindspore.float64]


@pytest.mark.parametrize("boxes_dtype", BOXES_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", BOXES_DTYPES[:3], ids=str)
def test_mixed_dtypes(mode, make_problem, dtype, boxes_dtype):
    problem = make_problem()
    features, boxes, index = arguments(problem)
    features, boxes, pool = features.astype(dtype), boxes.astype(boxes_dtype), pooling(problem)

    def loss(features, boxes):
        return pool(features, boxes, index).astype(mindspore.float32).square().sum()

    gradients = mindspore.grad(Net(loss), (0, 1))(features, boxes)
    assert [g.dtype for g in gradients] == [dtype, boxes_dtype]
    output = Net(pool)(features, boxes, index)
    assert output.dtype == dtype
    assert same(output, array(Net(pool)(features, boxes.astype(mindspore.float32), index)))


# The forms of rois


@pytest.mark.parametrize(
    "index_dtype", [mindspore.uint8, mindspore.int32, mindspore.int64], ids=str
)
def test_forms_of_rois(mode, make_problem, index_dtype):
    problem = make_problem(count=6)
    index = np.sort(problem.index)
    split = int(np.sum(index == 0))
    features, boxes = tensor(problem.features), tensor(problem.boxes)
    g = tensor(problem.draw_output())
    rule = problem.options
    pair_index = tensor(index).astype(index_dtype)
    column = tensor(index[:, None].astype(np.float32))

    def pair(boxes):
        return boxes, pair_index

    def whole(boxes):
        return ops.cat([column, boxes], 1)

    def per_image(boxes):
        return [boxes[:split], boxes[split:]]

    def results(form):
        def three(features, boxes):
            output = roialign.roi_align(features, form(boxes), (3, 2), **rule)
            d_features = roialign.roi_align_adjoint(g, form(boxes), (2, 5, 9, 11), **rule)
            d_rois = roialign.roi_align_box_gradient(g, features, form(boxes), **rule)
            return output, d_features, d_rois

        def loss(features, boxes):
            return (roialign.roi_align(features, form(boxes), (3, 2), **rule) * g).sum()

        output, d_features, d_rois = Net(three)(features, boxes)
        if isinstance(d_rois, (list, tuple)):
            assert [len(d) for d in d_rois] == [split, len(index) - split]
            d_rois = ops.cat(d_rois)
        elif form is whole:
            assert d_rois.shape == (6, 5) and not d_rois.asnumpy()[:, 0].any()
        gradients = mindspore.grad(Net(loss), (0, 1))(features, boxes)
        return [array(t) for t in (output, d_features, d_rois[:, -4:], *gradients)]

    expected = results(pair)
    assert np.array_equal(expected[1], expected[3]) and np.array_equal(expected[2], expected[4])
    assert all(e.any() for e in expected)
    for form in (whole, per_image):
        for actual, wanted in zip(results(form), expected, strict=True):
            assert np.array_equal(actual, wanted)


def test_lists_of_mixed_dtypes_and_of_none():
    features = Tensor(np.random.default_rng(0).random((2, 3, 8, 9), np.float32))
    boxes = Tensor(np.array([[1, 1, 6.5, 5]], np.float32))
    mixed = roialign.roi_align(features, [boxes, boxes.astype(mindspore.float16)], 2)
    assert same(mixed, roialign.roi_align(features, [boxes, boxes], 2).asnumpy())
    some = roialign.roi_align(features, [boxes[:0], boxes], 2)
    assert same(some, mixed.asnumpy()[1:])
    assert roialign.roi_align(features[:0], [], 2).shape == (0, 3, 2, 2)


@pytest.mark.parametrize("counts", [(0, 2), (0, 0)])
def test_lists_of_images_without_boxes(mode, counts):
    random = np.random.default_rng(0)
    features = random.random((2, 3, 8, 9), np.float32)
    boxes = np.array([[1, 1, 6.5, 5], [0, 2, 7, 6]], np.float32)
    first, second = boxes[: counts[0]], boxes[: counts[1]]
    d_output = random.random((sum(counts), 3, 2, 2), np.float32)

    def box_gradient(d_output, features, first, second):
        return roialign.roi_align_box_gradient(d_output, features, [first, second])

    given = d_output, features, first, second
    results = Net(box_gradient)(*map(Tensor, given))
    for actual, expected in zip(results, box_gradient(*given), strict=True):
        assert actual.shape == expected.shape and same(actual, expected)


@pytest.mark.parametrize("dtype", roialign.mindspore._INTEGERS, ids=str)
def test_integer_boxes(mode, dtype):
    features = Tensor(np.random.default_rng(0).random((1, 3, 8, 9), np.float32))
    rois = Tensor(np.array([[0, 1, 1, 6, 5]], np.float32))

    def both(features, rois):
        output = roialign.roi_align(features, rois, 2)
        return output, roialign.roi_align_box_gradient(output, features, rois)

    whole, expected = Net(both)(features, rois.astype(dtype)), Net(both)(features, rois)
    for actual, wanted in zip(whole, expected, strict=True):
        assert same(actual, wanted.asnumpy())


def test_no_rois(mode):
    features = Tensor(np.ones((2, 3, 4, 5), np.float32))
    boxes = Tensor(np.zeros((0, 4), np.float32))
    index = Tensor(np.zeros(0, np.int64))

    def loss(features):
        return roialign.roi_align(features, (boxes, index), 2).sum()

    assert not mindspore.grad(Net(loss))(features).asnumpy().any()

    def pool(features):
        return roialign.roi_align(features, (boxes, index), 2)

    assert Net(pool)(features).shape == (0, 3, 2, 2)


# Errors

FEATURES = Tensor(np.zeros((2, 3, 8, 9), np.float32))
ROIS = Tensor(np.array([[0, 1, 1, 6, 5], [1, 0, 2, 7, 6]], np.float32))
ERRORS = [
    ({"features": FEATURES.astype(mindspore.int32)}, TypeError, "`features` .*Int32"),
    ({"rois": ROIS.asnumpy()}, TypeError, "`rois` .*numpy.ndarray"),
    ({"rois": ROIS.astype(mindspore.bool_)}, TypeError, "`rois` .*Bool"),
    ({"rois": (ROIS[:, 1:], ROIS[:, 0])}, TypeError, "`image_index` .*Float32"),
    ({"output_size": 2.0}, TypeError, "`output_size` .*float"),
    ({"out": FEATURES}, TypeError, "`out` must be None"),
    ({"spatial_scale": "1"}, TypeError, "`spatial_scale` .*str"),
    ({"convention": 3}, TypeError, "`convention` .*int"),
    ({"convention": "half"}, ValueError, "`convention` 'half' is unknown"),
    ({"reduction": "max"}, ValueError, "`reduction` .*'max'"),
    ({"features": FEATURES[0]}, ValueError, r"`features` .*\(3, 8, 9\)"),
    ({"features": FEATURES[:, :, :0]}, ValueError, r"`features` .*\(2, 3, 0, 9\)"),
    ({"rois": ROIS[:, :4]}, ValueError, r"`rois` .*\(2, 4\)"),
    ({"rois": [ROIS[:, 1:]]}, ValueError, "`rois` .*got 1"),
    ({"output_size": (0, 2)}, ValueError, "`output_size` .*got 0"),
    ({"spatial_scale": -1.0}, ValueError, "`spatial_scale` .*-1"),
    ({"sampling_ratio": 4097}, ValueError, "`sampling_ratio` .*4096, got 4097"),
]


@pytest.mark.parametrize("changed, error, message", ERRORS, ids=[e[2] for e in ERRORS])
def test_errors(mode, changed, error, message):
    given = {"features": FEATURES, "rois": ROIS, "output_size": 2} | changed
    rois, rest = given.pop("rois"), {k: v for k, v in given.items() if k != "features"}

    def pool(features):
        return roialign.roi_align(features, rois, **rest)

    with pytest.raises(error, match=message):
        Net(pool)(given["features"])


D_OUTPUT = Tensor(np.zeros((2, 3, 2, 2), np.float32))
ADJOINT_ERRORS = [
    ({"feature_shape": 3}, TypeError, "`feature_shape` .*int"),
    ({"features": FEATURES.astype(mindspore.float16)}, TypeError, "`features` .*Float16"),
    ({"out": FEATURES}, TypeError, "`out` must be None"),
    ({"feature_shape": (2, 3, 8)}, ValueError, r"`feature_shape` .*\(2, 3, 8\)"),
    ({"feature_shape": (2, 4, 8, 9)}, ValueError, r"`d_output` .*\(2, 4, P, Q\)"),
    ({"features": FEATURES[:1]}, ValueError, r"`features` .*\(2, 3, 8, 9\).*\(1, 3, 8, 9\)"),
]


@pytest.mark.parametrize(
    "changed, error, message", ADJOINT_ERRORS, ids=[e[2] for e in ADJOINT_ERRORS]
)
def test_errors_of_the_adjoint(mode, changed, error, message):
    given = {"feature_shape": (2, 3, 8, 9)} | changed

    def adjoint(d_output, rois):
        return roialign.roi_align_adjoint(d_output, rois, **given)

    with pytest.raises(error, match=message):
        Net(adjoint)(D_OUTPUT, ROIS)


BOX_GRADIENT_ERRORS = [
    ({"d_output": D_OUTPUT.astype(mindspore.float64)}, TypeError, "`d_output` .*Float64"),
    ({"rois": ROIS.astype(mindspore.complex64)}, TypeError, "`rois` .*Complex64"),
    ({"out": ROIS}, TypeError, "`out` must be None"),
    ({"features": FEATURES[0]}, ValueError, r"`features` .*\(3, 8, 9\)"),
    ({"d_output": D_OUTPUT[:1]}, ValueError, r"`d_output` .*\(2, 3, P, Q\).*\(1, 3, 2, 2\)"),
]


@pytest.mark.parametrize(
    "changed, error, message", BOX_GRADIENT_ERRORS, ids=[e[2] for e in BOX_GRADIENT_ERRORS]
)
def test_errors_of_the_box_gradient(mode, changed, error, message):
    given = {"d_output": D_OUTPUT, "features": FEATURES, "rois": ROIS, "out": None} | changed
    out = given.pop("out")

    def box_gradient(d_output, features, rois):
        return roialign.roi_align_box_gradient(d_output, features, rois, out=out)

    with pytest.raises(error, match=message):
        Net(box_gradient)(*given.values())


@pytest.mark.parametrize("index", [2, -1, 0.5, np.nan, np.inf])
def test_image_index(index):
    """PyNative mode raises; in a graph, where nothing is read, row and gradients are 0."""
    random = np.random.default_rng(0)
    values, rois = random.random((2, 3, 8, 9), np.float32), ROIS.asnumpy().copy()
    features, good = Tensor(values), Tensor(rois)
    rois[1, 0] = index
    bad = Tensor(rois)
    pool = roialign.ROIAlign(2, 2, 0.5)
    d_output = Tensor(random.random((2, 3, 2, 2), np.float32))
    for call in (
        lambda: pool(features, bad),
        lambda: roialign.roi_align_adjoint(d_output, bad, features.shape),
        lambda: roialign.roi_align_box_gradient(d_output, features, bad),
    ):
        with pytest.raises(IndexError, match=rf"RoI 1 .*\[0, 2\), got {index}"):
            call()

    def loss(features, rois):
        return (pool(features, rois) * d_output).sum()

    gradients = mindspore.grad(loss, (0, 1))

    @mindspore.jit
    def all_of(features, rois):
        return pool(features, rois), gradients(features, rois)

    output, (d_features, d_rois) = all_of(features, bad)
    expected, (_, expected_d_rois) = all_of(features, good)
    assert np.array_equal(output.asnumpy()[0], expected.asnumpy()[0]) and expected.asnumpy().all()
    assert not output.asnumpy()[1].any() and not d_rois.asnumpy()[1].any()
    assert np.array_equal(d_rois.asnumpy()[0], expected_d_rois.asnumpy()[0])
    assert d_features.asnumpy()[0].any() and not d_features.asnumpy()[1].any()


@pytest.mark.parametrize("dtype", [mindspore.int64, mindspore.uint64, mindspore.bfloat16], ids=str)
def test_image_index_is_read_in_its_own_dtype(dtype):
    if dtype == mindspore.bfloat16:
        rois = (ROIS + Tensor(np.array([[0], [7]], np.float32))).astype(dtype)
        with pytest.raises(IndexError, match="RoI 1 .*got 8"):
            roialign.roi_align(FEATURES, rois, 2)
        return
    index = Tensor(np.array([0, 2**63 - 1], np.int64)).astype(dtype)
    with pytest.raises(IndexError, match=f"RoI 1 .*got {2**63 - 1}"):
        roialign.roi_align(FEATURES, (ROIS[:, 1:], index), 2)


@pytest.mark.parametrize("target", ["Ascend", "GPU"])
def test_other_targets(monkeypatch, target):
    """The device target is all that the adapter looks at; nothing of theirs was run here."""
    monkeypatch.setattr(mindspore, "get_context", lambda name: {"device_target": target}[name])

    def pool(features, rois):
        return roialign.roi_align(features, rois, 2)

    for call in (pool, mindspore.jit(pool), roialign.mindspore.ROIAlign(2, 2, 1.0)):
        with pytest.raises(NotImplementedError, match=f"{target}: use mindspore.ops.ROIAlign"):
            call(FEATURES, ROIS)


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("name", ["mindspore", "mindspore_legacy", "half_pixel"])
def test_bad_and_extreme_boxes(mode, name, ratio):
    """The rule's zeros and finite numbers, as NumPy's; no crash."""
    features = np.random.default_rng(1).standard_normal((1, 5, 7, 8)).astype(np.float32)
    boxes = [[np.nan, 0, 3, 3], [0, 0, np.inf, 3], [-1e9, -1e9, 1e9, 1e9], [5, 5, 1, 1],
             [2, 2, 2, 2], [500, 500, 600, 600], [-1e38, 0, 1e38, 3],
             [0.0005, 0, 0.0002, 3]]  # fmt: skip
    rois = np.array([[0, *box] for box in boxes], np.float32)
    options = {"sampling_ratio": ratio, "convention": name}

    def pool(features, rois):
        return roialign.roi_align(features, rois, 2, **options)

    output = Net(pool)(Tensor(features), Tensor(rois))
    expected = pool(features, rois)
    assert same(output, expected) and np.isfinite(expected).all()


# Derivatives


def differences(function, x, step=1e-6):
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[i] += sign * step
            ends.append(function(moved))
        out[i] = (ends[0] - ends[1]) / (2 * step)
    return out


def test_gradients(mode, problem):
    """By value and by differences, in features and boxes; and the value beside them."""
    pool, (features, boxes, index) = pooling(problem), arguments(problem)
    g = problem.draw_output()
    d_output = tensor(g)

    def loss(features, boxes):
        return (pool(features, boxes, index) * d_output).sum()

    value, gradients = mindspore.value_and_grad(Net(loss), (0, 1))(features, boxes)
    rule, rois = problem.options, problem.rois
    assert same(gradients[0], roialign.roi_align_adjoint(g, rois, features.shape, **rule))
    assert same(gradients[1], roialign.roi_align_box_gradient(g, problem.features, rois, **rule))
    for only in (0, 1):
        assert same(mindspore.grad(Net(loss), only)(features, boxes), gradients[only].asnumpy())

    def in_numpy(features, boxes):
        return np.vdot(roialign.roi_align(features, (boxes, rois[1]), problem.size, **rule), g)

    np.testing.assert_allclose(value.asnumpy(), in_numpy(problem.features, rois[0]), rtol=1e-12)
    by_features = differences(lambda f: in_numpy(f, rois[0]), problem.features)
    by_boxes = differences(lambda b: in_numpy(problem.features, b), problem.boxes)
    np.testing.assert_allclose(gradients[0].asnumpy(), by_features, rtol=0, atol=1e-7)
    np.testing.assert_allclose(gradients[1].asnumpy(), by_boxes, rtol=0, atol=1e-7)


def test_no_box_gradient_where_it_is_stopped(problem, monkeypatch):
    """PyNative mode: it is not computed at all (MindSpore wants those of all arguments)."""
    called = []
    call = roialign.mindspore._call

    def recorded(name, *inputs):
        called.append(name)
        return call(name, *inputs)

    monkeypatch.setattr(roialign.mindspore, "_call", recorded)
    pool, index = pooling(problem), tensor(problem.index)

    def loss(features, boxes):
        return pool(features, ops.stop_gradient(boxes), index).sum()

    gradients = mindspore.grad(loss, (0, 1))(*arguments(problem)[:2])
    assert called == ["forward", "adjoint"]
    assert gradients[0].asnumpy().any() and not gradients[1].asnumpy().any()


class SumOfGradient(nn.Cell):
    """The weighted sum of a gradient, to be differentiated again."""

    def __init__(self, loss, position, weight):
        super().__init__()
        self.gradient = mindspore.grad(loss, position)
        self.weight = weight

    def construct(self, *inputs):
        return (self.gradient(*inputs) * self.weight).sum()


def square_loss(problem):
    pool, index = pooling(problem), tensor(problem.index)

    def loss(features, boxes):
        return pool(features, boxes, index).square().sum()

    return Net(loss)


def gradients_in_numpy(problem, features, boxes):
    rule, rois = problem.options, (boxes, problem.index)
    d_output = 2 * roialign.roi_align(features, rois, problem.size, **rule)
    return (
        roialign.roi_align_adjoint(d_output, rois, features.shape, **rule),
        roialign.roi_align_box_gradient(d_output, features, rois, **rule),
    )


def test_second_order(mode, problem):
    """Of the features' gradient, in features and in boxes."""
    features, boxes = tensor(problem.features), tensor(problem.boxes)
    weight = np.random.default_rng(5).standard_normal(problem.features.shape)
    second = SumOfGradient(square_loss(problem), 0, Tensor(weight))
    in_features, in_boxes = mindspore.grad(second, (0, 1))(features, boxes)

    def first(features, boxes):
        return np.vdot(gradients_in_numpy(problem, features, boxes)[0], weight)

    by_features = differences(lambda f: first(f, problem.boxes), problem.features)
    by_boxes = differences(lambda b: first(problem.features, b), problem.boxes)
    np.testing.assert_allclose(in_features.asnumpy(), by_features, rtol=0, atol=1e-7)
    np.testing.assert_allclose(in_boxes.asnumpy(), by_boxes, rtol=0, atol=1e-7)


def test_mixed_second_order_in_a_graph(problem):
    """Of the boxes' gradient, in the features."""
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    try:
        weight = np.random.default_rng(6).standard_normal(problem.boxes.shape)
        second = SumOfGradient(square_loss(problem), 1, Tensor(weight))
        actual = mindspore.grad(second)(tensor(problem.features), tensor(problem.boxes))
    finally:
        mindspore.set_context(mode=mindspore.PYNATIVE_MODE)

    def first(features):
        return np.vdot(gradients_in_numpy(problem, features, problem.boxes)[1], weight)

    expected = differences(first, problem.features)
    np.testing.assert_allclose(actual.asnumpy(), expected, rtol=0, atol=1e-7)


def test_second_order_in_boxes_raises(mode, problem):
    weight = Tensor(np.ones(problem.boxes.shape))
    second = SumOfGradient(square_loss(problem), 1, weight)
    with pytest.raises(RuntimeError, match="no.second.derivative.in.the.boxes"):
        mindspore.grad(second, 1)(tensor(problem.features), tensor(problem.boxes)).asnumpy()


def test_the_adjoint_and_the_box_gradient_are_differentiable(mode, problem):
    index, g, shape = tensor(problem.index), problem.draw_output(), problem.features.shape
    rule = problem.options
    weight = np.random.default_rng(7).standard_normal(shape)
    box_weight = np.random.default_rng(8).standard_normal(problem.boxes.shape)
    on_features, on_boxes = Tensor(weight), Tensor(box_weight)
    boxes, held = tensor(problem.boxes), tensor(problem.boxes)

    def of_adjoint(g, boxes):
        return (roialign.roi_align_adjoint(g, (boxes, index), shape, **rule) * on_features).sum()

    def of_box_gradient(g, features):
        d_boxes = roialign.roi_align_box_gradient(g, features, (held, index), **rule)
        return (d_boxes * on_boxes).sum()

    rois = problem.rois
    dd_output, d_boxes = mindspore.grad(Net(of_adjoint), (0, 1))(tensor(g), boxes)
    assert same(dd_output, roialign.roi_align(weight, rois, problem.size, **rule))
    assert same(d_boxes, roialign.roi_align_box_gradient(g, weight, rois, **rule))
    along, d_features = mindspore.grad(Net(of_box_gradient), (0, 1))(
        tensor(g), tensor(problem.features)
    )
    expected = oracle.forward(problem, box_weight)
    bound = tolerance.forward(problem, expected, box_weight)
    tolerance.check(along.asnumpy(), expected, bound)
    expected = oracle.adjoint(problem, g, box_weight)
    bound = tolerance.adjoint(problem, g, expected, box_weight)
    tolerance.check(d_features.asnumpy(), expected, bound)


def test_jvp(mode, problem):
    pool, (features, boxes, index) = pooling(problem), arguments(problem)
    v = np.random.default_rng(9).standard_normal(problem.boxes.shape)

    def along_boxes(boxes):
        return pool(features, boxes, index)

    _, tangent = mindspore.jvp(along_boxes, boxes, Tensor(v))
    expected = oracle.forward(problem, v)
    tolerance.check(tangent.asnumpy(), expected, tolerance.forward(problem, expected, v))


def test_vmap(mode, problem):
    """Over features, of a pair: in each mode."""
    pool, (features, boxes, index) = pooling(problem), arguments(problem)
    two = Tensor(np.stack([problem.features, 2 * problem.features]))

    def over_features(features):
        return pool(features, boxes, index)

    output = mindspore.vmap(over_features)(two).asnumpy()
    expected = pool(features, boxes, index).asnumpy()
    assert (output[0] == expected).all() and (output[1] == 2 * expected).all()


# Graph mode's own


@pytest.mark.parametrize("capture_mode", ["ast", "bytecode"])
def test_jit(problem, capture_mode):
    pool, (features, boxes, index) = pooling(problem), arguments(problem)
    jitted = mindspore.jit(pool, capture_mode=capture_mode)
    assert same(jitted(features, boxes, index), pooling_in_numpy(problem))

    def loss(features):
        return jitted(features, boxes, index).sum()

    ones = np.ones(problem.output_shape)
    expected = roialign.roi_align_adjoint(
        ones, problem.rois, problem.features.shape, **problem.options
    )
    assert same(mindspore.grad(loss)(features), expected)


def test_calls_of_one_graph_are_kept_apart(mode):
    """Calls with equal inputs, and other bins, samples or conventions."""
    random = np.random.default_rng(0)
    features, rois = random.random((2, 3, 8, 9), np.float32), ROIS.asnumpy()

    def calls(features, rois):
        return (
            roialign.roi_align(features, rois, 2),
            roialign.roi_align(features, rois, 4),
            roialign.roi_align(features, rois, (1, 16)),
            roialign.roi_align(features, rois, 2, sampling_ratio=3),
            roialign.roi_align(features, rois, 2, convention="asymmetric"),
            roialign.roi_align_adjoint(features[:, :, :2, :2], rois, (2, 3, 8, 9)),
            roialign.roi_align_adjoint(features[:, :, :2, :2], rois, (2, 3, 9, 8)),
        )

    for _ in range(2):
        expected = calls(features, rois)
        for actual, wanted in zip(
            Net(calls)(Tensor(features), Tensor(rois)), expected, strict=True
        ):
            assert same(actual, wanted)


def test_a_fresh_process_compiles_it():
    """The adapter is loaded by the compiler, and MindSpore by nothing before."""
    code = """
import sys, roialign
assert "mindspore" not in sys.modules
import numpy as np, mindspore
from mindspore import Tensor, nn
class Head(nn.Cell):
    def __init__(self):
        super().__init__()
        self.pool = roialign.ROIAlign(2, 2, 0.5)
    def construct(self, features, rois):
        return self.pool(features, rois).sum()
mindspore.set_context(mode=mindspore.GRAPH_MODE)
assert "roialign.mindspore" not in sys.modules
inputs = np.ones((1, 1, 8, 8), np.float32), np.array([[0, 2, 2, 9, 9]], np.float32)
gradient = mindspore.grad(Head())(*map(Tensor, inputs)).asnumpy()
assert abs(gradient.sum() - 4) < 1e-5, gradient
"""
    # the compiler reads the source of a file
    done = subprocess.run(
        [sys.executable, "-c", f"import runpy, tempfile, pathlib\ncode = {code!r}\n"
         "with tempfile.TemporaryDirectory() as folder:\n"
         "    path = pathlib.Path(folder) / 'head.py'\n"
         "    path.write_text(code)\n"
         "    runpy.run_path(str(path), run_name='__main__')\n"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_threads(make_problem):
    problem = make_problem(shape=(1, 64, 40, 40), count=40)
    before, expected = roialign.get_num_threads(), None
    try:
        for threads in (1, 2, 3):
            roialign.set_num_threads(threads)
            output = pooling(problem)(*arguments(problem)).asnumpy()
            expected = output if expected is None else expected
            assert np.array_equal(output, expected)
    finally:
        roialign.set_num_threads(before)


# The layer


def test_layer():
    layer = roialign.mindspore.ROIAlign(2, 3, 0.5, -1, 0)
    assert isinstance(layer, nn.Cell) and not layer.trainable_params()
    shown = "pooled_height=2, pooled_width=3, spatial_scale=0.5, sample_num=-1, roi_end_mode=0"
    assert shown in repr(layer)
    with pytest.raises(TypeError, match="`features` must be a mindspore.Tensor, got numpy.ndarray"):
        layer(FEATURES.asnumpy(), ROIS.asnumpy())
    with pytest.raises(TypeError, match="`pooled_height`"):
        roialign.mindspore.ROIAlign(2.0, 2, 0.5)
    with pytest.raises(ValueError, match="`roi_end_mode`"):
        roialign.mindspore.ROIAlign(2, 2, 0.5, 2, 2)


def test_layer_in_a_model(mode):
    class Model(nn.Cell):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.pool = roialign.mindspore.ROIAlign(2, 2, 1.0)

        def construct(self, features, rois):
            return self.pool(self.conv(features), rois).sum()

    model = Model()
    weights = model.trainable_params()
    value, gradients = mindspore.value_and_grad(model, None, weights)(FEATURES + 1, ROIS)
    assert np.isfinite(value.asnumpy()) and all(g.asnumpy().any() for g in gradients)


@pytest.mark.parametrize("graph", [False, True])
def test_example_learns_the_same(monkeypatch, graph):
    """With theirs and ours: equal but for rounding, which a few steps do not amplify."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    from mindspore_training import train

    try:
        ours, theirs = (train(theirs, graph, steps=8) for theirs in (False, True))
    finally:
        mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert np.mean(ours[-2:]) < np.mean(ours[:2])


def test_mindspore_is_not_imported():
    code = (
        "import sys, roialign; assert 'mindspore' not in sys.modules; "
        "roialign.mindspore; assert 'mindspore' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
