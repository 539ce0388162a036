"""PyTorch on a GPU: the operators choose the kernels by the device, and all else stays as it is.

The kernels run in Triton's interpreter, on tensors of the CPU that pass for a GPU's; with
TRITON_INTERPRET=0 on the GPU that is there.
"""

import numpy as np
import pytest

import roialign
from backends import choose, operations, pooling
from isolation import python

torch = pytest.importorskip("torch", reason="the PyTorch adapter's tests need torch")
pytest.importorskip("triton", reason="the kernels of the GPU need Triton")
import roialign.torch.kernels as kernels_of_torch  # noqa: E402
from roialign import _rule  # noqa: E402
from roialign._triton import kernels  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*deprecated:FutureWarning"
)  # torch's own

(GPU,) = choose("interprets", "out")
DEVICE, SIZE = GPU.device, (2, 3)
KERNELS = (
    ["axis_taps", "forward"],
    ["axis_taps", "touched", "adjoint"],
    ["axis_taps", "box_gradient", "sum_blocks"],
)


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """The names of the kernels that ran."""
    names, launch = [], kernels_of_torch.launch

    def spy(kernel, grid, inputs, outputs, **constants):
        names.append(kernel.fn.__name__)
        return launch(kernel, grid, inputs, outputs, **constants)

    GPU.start(monkeypatch)
    monkeypatch.setattr(kernels_of_torch, "launch", spy)
    return names


@pytest.fixture
def problem(make_problem):
    """In float64, away from kinks: for derivatives."""
    return make_problem(dtype=np.float64, shape=(2, 3, 6, 7), count=3, size=SIZE, inside=True)


def arguments(problem):
    return GPU.array([problem.features, *problem.rois])


def rule_of(problem):
    return _rule.vector(problem.convention, problem.sampling)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_kernels_and_layouts(make_problem, layouts, launched, layout):
    """The values of float32 in NCHW are those of all backends' tests."""
    problem = make_problem(shape=(2, 16, 5, 6), count=4, size=SIZE, sampling=0)
    g, of_layout = problem.draw_output(), layouts[layout]
    given = GPU.array((of_layout(problem.features), of_layout(g), *problem.rois))
    results = []
    for operation, names in zip(operations(problem), KERNELS, strict=True):
        launched.clear()
        results.append(operation(*given))
        assert launched == names and results[-1].device == given[0].device
    memory_format = getattr(torch, f"{layout}_format" if layout == "contiguous" else layout)
    assert all(result.is_contiguous(memory_format=memory_format) for result in results[:2])
    GPU.check(problem, g, *GPU.numpy(results))


# Derivatives and transforms, by value


# Where the kernels come from


@pytest.mark.parametrize("home", ["kernels.home", "lambda tensor: '_triton'"])
def test_only_a_gpu_needs_triton(home):
    code = (
        "import sys; sys.modules['triton'] = None; import torch, roialign.torch;"
        f"kernels = roialign.torch.kernels; kernels.home = {home};"
        "print(roialign.roi_align(torch.ones(1, 1, 4, 4), torch.zeros(1, 5), 1).shape)"
    )
    ran = python("-c", code)
    if home == "kernels.home":
        assert ran.stdout == "torch.Size([1, 1, 1, 1])\n"
    else:
        assert "ImportError: roialign needs Triton for tensors on a GPU: pip install" in ran.stderr


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


def test_what_does_not_fit_is_refused(problem, launched):
    """The operators take any tensors; the kernels read what the shapes say: test_triton_launch."""
    features, boxes, index = arguments(problem)
    output = torch.ones(3, 3, *SIZE, dtype=features.dtype, device=DEVICE)
    rois, rest, operators = (
        (boxes, index, None),
        (problem.scale, rule_of(problem)),
        torch.ops.roialign,
    )
    for operator, given in (
        (operators.forward, ([features], *rois, boxes[1:], SIZE, *rest)),
        (operators.adjoint, (output, *rois, boxes[1:], features.shape, *rest)),
        (operators.box_gradient, (output, [features[:, 1:]], *rois, *rest)),
        (operators.box_gradient, (output, [features], boxes[1:], index, None, *rest)),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            operator.maps(*given)
    with pytest.raises(TypeError, match="of one float dtype"):
        operators.box_gradient.maps(output.float(), [features.int()], *rois, *rest)
    assert launched == []


# Ascend


@pytest.fixture
def npu(monkeypatch):
    """Tensors of the CPU pass for an Ascend device's."""
    monkeypatch.setattr(kernels_of_torch, "home", lambda t: None if t.is_meta else "_ascend")


@pytest.mark.parametrize(
    ("allowed", "dtype", "error"),
    [
        ("", "float32", "there use torch_npu.npu_roi_align; ROIALIGN_NPU=1 allows"),
        ("1", "float64", "`features` must be float16, bfloat16 or float32 on"),
    ],
)
def test_ascend_refuses(npu, monkeypatch, allowed, dtype, error):
    monkeypatch.setenv("ROIALIGN_NPU", allowed)
    rois = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(TypeError, match=error):
        roialign.roi_align(torch.zeros(1, 1, 4, 4, dtype=getattr(torch, dtype)), rois, 1)


@pytest.mark.skipif(DEVICE != "cpu", reason="an Ascend device is played by the CPU")
@pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered in matmul"
)  # beyond windows
def test_ascend(npu, launched, monkeypatch, make_problem):
    monkeypatch.setenv("ROIALIGN_NPU", "1")
    problem = make_problem(shape=(2, 2, 5, 6), count=3, size=SIZE)
    features, boxes, index = arguments(problem)
    features, boxes = features.requires_grad_(), boxes.double().requires_grad_()
    pool = pooling(problem)
    pool(features, boxes, index).square().sum().backward()
    names = "forward", "axis_weights", "touched", "adjoint", "axis_weights", "box_gradient"
    assert launched == ["axis_weights", *names, "sum_blocks"]
    monkeypatch.setattr(kernels_of_torch, "home", lambda tensor: None)
    same = features.detach().requires_grad_(), boxes.detach().requires_grad_()
    pool(*same, index).square().sum().backward()
    torch.testing.assert_close(features.grad, same[0].grad)
    torch.testing.assert_close(boxes.grad, same[1].grad, rtol=1e-4, atol=1e-5)


def test_the_interpreter_is_what_runs_here():
    interpreted = "Interpreted" in type(kernels.forward).__name__
    assert interpreted == (DEVICE == "cpu")
