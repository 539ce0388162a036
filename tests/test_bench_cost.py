"""The expected cost of the GPU kernels: counts of one box by hand, and of others lane by lane."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="triton is not installed")

from bench import cost, reference
from cases import WORKLOADS

# samples at 2.5 and 3.5: pixels 2, 3 and 3, 4, on both axes
ONE = SimpleNamespace(
    shape=(1, 16, 8, 16),
    output_shape=(1, 16, 2, 2),
    output_size=(2, 2),
    rois_number=1,
    scale=1.0,
    sampling=1,
    rois=lambda: np.array([[0, 2, 2, 4, 4]], np.float32),
)
TABLE = 4 * ((8 + 3 * 2) + (16 + 3 * 2))  # bytes of one part of the weights


def test_forward_of_one_box():
    assert cost.cost(ONE, "forward") == cost.Cost(
        dram=3 * 16 * 16 * 4 + 4 * 16 * 4,  # 3 rows of a line each
        l2=9 * 16 * 4 + 4 * 16 + 8 * 8,  # 3x3 pixels, ranges of 4 bins, 8 entries
        l1=4 * 2 * 16 * 32,  # 2x2 loads, each of 2 rows
        instructions=int(10.6 * 4 * 4 * 16),
        loads=4 * 4 * 16,
        multiply_adds=(4 + 2) * 4 * 16,
        programs=2 + 1,
        private=8 + 4 * 2 * 8 + 4 + 2 * TABLE,
    )


def test_adjoint_of_one_box():
    assert cost.cost(ONE, "adjoint") == cost.Cost(
        dram=8 * 16 * 16 * 4 + 4 * 16 * 4,
        l2=4 * 16 * 4 + 24 + 8 * (8 + 16) + 8 * 4,
        l1=(4 + 2) * 16 * 32,  # of rows 2 and 3, and of row 4
        instructions=int(8.6 * 4 * 128 * 16),
        loads=4 * 128 * 16,
        multiply_adds=(4 + 2) * 128 * 16,
        programs=2 + 1 + 1,
        private=8 + (8 + 16) * 2 * 4 + 6 * 4 + 4 + TABLE + 8,
    )


def test_box_gradient_and_variants_of_one_box():
    forward, box_gradient = (cost.cost(ONE, name) for name in ("forward", "box_gradient"))
    d_output = 4 * 16 * 4
    assert box_gradient.multiply_adds == (3 * 4 + 4 * 2) * 4 * 16
    assert box_gradient.l2 - forward.l2 == 2 * 4 * 8 + d_output
    assert box_gradient.private - forward.private == 2 * TABLE + 16
    last = cost.cost(ONE, "forward", layout="nhwc")
    assert last.l1 == 4 * 4 * 16 * 4 and last.programs == forward.programs
    half = cost.cost(ONE, "forward", "bfloat16")
    assert half.l2 == forward.l2 - 9 * 16 * 2 and half.loads == forward.loads


def test_what_takes_longest_is_expected():
    counts = dict.fromkeys(("dram", "l2", "l1", "instructions", "loads", "multiply_adds"), 0)
    found = cost.Cost(**counts | {"l2": 55e9}, programs=1, private=0)
    assert found.expected == (0.01, "L2")


@pytest.fixture(params=["W1", "W2", "W4"])
def some(request):
    """A few boxes of a workload: their axes, bins of x."""
    workload = WORKLOADS[request.param]
    rois = workload.rois()[:: workload.rois_number // 3]
    return reference.axes(
        rois, workload.shape, workload.output_size, workload.scale, workload.sampling, "asymmetric"
    )


def entries(axis):
    """Bin -> its pixels, and pixel -> its bins."""
    of_bin = [[r for r, w in zip(axis.pixels, row, strict=True) if w] for row in axis.weights]
    of_pixel = {r: [k for k, pixels in enumerate(of_bin) if r in pixels] for r in axis.pixels}
    return of_bin, of_pixel


@pytest.mark.parametrize("itemsize", [2, 4])
def test_rows_lane_by_lane(some, itemsize):
    lanes = 64
    for y, x in some:
        of_y, of_x = entries(y)[0], entries(x)[0]
        bins = [(p, q) for p in range(len(of_y)) for q in range(len(of_x))]
        values, sectors, loads, outer = set(), 0, 0, 0
        for block in range(0, len(bins), lanes):
            program = bins[block : block + lanes]
            most_y = max(len(of_y[p]) for p, _ in program)
            most_x = max(len(of_x[q]) for _, q in program)
            outer += most_y * lanes
            for i in range(most_y):
                for j in range(most_x):
                    loads += lanes
                    for warp in range(0, len(program), 32):
                        read = [
                            (of_y[p][i], of_x[q][j])
                            for p, q in program[warp : warp + 32]
                            if i < len(of_y[p]) and j < len(of_x[q])
                        ]
                        values |= {(block, *pixel) for pixel in read}
                        sectors += len({(r, c * itemsize // 32) for r, c in read})
        constants = {"BLOCK_B": lanes, "PARTS": 1}
        found = cost.by_rows(y, x, itemsize, constants)
        assert found[2:] == (sectors, loads, outer)
        if len(bins) <= lanes:
            assert found[0] == len(values)
        else:  # a block's first and last row of bins are counted as if they were whole
            assert len(values) <= found[0] <= 2 * len(values)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_columns_lane_by_lane(some, itemsize):
    height, width = 8, 16
    for y, x in some:
        (_, of_y), (of_bin_x, of_x) = entries(y), entries(x)
        values, sectors, loads, outer = set(), 0, 0, 0
        tiles_y = range(y.pixels[0] // height, y.pixels[-1] // height + 1)
        tiles_x = range(x.pixels[0] // width, x.pixels[-1] // width + 1)
        for tile in [(a, b) for a in tiles_y for b in tiles_x]:
            lanes = [
                (of_y.get(r, []), of_x.get(c, []))
                for r in range(tile[0] * height, (tile[0] + 1) * height)
                for c in range(tile[1] * width, (tile[1] + 1) * width)
            ]
            most_y, most_x = (max(len(lane[axis]) for lane in lanes) for axis in (0, 1))
            outer += most_y * len(lanes)
            for i in range(most_y):
                for j in range(most_x):
                    loads += len(lanes)
                    for warp in range(0, len(lanes), 32):
                        read = [
                            (ps[i], qs[j])
                            for ps, qs in lanes[warp : warp + 32]
                            if i < len(ps) and j < len(qs)
                        ]
                        values |= {(tile, *bin) for bin in read}
                        sectors += len({(p * len(of_bin_x) + q) * itemsize // 32 for p, q in read})
        constants = {"TILE_Y": height, "TILE_X": width}
        found = cost.by_columns(y, x, itemsize, constants)
        assert (found[0], *found[2:]) == (len(values), sectors, loads, outer)


def test_prints_its_table(capsys):
    cost.main(["--workloads", "W6", "--operations", "forward", "adjoint"])
    printed = capsys.readouterr().out
    assert "not measured" in printed
    assert "| W6 forward |" in printed and "| W6 adjoint |" in printed
