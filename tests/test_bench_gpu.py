"""The benchmark on a GPU, where there is none: torch's driver is a stand-in."""

import itertools
import json
import os
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import roialign  # noqa: E402
from bench import __main__ as command, devices, report, run  # noqa: E402
from bench.peers import (  # noqa: E402
    MAIN,
    PEERS,
    ROUNDING,
    torch as of_torch,
)
from test_bench import TINY, Here, ran  # noqa: E402

OURS, THEIRS, DETERMINISTIC = "ours", "torchvision", "torchvision_deterministic"
FLUSH = devices.Cuda.flush
DRIVER = ("is_available", "get_device_properties", "Event", "CUDAGraph", "graph", "synchronize")
DRIVER += ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated")
COMMAND = ["--device", "cuda", "--workloads", "tiny", "--rounds", "2", "--slice", "0.002"]
COMMAND += ["--peer", "torchvision=python", "--peer", "torch=python"]
PLAIN = ["--dtypes", "float32", "--layouts", "nchw", "--no-extras", "--operations"]


class Apart(Here):
    """With a deterministic mode of its own, as a process has."""

    mode = False

    def ask(self, command, **asked):
        torch.use_deterministic_algorithms(self.mode)
        try:
            return super().ask(command, **asked)
        finally:
            self.mode = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    """In the place of what is asked of torch.cuda."""
    cuda = MagicMock()
    cuda.Event.return_value.elapsed_time.return_value = 3.0
    cuda.memory_allocated.return_value, cuda.max_memory_allocated.return_value = 1000, 5000
    sizes = {"total_memory": 1, "L2_cache_size": 2, "multi_processor_count": 3}
    properties = SimpleNamespace(name="a stand-in", **sizes)
    cuda.get_device_properties.return_value = properties
    for name in DRIVER:
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(devices.Cuda, "name", "cpu")
    monkeypatch.setattr(devices.Cuda, "flush", cuda.flush)
    monkeypatch.setattr(devices, "FLUSHED", 2**16)
    monkeypatch.setattr(devices, "smi", lambda *names: {name: f"<{name}>" for name in names})
    monkeypatch.setitem(run.EVERY, "tiny", TINY)
    monkeypatch.setattr(run, "VARIED", ("tiny",))
    monkeypatch.setattr(run, "CALLS", 2)
    slow = replace(PEERS["cuda"][DETERMINISTIC], only=("tiny",))
    monkeypatch.setitem(PEERS["cuda"], DETERMINISTIC, slow)
    with_torchvision(monkeypatch)
    return cuda


def asked(cuda):
    """What the driver was asked, in order."""
    names = [name for name, *_ in cuda.mock_calls]
    kept = ("flush", "record", "call", "synchronize", "reset_peak_memory_stats", "replay")
    return [name for name in (name.split(".")[-1] for name in names) if name in kept]


def with_torchvision(monkeypatch, spoil=lambda output: output):
    """torchvision's function, made of ours; its results go through `spoil`."""

    def roi_align(input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
        assert input.dtype == boxes.dtype == torch.float32
        output = roialign.roi_align(
            input, boxes, output_size, spatial_scale=spatial_scale, sampling_ratio=sampling_ratio,
            convention=f"torchvision:aligned={aligned}",
        )  # fmt: skip
        return spoil(output)

    ops = SimpleNamespace(roi_align=roi_align)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "torchvision.ops", ops)


@pytest.fixture
def measured(tmp_path):
    """The record of a command with more arguments."""

    def measure(*more, start=Apart, status=0):
        return ran([*COMMAND, *more], tmp_path, start, status)

    return measure


def by(record, has="samples"):
    return [row["by"] for row in record["rows"] if has in row]


def test_the_command_writes_a_record_and_prints_its_tables(measured, tmp_path, capsys):
    record = measured()
    assert list((tmp_path / "cuda").glob("*-a-stand-in.jsonl"))
    machine = record["machine"]
    assert machine["gpu"] and machine["driver"] == "<driver_version>" and machine["cpu"]
    assert machine["clocks"]["clocks.sm"] == "<clocks.sm>" and "cuda" in machine
    assert record["versions"]["torch"]["torch"] == torch.__version__
    assert record["bandwidth"]["copy"] > 0 and record["left_out"] == []
    variants = {(dtype, "nchw") for dtype in ROUNDING} | {("float32", "nhwc")}
    wanted = {(name, o, *v) for name in (OURS, THEIRS) for o in MAIN for v in variants}
    wanted -= {(THEIRS, "box_gradient", *v) for v in variants}
    wanted |= {(DETERMINISTIC, "adjoint", "float32", "nchw")}
    rows = [row for row in record["rows"] if "samples" in row]
    assert {(r["by"], r["operation"], r["dtype"], r["layout"]) for r in rows} == wanted
    assert len(rows) == len(wanted)
    for row in rows:
        assert [set(samples) for samples in row["samples"]] == [{0.003}, {0.003}]
        assert row["floor"]["dram"] == row["floor"]["bytes"] / record["bandwidth"]["copy"]
    assert by(record, "memory") == [OURS, THEIRS, DETERMINISTIC] and not by(record, "refused")
    printed = capsys.readouterr().out
    for title in ("forward", "adjoint", "box gradient", "backward, its forward untimed, memory"):
        assert f"tiny roialign, {title} |" in printed
    assert "times <= 1.5" in printed and "torchvision was not there" not in printed


