"""The benchmark: its workloads are the ones it states, it runs, and it refuses wrong code."""

import itertools
import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench import __main__ as command, devices, reference, report, run, worker
from bench.peers import LAYOUTS, MAIN, OPERATIONS, PEERS, SAMPLED
from cases import PYRAMIDS, WORKLOADS, Workload

TINY = Workload(
    "tiny", "smoke test", (2, 5, 12, 14), 1 / 2, 3, (3, 2), 2, (2.0, 4.0, 8.0, 0.5), (2, 5, 10)
)


class Here:
    """A worker of this process. What it does to results can be changed."""

    def __init__(self, process, device, threads=1, python=None, path=None):
        self.of, self.path, self.session = (process, device), path, None

    def ask(self, command, **asked):
        try:
            self.session = self.session or worker.Session(*self.of)
            reply = getattr(self.session, command)(**json.loads(json.dumps(asked)))
        except Exception as error:
            raise run.PeerError(f"{type(error).__name__}: {error}") from error
        return reply | {"at": str(self.path)} if command == "versions" else reply

    def close(self):
        pass


def apart(process, device, threads=1, python=None, path=None):
    """A worker in a process of its own, in this environment: OpenVINO is kept out of ours."""
    return run.Worker(process, device, threads, sys.executable, path)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(run.EVERY, "tiny", TINY)
    monkeypatch.setitem(run.WORKLOADS, "tiny", TINY)  # and so in every dtype and layout
    monkeypatch.setattr(devices, "LARGE", 2**20)
    return ["--workloads", "tiny", "--rounds", "2", "--slice", "0.002"]


def settings(**changes):
    usual = {"device": "cpu", "operations": MAIN, "dtypes": ["float32"], "layouts": ["nchw"]}
    usual |= {"peers": ["mindspore", "jnp_gathers"], "convention": "asymmetric", "out": True}
    return SimpleNamespace(**usual | {"before": None} | changes)


def ran(arguments, folder, start=Here, status=0):
    """The record of a command, as it is written."""
    assert command.main([*arguments, "--results", str(folder)], start=start) == status
    (path,) = folder.rglob("*.jsonl")
    (line,) = path.read_text().splitlines()
    return json.loads(line)


@pytest.mark.parametrize("workload", (WORKLOADS | PYRAMIDS).values(), ids=WORKLOADS | PYRAMIDS)
def test_windows_are_as_stated(workload):
    """Pixels from the first to the last that a box touches, y and x."""
    axes = reference.samples(replace(workload, sampling=2), workload.rois(), "half_pixel")
    found = np.array([[window(axis) for axis in pair] for pair in axes])
    least, mean, largest = workload.window
    assert abs(found.mean() - mean) <= 0.1 * mean
    assert abs(found.min() - least) <= 1
    assert abs(found.max() - largest) <= max(2, 0.05 * largest)


def window(axis):
    first, last = axis.position(0, 0), axis.position(axis.bins - 1, axis.n - 1)
    return min(int(last) + 2, axis.length) - int(max(first, 0))


@pytest.mark.parametrize("workload", (WORKLOADS | PYRAMIDS).values(), ids=WORKLOADS | PYRAMIDS)
def test_boxes_are_inside_and_in_image_order(workload):
    rois = workload.rois()
    height, width = (length / workload.scale for length in workload.shape[2:])
    assert rois.shape == (workload.rois_number, 5)
    assert (np.diff(rois[:, 0]) >= 0).all() and rois[-1, 0] == workload.shape[0] - 1
    assert (rois[:, 1:3] >= 0).all() and (rois[:, 3:] <= [width, height]).all()
    assert (rois[:, 3:] > rois[:, 1:3]).all()
    np.testing.assert_array_equal(rois, workload.rois())


def test_runs_end_to_end_without_peers(tiny, tmp_path, capsys):
    record = ran([*tiny, "--peers", "--no-extras"], tmp_path, start=run.Worker)
    assert record["versions"]["ours"]["isa"] and record["machine"]["cpu"]
    found = {(row["operation"], row["dtype"], row["layout"]) for row in record["rows"]}
    variants = {("float32", "nchw"), ("float32", "nhwc"), ("float16", "nchw"), ("bfloat16", "nchw")}
    assert found == {(operation, *variant) for operation in MAIN for variant in variants}
    for row in record["rows"]:
        assert "refused" not in row
        assert len(row["samples"]) == 2 and min(map(min, row["samples"])) > 0
        assert 0 < row["floor"]["dram"] < row["floor"]["dram_and_cache"]
    assert "tiny roialign, adjoint, nhwc" in capsys.readouterr().out


