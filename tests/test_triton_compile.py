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

import triton_offline as offline
from roialign._triton import launch
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


@each_target
def test_no_atomics(compiled, target):
    atomic = re.compile(r"\b(atom|red)\.|_atomic_")
    assert not [v.row for v in compiled[target] if atomic.search(v.code)]


@each_target
def test_no_matrix_units(compiled, target):
    # their float32 is TF32
    matrix = re.compile(r"\b(mma|wmma|wgmma|tcgen05)\.|tf32|v_(mfma|wmma)_")
    assert not [v.row for v in compiled[target] if matrix.search(v.code)]


@pytest.mark.parametrize("target", [name for name in TARGETS if name.startswith("sm_")])
def test_coordinates_are_not_contracted(compiled, target):
    taps = [v for v in compiled[target] if v.kernel == "axis_taps"]
    assert all("div.rn.f" in v.code for v in taps)
    assert not [v.row for v in taps if re.search(r"\bfma\.", v.code)]


@each_gated
def test_aligned_channels_are_read_16_bytes_at_once(compiled, target):
    wide = re.compile(r"\bld\.global\S*\.(v4\.b32|v2\.b64)|\b(global|buffer)_load_dwordx4")
    for v in compiled[target]:
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
    Problem().run(device.call)
    before = set(device.compiled)
    Problem(images=1, channels=17, size=(1, 1), bins=(5, 8), count=1).run(device.call)
    Problem(images=16, channels=1000, size=(32, 160), bins=(8, 8), count=32).run(device.call)
    assert set(device.compiled) == before


def test_strides_beyond_32_bits_compile_a_kernel_once(device):
    Problem(channels=16).run(device.call)
    few = len(device.compiled)
    for channels in (2**11, 2**12):
        Problem(channels=channels, size=(2**10, 2**11)).run(device.call)
    # what sees strides of features: `forward` and `adjoint`, with a tangent too, and `box_gradient`
    assert len(device.compiled) == few + 5
