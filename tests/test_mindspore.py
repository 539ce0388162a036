"""MindSpore: NumPy's numbers in PyNative and Graph mode, and its own operator beside ours."""

from pathlib import Path

import numpy as np
import pytest

import roialign

mindspore = pytest.importorskip("mindspore", reason="the MindSpore adapter's tests need mindspore")
from mindspore import Tensor, nn, ops  # noqa: E402

import roialign.mindspore  # noqa: E402
from backends import named, pooling  # noqa: E402

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


MINDSPORE = named("mindspore")
MINDSPORE.load()
Net, tensor, array = MINDSPORE.way, MINDSPORE.array, MINDSPORE.numpy


def same(actual, expected):
    """Bit for bit, and of one dtype."""
    actual = array(actual)
    return actual.dtype == expected.dtype and actual.tobytes() == expected.tobytes()


def arguments(problem):
    return tensor(problem.features), tensor(problem.boxes), tensor(problem.index)


# Values


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


# Errors

FEATURES = Tensor(np.zeros((2, 3, 8, 9), np.float32))
ROIS = Tensor(np.array([[0, 1, 1, 6, 5], [1, 0, 2, 7, 6]], np.float32))


@pytest.mark.parametrize("target", ["Ascend", "GPU"])
def test_other_targets(monkeypatch, target):
    """The device target is all that the adapter looks at; nothing of theirs was run here."""
    monkeypatch.setattr(mindspore, "get_context", lambda name: {"device_target": target}[name])

    def pool(features, rois):
        return roialign.roi_align(features, rois, 2)

    for call in (pool, mindspore.jit(pool), roialign.mindspore.ROIAlign(2, 2, 1.0)):
        with pytest.raises(NotImplementedError, match=f"{target}: use mindspore.ops.ROIAlign"):
            call(FEATURES, ROIS)


# Derivatives


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


# Graph mode's own


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


def test_a_graph_takes_no_dicts_of_maps():
    def pool(features, rois):
        return roialign.multiscale_roi_align({"p2": features}, rois, 2, spatial_scales=[1.0])

    assert pool(FEATURES, ROIS).shape == (2, 3, 2, 2)
    with pytest.raises(TypeError, match="tuple or list in MindSpore's Graph mode"):
        mindspore.jit(pool)(FEATURES, ROIS)


def test_other_targets_are_refused(monkeypatch):
    monkeypatch.setattr(roialign.mindspore, "_target", lambda: "Ascend")
    with pytest.raises(NotImplementedError, match="CPU target, got Ascend: use mindspore.ops.ROI"):
        roialign.roi_align(FEATURES, ROIS, 2)


# The layer


def test_layer():
    layer = roialign.mindspore.ROIAlign(2, 3, 0.5, -1, 0)
    assert isinstance(layer, nn.Cell) and not layer.trainable_params()


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
