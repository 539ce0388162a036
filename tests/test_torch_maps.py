"""Several maps in PyTorch: the numbers of NumPy's, in every mode and under every transform.

Through the adapter: there is no public function of several maps yet.
"""

import io

import numpy as np
import pytest

import roialign
import tolerance
from roialign import _core, _rule, numpy as in_numpy
from roialign._rois import Rois

torch = pytest.importorskip("torch", reason="the PyTorch adapter's tests need torch")
from torch.autograd import gradcheck, gradgradcheck  # noqa: E402

from roialign import torch as in_torch  # noqa: E402
from roialign.torch import kernels  # noqa: E402
from test_torch import LAYOUTS, array, tensor  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated:FutureWarning")  # torch's

SIZES = ((9, 11), (5, 7))
SCALES = (0.5, 0.4, 0.25, 0.2)
BINS = (3, 2)


@pytest.fixture
def pyramid(make_problem):
    """Maps, RoIs on them and on none, d_output, and the rule: arrays of NumPy."""

    def pyramid(dtype=np.float64, channels=3):
        maps = [
            make_problem(m, shape=(2, channels, *size), dtype=dtype).features
            for m, size in enumerate(SIZES)
        ]
        problem = make_problem(
            3, shape=(2, channels, *SIZES[0]), count=5, dtype=dtype, size=BINS, inside=True
        )
        rois = Rois(*problem.rois, np.array([0, 1, -1, 1, 0]))
        rule = _rule.vector(roialign.conventions["half_pixel"], 2)
        return tuple(maps), rois, problem.draw_output(), rule

    return pyramid


@pytest.fixture
def given(pyramid):
    """The same as float64 tensors; and `pool(maps, boxes)`."""
    maps, rois, d_output, rule = pyramid()
    maps, rois = tuple(map(tensor, maps)), Rois(*map(tensor, rois))

    def pool(maps, boxes=rois.boxes, levels=rois.levels):
        return in_torch.forward(maps, Rois(boxes, rois.image_index, levels), BINS, SCALES, rule)

    return maps, rois, tensor(d_output), rule, pool


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", tolerance.DTYPES, ids=str)
def test_bits_are_those_of_numpy(pyramid, dtype, layout):
    maps, rois, d_output, rule = pyramid(dtype, 19)
    of_numpy = maps, rois, d_output
    maps, d_output = (
        tuple([LAYOUTS[layout](tensor(m)) for m in maps]),
        LAYOUTS[layout](tensor(d_output)),
    )
    of_torch = maps, Rois(*map(tensor, rois)), d_output

    def results(adapter, maps, rois, d_output):
        shapes = [m.shape for m in maps]
        yield adapter.forward(maps, rois, BINS, SCALES, rule)
        yield from adapter.adjoint(d_output, rois, shapes, SCALES, rule)
        yield adapter.box_gradient(d_output, maps, rois, SCALES, rule)

    for actual, expected in zip(
        results(in_torch, *of_torch), results(in_numpy, *of_numpy), strict=True
    ):
        np.testing.assert_array_equal(array(actual).astype(np.float64), expected.astype(np.float64))


def test_gradients(given):
    maps, rois, d_output, rule, pool = given
    leaves = [t.clone().requires_grad_() for t in (*maps, rois.boxes)]
    actual = torch.autograd.grad(pool(leaves[:-1], leaves[-1]), leaves, d_output)
    shapes = [m.shape for m in maps]
    expected = (
        *in_torch.adjoint(d_output, rois, shapes, SCALES, rule),
        in_torch.box_gradient(d_output, maps, rois, SCALES, rule),
    )
    assert all(map(torch.equal, actual, expected)) and all(t.any() for t in actual)
    _, pull = torch.func.vjp(lambda *t: pool(t[:-1], t[-1]), *maps, rois.boxes)
    assert all(map(torch.equal, pull(d_output), expected))
    one = leaves[1].detach().requires_grad_()  # the other is a constant
    (actual,) = torch.autograd.grad(pool([maps[0], one]), one, d_output)
    assert torch.equal(actual, expected[1])