@pytest.mark.parametrize("peers", [(), ("torch", "onnxruntime"), ("torchvision",)])
def test_a_pyramid(tiny, tmp_path, monkeypatch, peers):
    """All results are those of the reference; peers without several maps are left out."""
    for name in peers:
        pytest.importorskip(name, reason=f"{name} is not installed")
    sizes = {"shape": (2, 5, 120, 140), "side": (4.0, 40.0, 110.0, 0.7), "per_image": 9}
    workload = replace(TINY, **sizes, coarser=2)
    assert {*workload.levels(workload.rois())} == {0, 1, 2}
    monkeypatch.setitem(run.EVERY, "tiny", workload)
    monkeypatch.delitem(run.WORKLOADS, "tiny")
    record = ran([*tiny, "--peers", *peers, "jax", "--no-extras"], tmp_path)
    found = {(row["by"], row["operation"]) for row in record["rows"]}
    operations = {name: {*PEERS["cpu"][name].operations} & {*MAIN} for name in ("ours", *peers)}
    assert found == {(name, each) for name in operations for each in operations[name]}
    assert not any("refused" in row for row in record["rows"])


@pytest.mark.parametrize("peers", [(), ("onnxruntime", "openvino")])
def test_maxima_and_rotated_boxes(tiny, tmp_path, peers):
    """All results are those of the oracle; a table for a document is made of the record."""
    if not all(map(find_spec, peers)):
        pytest.skip("onnxruntime or openvino is not installed")
    given = ["--sampled", "--clock", "cpu", "--peers", *peers, *tiny]
    record = ran(given, tmp_path, start=apart if peers else Here)
    rows = [row for row in record["rows"] if OPERATIONS[row["operation"]].sampled]
    found = {(row["by"], row["operation"]) for row in rows}
    theirs = {("onnxruntime", "max_corner"), ("openvino", "max"), ("openvino", "rotated")}
    assert found == {("ours", operation) for operation in SAMPLED} | (theirs if peers else set())
    assert not any("refused" in row for row in rows)
    assert {row["dtype"] for row in rows} == {"float32"}
    assert {row["layout"] for row in rows} == {*LAYOUTS}
    text = report.sampled_table([record])
    assert "| tiny Max, adjoint | " in text and " | roialign, max | " in text
    assert (" (OpenVINO) | " in text) == bool(peers)


@pytest.mark.skipif(not find_spec("openvino"), reason="openvino is not installed")
def test_rotated_boxes_of_a_peer_have_one_convention(tiny, tmp_path):
    given = ["--operations", "rotated", "--peers", "openvino", "--no-extras", *tiny]
    record = ran([*given, "--convention", "asymmetric"], tmp_path, start=apart)
    assert ["refused" in row for row in record["rows"]] == [False, True, False]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_one_box_memory_and_import(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "VARIED", ("tiny",))
    for name, workload in run.HUGE.items():
        monkeypatch.setitem(run.EVERY, name, replace(workload, shape=(1, 4, 200, 304)))
    record = ran(["--workloads", "map", "huge", *tiny[1:], "--peers"], tmp_path)
    timed = [row["workload"] for row in record["rows"] if row.get("samples")]
    assert timed == ["map", "huge", *["tiny"] * 12]
    weighed = {row["operation"]: row["memory"] for row in record["rows"] if "memory" in row}
    assert set(weighed) == {*MAIN} and min(weighed.values()) >= 0
    assert len(record["import"]) == 9 and min(record["import"]) > 0
    printed = capsys.readouterr().out
    assert "| huge roialign, forward |" in printed and "roialign, forward, memory" in printed
    assert "`import roialign` beyond NumPy" in printed


def test_torchvision_is_right_and_takes_turns(tiny, tmp_path):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    record = ran([*tiny, "--peers", "torchvision", "--no-extras"], tmp_path)
    rows = [row for row in record["rows"] if row["by"] == "torchvision"]
    found = [(row["operation"], row["layout"]) for row in rows if len(row["samples"]) == 2]
    assert sorted(found) == sorted(itertools.product(("forward", "adjoint"), LAYOUTS))
    assert "| torchvision, ms | fastest other, ms |" in report.all_tables([record])


def test_what_a_call_costs(tiny, tmp_path, capsys):
    record = ran(["--overhead", "--peers", "core", *tiny[2:]], tmp_path)
    assert [(row["by"], row["workload"]) for row in record["rows"]] == [
        ("ours", "W0"),
        ("core", "W0"),
    ]
    assert all(len(row["samples"]) == 2 for row in record["rows"])
    assert "us above the core alone" in capsys.readouterr().out


def test_another_build_takes_turns(tiny, tmp_path, capsys):
    plain = ["--dtype", "float32", "--layout", "nchw"]
    record = ran([*tiny, *plain, "--before", str(tmp_path / "other")], tmp_path)
    found = [(row["operation"], row["build"]) for row in record["rows"]]
    assert found == [(operation, build) for operation in MAIN for build in ("", "before")]
    for row in record["rows"]:
        row["samples"] = [[3.0], [2.0]] if row["build"] else [[2.0], [2.0]]
    assert "| 1.250 (1.000..1.500) |" in report.tables(record)
    with pytest.raises(SystemExit, match="both builds are at"):
        command.main([*tiny, "--before", "x"], start=lambda *a: Here(*a[:4]))


