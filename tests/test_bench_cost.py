"""The expected cost of the GPU kernels: counts of one box by hand, and of others lane by lane."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="triton is not installed")

from bench import cost, reference
from cases import WORKLOADS, Workload


class One(Workload):
    """Samples at 2.5 and 3.5: pixels 2, 3 and 3, 4, on both axes."""

    def rois(self):
        return np.array([[0, 2, 2, 4, 4]], np.float32)


ONE = One("one", "one box", (1, 16, 8, 16), 1.0, 1, (2, 2), 1, (), ())
# of whose boxes some tiles have no tap
SPARSE = replace(WORKLOADS["W1"], name="sparse", sampling=1, output_size=(2, 2))
TABLE = 4 * ((8 + 3 * 2) + (16 + 3 * 2))  # bytes of one part of the weights


def test_forward_of_one_box():
    assert cost.cost(ONE, "forward") == {
        "DRAM": 3 * 16 * 16 * 4 + 4 * 16 * 4,  # 3 rows of a line each
        "L2": 9 * 16 * 4 + 4 * 16 + 8 * 8,  # 3x3 pixels, ranges of 4 bins, 8 entries
        "L1": 4 * 2 * 16 * 32,  # 2x2 loads, each of 2 rows
        "instructions": int((10.6 * 4 * 4 + 5.9 * 4 * 2 + 60 * 4) * 16),
        "loads": 4 * 4 * 16,
        "multiply-adds": (4 + 2) * 4 * 16,
        "programs": 2 + 1,
        "private": 8 + 4 * 2 * 8 + 4 + 2 * TABLE,
    }


def test_adjoint_of_one_box():
    """15 channels: not by rows."""
    one = replace(ONE, shape=(1, 15, 8, 16))
    assert cost.cost(one, "adjoint") == {
        "DRAM": 8 * 16 * 15 * 4 + 4 * 15 * 4,
        "L2": 4 * 15 * 4 + 24 + 8 * (8 + 16) + 8 * 4,
        "L1": (4 + 2) * 15 * 32,  # of rows 2 and 3, and of row 4
        "instructions": int((8.6 * 4 + 6.0 * 2 + 15.8) * 128 * 16),
        "loads": 4 * 128 * 16,
        "multiply-adds": (4 + 2) * 128 * 16,
        "programs": 2 + 1 + 1,
        "private": 8 + (8 + 16) * 2 * 4 + 6 * 4 + 4 + TABLE + 8,
    }


def test_map_rows_of_one_box():
    """3 rows of pixels, of which the one between has both bins."""
    assert cost.cost(ONE, "adjoint", layout="nhwc") == {
        "DRAM": 8 * 16 * 16 * 4 + 4 * 16 * 4,
        "L2": 8 * 16 * 16 * 4 + 4 * 2 * 16 * 4,
        "L1": 4 * 4 * 16 * 4,
        "instructions": int((1.1 * 3 + 3.2 * 3 + 5.7 * 4) * 8 * 16),
        "loads": 4 * 4 * 16,
        "multiply-adds": 4 * 2 * 8 * 16,
        "programs": 2 + (2 + 16) + 16,  # axes; axes and tiles; tiles
        "private": 8 + (8 + 16) * (2 * 4 + 2 * 8) + 6 * 4 + 4 + TABLE + 8 * 16 + 2 * 4 + 4,
    }
    packed = cost.cost(ONE, "adjoint")
    assert packed["L2"] - packed["DRAM"] == 4 * 2 * 16 * 4 - 4 * 16 * 4
    many = cost.cost(replace(ONE, output_size=(8, 8)), "adjoint", layout="nhwc")
    assert many["multiply-adds"] == (8 + 8) * 8 * 8 * 16  # 8 bins on the middle pixel


def test_box_gradient_and_variants_of_one_box():
    forward, box_gradient = (cost.cost(ONE, name) for name in ("forward", "box_gradient"))
    assert box_gradient["multiply-adds"] == (3 * 4 + 4 * 2) * 4 * 16
    assert box_gradient["L2"] - forward["L2"] == 2 * 4 * 8 + 4 * 16 * 4
    assert box_gradient["private"] - forward["private"] == 2 * TABLE + 16
    half = cost.cost(ONE, "forward", "bfloat16")
    assert half["L2"] == forward["L2"] - 9 * 16 * 2 and half["loads"] == forward["loads"]


def test_sorted_rows_of_one_box():
    loads = 128 * 16 * 16  # one step: all of its lanes, 4x4 taps and 16 channels
    assert cost.cost(ONE, "forward", layout="nhwc") == {
        "DRAM": 3 * 3 * 16 * 4 + 4 * 16 * 4,
        "L2": 9 * 16 * 4 + 4 * 16 * 4,
        "L1": 4 * loads,
        "instructions": int(2.97 * loads),
        "loads": loads,
        "multiply-adds": loads,
        "programs": 1 + 2 + 1,  # taps, tiles of 8x8, rows
        "private": 8 * (4 * 4 + 1 + 2),
    }
    packed = cost.cost(replace(ONE, output_size=(4, 8)), "forward")
    assert packed["private"] == 8 * (12 * 4 + 1 + 4) + 4 * 8 * 16 * 16


def test_box_rows_of_one_box():
    loads = 16 * 16 * 16  # one step: all of its lanes, 4x4 taps and 16 channels
    assert cost.cost(ONE, "box_gradient", layout="nhwc") == {
        "DRAM": 3 * 3 * 16 * 4 + 4 * 16 * 4,
        "L2": 9 * 16 * 4 + 4 * 16 * 4,
        "L1": 4 * loads,
        "instructions": int(loads * (2.2 + 2 * 11.6)),  # a block of 16 channels
        "loads": loads,
        "multiply-adds": loads,
        "programs": 1 + 2 + 1 + 1,  # taps, tiles of 8x8, rows, sums
        "private": 8 * (3 * 4 * 4 + 1 + 2) + 16 * 2,
    }
    both = replace(ONE, output_size=(4, 8))  # are packed
    packed, forward = (cost.cost(both, name) for name in ("box_gradient", "forward"))
    assert packed["DRAM"] - forward["DRAM"] == 2 * 4 * 32 * 16
    most = cost.cost(replace(both, sampling=0), "box_gradient", layout="nhwc")
    assert most["instructions"] == int(loads * (2.7 + 2 * 10.1) * 2 + 16 * 16 * 16 * 2 * 3.8 * 2)


def test_peer_of_one_box():
    forward, adjoint = (cost.cost(ONE, name, by="torchvision") for name in ("forward", "adjoint"))
    assert forward["instructions"] == int(64 * (274 + 91.5))
    assert forward["L2"] == 9 * 16 * 4 + 64 * 4
    assert adjoint["L2"] == 4 * 64 * 32 + 64 * 4


def test_general_kernels_of_one_box():
    usual, general = (cost.cost(ONE, "adjoint", layout="nhwc", by=by) for by in ("ours", "general"))
    assert general["loads"] == 4 * 128 * 16 > usual["loads"]


def test_writes_its_page(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"a\n{cost.BEGIN}\nold\n{cost.END}\nb\n")
    monkeypatch.setattr(cost, "PAGE", page)
    monkeypatch.setattr(cost, "SHOWN", ("W6",))
    cost.main(["--write"])
    first, begin, titles, _, *rows, end, last = page.read_text().splitlines()
    assert (first, begin, end, last) == ("a", cost.BEGIN, cost.END, "b")
    assert titles.count("|") == 2 + len(cost.COLUMNS) and len(rows) == 3
    assert rows[2].endswith("| - |") and rows[0].startswith("| W6 forward |")


def test_what_takes_longest_is_expected():
    assert cost.expected({"DRAM": 0, "L2": 55e9, "L1": 0, "instructions": 0}) == (0.01, "L2")


def lanes_of_bins(y, x):
    """(lane's rows, lane's columns) of each program of 64 lanes."""
    of_y, of_x = ([axis.pixels[row != 0].tolist() for row in axis.weights] for axis in (y, x))
    lanes = list(product(of_y, of_x))
    programs = [lanes[first : first + 64] for first in range(0, len(lanes), 64)]
    return [program + [([], [])] * (64 - len(program)) for program in programs]


def lanes_of_pixels(y, x):
    """The same of the adjoint: programs are tiles."""

    def of(axis, pixel):
        return [k for k, row in enumerate(axis.weights) if row[axis.pixels == pixel].any()]

    tiles = [
        [
            range(t * size, (t + 1) * size)
            for t in range(axis.pixels[0] // size, axis.pixels[-1] // size + 1)
        ]
        for axis, size in ((y, 8), (x, 16))
    ]
    return [[(of(y, r), of(x, c)) for r, c in product(*tile)] for tile in product(*tiles)]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    "workload", [*(WORKLOADS[name] for name in ("W1", "W2", "W4")), SPARSE], ids=lambda w: w.name
)
@pytest.mark.parametrize("programs", [(cost.bins, lanes_of_bins), (cost.tiles, lanes_of_pixels)])
def test_lane_by_lane(workload, programs, itemsize):
    counted, by_lane = programs
    constants = {"BLOCK_B": 64, "TILE_Y": 8, "TILE_X": 16}
    row = 37
    for y, x in reference.axes_of(
        workload, workload.rois()[:: workload.rois_number // 3], "asymmetric"
    ):
        found = [cost.count(*lanes, row, itemsize) for *lanes, _ in counted(y, x, 1, constants)]
        assert found == [one_by_one(lanes, row, itemsize) for lanes in by_lane(y, x)]


def one_by_one(lanes, row, itemsize):
    """Values, sectors, loads, steps over y and lanes of one program."""
    most_y, most_x = (max(len(lane[axis]) for lane in lanes) for axis in (0, 1))
    values, sectors = set(), 0
    for i, j in product(range(most_y), range(most_x)):
        for warp in range(0, len(lanes), 32):
            at = [
                ys[i] * row + xs[j]
                for ys, xs in lanes[warp : warp + 32]
                if i < len(ys) and j < len(xs)
            ]
            values.update(at)
            sectors += len({a * itemsize // 32 for a in at})
    return len(values), sectors, most_y * most_x * len(lanes), most_y * len(lanes), len(lanes)


def test_prints_its_table(capsys):
    cost.main(["W6"])
    printed = capsys.readouterr().out
    assert "not measured" in printed
    assert "| W6 forward |" in printed and "| W6 adjoint |" in printed
