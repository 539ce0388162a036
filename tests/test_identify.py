"""`identify` names the rule of a RoIAlign: ours, recorded ones, and other libraries' own."""

import functools
import json
import re
from importlib.util import find_spec

import numpy as np
import pytest

import roialign
from conftest import CONVENTIONS, golden_cases
from isolation import isolated, python

SEPARATING = "typical_sr2", "typical_adaptive"  # that suffice to tell rules apart
MAP = np.ones((1, 1, 2, 2))


def call(features, rois, order="xyxy", **options):
    """Ours, of boxes in another order."""
    columns = {"xyxy": [0, 1, 2, 3, 4], "yxyx": [0, 2, 1, 4, 3]}
    if order == "xywh":
        rois = np.concatenate([rois[:, :3], rois[:, 1:3] + rois[:, 3:]], 1)
    else:
        rois = rois[:, columns[order]]
    return roialign.roi_align(features, rois, **{"output_size": (3, 2)} | options)


def rules(found, boxes="xyxy"):
    """(numbers of the convention, sampling, reduction, scale) of each match."""
    numbers = roialign.conventions
    return {
        (numbers.get(m.convention, m.convention), m.sampling_ratio, m.reduction, m.spatial_scale)
        for m in found.matches
        if m.boxes == boxes
    }


@pytest.mark.parametrize(
    "name, sampling, reduction",
    [(name, sampling, "mean") for name in CONVENTIONS for sampling in (0, 3)]
    + [
        ("half_pixel", sampling, largest)
        for sampling in (0, 2)
        for largest in ("max", "max_corner")
    ],
)
def test_our_own(name, sampling, reduction):
    options = {"convention": name, "sampling_ratio": sampling, "reduction": reduction}
    function = functools.partial(call, spatial_scale=0.25, **options)
    found = roialign.identify(function, spatial_scale=0.25)
    same = [name]
    if sampling and name in ("asymmetric", "mindspore_legacy"):  # they differ in adaptive grids
        same = ["asymmetric", "mindspore_legacy"]
    first = found.matches[0]
    assert [m.convention for m in found.matches] == same
    assert (first.sampling_ratio, first.reduction) == (sampling, reduction)
    assert (first.boxes, first.spatial_scale, first.max_error) == ("xyxy", 0.25, 0)
    assert found.precision == "float32" and all(name in str(found) for name in same)
    assert found.nearest[0].max_error > 0.01


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in golden_cases()
        if c.entry["kind"] in SEPARATING and np.isfinite(c.arrays["y"]).any()
    ],
    ids=str,
)
def test_recorded(case):
    """Of one call of each library; rows that it did not write, and NaN, say nothing."""
    output = case.arrays["y"].copy()
    output[~case.arrays.get("y_valid", np.ones(len(output), bool))] = np.nan
    problem = case.problem
    scale = problem.scale[0]
    found = roialign.identify(case.features, case.rois, output, spatial_scale=scale)
    convention = roialign.conventions[case.convention]
    assert (convention, max(0, problem.sampling), case.reduction, scale) in rules(found)
    assert (found.precision == "float32") == (output.dtype != np.float16)


@pytest.mark.parametrize(
    "name, sampling, same",
    [
        ("asymmetric", 4, {("openvino_half_pixel", 4), ("mindspore_legacy", 4)}),
        ("mmdet_legacy", 4, {("mindspore", 4)}),
        ("half_pixel", 0, {("half_pixel", 2)}),
    ],
)
def test_one_call_tells_what_its_boxes_tell(name, sampling, same):
    """As docs/conventions.md says; here bins are 1.9 and 1.8 pixels long."""
    features = np.random.default_rng(0).standard_normal((1, 2, 12, 12), np.float32)
    rois = np.array([[0, 3.2, 4.1, 7, 9.5], [0, 2, 1.3, 5.8, 6.7]], np.float32)
    output = call(features, rois, convention=name, sampling_ratio=sampling)
    found = roialign.identify(features, rois, output, spatial_scale=1)
    assert {(m.convention, m.sampling_ratio) for m in found.matches} == {(name, sampling), *same}
    assert {(m.reduction, m.boxes, m.spatial_scale) for m in found.matches} == {("mean", "xyxy", 1)}


