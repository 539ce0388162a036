"""PyTorch on a GPU: the operators choose the kernels by the device, and all else stays as it is.

The kernels run in Triton's interpreter, on tensors of the CPU that pass for a GPU's; with
TRITON_INTERPRET=0 on the GPU that is there.
"""

import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest

import oracle
import roialign
import tolerance

torch = pytest.importorskip("torch", reason="the PyTorch adapter's tests need torch")
pytest.importorskip("triton", reason="the kernels of the GPU need Triton")
import roialign.torch.kernels as kernels_of_torch  # noqa: E402
from roialign._triton import kernels  # noqa: E402
from test_torch import OPTIONS, RULE, array, tensor  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*deprecated:FutureWarning"
)  # torch's own

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
SIZE = (2, 3)


def on_device(array):
    return tensor(array).to(DEVICE)


def on_host(tensor):
    return array(tensor.cpu())


def folder_of(tensor):
    """A tensor of the CPU passes for one of a GPU."""
    return None if tensor.is_meta else "_triton"


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """The names of the kernels that ran."""
    names, launch = [], kernels_of_torch.launch

    def spy(kernel, grid, inputs, outputs, **constants):
        names.append(kernel.fn.__name__)
        return launch(kernel, grid, inputs, outputs, **constants)

    if DEVICE == "cpu":
        monkeypatch.setattr(kernels_of_torch, "home", folder_of)
    monkeypatch.setattr(kernels_of_torch, "launch", spy)
    return names


