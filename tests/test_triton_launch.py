"""Which kernels are launched, on which grids, with how much private memory: nothing runs."""

import math
from dataclasses import replace

import pytest

import cases
import roialign
from roialign import _rule
from roialign._rois import Rois

pytest.importorskip("torch", reason="the launched arrays are torch tensors")
pytest.importorskip("triton", reason="the kernels need Triton")

import torch
import triton.language as tl

import triton_offline as offline
from roialign._triton import compiled, geometry, launch
from triton_offline import OPERATIONS, Problem, memory

CONVENTION = roialign.conventions["half_pixel"]
SCALES = 0.25, 0.5
RULE = _rule.vector(CONVENTION, 2)
each_operation = pytest.mark.parametrize("operation", OPERATIONS)


def blocks(number, size):
    return -(-number // size)


@pytest.mark.parametrize("workload", cases.WORKLOADS.values(), ids=lambda workload: workload.name)
def test_private_memory(workload):
    """For each RoI a table as long as its bins, or also as the map's sides, and a packed map; for
    the adjoint a table as long as both, and a bit for each tile.
    """
    (n, _, h, w), (k, c, p, q) = workload.shape, workload.output_shape
    rule = _rule.vector(CONVENTION, workload.sampling)
    problem = Problem(images=n, channels=c, size=(h, w), bins=(p, q), count=k, rule=rule)
    spread = (3, 3) if workload.sampling else (3 + p // 2, 3 + q // 2)
    room = h + w + p * spread[0] + q * spread[1]
    unused = 4
    forward = problem.launches("forward")
    if c % 16:
        assert memory(forward) == k * (8 + 16 * (p + q) + 8 * room) + unused
    else:
        entries = 4 * (p + q) if workload.sampling else room + 5 * (p + q)
        assert memory(forward) == 8 * k * (entries + 1 + p) + 4 * n * c * h * w
        last = replace(problem, last=True)
        assert memory(last.launches("forward")) == 8 * k * (entries + 1 + p)
    table = k * (8 + 8 * (h + w) + 24 + 4 * room)
    adjoint = memory(problem.launches("adjoint"))
    if c % 16:
        tiles = n * blocks(h, launch.TILE[0]) * blocks(w, launch.TILE[1])
        assert adjoint == table + unused + 8 * tiles * blocks(k, 32)
    else:
        table += k * (16 * (h + w) + 8) + 8 * n * h * blocks(w, 8) * blocks(k, 32)
        assert adjoint == table + unused + 4 * k * c * p * q
        last = replace(problem, last=True)
        assert memory(last.launches("adjoint")) == table + 2 * unused
        kind = 4 * (p + q) if workload.sampling else room + 3 * (p + q)
        sums = 16 * k * p * blocks(c, 128 if workload.sampling else 512)
        box_gradient = 8 * k * (entries + 2 * kind + 1 + p) + sums
        assert memory(last.launches("box_gradient")) == box_gradient
        box_gradient += 4 * n * c * h * w + 4 * k * c * p * q
        assert memory(problem.launches("box_gradient")) == box_gradient


def test_grids():
    problem = Problem(count=70, channels=250, size=(17, 33), bins=(7, 10))
    tiles = 2 * 3 * 3
    assert {(each.kernel, *each.grid) for each in problem.launches()} == {
        ("axis_taps", 2 * blocks(70, 2)),
        ("touched", tiles),
        ("forward", 70 * blocks(70, 64) * blocks(250, 16)),
        ("adjoint", tiles * blocks(250, 16)),
        ("box_gradient", 70 * blocks(250, 16)),
        ("sum_blocks", 1),
    }
    problem = replace(problem, channels=256)
    pack, sort = 2 * 8 * blocks(17 * 33, 128), 2 * 3 * 5
    assert {(each.kernel, *each.grid) for each in problem.launches("forward")} == {
        ("plan", blocks(70 * 17, 128) + sort + pack),
        ("gather", blocks(70 * 7, 8) * 8),
    }
    pack = 70 * 8 * blocks(70, 128)
    assert {(each.kernel, *each.grid) for each in problem.launches("box_gradient")} == {
        ("pack", pack),
        ("plan", blocks(70 * 17, 128) + sort + 2 * 8 * blocks(17 * 33, 128)),
        ("box_rows", blocks(70 * 7, 2) * 2),
        ("sum_blocks", 1),
    }
    tiles = 2 * 17 * 5
    assert {(each.kernel, *each.grid) for each in problem.launches("adjoint")} == {
        ("axis_taps", 2 * blocks(70, 2)),
        ("columns", 2 * 70 + pack + tiles),
        ("scatter", tiles),
    }


@each_operation
def test_maps_are_launched_in_turn(operation):
    """With one kernel, their own number and scale, and into the same output.

    But an output gradient is packed once.
    """
    one, two = (
        [each for each in Problem(maps=maps).launches(operation) if each.kernel != "pack"]
        for maps in (1, 2)
    )
    assert [each.kernel for each in two] == [each.kernel for each in one] * 2
    first, second = two[: len(one)], two[len(one) :]
    assert [each.constants for each in first] == [each.constants for each in second]
    for level, each in enumerate((first[0], second[0])):
        assert (each.arguments["map"], each.arguments["maps"], each.constants["LEVELS"]) == (
            level,
            2,
            1,
        )
        assert (each.arguments["scale_y"], each.arguments["scale_x"]) == SCALES
    if operation != "adjoint":
        output = "output" if operation == "forward" else "d_boxes"
        assert second[-1].arguments["before"] is first[-1].arguments[output]


@each_operation
@pytest.mark.parametrize(
    "channels, channels_last, innermost, aligned",
    [(48, 0, False, False), (40, 1, True, False), (48, 1, True, True), (1, 1, False, False)],
)
def test_layouts(operation, channels, channels_last, innermost, aligned):
    problem = Problem("float64", channels=channels, last=channels_last)
    (last,) = (each for each in problem.launches(operation) if "INNERMOST" in each.constants)
    assert (last.constants["INNERMOST"], last.constants["ALIGNED"]) == (innermost, aligned)


@pytest.mark.parametrize(
    "operation, shape",
    [
        ("forward", {"channels": 1024, "count": 2**26}),
        ("box_gradient", {"channels": 1024, "count": 2**26}),
        ("adjoint", {"channels": 16, "images": 2**28, "size": (64, 8), "count": 1}),
    ],
)
def test_too_many_programs(operation, shape):
    with pytest.raises(ValueError, match=f"at most {launch.MAX_PROGRAMS} programs"):
        Problem(bins=(1, 1), **shape).launches(operation)
    assert Problem(bins=(1, 1), channels=16, count=2**30).launches("forward")


@pytest.mark.parametrize("size", [1, 2, 40, 2**20, 2**22])
@pytest.mark.parametrize("double", [False, True])
def test_spread(size, double):
    """3 for usual calls; never more than a row of the matrix has pixels."""

    def spread(bins, sampling, double):
        return geometry.spread_of(_rule.vector(CONVENTION, sampling), size, bins, double)

    assert spread(7, 2, double) == min(size, 3 if double else 3 + size // 2**20)
    assert spread(7, 0, True) == min(size, 3)
    assert spread(1023, 4096, False) == min(size, 3 + size // 2**20)
    assert spread(1024, 4096, False) == size
    assert spread(2**20, 4096, True) == min(size, 3)


@each_operation
def test_what_is_kept_of_a_kind(operation):
    first, second = (Problem().kept(operation)[0] for _ in range(2))
    assert first is second
    assert Problem(count=51).kept(operation)[0] is not first


def test_what_is_made_is_dropped_after_its_last_use(monkeypatch):
    """So several maps take no more memory than one."""
    of_two_maps, arrays = Problem(maps=2).kept("forward")
    given, alive = len(arrays), []

    def by_jit(kernel, grid, arguments, constants):
        alive.append(sum(x is not None for x in arrays))
        assert not any(x is None for x in arguments)

    monkeypatch.setattr(compiled, "by_jit", by_jit)
    monkeypatch.setattr(compiled.kernels, "INTERPRETED", tl.constexpr(True))
    compiled.run(of_two_maps, arrays, offline.empty)
    assert len(alive) == 4 and alive[0] == alive[2]
    assert not any(x is not None for x in arrays[given:])


@each_operation
@pytest.mark.parametrize("maps", [1, 3])
def test_room_in_one_buffer(operation, maps):
    """What is alive at the same time does not overlap, and the end of the buffer is used."""
    of_maps, arrays = Problem(maps=maps).kept(operation)
    place, used, ends = len(arrays), {}, [0]
    for step in of_maps.steps:
        for new in step.made:
            begin = of_maps.offsets[place - len(arrays)]
            end = begin + offline.empty(*new).nbytes
            assert begin % 16 == 0
            assert all(end <= low or begin >= high for low, high in used.values())
            used[place] = begin, end
            ends.append(end)
            place += 1
        used = {key: value for key, value in used.items() if key not in step.last}
    assert place - len(arrays) == len(of_maps.offsets) and not used
    assert 0 <= of_maps.size - max(ends) < compiled.APART
    if operation == "forward":
        assert of_maps.size == Problem(maps=1).kept(operation)[0].size


# What does not fit


@pytest.mark.parametrize(
    "wrong", ["map", "boxes", "index", "levels", "tangent", "pooled", "scales"]
)
def test_shapes_that_do_not_fit(wrong):
    """Kernels would read beyond the arrays."""

    def empty(*shape):
        return torch.empty(shape, device="meta")

    maps = [empty(2, 3, 5, 6), empty(2, 3, 4, 4)]
    given = {
        "map": (empty(2, 3, 4), empty(2, 4, 4, 4), empty(1, 3, 4, 4), empty(2, 3, 0, 4)),
        "boxes": (empty(3, 4), empty(4, 5), empty(4)),
        "index": (empty(3), empty(4, 1)),
        "levels": (None, empty(3)),
        "tangent": (empty(3, 4), empty(4, 5)),
        "pooled": (empty(3, 3, 2, 2), empty(4, 2, 2, 2), empty(4, 3, 2)),
        "scales": (SCALES, SCALES * 3),
    }[wrong]
    fits = {
        "map": maps[1], "boxes": empty(4, 4), "index": empty(4), "levels": empty(4),
        "tangent": empty(4, 4), "pooled": empty(4, 3, 2, 2), "scales": SCALES * 2,
    }  # fmt: skip

    def check(last, boxes, index, levels, tangent, pooled, scales):
        rois = Rois(boxes, index, levels)
        launch.Job(None, [maps[0], last], pooled, rois, tangent, scales, RULE)

    check(*fits.values())
    for each in given:
        with pytest.raises(ValueError, match="do not fit"):
            check(*(fits | {wrong: each}).values())


@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("int32", "int32")])
def test_dtypes_that_do_not_fit(dtypes):
    map_, pooled = (launch.New((1, 1, 1, 1), dtype) for dtype in dtypes)
    rois = Rois(launch.New((1, 4), "float32"), launch.New((1,), "int64"))
    with pytest.raises(TypeError, match="of one float dtype"):
        launch.Job(None, [map_], pooled, rois, None, SCALES, RULE)


@pytest.mark.parametrize("sampling", [4097, math.inf, math.nan])
def test_too_many_samples(sampling):
    with pytest.raises(ValueError, match="sampling_ratio must be at most 4096; 0 adapts"):
        geometry.check((sampling, *RULE[1:]))
    geometry.check((4096.0, *RULE[1:]))