def test_derivatives(given):
    maps, rois, d_output, rule, pool = given
    fine, coarse, boxes, g = (t.clone().requires_grad_() for t in (*maps, rois.boxes, d_output))

    def paste(g, boxes):
        own = rois._replace(boxes=boxes)
        return in_torch.adjoint(g, own, [m.shape for m in maps], SCALES, rule)

    def box_gradient(g, fine, coarse):
        return in_torch.box_gradient(g, (fine, coarse), rois, SCALES, rule)

    along = {"check_forward_ad": True}
    assert gradcheck(lambda *t: pool(t[:2], t[2]), (fine, coarse, boxes), **along)
    assert gradcheck(paste, (g, boxes), **along)
    assert gradcheck(lambda g: paste(g, rois.boxes)[1], (g,), **along)  # one result does not count
    assert gradcheck(box_gradient, (g, fine, coarse), **along)
    assert gradgradcheck(lambda *t: pool(t).pow(2), (fine, coarse))
    with pytest.raises(NotImplementedError, match="no second derivative in the boxes"):
        torch.func.hessian(lambda b: pool(maps, b).pow(2).sum())(rois.boxes)


def test_forward_mode_along_one_map(given):
    maps, _, _, _, pool = given
    v = torch.randn_like(maps[1])
    _, along = torch.func.jvp(lambda m: pool((maps[0], m)), (maps[1],), (v,))
    assert torch.equal(along, pool((torch.zeros_like(maps[0]), v)))


@pytest.mark.parametrize("batched", ["all maps", "one map", "boxes", "levels", "maps and boxes"])
def test_vmap(given, batched):
    maps, rois, _, _, pool = given
    dims = {
        "all maps": ((0, 2), None, None),
        "one map": ((None, 1), None, None),
        "boxes": ((None, None), 1, None),
        "levels": ((None, None), None, 0),
        "maps and boxes": ((1, 0), 0, None),
    }[batched]

    def changes(t, i):
        return (1 - 0.1 * i) * t if t.is_floating_point() else (t + i + 1) % 3 - 1

    def call(maps, boxes, levels):
        def loss(maps, boxes):
            output = pool(maps, boxes, levels)
            return output.pow(2).sum(), output

        gradients, output = torch.func.grad(loss, argnums=(0, 1), has_aux=True)(maps, boxes)
        return [output, *gradients[0], gradients[1]]

    given = maps, rois.boxes, rois.levels
    leaves, spec = torch.utils._pytree.tree_flatten(given)
    flat_dims = [*dims[0], *dims[1:]]
    calls = [
        [t if d is None else changes(t, i) for t, d in zip(leaves, flat_dims, strict=True)]
        for i in range(3)
    ]
    stacked = [
        each[0] if d is None else torch.stack(each, d)
        for each, d in zip(zip(*calls, strict=True), flat_dims, strict=True)
    ]
    unflatten = torch.utils._pytree.tree_unflatten
    results = torch.func.vmap(call, dims)(*unflatten(stacked, spec))
    for i, each in enumerate(calls):
        for actual, expected in zip(results, call(*unflatten(each, spec)), strict=True):
            torch.testing.assert_close(actual[i], expected, rtol=0, atol=1e-12)


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


def test_compiled_and_exported(given, tmp_path):
    maps, rois, d_output, rule, _ = given
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

    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    for function in (pool, compiled):
        leaves = [t.clone().requires_grad_() for t in (*maps, rois.boxes)]
        output = function(*leaves, *rois[1:])
        gradients = torch.autograd.grad(output, leaves, d_output)
        if function is pool:
            expected = gradients
    assert all(map(torch.equal, gradients, expected))
    torch._dynamo.reset()


def test_onnx_has_one_map(given):
    pytest.importorskip("onnxscript", reason="export to ONNX needs onnxscript")
    maps, rois, _, rule, _ = given
    with pytest.raises(torch.onnx.OnnxExporterError) as error:
        torch.onnx.export(Pool(rule).eval(), (*maps, *rois), dynamo=True, verbose=False)
    assert type(error.value.__cause__) is NotImplementedError
    assert "one map, got 2" in str(error.value.__cause__)


@pytest.mark.parametrize("level", [2, -2])
def test_a_bad_level_is_an_error(given, level):
    maps, rois, _, _, pool = given
    levels = rois.levels.clone()
    levels[3] = level
    with pytest.raises(IndexError, match=rf"`levels` of RoI 3 must be .*\[-1, 2\), got {level}"):
        pool(maps, levels=levels)


def test_out(given):
    maps, rois, d_output, rule, pool = given
    out = torch.full_like(d_output, torch.nan)
    assert in_torch.forward(maps, rois, BINS, SCALES, rule, out=out) is out
    assert torch.equal(out, pool(maps))
    outs, shapes = tuple(map(torch.empty_like, maps)), [m.shape for m in maps]
    assert in_torch.adjoint(d_output, rois, shapes, SCALES, rule, out=outs) is outs
    assert all(map(torch.equal, outs, in_torch.adjoint(d_output, rois, shapes, SCALES, rule)))


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
