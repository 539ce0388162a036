"""`python -m bench.regimes`: what it draws, that it checks results, and what it calls slower."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("bench", reason="the benchmark is in the repository, not in the package")
from bench import regimes, run
from test_bench import Here


def test_three_thirds_are_the_grid():
    thirds = [{w.name for w, _ in regimes.regimes(seed)} for seed in range(3)]
    every = set.union(*thirds)
    assert sum(map(len, thirds)) == len(every) > 1000
    assert max(map(len, thirds)) - min(map(len, thirds)) <= 1
    for seed in range(3):
        for workload, layout in regimes.regimes(seed):
            assert 4 * math.prod(workload.shape) <= 80e6 and layout in ("nchw", "nhwc")
            assert 4 * math.prod(workload.output_shape) <= 120e6
            rois = workload.rois()
            height, width = workload.shape[2:]
            assert (rois[:, 1:] >= 0).all() and (rois[:, [3, 4]] <= [width, height]).all()


SLICE = SimpleNamespace(slice=0.03, device="cpu", overhead=False, clock="wall")  # as by default


class Player:
    """Answers as a worker does; `wrong`, `slow` and `clipped` are names of who is."""

    wrong = slow = clipped = ()
    sign = 1

    def __init__(self, process, device, threads, python):
        self.name = process

    def ask(self, command, key="", save=None, samples=1, **asked):
        if command == "prepare":
            value = self.sign * (1 + (self.name in self.wrong)) * (self.name not in self.clipped)
            np.save(save, np.full(3, value, np.float32))
            return {"seconds": 0.001, "same": True}
        if command == "time":
            return [0.002 if self.name in self.slow else 0.001] * samples
        return {"machine": {"cpu": "a cpu"}}.get(command, {})

    def close(self):
        pass


@pytest.fixture
def swept(tmp_path, capsys):
    """The exit status, what is printed and the record of a sweep of three regimes."""

    def sweep(options=(), peers=("torchvision", "onnxruntime"), **players):
        start = type("One", (Player,), players)
        named = itertools.chain(*(("--peer", f"{name}=a") for name in ("ours", *peers)))
        given = ["--seed", "1", "--most", "3", "--rounds", "2", "--results", str(tmp_path)]
        status = regimes.main([*given, *named, "--peers", *peers, *options], start)
        (file,) = tmp_path.glob("*.jsonl")
        return status, capsys.readouterr().out, json.loads(file.read_text())

    return sweep


def test_nobody_is_slower(swept):
    status, printed, record = swept()
    assert status == 0 and "takes" not in printed
    assert {row["by"] for row in record["rows"]} == {"ours", "torchvision", "onnxruntime"}
    assert len(record["rows"]) == 3 * 5  # ONNX Runtime has no adjoint
    samples = {len(row["samples"]) for row in record["rows"]}
    assert samples == {2 * run.turn(0.001, SLICE)["samples"]}


def test_who_is_slower_is_measured_again_and_told(swept):
    status, printed, record = swept(slow=("ours",))
    assert status == 1 and printed.count("takes 0.50 of our 2000.0 us") == 3 * 3
    samples = {len(row["samples"]) for row in record["rows"]}
    assert samples == {regimes.AGAIN * run.turn(0.001, SLICE)["samples"]}
    assert "| 3 | 3 | 0.50, 0.5 |" in printed or "| 1 | 1 | 0.50, 0.5 |" in printed


def test_a_clipped_maximum_is_compared_with_ours_clipped(swept):
    """Ours gives -1 here, and a peer whose maximum starts at 0 gives 0."""
    given = ["--operations", "max", "max_corner", "--convention", "half_pixel", "--clock", "cpu"]
    peers = "openvino", "onnxruntime"
    status, _, record = swept(given, peers, sign=-1, clipped=("openvino",))
    assert status == 0 and {row["convention"] for row in record["rows"]} == {"half_pixel"}
    found = {(row["by"], row["operation"]) for row in record["rows"]}
    ours = {("ours", "max"), ("ours", "max_corner")}
    assert found == ours | {("openvino", "max"), ("onnxruntime", "max_corner")}


@pytest.mark.parametrize("slow, least", [((), 1.0), (("ours",), 0.5)])
def test_a_map_of_ratios_is_drawn(swept, tmp_path, slow, least):
    """Most of it is in the colour of the ratio; its legend has as much of each."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from bench import heatmap  # which imports matplotlib

    swept(slow=slow)
    (image,) = tmp_path.glob("*.png")
    pixels = np.asarray(Image.open(image).convert("RGB"))
    areas = {
        ratio: (pixels == tuple(bytes.fromhex(colour[1:]))).all(2).sum()
        for ratio, colour in heatmap.COLOURS.items()
    }
    most = areas.pop(least)
    assert most > 5 * max(areas.values()) > 0


def test_a_wrong_result_is_not_timed(swept):
    with pytest.raises(run.PeerError, match="differs from ours"):
        swept(wrong=("torchvision",))


def test_torchvision_is_a_peer(tmp_path):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    given = ["--peers", "torchvision", "--rounds", "1", "--slice", "0.001", "--most", "1"]
    regimes.main([*given, "--seed", "0", "--results", str(tmp_path)], start=Here)
    (file,) = tmp_path.glob("*.jsonl")
    rows = json.loads(file.read_text())["rows"]
    found = [(row["by"], row["operation"]) for row in rows if min(row["samples"]) > 0]
    assert found == [*itertools.product(("ours", "torchvision"), ("forward", "adjoint"))]
