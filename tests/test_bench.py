"""The benchmark: its workloads are the ones it states, it runs, and it refuses wrong code."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from bench import __main__ as command
from bench import floor, reference, report, run
from bench.peers.worker import converted
from cases import WORKLOADS, Workload

TINY = Workload(
    "tiny", "smoke test", (2, 5, 12, 14), 1 / 2, 3, (3, 2), 2, (2.0, 4.0, 8.0, 0.5), (2, 5, 10)
)


def windows(workload):
    """[K, 2]: pixels from the first to the last that a box touches, y and x."""
    axes = reference.axes(
        workload.rois(), workload.shape, workload.output_size, workload.scale, 2, "half_pixel"
    )
    return np.array([[axis.pixels[-1] - axis.pixels[0] + 1 for axis in pair] for pair in axes])


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_windows_are_as_stated(workload):
    found = windows(workload)
    least, mean, largest = workload.window
    assert abs(found.mean() - mean) <= 0.1 * mean
    assert abs(found.min() - least) <= 1
    assert abs(found.max() - largest) <= max(2, 0.05 * largest)


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_boxes_are_inside_and_in_image_order(workload):
    rois = workload.rois()
    height, width = (length / workload.scale for length in workload.shape[2:])
    assert rois.shape == (workload.rois_number, 5)
    assert (np.diff(rois[:, 0]) >= 0).all() and rois[-1, 0] == workload.shape[0] - 1
    assert (
        (rois[:, 1:3] >= 0).all() and (rois[:, 3] <= width).all() and (rois[:, 4] <= height).all()
    )
    assert (rois[:, 3:] > rois[:, 1:3]).all()
    np.testing.assert_array_equal(rois, workload.rois())


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(run.WORKLOADS, "tiny", TINY)
    return ["--workloads", "tiny", "--peers", "--no-extras", "--rounds", "2", "--slice", "0.002"]


def test_runs_end_to_end_without_peers(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(floor, "LARGE", 2**20)
    command.main([*tiny, "--results", str(tmp_path)])
    (path,) = tmp_path.glob("*.jsonl")
    (line,) = path.read_text().splitlines()
    record = json.loads(line)
    assert record["versions"]["ours"]["isa"] and record["machine"]["cpu"]
    ran = {(row["operation"], row["dtype"], row["layout"]) for row in record["rows"]}
    variants = {("float32", "nchw"), ("float32", "nhwc"), ("float16", "nchw"), ("bfloat16", "nchw")}
    assert ran == {(operation, *v) for operation in report.OPERATIONS for v in variants}
    for row in record["rows"]:
        assert "refused" not in row
        assert len(row["samples"]) == 2 and min(map(min, row["samples"])) > 0
        assert 0 < row["floor"]["dram"] < row["floor"]["dram_and_cache"]
    assert "tiny adjoint" in capsys.readouterr().out


def contestant(**changes):
    return replace(run.Contestant("ours", "forward", "asymmetric"), **changes)


class Answering:
    """A worker that answers with the reference's result, changed by `spoil`."""

    def __init__(self, arrays, spoil):
        self.arrays, self.spoil = arrays, spoil

    def ask(self, command, save, operation, convention, **_):
        arrays = self.arrays
        axes = arrays.axes(convention)
        result = {
            "forward": lambda: reference.forward(arrays.features, arrays.rois, axes),
            "adjoint": lambda: reference.adjoint(arrays.d_output, arrays.rois, axes, TINY.shape),
            "box_gradient": lambda: reference.box_gradient(
                arrays.d_output, arrays.features, arrays.rois, axes
            ),
        }[operation]().astype(np.float32)
        np.save(save, self.spoil(result))
        return {"seconds": 0.001}


def spoilt(result, value):
    result = result.copy()
    result.flat[result.size - 1] += value
    return result


@pytest.mark.parametrize("operation", report.OPERATIONS)
def test_refuses_wrong_code(operation, tmp_path):
    arrays = run.Arrays(TINY, tmp_path)
    right = Answering(arrays, lambda result: result)
    asked = contestant(operation=operation), arrays, run.Settings()

    def check(worker, by="ours", results=None):
        one, *others = asked
        return run.checked(replace(one, by=by), worker, *others, {} if results is None else results)

    assert check(right) == 0.001
    for wrong in (0.1, np.nan):
        with pytest.raises(run.PeerError, match="differs from the reference"):
            check(Answering(arrays, lambda result, wrong=wrong: spoilt(result, wrong)))
    with pytest.raises(run.PeerError, match="has shape"):
        check(Answering(arrays, lambda result: result[:-1]))


def test_refuses_a_peer_that_differs_from_ours_outside_the_checked_channels(tmp_path):
    arrays = run.Arrays(TINY, tmp_path)
    results = {}
    run.checked(
        contestant(), Answering(arrays, lambda result: result), arrays, run.Settings(), results
    )

    def other_channel(result):
        result[:, 1] += 0.1  # of 0, 2 and 4 the reference checks each
        return result

    with pytest.raises(run.PeerError, match="differs from ours"):
        run.checked(
            contestant(by="paddle"),
            Answering(arrays, other_channel),
            arrays,
            run.Settings(),
            results,
        )


def test_a_worker_that_dies_or_raises_is_a_peer_error():
    worker = run.Worker("ours", sys.executable, 1)
    try:
        with pytest.raises(run.PeerError, match="AttributeError"):
            worker.ask("no_such_command")
        worker.process.kill()
        with pytest.raises(run.PeerError, match="ended"):
            worker.ask("versions")
    finally:
        worker.close()


def test_touched_bytes():
    shape, rois = (1, 3, 8, 16), np.array([[0, 2, 2, 4, 4]], np.float32)
    axes = reference.axes(rois, shape, (2, 2), 1.0, 1, "half_pixel")
    # samples at 2 and 3: rows and columns 2, 3 and the one after
    assert [axis.pixels.tolist() for axis in axes[0]] == [[2, 3, 4], [2, 3, 4]]
    asked = shape, (1, 3, 2, 2), rois, axes, 4
    out, windows_bytes = 3 * 4 * 4, 9 * 3 * 4
    assert floor.traffic("forward", *asked, "nhwc") == (9 * 3 * 4 + out, windows_bytes)
    assert floor.traffic("forward", *asked, "nchw") == (3 * 16 * 3 * 4 + out, windows_bytes)
    assert floor.traffic("adjoint", *asked, "nchw")[0] == 3 * 8 * 16 * 4 + out


def test_layout_conversion_keeps_values():
    array = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    last = converted(array, "float32", "nhwc")
    np.testing.assert_array_equal(last, array)
    assert last.strides == (96, 4, 32, 8)


def test_readme_part_is_rewritten(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.rewrite(readme, "new")
    assert readme.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    readme.write_text("no markers")
    with pytest.raises(SystemExit):
        report.rewrite(readme, "new")
