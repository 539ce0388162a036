"""The Triton kernels compiled for GPUs that are not there."""

import re
from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="the arrays of the GPU tests are of torch")
pytest.importorskip("triton", reason="the GPU kernels need triton")
import triton

if triton.knobs.runtime.interpret:
    pytest.skip(
        "interpreted kernels cannot be compiled: "
        "TRITON_INTERPRET=0 pytest tests/test_triton_compile.py",
        allow_module_level=True,
    )

import torch
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import triton_offline as offline
from roialign._triton import compiled as compiled_of_triton, launch, sampled, turned
from triton_offline import DTYPES, GATED, PAGE, TARGETS, Device, Problem

pytestmark = pytest.mark.triton_compile
each_target = pytest.mark.parametrize("target", TARGETS)
each_gated = pytest.mark.parametrize("target", GATED)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def compiled(request, cache):
    """Target -> its variants, of the targets that the chosen tests name."""
    named = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    targets = dict.fromkeys(params["target"] for params in named if "target" in params)
    with offline.pool() as processes:
        jobs = {
            target: processes.submit(
                offline.compile_all, target, DTYPES if target in GATED else ("float32",)
            )
            for target in targets
        }
        return {target: job.result() for target, job in jobs.items()}


# What is compiled


@each_target
def test_the_recorded_table_has_every_row(compiled, target):
    lines = [line.strip("| \n").split(" | ") for line in PAGE.read_text().splitlines()]
    rows = {tuple(line[:4]): line[4:] for line in lines if len(line) == 4 + len(GATED)}
    titles = rows.pop(("kernel", "dtype", "tables", "layout"))
    assert titles == list(GATED)
    assert all(re.fullmatch(r"\d+ / \d+", cell) for cells in rows.values() for cell in cells)
    dtypes = {"fp16", "bf16", "fp32", "fp64", "-"} if target in GATED else {"fp32", "-"}
    assert {row for row in rows if row[1] in dtypes} == {v.row for v in compiled[target]}


@each_gated
def test_no_registers_are_spilled(compiled, target):
    assert not [(*v.row, v.registers, v.memory) for v in compiled[target] if v.memory]


KERNELS = {
    "max": {"extremes", "largest", "touched", "adjoint_of_winners"},
    "max_corner": {"extremes", "largest", "touched", "adjoint_of_winners"},
    "turned": {"frames", "forward_of_turned", "touched", "adjoint_of_turned"},
}


@each_gated
@pytest.mark.parametrize("kind", KERNELS)
def test_samples(target, kind):
    """Compiled for float64, which takes the most registers, and a 16-bit type."""
    device, turn = Device(GATED[target]), float(kind == "turned")
    for dtype in ("float64", "bfloat16"):
        rule = *Problem.rule, float(["turned", "max", "max_corner"].index(kind)), turn
        problem = Problem(dtype, last=dtype == "bfloat16", rule=rule)
        features, output, rois, _ = problem.arrays()
        if turn:
            rois = rois._replace(boxes=offline.empty((problem.count, 5), rois.boxes.dtype))
        module, selectors = (turned, []) if turn else (sampled, [[features]])
        rest = rois, None, problem.scales, rule
        module.forward(device.call, [features], *selectors, *rest, output)
        module.adjoint(device.call, output, *selectors, *rest, [features])
    variants = [offline._variant(one) for one in device.compiled.values()]
    assert {v.kernel for v in variants} == KERNELS[kind]
    # the sine of large angles has an array on a stack
    assert not [(v.kernel, v.dtype) for v in variants if v.memory and v.kernel != "frames"]
    forbidden = {"frames": r"fma\.rn\.f32", "adjoint_of_turned": r"bar\.sync|s_barrier"}
    for v in variants:
        words = FORBIDDEN["atomics"], *[forbidden[k] for k in forbidden if k == v.kernel]
        assert not [each for each in words if re.search(each, v.code)], (v.kernel, v.dtype)


FORBIDDEN = {
    "atomics": r"\b(atom|red)\.|_atomic_",
    # their float32 is TF32
    "matrix units": r"\b(mma|wmma|wgmma|tcgen05)\.|tf32|v_(mfma|wmma)_",
}


@each_target
@pytest.mark.parametrize("what", FORBIDDEN)
def test_none_of_these(compiled, target, what):
    assert not [v.row for v in compiled[target] if re.search(FORBIDDEN[what], v.code)]


@pytest.mark.parametrize("target", [name for name in TARGETS if name.startswith("sm_")])
def test_coordinates_are_not_contracted(compiled, target):
    taps = [v for v in compiled[target] if v.kernel in ("axis_taps", "plan")]
    assert all("div.rn.f" in v.code for v in taps)
    assert not [v.row for v in taps if re.search(r"\bfma\.", v.code)]


