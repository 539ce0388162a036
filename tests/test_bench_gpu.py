"""The benchmark's GPU part, where there is no GPU: the device is a stand-in with a wall clock."""

import contextlib
import itertools
import json
import os
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from cases import Workload

torch = pytest.importorskip("torch", reason="torch is not installed")

import roialign  # noqa: E402
from bench import __main__ as command  # noqa: E402
from bench import gpu, gpu_report, report, run  # noqa: E402

TINY = Workload(
    "tiny", "smoke test", (2, 5, 12, 14), 1 / 2, 3, (3, 2), 2, (2.0, 4.0, 8.0, 0.5), (2, 5, 10)
)
Cuda = gpu.Cuda
PEERS = gpu.OURS, gpu.THEIRS, gpu.DETERMINISTIC


class Clock:
    """The CPU, with the calls of `gpu.Cuda`."""

    name = "cpu"

    def __init__(self):
        self.done = []  # in their order: flushes and samples

    def machine(self):
        return {"gpu": "a stand-in", "driver": "none"}

    def flush(self):
        self.done.append("flush")

    def seconds(self, call, number):
        samples = []
        for _ in range(number):
            state = call.before()
            self.flush()
            start = time.perf_counter()
            call.timed(state)
            samples.append(time.perf_counter() - start)
            self.done.append("sample")
        return samples

    def synchronize(self):
        pass

    def allocated(self):
        return 1000

    def peak(self, function):
        result = function()
        return result, 1000 + 2 * result.nbytes + 24

    def captured(self, function):
        return function


