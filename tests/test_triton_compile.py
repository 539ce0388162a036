"""The Triton kernels compiled for GPUs that are not there."""

import re

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


class Kept:
    """Calls of an operation: what they launch, how often by Triton's JIT, and what they make."""

    def __init__(self, operation, problem, monkeypatch):
        self.launches, self.jits, self.made = [], 0, []
        compiled_of_triton.operation_of.cache_clear()
        self.operation, arrays = problem.kept(operation)
        self.arrays = [
            x if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
            for x in arrays
        ]

        def launcher(device, source, metadata):
            return lambda *given: self.launches.append(given)

        def count(kernel, *given, jit=JITFunction.run, **options):
            self.jits += 1
            return jit(kernel, *given, **options)

        monkeypatch.setattr(Device, "launcher_cls", launcher)
        monkeypatch.setattr(JITFunction, "run", count)
        driver.set_active(Device(TARGETS["sm_80"]))

    def make(self, shape, dtype):
        self.made.append(torch.empty(shape, dtype=getattr(torch, dtype)))
        return self.made[-1]

    def call(self):
        """The launches of another call."""
        self.launches.clear()
        self.made.clear()
        compiled_of_triton.run(self.operation, [*self.arrays], self.make)
        return [*self.launches]


@pytest.fixture
def kept(monkeypatch):
    return lambda operation="forward", **problem: Kept(operation, Problem(**problem), monkeypatch)


@pytest.mark.parametrize("operation", offline.OPERATIONS)
def test_kept_launches_are_those_of_the_jit(kept, operation):
    """On the same arrays and numbers, and on what is made at its place in one buffer."""
    calls = kept(operation, maps=2)
    steps, offsets, *_ = calls.operation
    by_jit = calls.call()
    assert calls.jits == len(by_jit) == len(steps) and len(calls.made) == len(offsets)
    found = calls.call()
    (buffer,) = calls.made
    assert calls.jits == len(found) and buffer.nbytes == calls.operation.size
    addresses = [x if x is None else x.data_ptr() for x in calls.arrays]
    addresses += [buffer.data_ptr() + offset for offset in offsets]
    for step, one, two in zip(steps, by_jit, found, strict=True):
        assert (*one[:6], None, None, None) == two[:9]  # without what profilers are told
        one, two = list(one[9:]), list(two[9:])
        for position, place in step.arrays:
            assert two[position] == addresses[place]
            one[position] = two[position]
        assert one == two


def test_without_the_interface_the_jit_launches(kept, monkeypatch):
    monkeypatch.setattr(compiled_of_triton, "INTERFACE", ("run", "not_there"))
    calls = kept()
    assert len(calls.call()) == len(calls.call()) == calls.jits / 2


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_is_told_of_each_launch(kept, monkeypatch, hook):
    calls = kept()
    monkeypatch.setattr(getattr(triton.knobs.runtime, hook), "calls", [lambda metadata: None])
    assert len(calls.call()) == len(calls.call()) == calls.jits / 2


def test_what_is_specialised_is_another_launch(kept):
    """An array that is not aligned, and another device: what a kind does not tell."""
    calls = kept()
    for again in (False, True):
        before = calls.jits
        calls.call()
        assert (calls.jits == before) == again
    boxes = calls.arrays[1]
    calls.arrays[1] = torch.empty(1 + boxes.numel())[1:].view_as(boxes)  # 4 bytes off
    before = calls.jits
    calls.call()
    assert calls.jits > before
    driver.set_active(Device(TARGETS["sm_90"]))
    before = calls.jits
    calls.call()
    assert calls.jits > before


def test_the_benchmark_of_the_host(capsys, monkeypatch):
    pytest.importorskip("bench", reason="the benchmark is in the repository, not in the package")
    from bench import host

    monkeypatch.setattr(host, "keep_freed_memory", lambda: None)
    host.main(["--workloads", "W6", "--calls", "1"])
    _, *rows = capsys.readouterr().out.splitlines()
    expected = [f"W6 {operation}" for operation in offline.OPERATIONS]
    assert [row.partition(":")[0] for row in rows] == expected
