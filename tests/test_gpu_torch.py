"""PyTorch on a GPU: the operators choose the kernels by the device, and all else stays as it is.

The kernels run in Triton's interpreter, on tensors of the CPU that pass for a GPU's; with
TRITON_INTERPRET=0 on the GPU that is there.
"""

import pytest

import roialign
from backends import named, operations
from isolation import python

torch = pytest.importorskip("torch", reason="the PyTorch adapter's tests need torch")
pytest.importorskip("triton", reason="the kernels of the GPU need Triton")
import roialign.torch.kernels as kernels_of_torch  # noqa: E402
import test_torch  # noqa: E402
from roialign._triton import compiled, kernels  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*deprecated:FutureWarning"
)  # torch's own

GPU = named("triton")
DEVICE, SIZE = GPU.device, (2, 3)
KERNELS = (
    ["plan", "gather"],
    ["axis_taps", "columns", "scatter"],
    ["plan", "box_rows", "sum_blocks"],
)


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """The names of the kernels that ran."""
    names, by_jit = [], compiled.by_jit

    def spy(kernel, *given):
        names.append(kernel.fn.__name__)
        return by_jit(kernel, *given)

    GPU.start(monkeypatch)
    compiled.operation_of.cache_clear()  # on a GPU the first call of a kind goes through the JIT
    monkeypatch.setattr(compiled, "by_jit", spy)
    yield names
    GPU.stop()


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
        assert [name for name in launched if name != "pack"] == names and results[
            -1
        ].device == given[0].device
    memory_format = getattr(torch, f"{layout}_format" if layout == "contiguous" else layout)
    assert all(result.is_contiguous(memory_format=memory_format) for result in results[:2])
    GPU.check(problem, g, *GPU.numpy(results))


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


@pytest.mark.parametrize("operation", ["forward", "adjoint", "box_gradient"])
def test_operators_are_called_with_anything(operation):
    test_torch.test_operators_are_called_with_anything(operation, DEVICE)


# Ascend


@pytest.fixture
def npu(monkeypatch):
    """Tensors of the CPU pass for an Ascend device's."""
    monkeypatch.setattr(kernels_of_torch, "home", lambda t: None if t.is_meta else "_ascend")


@pytest.mark.parametrize(
    ("allowed", "dtype", "reduction", "error"),
    [
        ("", "float32", "mean", "there use torch_npu.npu_roi_align; ROIALIGN_NPU=1 allows"),
        ("1", "float64", "mean", "`features` must be float16, bfloat16 or float32 on"),
        ("1", "float32", "max", "largest samples and boxes that turn are not there on .*: take"),
    ],
)
def test_ascend_refuses(npu, monkeypatch, allowed, dtype, reduction, error):
    monkeypatch.setenv("ROIALIGN_NPU", allowed)
    rois = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    features = torch.zeros(1, 1, 4, 4, dtype=getattr(torch, dtype))
    with pytest.raises((TypeError, NotImplementedError), match=error):
        roialign.roi_align(features, rois, 1, reduction=reduction)


def test_the_interpreter_is_what_runs_here():
    interpreted = "Interpreted" in type(kernels.forward).__name__
    assert interpreted == (DEVICE == "cpu")