def roi_align_of(spoil):
    """torchvision's function, made of ours."""

    def roi_align(input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
        assert input.dtype == boxes.dtype == torch.float32
        output = roialign.roi_align(
            input, boxes, output_size, spatial_scale=spatial_scale, sampling_ratio=sampling_ratio,
            convention=f"torchvision:aligned={aligned}",
        )  # fmt: skip
        return spoil(output)

    return roi_align


@pytest.fixture
def with_torchvision(monkeypatch):
    """Puts a stand-in of torchvision there; its results go through `spoil`."""

    def put(spoil=lambda output: output):
        module = SimpleNamespace(
            __version__="0", ops=SimpleNamespace(roi_align=roi_align_of(spoil))
        )
        monkeypatch.setitem(sys.modules, "torchvision", module)

    return put


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(run.WORKLOADS, "tiny", TINY)
    monkeypatch.setattr(gpu, "Cuda", Clock)
    monkeypatch.setattr(gpu, "FLUSHED", 2**16)
    monkeypatch.setattr(gpu, "VARIED", ("tiny",))
    monkeypatch.setattr(gpu, "SMALL", ("tiny",))
    monkeypatch.setattr(gpu, "CALLS", 2)


def settings(**changes):
    return run.Settings(
        **{"rounds": 2, "slice": 0.002, "dtypes": ("float32", "bfloat16"), **changes}
    )


def measured(device=None, budget=60.0, workload=TINY, **changes):
    return gpu.measure(
        [workload], device or Clock(), settings(**changes), budget, say=lambda _: None
    )


def test_the_command_writes_a_record_and_prints_its_tables(with_torchvision, tmp_path, capsys):
    with_torchvision()
    narrow = ["--workloads", "tiny", "--rounds", "2", "--slice", "0.002"]
    assert command.main(["--device", "cuda", *narrow, "--results", str(tmp_path)]) == 0
    (path,) = (tmp_path / "gpu").glob("*-a-stand-in.jsonl")
    (line,) = path.read_text().splitlines()
    record = json.loads(line)
    assert record["machine"]["gpu"] and record["machine"]["driver"] and record["machine"]["cpu"]
    assert {"roialign", "torch", "cuda", "triton"} == set(record["versions"]["ours"])
    assert record["versions"]["torchvision"] == {"torchvision": "0"}
    assert record["bandwidth"]["copy"] > 0 and record["left_out"] == []
    variants = {(d, "nchw") for d in run.ROUNDING} | {("float32", "nhwc")}
    wanted = {(by, o, *v) for by in PEERS[:2] for o in report.OPERATIONS for v in variants}
    wanted -= {(gpu.THEIRS, "box_gradient", *v) for v in variants}
    wanted |= {(gpu.DETERMINISTIC, "adjoint", "float32", "nchw")}
    rows = record["rows"]
    assert {(r["by"], r["operation"], r["dtype"], r["layout"]) for r in rows} == wanted
    assert len(rows) == len(wanted)
    for row in rows:
        assert "refused" not in row
        assert len(row["samples"]) == 2 and min(map(min, row["samples"])) > 0
        assert row["floor"]["dram"] == row["floor"]["bytes"] / record["bandwidth"]["copy"]
    assert [row["by"] for row in record["memory"]] == [*PEERS]
    assert {row["operation"] for row in record["launches"]} == {
        "forward", "forward and backward", "forward, captured in a graph",
    }  # fmt: skip
    printed = capsys.readouterr().out
    for title in ("**Forward**", "**Adjoint**", "**Box gradient**", "tiny box gradient"):
        assert title in printed
    assert "asked >= 50" in printed and "Refused" not in printed


def test_without_torchvision_it_is_ours_and_the_floor(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    record = measured()
    assert {row["by"] for row in record["rows"]} == {gpu.OURS}
    assert "torchvision was not there" in gpu_report.tables(record)


def test_a_cache_flush_comes_before_every_sample(with_torchvision):
    with_torchvision()
    device = Clock()
    measured(device)
    assert device.done[::2] == ["flush"] * (len(device.done) // 2)
    assert device.done[1::2] == ["sample"] * (len(device.done) // 2) != []


def test_contestants_take_turns(with_torchvision):
    with_torchvision()
    turns = []

    class Turns(Clock):
        def seconds(self, call, number):
            turns.append(id(call))
            return super().seconds(call, number)

    record = measured(Turns(), operations=("forward",), dtypes=("float32",), layouts=("nchw",))
    contestants = len(record["rows"])
    assert contestants == 2
    after = turns[1 + contestants :]  # the copy and the first sample of each
    assert len(after) == 2 * contestants and after[:contestants] == after[contestants:]


@pytest.mark.parametrize("value", [0.1, np.nan])
def test_a_wrong_result_is_not_timed(with_torchvision, value):
    def spoil(output):
        wrong = torch.zeros_like(output)
        wrong.view(-1)[-1] = value
        return output + wrong

    with_torchvision(spoil)
    record = measured(operations=("forward",), dtypes=("float32",), layouts=("nchw",))
    ours, theirs = record["rows"]
    assert "samples" in ours and "refused" not in ours
    assert "samples" not in theirs and "differs from the CPU core" in theirs["refused"]
    assert "Refused: torchvision, tiny forward" in gpu_report.tables(record)


def test_a_wrong_result_of_ours_fails_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    agree = run.agree
    monkeypatch.setattr(run, "agree", lambda result, *others: agree(result + 1, *others))
    arguments = ["--workloads", "tiny", "--rounds", "1", "--results", str(tmp_path)]
    assert command.main(["--device", "cuda", *arguments]) == 1


def test_ours_is_refused_if_its_bits_change(with_torchvision, monkeypatch):
    with_torchvision()
    count, adjoint = itertools.count(), roialign.roi_align_adjoint
    monkeypatch.setattr(
        roialign, "roi_align_adjoint", lambda *a, **k: adjoint(*a, **k) + 1e-7 * next(count)
    )
    record = measured(operations=("adjoint",), dtypes=("float32",), layouts=("nchw",))
    refused = {row["by"]: row.get("refused", "") for row in record["rows"]}
    assert "other bits" in refused[gpu.OURS] and not refused[gpu.THEIRS]


@pytest.mark.parametrize("mode", [(False, False), (True, False), (True, True)])
def test_the_deterministic_mode_is_for_one_contestant_and_then_as_before(with_torchvision, mode):
    seen = []

    def spoil(output):
        seen.append(torch.are_deterministic_algorithms_enabled())
        if seen[-1] and output.numel() > 1:  # not in the trial of whether it works
            raise torch.OutOfMemoryError("out of memory")
        return output

    with_torchvision(spoil)
    torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
    try:
        record = measured(operations=("adjoint",), dtypes=("float32",), layouts=("nchw",))
        assert mode == (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert {True, False} == set(seen)
    refused = [row["by"] for row in record["rows"] if "refused" in row]
    assert refused == [gpu.DETERMINISTIC]
    assert "out of memory" in gpu_report.tables(record)


def test_memory_is_what_is_beyond_inputs_and_results(with_torchvision):
    with_torchvision()
    problem = gpu.Arrays(TINY, "asymmetric").problem("float32", "nchw", "cpu")
    # the stand-in has each result twice, and 24 bytes
    output, d_features = problem.d_output.nbytes, problem.features.nbytes
    expected = max(output + 24, d_features - output + 24)
    for by in PEERS:
        assert gpu.memory_of(by, problem, Clock()) == expected


def test_the_budget_ends_a_run(with_torchvision, monkeypatch):
    with_torchvision()
    assert measured(budget=0)["rows"] == []
    seconds = itertools.count()
    monkeypatch.setattr(gpu, "clock", lambda: next(seconds))
    record = measured(budget=4)  # the clock is read once to set the end, and before each contestant
    assert [len(row["samples"]) for row in record["rows"]] == [1, 1, 1]
    left_out = record["left_out"]
    assert "tiny: rounds after 1" in left_out and "tiny: launches" in left_out
    assert any("torchvision, deterministic-adjoint" in name for name in left_out)
    assert "No time was left for: tiny-" in gpu_report.tables(record)


def test_the_results_folder_takes_records_of_a_gpu_only(tmp_path):
    record = {"machine": {"cpu": "a CPU"}, "date": "2026-01-01"}
    with pytest.raises(SystemExit, match="not measured on a GPU"):
        gpu.write(record, gpu.ROOT / "bench" / "results" / "gpu")
    assert gpu.write(record, tmp_path).read_text()


def test_what_has_a_goal_comes_first():
    assert set(gpu.ORDER) >= {name for goals in gpu_report.GOALS.values() for name in goals}


@pytest.fixture
def cuda(monkeypatch):
    """`gpu.Cuda` on a driver that is a stand-in and says what it was asked."""
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            asked.append("event")

        def elapsed_time(self, end):
            return 3.0

    class Graph:
        def replay(self):
            asked.append("replay")

    properties = SimpleNamespace(
        name="a stand-in", total_memory=1, L2_cache_size=2, multi_processor_count=3
    )
    for name, value in {
        "is_available": lambda: True,
        "get_device_properties": lambda device: properties,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": lambda graph: contextlib.nullcontext(),
        "synchronize": lambda: asked.append("synchronize"),
        "reset_peak_memory_stats": lambda: asked.append("reset"),
        "memory_allocated": lambda: 5,
        "max_memory_allocated": lambda: 7,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Cuda, "name", "cpu")
    monkeypatch.setattr(Cuda, "flush", lambda self: asked.append("flush"))
    device = Cuda()
    device.asked = asked
    return device


def test_a_sample_is_between_two_events_after_a_flush(cuda):
    call = gpu.Call(lambda: cuda.asked.append("before"), lambda _: cuda.asked.append("call"))
    assert cuda.seconds(call, 2) == [0.003, 0.003]
    one = ["before", "flush", "event", "call", "event"]
    assert cuda.asked == [*one, *one, "synchronize"]


def test_peak_memory_and_graphs(cuda):
    assert cuda.peak(lambda: cuda.asked.append("call") or 4) == (4, 7)
    assert cuda.asked == ["synchronize", "reset", "call", "synchronize"]
    assert cuda.allocated() == 5
    replay = cuda.captured(lambda: 6)
    assert replay() == 6 and cuda.asked[-1] == "replay"


def test_a_flush_leaves_the_buffer_written(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Cuda, "name", "cpu")
    device = Cuda()
    device.buffer.fill_(1)
    device.flush()
    assert device.buffer.nbytes == gpu.FLUSHED and not device.buffer.any()


def test_a_machine_without_a_driver_is_none(cuda, monkeypatch):
    monkeypatch.setattr(gpu, "smi", lambda fields: [f"<{field}>" for field in fields])
    machine = cuda.machine()
    assert machine["gpu"] == "a stand-in" and machine["driver"] == "<driver_version>"
    assert machine["clocks"]["clocks.sm"] == "<clocks.sm>" and json.dumps(machine)
    monkeypatch.setattr(gpu, "smi", lambda fields: [])
    monkeypatch.setattr(run, "text_of", lambda path: None)
    with pytest.raises(SystemExit, match="driver's version is not known"):
        cuda.machine()


def test_a_whole_run_on_the_stand_in(cuda, with_torchvision, monkeypatch):
    monkeypatch.setattr(gpu, "smi", lambda fields: ["1"] * len(fields))
    with_torchvision()
    record = measured(cuda)
    assert not [row for row in (*record["rows"], *record["launches"]) if "refused" in row]
    assert {t for row in record["rows"] for round_ in row["samples"] for t in round_} == {0.003}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")
def test_what_is_measured_are_the_kernels_of_the_gpu(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    import roialign.torch

    names, launch, expected = set(), roialign.torch._launch, gpu.Arrays.expected

    def spy(kernel, *arguments, **constants):
        names.add(kernel.fn.__name__)
        return launch(kernel, *arguments, **constants)

    def by_the_core(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(roialign.torch, "_triton_module", lambda tensor: None)
            return expected(*arguments)

    monkeypatch.setattr(gpu.Arrays, "expected", by_the_core)
    monkeypatch.setattr(roialign.torch, "_triton_module", lambda tensor: "launch")
    monkeypatch.setattr(roialign.torch, "_launch", spy)
    for name in ("VARIED", "SMALL"):
        monkeypatch.setattr(gpu, name, ())
    monkeypatch.setitem(sys.modules, "torchvision", None)
    small = replace(TINY, shape=(1, 2, 8, 8), per_image=1, output_size=(2, 1), sampling=1)
    rows = measured(workload=small, rounds=1, slice=0)["rows"]
    assert [row["operation"] for row in rows] == [*report.OPERATIONS]
    assert not any("refused" in row for row in rows)
    assert names == {"axis_taps", "touched", *report.OPERATIONS}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(monkeypatch, tmp_path):
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        command.main(["--device", "cuda", "--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())