@contextlib.contextmanager
def core():
    """On tensors of the CPU the core again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels_of_torch, "home", lambda t: "_triton" if t.is_cuda else None)
        yield


@pytest.fixture
def problem(make_problem):
    """In float64, away from kinks: for derivatives."""
    return make_problem(dtype=np.float64, shape=(2, 3, 6, 7), count=3, size=SIZE, inside=True)


def arguments(problem):
    return [on_device(a) for a in (problem.features, problem.boxes, problem.index)]


def same_as_the_core(function, *arguments):
    """`function` of tensors, on the device and with the core: equal but for rounding of float64."""
    results = function(*arguments)
    with core():
        expected = function(*[argument.cpu() for argument in arguments])
    flat, _ = torch.utils._pytree.tree_flatten(results)
    flat_expected, _ = torch.utils._pytree.tree_flatten(expected)
    assert len(flat) == len(flat_expected)
    for result, value in zip(flat, flat_expected, strict=True):
        assert result.device.type == DEVICE
        torch.testing.assert_close(result.cpu(), value, rtol=1e-12, atol=1e-12)


def pool(features, boxes, index):
    options = OPTIONS | {"convention": "half_pixel"}
    return roialign.roi_align(features, (boxes, index), SIZE, **options)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", tolerance.DTYPES, ids=str)
def test_oracle(make_problem, launched, dtype, layout):
    problem = make_problem(dtype=dtype, shape=(2, 16, 5, 6), count=4, size=SIZE, sampling=0)
    features = on_device(problem.features).contiguous(memory_format=layout)
    rois = on_device(problem.boxes), on_device(problem.index)
    output = roialign.roi_align(features, rois, SIZE, **problem.options)
    assert launched == ["axis_taps", "forward"]
    assert output.device == features.device and output.is_contiguous(memory_format=layout)
    expected = oracle.forward(problem)
    tolerance.check(on_host(output), expected, tolerance.forward(problem, expected))

    g = problem.draw_output()
    d_output = on_device(g).contiguous(memory_format=layout)
    launched.clear()
    d_features = roialign.roi_align_adjoint(d_output, rois, features.shape, **problem.options)
    assert launched == ["axis_taps", "touched", "adjoint"]
    assert d_features.device == features.device and d_features.is_contiguous(memory_format=layout)
    expected = oracle.adjoint(problem, g)
    tolerance.check(on_host(d_features), expected, tolerance.adjoint(problem, g, expected))

    launched.clear()
    d_boxes = roialign.roi_align_box_gradient(d_output, features, rois, **problem.options)
    assert launched == ["axis_taps", "box_gradient", "sum_blocks"]
    assert d_boxes.device == features.device
    expected = oracle.box_gradient(problem, g)
    tolerance.check(on_host(d_boxes), expected, tolerance.box_gradient(problem, g, expected))


def test_integer_boxes():
    features = torch.rand(1, 2, 5, 6, device=DEVICE)
    rois = torch.tensor([[0, 1, 1, 4, 3]], device=DEVICE)
    output = roialign.roi_align(features, rois, SIZE)
    assert torch.equal(output, roialign.roi_align(features, rois.float(), SIZE))
    d_rois = roialign.roi_align_box_gradient(torch.ones_like(output), features, rois)
    assert (d_rois.dtype, d_rois.shape) == (torch.float32, (1, 5))


def test_empty(launched):
    features, rois = torch.rand(2, 3, 5, 6, device=DEVICE), torch.zeros(0, 5, device=DEVICE)
    assert roialign.roi_align(features, rois, SIZE).shape == (0, 3, *SIZE)
    assert roialign.roi_align(features, [rois[:, 1:]] * 2, SIZE).shape == (0, 3, *SIZE)
    assert roialign.roi_align(features[:, :0], torch.zeros(4, 5, device=DEVICE), SIZE).shape[0] == 4
    d_output = torch.zeros(0, 3, *SIZE, device=DEVICE)
    d_features = roialign.roi_align_adjoint(d_output, rois, features.shape)
    assert d_features.shape == features.shape and not d_features.any()
    assert roialign.roi_align_box_gradient(d_output, features, rois).shape == (0, 5)
    d_rois = roialign.roi_align_box_gradient(
        torch.zeros(4, 0, *SIZE, device=DEVICE), features[:, :0], torch.zeros(4, 5, device=DEVICE)
    )
    assert d_rois.shape == (4, 5) and not d_rois.any()
    assert launched == []


def test_out(make_problem):
    problem = make_problem(shape=(2, 3, 5, 6), count=3, size=SIZE)
    features, boxes, index = arguments(problem)
    options = problem.options
    expected = roialign.roi_align(features, (boxes, index), SIZE, **options)
    wide = torch.full((3, 3, 2, 6), 7.0, device=DEVICE)
    out = wide[..., ::2]
    assert roialign.roi_align(features, (boxes, index), SIZE, **options, out=out) is out
    assert torch.equal(out, expected)
    assert (wide[..., 1::2] == 7).all()
    rows = torch.cat([index[:, None], boxes], 1)
    whole = torch.empty_like(expected)
    assert roialign.roi_align(features, rows, SIZE, **options, out=whole) is whole
    assert torch.equal(whole, expected)
    memory = torch.zeros(1000, device=DEVICE)
    overlapping = memory[:180].view(2, 3, 5, 6), memory[100:154].view(3, 3, *SIZE)
    with pytest.raises(ValueError, match="`out` must not overlap an input"):
        roialign.roi_align(overlapping[0], rows, SIZE, **options, out=overlapping[1])
    with pytest.raises(ValueError, match="`out` must not overlap itself"):
        itself = torch.as_strided(memory, (3, 3, *SIZE), (1, 1, 1, 1))
        roialign.roi_align(features, rows, SIZE, **options, out=itself)


# Derivatives and transforms, by value


def test_compile(problem):
    def gradients(features, boxes, index):
        features, boxes = features.requires_grad_(), boxes.requires_grad_()
        compiled = torch.compile(pool, fullgraph=True, backend="aot_eager", dynamic=True)
        return torch.autograd.grad(compiled(features, boxes, index).sum(), (features, boxes))

    same_as_the_core(gradients, *arguments(problem))


def test_export(problem):
    class Model(torch.nn.Module):
        def forward(self, features, boxes, index):
            return pool(features, boxes, index)

    given = tuple(arguments(problem))
    program = torch.export.export(Model(), given)
    assert "torch.ops.roialign.forward" in program.graph_module.code
    same_as_the_core(lambda *given: program.module()(*given), *given)


def test_opcheck(problem):
    features, boxes, index = arguments(problem)
    maps, rest = [features.requires_grad_()], (None, None, SIZE, (0.5, 0.4), RULE)
    given = (maps, boxes.requires_grad_(), index, *rest)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.roialign.forward.maps, given, test_utils=tests)


def test_autocast(make_problem):
    problem = make_problem(shape=(2, 2, 5, 6), count=3, size=SIZE)
    features, boxes, index = arguments(problem)
    with torch.autocast(DEVICE, torch.bfloat16):
        low = features.bfloat16().requires_grad_()
        boxes = boxes.requires_grad_()
        output = roialign.roi_align(low, (boxes, index), SIZE, **problem.options)
        output.float().sum().backward()
    kinds = output.dtype, low.grad.dtype, boxes.grad.dtype
    assert kinds == (torch.bfloat16, torch.bfloat16, torch.float32)
    same = roialign.roi_align(features.bfloat16(), (boxes, index), SIZE, **problem.options)
    assert torch.equal(output, same)


def test_deterministic_algorithms(make_problem):
    problem = make_problem(shape=(2, 2, 5, 6), count=3, size=SIZE)
    features, boxes, index = arguments(problem)

    def gradient():
        given = features.clone().requires_grad_()
        roialign.roi_align(given, (boxes, index), SIZE, **problem.options).square().sum().backward()
        return given.grad

    expected = gradient()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(gradient(), expected)
    finally:
        torch.use_deterministic_algorithms(False)


# Where the kernels come from


def test_the_cpu_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, roialign;"
        "print(roialign.roi_align(torch.ones(1, 1, 4, 4), torch.zeros(1, 5), 1).shape)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.split() == ["torch.Size([1,", "1,", "1,", "1])"]


def test_a_gpu_without_triton_is_a_clear_error():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, roialign.torch;"
        "roialign.torch.kernels.home = lambda tensor: '_triton';"
        "roialign.roi_align(torch.ones(1, 1, 4, 4), torch.zeros(1, 5), 1)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: roialign needs Triton for tensors on a GPU: pip install" in output.stderr


def test_other_devices_are_refused():
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        features = torch.empty(1, 1, 4, 4, device="mps")
        with pytest.raises(
            TypeError, match="`features` must be on the CPU or a GPU, got device mps"
        ):
            roialign.roi_align(features, torch.zeros(1, 5), 1)


@pytest.mark.parametrize("key", ["CUDA", "PrivateUse1"])
def test_operators_are_registered(key):
    for name in ("forward", "adjoint", "box_gradient"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"roialign::{name}.maps", key)


@pytest.mark.parametrize("wrong", ["features", "boxes", "index", "tangent", "output", "dtype"])
def test_what_does_not_fit_is_refused(problem, launched, wrong):
    """The operators take any tensors; the kernels read what the shapes say."""
    features, boxes, index = arguments(problem)
    given = {
        "output": torch.ones(3, 3, *SIZE, dtype=features.dtype, device=DEVICE),
        "features": features,
        "boxes": boxes,
        "index": index,
        "tangent": torch.ones_like(boxes),
    }
    if wrong == "dtype":
        given |= {"features": features.int(), "output": given["output"].float()}
    else:
        given[wrong] = given[wrong][:, 1:] if wrong == "features" else given[wrong][1:]
    output, features, boxes, index, tangent = given.values()
    rois, rest = (boxes, index, None), ((0.5, 0.4), RULE)
    error = TypeError if wrong == "dtype" else ValueError
    operators = torch.ops.roialign
    if wrong == "tangent":
        with pytest.raises(error):
            operators.forward.maps([features], *rois, tangent, SIZE, *rest)
        with pytest.raises(error):
            operators.adjoint.maps(output, *rois, tangent, problem.features.shape, *rest)
    else:
        with pytest.raises(error):
            operators.box_gradient.maps(output, [features], *rois, *rest)
    assert launched == []


# Ascend


@pytest.fixture
def npu(monkeypatch):
    """Tensors of the CPU pass for an Ascend device's."""
    monkeypatch.setattr(kernels_of_torch, "home", lambda t: folder_of(t) and "_ascend")


