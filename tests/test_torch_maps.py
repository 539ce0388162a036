"""What PyTorch alone does with several maps: exports, operators, and the calls that vmap makes."""

import io

import pytest

from roialign import _core

torch = pytest.importorskip("torch", reason="the PyTorch adapter's tests need torch")
from roialign.torch import kernels  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated:FutureWarning")  # torch's


@pytest.fixture
def given(pyramid):
    """The pyramid, and its maps, boxes, image index and levels as tensors."""
    p = pyramid()
    return p, *map(torch.from_numpy, (*p.maps, *p.rois))


class Pool(torch.nn.Module):
    def __init__(self, pyramid):
        super().__init__()
        self.pool = pyramid.forward

    def forward(self, fine, coarse, boxes, index, levels):
        return self.pool(fine * 2, coarse, boxes, index, levels)


def test_exported(given, tmp_path):
    pool, inputs = Pool(given[0]), given[1:]
    count = torch.export.Dim("count", min=2, max=64)
    program = torch.export.export(pool, inputs, dynamic_shapes=({}, {}, *[{0: count}] * 3))
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    more = *inputs[:2], *[torch.cat([t, t, t]) for t in inputs[2:]]
    assert torch.equal(torch.export.load(stored).module()(*more), pool(*more))
    program = torch.export.export(pool, inputs)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "p.pt2"))
    assert torch.equal(torch._inductor.aoti_load_package(path)(*inputs), pool(*inputs))


def test_onnx_has_one_map(given):
    pytest.importorskip("onnxscript", reason="export to ONNX needs onnxscript")
    with pytest.raises(torch.onnx.OnnxExporterError) as error:
        torch.onnx.export(Pool(given[0]).eval(), given[1:], dynamo=True, verbose=False)
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
    p, *maps, boxes, index, levels = given
    pool = lambda *maps: p.forward(*maps, boxes, index, levels)  # noqa: E731
    fine, coarse, d_output = (torch.stack([t] * 4) for t in (*maps, torch.from_numpy(p.d_output)))
    torch.func.vmap(pool)(fine, coarse)
    torch.func.vmap(pool, (None, 0))(maps[0], coarse)
    torch.func.vmap(lambda g: p.adjoint(g, boxes, index, levels))(d_output)
    assert made == [("forward", 2, 12, 7)] * 2 + [("adjoint", 2, 12, 7)]


def test_a_batch_of_boxes_is_more_rois(given, made):
    """On the images that there are; on more where features differ too."""
    p, fine, coarse, boxes, *others = given
    pool = lambda fine, coarse, boxes: p.forward(fine, coarse, boxes, *others)  # noqa: E731
    batch = [torch.stack([t] * 4) for t in (fine, coarse, boxes)]
    torch.func.vmap(pool, (None, None, 0))(fine, coarse, batch[2])
    torch.func.vmap(pool)(*batch)
    assert made == [("forward", 2, 3, 28), ("forward", 8, 3, 28)]