def test_what_launching_costs(measured, capsys):
    record = measured("--overhead")
    found = {(row["by"], row["operation"]) for row in record["rows"] if "refused" not in row}
    both = {(name, operation) for name in (OURS, THEIRS) for operation in ("forward", "gradient")}
    assert found == both | {(f"{name}_captured", "forward") for name in (OURS, THEIRS)}
    samples = [row["samples"] for row in record["rows"]]
    assert all(len(rounds) == 2 and rounds[0] != [0.003] for rounds in samples)
    assert "times >= 1" in capsys.readouterr().out


def test_without_torchvision_it_is_ours_and_the_floor(measured, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    assert set(by(measured())) == {OURS}
    assert "torchvision was not there" in capsys.readouterr().out


def test_a_sample_is_between_two_events_after_a_flush(cuda):
    cuda.call.before = lambda: (cuda.record() and "made",)
    assert devices.Cuda().samples(cuda.call, 2, 1) == [0.003, 0.003]
    one = ["record", "flush", "record", "call", "record"]
    assert asked(cuda) == [*one, *one, "synchronize"]


def test_a_mean_of_calls_is_wall_time_without_flushes(cuda):
    cuda.call.before = tuple
    (seconds,) = devices.Cuda().samples(cuda.call, 1, 3)
    assert asked(cuda) == ["synchronize", "call", "call", "call", "synchronize"] and seconds > 0


def test_contestants_take_turns(measured):
    turns = []

    class Turns(Apart):
        def ask(self, command, **asked):
            turns.extend([asked["key"]] if command == "time" else [])
            return super().ask(command, **asked)

    measured(*PLAIN, "forward", start=Turns)
    assert len(turns) == 4 and turns[:2] == turns[2:] and turns[0] != turns[1]


def test_a_wrong_result_of_ours_fails_the_command(measured, monkeypatch):
    agree = run.agree
    monkeypatch.setattr(run, "agree", lambda result, *others: agree(result + 1, *others))
    assert by(measured("--peers", status=1), "refused")


def test_ours_is_refused_if_its_bits_change(measured, monkeypatch):
    count, adjoint = itertools.count(), roialign.roi_align_adjoint
    monkeypatch.setattr(
        roialign, "roi_align_adjoint", lambda *a, **k: adjoint(*a, **k) + 1e-7 * next(count)
    )
    record = measured(*PLAIN, "adjoint", status=1)
    refused = {row["by"]: row.get("refused", "") for row in record["rows"]}
    assert "other bits" in refused[OURS] and not refused[THEIRS]


def test_the_deterministic_mode_is_for_one_contestant(measured, monkeypatch, capsys):
    seen = []

    def spoil(output):
        seen.append(torch.are_deterministic_algorithms_enabled())
        if seen[-1] and output.numel() > 1:  # not in the trial of whether it works
            raise torch.OutOfMemoryError("out of memory")
        return output

    with_torchvision(monkeypatch, spoil)
    record = measured("--operations", "adjoint")
    assert {True, False} == set(seen)
    assert by(record, "refused") == [DETERMINISTIC, DETERMINISTIC]  # time, and memory
    assert "out of memory" in capsys.readouterr().out
    processes = [peer.process for peer in PEERS["cuda"].values()]
    assert processes.count(PEERS["cuda"][DETERMINISTIC].process) == 1


def test_memory_is_what_is_beyond_inputs_and_results(cuda):
    output, gradient = torch.zeros(100), torch.zeros(300)
    cuda.max_memory_allocated.side_effect = [5000, 6000]
    cuda.call.before, cuda.call.return_value = lambda: (output,), gradient
    found = devices.Cuda().memory(cuda.call)
    assert found == max(5000, 6000 - gradient.nbytes) - output.nbytes - 1000
    reset = ["synchronize", "reset_peak_memory_stats"]
    assert asked(cuda) == [*reset, "synchronize", *reset, "call", "synchronize"]


@pytest.mark.parametrize(("budget", "rounds"), [("0", []), ("4", [1, 1, 1])])
def test_the_budget_ends_a_run(measured, monkeypatch, capsys, budget, rounds):
    seconds = itertools.count()
    monkeypatch.setattr(run, "clock", lambda: next(seconds))
    record = measured("--budget", budget)  # read to set the end, and before each contestant
    assert [len(row["samples"]) for row in record["rows"]] == rounds
    left_out = record["left_out"]
    assert "tiny: rounds after 1" in left_out
    for operation in ("adjoint", "backward"):
        assert any(f"{DETERMINISTIC}-{operation}" in name for name in left_out)
    assert "No time was left for: tiny-" in capsys.readouterr().out


def test_what_has_a_goal_comes_first():
    goals = {name for names, *_ in report.GOALS for name in names}
    assert goals - {*report.CALL} <= set(run.ORDER)


def test_a_replay_is_of_the_captured_call(cuda):
    replay = of_torch._captured(lambda: 6)
    assert replay() == 6 and asked(cuda)[-1] == "replay"


def test_a_flush_leaves_the_buffer_written():
    device = devices.Cuda()
    device.buffer.fill_(1)
    FLUSH(device)
    assert device.buffer.nbytes == devices.FLUSHED and not device.buffer.any()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")
def test_what_is_measured_are_the_kernels_of_the_gpu(measured, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from roialign._triton import compiled
    from roialign.torch import kernels

    names, by_jit = set(), compiled.by_jit

    def spy(kernel, *given):
        names.add(kernel.fn.__name__)
        return by_jit(kernel, *given)

    monkeypatch.setattr(kernels, "home", lambda tensor: "_triton")
    monkeypatch.setattr(compiled, "by_jit", spy)
    small = replace(TINY, shape=(1, 2, 8, 8), per_image=1, output_size=(2, 1), sampling=1)
    monkeypatch.setitem(run.EVERY, "tiny", small)
    record = measured("--peers", "--slice", "0", "--rounds", "1", *PLAIN, *MAIN)
    assert [row["operation"] for row in record["rows"]] == [*MAIN] and not by(record, "refused")
    assert names == {"axis_taps", "touched", "sum_blocks", *MAIN}


@pytest.mark.parametrize(
    ("there", "error"), [(False, "torch sees no GPU"), (True, "driver's version is not known")]
)
def test_without_a_gpu_nothing_is_measured(measured, cuda, tmp_path, monkeypatch, there, error):
    cuda.is_available.return_value = there
    monkeypatch.setattr(devices, "smi", lambda *names: {})
    monkeypatch.setattr(devices, "text_of", lambda path: None)
    with pytest.raises(SystemExit, match=error):
        measured()
    assert not list(tmp_path.iterdir())


# In one process


@pytest.fixture
def in_one_process(monkeypatch, tmp_path):
    """Of a small workload, by our kernels in the interpreter; the lines of a command."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here")
    pytest.importorskip("triton", reason="triton is not installed")
    import triton_interpreter
    from bench import gpu
    from roialign.torch import kernels

    triton_interpreter.hasten()
    small = replace(
        TINY, shape=(1, 16, 8, 8), per_image=2, output_size=(2, 3), sampling=2, name="tiny"
    )
    for name in ("tiny", "W6"):
        monkeypatch.setitem(run.EVERY, name, small)
    monkeypatch.setattr(gpu, "TIMED", ("tiny",))
    monkeypatch.setattr(gpu, "SWEPT", ("tiny",))
    monkeypatch.setattr(gpu, "VARIANTS", (("bfloat16", "nhwc"),))
    monkeypatch.setattr(gpu, "CASES", (("float32", "nhwc", 2, 16), ("float16", "nchw", 0, 3)))
    monkeypatch.setattr(gpu, "TAPS", ((2, 32),))
    monkeypatch.setattr(gpu, "ROIS", 3)
    monkeypatch.setattr(gpu, "SAMPLES", 2)
    monkeypatch.setattr(gpu, "CALLS", 2)
    monkeypatch.setattr(gpu, "TUNED", {name: values[:2] for name, values in gpu.TUNED.items()})
    monkeypatch.setattr(kernels, "home", lambda tensor: "_triton")

    def ran(mode, status=0):
        arguments = ["--device", "cuda", f"--{mode}", "--results", str(tmp_path)]
        assert command.main(arguments) == status
        (path,) = tmp_path.glob("cuda/*.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]

    return ran


def test_quick(in_one_process):
    first, *rows = in_one_process("quick")
    assert first["machine"]["driver"] and first["bandwidth"] and first["versions"]["triton"]
    checks, rows = rows[:7], rows[7:]
    assert [row["check"] for row in checks] == [*MAIN, *MAIN, "taps"]
    assert all(row["right"] for row in checks)
    assert all(len(row["samples"]) == (5 if row["workload"] == "W6" else 2) for row in rows)
    found = {(row["by"], row["operation"]) for row in rows}
    peers = {(by, o) for by in (OURS, THEIRS) for o in MAIN} - {(THEIRS, "box_gradient")}
    general = {("general", operation) for operation in MAIN}
    assert found == peers | general | {(DETERMINISTIC, "adjoint")}


def test_quick_ends_with_its_time_and_says_what_is_wrong(in_one_process, monkeypatch):
    from bench import gpu

    monkeypatch.setattr(gpu, "SECONDS", -1)
    monkeypatch.setattr(gpu, "CASES", ())
    monkeypatch.setattr(gpu.torch, "equal", lambda *_: False)
    _, taps, *rows, _, _ = in_one_process("quick", status=1)
    assert not taps["right"] and rows and all(row["left_out"] for row in rows)


def test_a_sweep_goes_on(in_one_process, capsys):
    from bench import gpu

    _, *rows = in_one_process("sweep")
    assert len(rows) == 1 + len(gpu.TUNED) and not any("refused" in row for row in rows)
    assert capsys.readouterr().out.count("best: ") == 1
    assert len(in_one_process("sweep")) == 1 + len(rows)