def test_ascend_is_refused_by_default(npu, monkeypatch):
    monkeypatch.delenv("ROIALIGN_NPU", raising=False)
    with pytest.raises(TypeError, match="there use torch_npu.npu_roi_align; ROIALIGN_NPU=1 allows"):
        roialign.roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4), 1)


@pytest.mark.skipif(DEVICE != "cpu", reason="an Ascend device is played by the CPU")
@pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered in matmul"
)  # beyond windows
def test_ascend(npu, launched, monkeypatch, make_problem):
    monkeypatch.setenv("ROIALIGN_NPU", "1")
    problem = make_problem(shape=(2, 2, 5, 6), count=3, size=SIZE)
    features, boxes, index = arguments(problem)
    features, boxes = features.requires_grad_(), boxes.double().requires_grad_()
    pool(features, boxes, index).square().sum().backward()
    names = "forward", "axis_weights", "touched", "adjoint", "axis_weights", "box_gradient"
    assert launched == ["axis_weights", *names, "sum_blocks"]
    monkeypatch.setattr(kernels_of_torch, "home", lambda tensor: None)
    same = features.detach().requires_grad_(), boxes.detach().requires_grad_()
    pool(*same, index).square().sum().backward()
    torch.testing.assert_close(features.grad, same[0].grad)
    torch.testing.assert_close(boxes.grad, same[1].grad, rtol=1e-4, atol=1e-5)


def test_ascend_has_no_float64(npu, monkeypatch):
    monkeypatch.setenv("ROIALIGN_NPU", "1")
    with pytest.raises(TypeError, match="`features` must be float16, bfloat16 or float32 on"):
        rois = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
        roialign.roi_align(torch.zeros(1, 1, 4, 4).double(), rois, 1)


def test_the_interpreter_is_what_runs_here():
    interpreted = "Interpreted" in type(kernels.forward).__name__
    assert interpreted == (DEVICE == "cpu")