@each_gated
def test_aligned_channels_are_read_16_bytes_at_once(compiled, target):
    wide = re.compile(r"\bld\.global\S*\.(v4\.b32|v2\.b64)|\b(global|buffer)_load_dwordx4")
    for v in compiled[target]:
        if v.kernel in ("gather", "scatter"):
            assert wide.search(v.code), v.row
        if v.kernel == "box_rows":  # four channels of each load, in any dtype; none of it waits
            assert wide.search(v.code) or v.dtype != "fp32", v.row
        # AMD has twice the lanes: 8 bytes of float16 for each
        enough = target.startswith("sm_") or v.dtype in ("fp32", "fp64")
        if v.kernel == "forward" and v.constants["INNERMOST"] and enough:
            assert bool(wide.search(v.code)) == v.constants["ALIGNED"], v.row


# What a call compiles


@pytest.fixture
def device():
    return Device(GATED["sm_90"])


def test_types_of_numbers(device):
    Problem().run(device.call)
    for compiled in device.compiled.values():
        for name, kind in compiled.src.signature.items():
            if kind != "constexpr" and not kind.startswith("*"):
                assert kind == ("fp64" if name in ("scale_y", "scale_x") else "i32"), name


def test_no_kernel_contracts_by_itself(device):
    Problem().run(device.call)
    assert launch.OPTIONS["enable_fp_fusion"] is False
    assert not any(one.metadata.enable_fp_fusion for one in device.compiled.values())


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_other_sizes_compile_nothing(target):
    device = Device(GATED[target])
    Problem(channels=250).run(device.call)
    Problem().launch("forward", device.call)
    before = set(device.compiled)
    Problem(images=1, channels=64, size=(9, 7), bins=(5, 8), count=900).launch(
        "forward", device.call
    )
    Problem(images=1, channels=17, size=(1, 1), bins=(5, 8), count=1).run(device.call)
    Problem(images=16, channels=1000, size=(32, 160), bins=(8, 8), count=32).run(device.call)
    assert set(device.compiled) == before


def test_strides_beyond_32_bits_compile_a_kernel_once(device):
    Problem(channels=15).run(device.call)
    few = len(device.compiled)
    for channels in (2**11, 2**12):
        Problem(channels=channels, size=(2**10, 2**11)).run(device.call)
    # what sees strides of features: `forward` and `adjoint`, with a tangent too, and `box_gradient`
    assert len(device.compiled) == few + 5


# What is kept


@pytest.fixture
def launched(device, monkeypatch):
    """Calls of `start`, for each kernel; what they launch; how often by Triton's JIT."""
    found = SimpleNamespace(calls=[], launches=[], jits=0)

    def call(kernel, grid, inputs, outputs, **constants):
        arrays = offline.arrays_of(outputs)
        found.calls.append((kernel, grid, [*inputs, *arrays], constants))
        return arrays

    def launcher(self, source, metadata):
        return lambda *given: found.launches.append(given)

    def count(self, *given, jit=JITFunction.run, **options):
        found.jits += 1
        return jit(self, *given, **options)

    Problem().run(call)
    driver.set_active(device)
    monkeypatch.setattr(Device, "launcher_cls", launcher)
    monkeypatch.setattr(JITFunction, "run", count)
    monkeypatch.setattr(compiled_of_triton, "_compiled", {})
    return found


def test_kept_launches_are_those_of_the_jit(launched):
    for each in launched.calls:
        compiled_of_triton.start(*each)
        before = launched.jits
        compiled_of_triton.start(*each)
        assert launched.jits == before
        pairs = list(zip(*launched.launches[-2:], strict=True))
        _, second = pairs.pop(6)  # what profilers are told
        assert second is None and all(a is b or a == b for a, b in pairs)
    assert len(launched.launches) == 2 * len(launched.calls) > launched.jits


def test_without_the_interface_the_jit_launches(launched, monkeypatch):
    monkeypatch.setattr(compiled_of_triton, "INTERFACE", ("run", "not_there"))
    for each in launched.calls * 2:
        compiled_of_triton.start(*each)
    assert launched.jits == len(launched.launches) == 2 * len(launched.calls)


def test_a_profiler_is_told_of_each_launch(launched, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [lambda metadata: None])
    compiled_of_triton.start(*launched.calls[0])
    compiled_of_triton.start(*launched.calls[0])
    assert launched.jits == 2


def test_what_is_specialised_is_another_launch(launched):
    """An array that is not aligned, or of another dtype, and a number of more than 32 bits."""
    kernel, grid, arguments, constants = launched.calls[0]
    compiled_of_triton.start(kernel, grid, arguments, constants)
    number = max(i for i, x in enumerate(arguments) if isinstance(x, int))
    for place, other in (
        (0, torch.empty(81)[1:].view(20, 4)),  # 4 bytes off
        (0, torch.empty(20, 4, dtype=torch.float64, device="meta")),
        (number, 2**31),
    ):
        before = launched.jits
        changed = [*arguments[:place], other, *arguments[place + 1 :]]
        compiled_of_triton.start(kernel, grid, changed, constants)
        assert launched.jits == before + 1
