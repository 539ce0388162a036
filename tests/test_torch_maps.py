"""What PyTorch alone does with several maps: exports, operators, and the calls that vmap makes."""

import io

import numpy as np
import pytest

import roialign
from roialign import _core, _rule
from roialign._rois import Rois

torch = pytest.importorskip("torch", reason="the PyTorch adapter's tests need torch")
from roialign import torch as in_torch  # noqa: E402
from roialign.torch import kernels  # noqa: E402
from test_torch import tensor  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated:FutureWarning")  # torch's

SIZES = ((9, 11), (5, 7))
SCALES = (0.5, 0.4, 0.25, 0.2)
BINS = (3, 2)


@pytest.fixture
def given(make_problem):
    """Float64 tensors: maps, RoIs on them and on none, d_output; the rule; `pool(maps, boxes)`."""
    problem, coarse = (
        make_problem(m, shape=(2, 3, *size), dtype=np.float64, count=5, size=BINS, inside=True)
        for m, size in enumerate(SIZES)
    )
    maps = tensor(problem.features), tensor(coarse.features)
    rois = Rois(*map(tensor, (*problem.rois, np.array([0, 1, -1, 1, 0]))))
    rule = _rule.vector(roialign.conventions["half_pixel"], 2)

    def pool(maps, boxes=rois.boxes):
        return in_torch.forward(maps, rois._replace(boxes=boxes), BINS, SCALES, rule)

    return maps, rois, tensor(problem.draw_output()), rule, pool


def test_vmap_of_operators(given):
    maps, rois, d_output, rule, _ = given
    operators, rest = torch.ops.roialign, (SCALES, rule)
    shapes = [n for m in maps for n in m.shape]

    def calls(fine, coarse, boxes, d_output):
        own = boxes, *rois[1:]
        yield operators.forward.maps([fine, coarse], *own, None, BINS, *rest)
        yield from operators.adjoint.maps(d_output, *own, None, shapes, *rest)
        yield operators.box_gradient.maps(d_output, [fine, coarse], *own, *rest)

    leaves = *maps, rois.boxes, d_output
    for which in ((0,), (1, 3), (2,), (0, 1, 2, 3)):
        batch = [torch.stack([t, 0.9 * t], 1) if i in which else t for i, t in enumerate(leaves)]
        dims = tuple([1 if i in which else None for i in range(4)])
        results = torch.func.vmap(lambda *t: tuple(calls(*t)), dims)(*batch)
        for i in range(2):
            one = [t if d is None else t.select(d, i) for t, d in zip(batch, dims, strict=True)]
            for actual, expected in zip(results, calls(*one), strict=True):
                torch.testing.assert_close(actual[i], expected, rtol=0, atol=1e-12)


class Pool(torch.nn.Module):
    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def forward(self, fine, coarse, boxes, index, levels):
        rois = Rois(boxes, index, levels)
        return in_torch.forward((fine * 2, coarse), rois, BINS, SCALES, self.rule)


def test_exported(given, tmp_path):
    maps, rois, _, rule, _ = given
    pool, inputs = Pool(rule), (*maps, *rois)
    count = torch.export.Dim("count", min=2, max=64)
    program = torch.export.export(pool, inputs, dynamic_shapes=({}, {}, *[{0: count}] * 3))
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    more = *maps, *[t.repeat(3, *[1] * (t.dim() - 1)) for t in rois]
    assert torch.equal(torch.export.load(stored).module()(*more), pool(*more))
    program = torch.export.export(pool, inputs)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "p.pt2"))
    assert torch.equal(torch._inductor.aoti_load_package(path)(*inputs), pool(*inputs))


def test_onnx_has_one_map(given):
    pytest.importorskip("onnxscript", reason="export to ONNX needs onnxscript")
    maps, rois, _, rule, _ = given
    with pytest.raises(torch.onnx.OnnxExporterError) as error:
        torch.onnx.export(Pool(rule).eval(), (*maps, *rois), dynamo=True, verbose=False)
    assert type(error.value.__cause__) is NotImplementedError
    assert "one map, got 2" in str(error.value.__cause__)


# What calls are made


@pytest.fixture
def made(monkeypatch):
    """Operation, N, C and K of the calls of the core."""
    calls = []

    class Core:
        def __getattr__(self, name):
            if name not in ("forward", "adjoint", "box_gradient"):
                return getattr(_core, name)

            def operation(*args):
                maps = args[0] if name == "forward" else args[-2]
                boxes, _ = args[2]
                calls.append((name, *maps[0].shape[:2], len(boxes)))
                return getattr(_core, name)(*args)

            return operation

    monkeypatch.setattr(kernels, "_core", Core())
    return calls


def test_a_batch_of_features_is_more_channels(given, made):
    """So taps are built once."""
    maps, rois, d_output, rule, pool = given
    torch.func.vmap(pool)(tuple([torch.stack([m] * 4) for m in maps]))
    torch.func.vmap(lambda m: pool((maps[0], m)))(torch.stack([maps[1]] * 4))
    torch.func.vmap(lambda g: in_torch.adjoint(g, rois, [m.shape for m in maps], SCALES, rule))(
        torch.stack([d_output] * 4)
    )
    assert made == [("forward", 2, 12, 5)] * 2 + [("adjoint", 2, 12, 5)]


def test_a_batch_of_boxes_is_more_rois(given, made):
    """On the images that there are; on more where features differ too."""
    maps, rois, _, _, pool = given
    boxes = torch.stack([rois.boxes] * 4)
    torch.func.vmap(lambda b: pool(maps, b))(boxes)
    torch.func.vmap(pool)(tuple([torch.stack([m] * 4) for m in maps]), boxes)
    assert made == [("forward", 2, 3, 20), ("forward", 8, 3, 20)]