def test_where_another_build_is(tmp_path):
    assert run.place_of(str(tmp_path), "python") == ("python", str(tmp_path))
    (tmp_path / "src").mkdir()
    assert run.place_of(str(tmp_path), "python") == ("python", str(tmp_path / "src"))
    assert run.place_of(sys.executable, "python") == (sys.executable, "")


def test_a_peer_of_another_convention_stands_beside_ours_of_the_same(tiny):
    found = [(r["by"], r["operation"], r["convention"]) for r in run.contestants(TINY, settings())]
    for name, operation in itertools.product(("ours", "mindspore"), ("forward", "adjoint")):
        assert found.count((name, operation, "mindspore")) == 1
    assert ("jnp_gathers", "forward", "asymmetric") in found


def test_every_peer_says_what_it_is():
    for peers in PEERS.values():
        for peer in peers.values():
            source = Path(run.ROOT / "bench" / "peers" / f"{peer.module}.py").read_text()
            functions = {OPERATIONS[operation].function for operation in peer.operations}
            assert all(f"def {function}(" in source for function in functions)
            assert {peers[name].ours for name in peer.beside} == {True}


class Spoiling(Here):
    """Its results go through `spoil`."""

    spoil = staticmethod(lambda result: None)

    def ask(self, command, **asked):
        reply = super().ask(command, **asked)
        if command == "prepare":
            result = np.load(asked["save"])
            changed = self.spoil(result)
            np.save(asked["save"], result if changed is None else changed)
        return reply


def checked(spoil, operation, folder, ours=True):
    answers = run.Answers(TINY, folder, Here("ours", "cpu"), 1)
    worker = Spoiling("ours", "cpu")
    worker.spoil = spoil
    worker.ask("load", **answers.files)
    (row,) = run.contestants(TINY, settings(operations=[operation], peers=[]))
    return answers.check(row, worker, PEERS["cpu"]["ours" if ours else "torchvision"])


def added(value, at):
    return lambda result: result.__setitem__(at, result[at] + value)


@pytest.mark.parametrize("operation", (*MAIN, *SAMPLED))
def test_refuses_wrong_code(operation, tmp_path):
    assert checked(lambda result: None, operation, tmp_path) > 0
    for value in (0.1, np.nan):
        with pytest.raises(run.PeerError, match="differs from the reference"):
            checked(added(value, np.s_[-1:, -1:]), operation, tmp_path)
    with pytest.raises(run.PeerError, match="has shape"):
        checked(lambda result: result[:-1], operation, tmp_path)


def test_refuses_a_peer_that_differs_from_ours_outside_the_checked_channels(tmp_path):
    with pytest.raises(run.PeerError, match="differs from ours"):
        checked(added(0.1, np.s_[:, 1]), "forward", tmp_path)  # the reference has 0, 2 and 4


def test_a_peer_may_round_coordinates_otherwise(tmp_path):
    """Which on this map counts 0.033 of the tolerance."""
    spoil = added(1.02 * run.TOLERANCE * np.abs(TINY.features()).max(), np.s_[-1:])
    assert checked(spoil, "forward", tmp_path, ours=False) > 0
    with pytest.raises(run.PeerError, match="differs from the reference"):
        checked(spoil, "forward", tmp_path)


def test_a_worker_that_dies_or_raises_is_a_peer_error():
    one = run.Worker("ours", "cpu", 1, sys.executable)
    try:
        with pytest.raises(run.PeerError, match="AttributeError"):
            one.ask("no_such_command")
        one.process.kill()
        with pytest.raises(run.PeerError, match="ended"):
            one.ask("versions")
    finally:
        one.close()


def test_readme_part_is_rewritten(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.rewrite(readme, "new")
    assert readme.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    readme.write_text("no markers")
    with pytest.raises(SystemExit):
        report.rewrite(readme, "new")


def test_the_documents_are_what_a_record_says():
    found = [*map(report.records, (run.ROOT / "bench" / "results").glob("*.jsonl"))]
    image = "docs/images/bench.png"
    shorts = [report.short_table(report.main_run(runs), image) for runs in found]
    for page, parts in (("README.md", shorts), ("docs/speed.md", map(report.all_tables, found))):
        text = (run.ROOT / page).read_text()
        assert any(f"{report.BEGIN}\n{part}\n{report.END}" in text for part in parts), page


def test_the_table_of_maxima_is_what_a_record_says():
    found = map(report.records, (run.ROOT / "bench" / "results" / "sampled").glob("*.jsonl"))
    text, (begin, end) = (run.ROOT / "docs" / "speed.md").read_text(), report.SAMPLED
    assert any(f"{begin}\n{report.sampled_table(runs)}\n{end}" in text for runs in found)


def test_the_chart_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    newest = sorted((run.ROOT / "bench" / "results").glob("*.jsonl"))[-1]
    report.chart(report.main_run(report.records(newest)), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10000