@pytest.mark.parametrize(
    "order, given", [("xyxy", 0.5), ("xyxy", 4.0), ("yxyx", 2.0), ("xywh", None)]
)
def test_order_and_scale(order, given):
    """A scale that is unknown, twice as large, inverted..."""
    found = roialign.identify(
        functools.partial(call, order=order, spatial_scale=0.25), spatial_scale=given
    )
    assert rules(found, order) == {(roialign.conventions["half_pixel"], 0, "mean", 0.25)}
    assert len(found.matches) == 1
    rois = np.array([[0, 3, 4, 20, 30]], np.float32)
    features = np.random.default_rng(0).standard_normal((1, 1, 24, 32))
    values = {"features": features, "rois": rois, "roialign": roialign, "np": np}
    written = eval(found.advice, values)
    np.testing.assert_array_equal(written, call(features, rois, order, spatial_scale=0.25))


def test_normalised_boxes():
    def function(features, rois):
        return call(features, rois, "yxyx", spatial_scale=features.shape[2:])

    found = roialign.identify(function)
    assert found.matches[0].boxes == "normalised yxyx"
    assert found.matches[0].spatial_scale == (24, 32)
    assert "normalised yxyx" in str(found)


def test_adaptive_rounding():
    rounded = roialign.Convention(pixel_offset=0.5, adaptive="floor")
    found = roialign.identify(functools.partial(call, convention=rounded), spatial_scale=1)
    assert rules(found) == {(rounded, 0, "mean", 1.0)}
    assert "half_pixel with adaptive='floor'" in str(found)


@pytest.mark.parametrize("name", ["half_pixel", "mindspore"])
def test_16_bits(name):
    def function(features, rois):
        output = call(features, rois, convention=name, sampling_ratio=2, spatial_scale=0.5)
        return output.astype(np.float16)

    found = roialign.identify(function, spatial_scale=0.5)
    assert name in {m.convention for m in found.matches}
    assert found.precision == "16 bits" and "16 bits" in str(found)


def test_no_rule_fits():
    found = roialign.identify(lambda features, rois: 1 + call(features, rois))
    assert not found.matches and not found.precision
    assert str(found).startswith("No rule fits. The nearest")
    assert len(found.nearest) == 3 and "No rule" in found.advice


def test_static_shapes_and_swapped_boxes():
    """The function sees one shape alone, and may refuse boxes whose ends are swapped."""

    def function(features, rois):
        assert features.shape == (1, 2, 16, 20) and rois.shape == (5, 5)
        if (rois[:, 1] > rois[:, 3]).any():
            raise RuntimeError("swapped")
        return call(features, rois, convention="asymmetric")

    found = roialign.identify(function, shape=(1, 2, 16, 20), count=5)
    assert [m.convention for m in found.matches] == ["asymmetric"]


@pytest.mark.parametrize(
    "error, words, arguments, options",
    [
        (TypeError, "`features` must be a numpy.ndarray", ([1],), {}),
        (ValueError, "`rois` must have shape", (MAP, np.ones((1, 4)), MAP), {}),
        (ValueError, "`output` must have shape", (MAP, np.ones((1, 5)), np.ones(1)), {}),
        (ValueError, "`output` must have a finite", (MAP, np.ones((1, 5)), MAP * np.nan), {}),
        (ValueError, "`shape` must be", (call,), {"shape": (1, 1, 8, 8)}),
        (ValueError, "`count` must be", (call,), {"count": 0}),
        (ValueError, "`spatial_scale` must be finite", (call,), {"spatial_scale": 0}),
        (ValueError, "the function's result", (lambda features, rois: np.ones(3),), {}),
        (ZeroDivisionError, "zero", (lambda features, rois: 1 // 0,), {}),
    ],
)
def test_errors(error, words, arguments, options):
    with pytest.raises(error, match=words):
        roialign.identify(*arguments, **options)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling", [-1, 2])
def test_torchvision(aligned, sampling):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    try:
        from torchvision.ops import roi_align
    except Exception as error:
        pytest.skip(f"torchvision cannot be imported: {error}")

    def function(features, rois):
        features, rois = torch.from_numpy(features), torch.from_numpy(rois)
        return roi_align(features, rois, (7, 7), 0.25, sampling, aligned).numpy()

    found = roialign.identify(function)
    convention = roialign.conventions[f"torchvision:aligned={aligned}"]
    assert (convention, max(0, sampling), "mean", 0.25) in rules(found)
    assert f"torchvision aligned={aligned}" in str(found)


def model_of(path, opset, **attributes):
    """An ONNX model with one RoiAlign, at `path`."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from onnx import TensorProto, helper

    node = helper.make_node("RoiAlign", ["x", "b", "i"], ["y"], name="pool", **attributes)
    kinds = TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64
    inputs = [
        helper.make_tensor_value_info(name, kind, [None] * rank)
        for name, kind, rank in zip("xbi", kinds, (4, 2, 1), strict=True)
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)
    graph = helper.make_graph([node], "g", inputs, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), path)


@pytest.mark.parametrize(
    "opset, mode, convention",
    [
        (10, None, "asymmetric"),
        (16, None, "half_pixel"),
        (16, "half_pixel", "half_pixel"),
        (16, "output_half_pixel", "asymmetric"),
        (22, "half_pixel", "half_pixel"),
    ],
)
@pytest.mark.parametrize("reduction", ["avg", "max"])
def test_onnx(tmp_path, opset, mode, convention, reduction):
    path = tmp_path / "model.onnx"
    given = {"coordinate_transformation_mode": mode} if mode else {}
    sizes = {"output_height": 3, "output_width": 2}
    model_of(path, opset, mode=reduction, spatial_scale=0.25, sampling_ratio=2, **sizes, **given)
    from roialign._identify_onnx import identify_nodes

    ((name, attributes, found),) = identify_nodes(path)
    assert name == "pool" and attributes["mode"] == reduction
    ours = "mean" if reduction == "avg" else "max_corner"
    assert (roialign.conventions[convention], 2, ours, 0.25) in rules(found)
    if mode is None:
        ran = python("-m", "roialign", "identify", "--onnx", path, "--json")
        (row,) = json.loads(ran.stdout)
        assert ran.returncode == 0 and row["node"] == "pool" and row["verdict"] == str(found)
        assert row["matches"][0]["convention"] == found.matches[0].convention
        ran = python("-m", "roialign", "identify", "--onnx", path)
        assert ran.returncode == 0 and str(found) in ran.stdout and found.advice in ran.stdout


def test_a_model_without_the_operator(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    path = tmp_path / "empty.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), path)
    ran = python("-m", "roialign", "identify", "--onnx", path)
    assert ran.returncode == 1 and "no RoiAlign node" in ran.stdout


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "No such file"),
        (b"", "an ONNX model"),
        (b"text", "an ONNX model"),
        ({}, "`pool|pool "),
    ],
)
def test_a_model_that_cannot_be_read_is_one_line(tmp_path, content, words):
    path = tmp_path / "model.onnx"
    model_of(path, 16, mode="none" if content == {} else "avg")
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is None:
        path.unlink()
    ran = python("-m", "roialign", "identify", "--onnx", path)
    assert ran.returncode == 1 and not ran.stdout and re.search(words, ran.stderr), ran.stderr
    assert ran.stderr.startswith("roialign identify: ") and len(ran.stderr.splitlines()) == 1


def check_openvino(mode):
    import openvino
    from openvino import opset9

    features = opset9.parameter([-1, -1, -1, -1], np.float32)
    boxes, index = opset9.parameter([-1, 4], np.float32), opset9.parameter([-1], np.int32)
    node = opset9.roi_align(features, boxes, index, 3, 2, 2, 0.25, "avg", mode)
    model = openvino.Model([node], [features, boxes, index])
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(model, "CPU", hint)

    def function(features, rois):
        return compiled([features, rois[:, 1:].copy(), rois[:, 0].astype(np.int32)])[0]

    found = roialign.identify(function)
    convention = roialign.conventions[f"openvino:{mode}"]
    assert (convention, 2, "mean", 0.25) in rules(found)


@pytest.mark.skipif(not find_spec("openvino"), reason="openvino is not installed")
@pytest.mark.parametrize("mode", ["asymmetric", "half_pixel_for_nn", "half_pixel"])
def test_openvino(mode):
    isolated(check_openvino, mode)
