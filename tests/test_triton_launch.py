"""Which kernels are launched, on which grids, with how much private memory: nothing runs."""

import math
from types import SimpleNamespace

import pytest

import cases
import roialign
from roialign import _rule
from roialign._rois import Rois

pytest.importorskip("torch", reason="the launched arrays are torch tensors")
pytest.importorskip("triton", reason="the kernels need Triton")

import torch
import triton

from roialign._triton import geometry, kernels, launch

BYTES = {"int32": 4, "int64": 8, "float32": 4, "float64": 8}
OPERATIONS = [launch.forward, launch.adjoint, launch.box_gradient]
CONVENTION = roialign.conventions["half_pixel"]
SCALES = 0.25, 0.5
RULE = _rule.vector(CONVENTION, 2)


def launches(
    operation, shape, output_shape, *, sampling=2, dtype="float32", channels_last=False, maps=1
):
    """What an operation asks for, of arrays without memory."""
    found = []

    def call(kernel, grid, inputs, outputs, **constants):
        named = dict(zip(kernel.arg_names, inputs, strict=False))
        found.append(
            SimpleNamespace(
                kernel=kernel, grid=grid, inputs=named, made=outputs, constants=constants
            )
        )
        return outputs

    def array(shape, dtype=dtype):
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    layout = torch.channels_last if channels_last else torch.contiguous_format
    features, output = (array(s).contiguous(memory_format=layout) for s in (shape, output_shape))
    levels = None if maps == 1 else array(output_shape[:1], "int8")
    rois = Rois(array((output_shape[0], 4)), array(output_shape[:1], "int64"), levels)
    features, scales, rule = [features] * maps, SCALES * maps, _rule.vector(CONVENTION, sampling)
    if operation is launch.forward:
        operation(call, features, rois, None, scales, rule, output)
    elif operation is launch.adjoint:
        operation(call, output, rois, None, scales, rule, features)
    else:
        operation(call, output, features, rois, scales, rule, array((output_shape[0], 4)))
    return found


def blocks(number, size):
    return -(-number // size)


def memory(found):
    """Bytes of the arrays that a call makes."""
    made = [o for each in found for o in each.made if isinstance(o, launch.New)]
    return sum(math.prod(new.shape) * BYTES[new.dtype] for new in made)


@pytest.mark.parametrize("workload", cases.WORKLOADS.values(), ids=lambda workload: workload.name)
def test_private_memory(workload):
    """For each RoI a table as long as the sides of the map and the bins; a bit for each tile."""
    (n, _, h, w), (k, c, p, q) = workload.shape, workload.output_shape
    side = workload.shape, workload.output_shape
    spread = (3, 3) if workload.sampling else (3 + p // 2, 3 + q // 2)
    room = h + w + p * spread[0] + q * spread[1]
    unused = 4
    forward = launches(launch.forward, *side, sampling=workload.sampling)
    assert memory(forward) == k * (8 + 16 * (p + q) + 8 * room) + unused
    adjoint = launches(launch.adjoint, *side, sampling=workload.sampling)
    tiles = n * blocks(h, launch.TILE[0]) * blocks(w, launch.TILE[1])
    table = k * (8 + 8 * (h + w) + 24 + 4 * room)
    assert memory(adjoint) == table + unused + 8 * tiles * blocks(k, 32)
    assert memory(adjoint) < 4 * k * c * p * q / 2  # less than half of d_output


def test_grids():
    shape, output_shape = (2, 40, 17, 33), (70, 40, 7, 9)
    taps, forward = launches(launch.forward, shape, output_shape)
    assert (taps.kernel, forward.kernel) == (kernels.axis_taps, kernels.forward)
    bins, rois = taps.constants["BLOCK_P"], taps.constants["BLOCK_K"]
    assert bins >= 9 and taps.grid == (2 * blocks(70, rois),)
    channels, bins = forward.constants["BLOCK_C"], forward.constants["BLOCK_B"]
    assert forward.grid == (70 * blocks(40, channels) * blocks(63, bins),)

    taps, touched, adjoint = launches(launch.adjoint, shape, output_shape)
    tile_y, tile_x = launch.TILE
    tiles = 2 * blocks(17, tile_y) * blocks(33, tile_x)
    assert touched.grid == (tiles * blocks(3, touched.constants["BLOCK_W"]),)
    assert adjoint.grid == (tiles * blocks(40, adjoint.constants["BLOCK_C"]),)
    for each in (touched, adjoint):
        assert (each.constants["TILE_Y"], each.constants["TILE_X"]) == launch.TILE

    taps, gradient, sums = launches(launch.box_gradient, shape, output_shape)
    (partial,) = gradient.made
    number = blocks(40, gradient.constants["BLOCK_C"])
    assert gradient.grid == (70 * number,) and partial.shape == (number, 70, 4)
    assert sums.grid == (blocks(70, sums.constants["BLOCK_K"]),)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_maps_are_launched_in_turn(operation):
    """With one kernel, their own number and scale, and into the same output."""
    one = launches(operation, (2, 3, 5, 6), (4, 3, 2, 2))
    two = launches(operation, (2, 3, 5, 6), (4, 3, 2, 2), maps=2)
    assert [each.kernel for each in two] == [each.kernel for each in one] * 2
    first, second = two[: len(one)], two[len(one) :]
    assert [each.constants for each in first] == [each.constants for each in second]
    for level, each in enumerate((first[0], second[0])):
        assert (each.inputs["map"], each.inputs["maps"], each.constants["LEVELS"]) == (level, 2, 1)
        assert (each.inputs["scale_y"], each.inputs["scale_x"]) == SCALES
    if operation is not launch.adjoint:
        assert second[-1].inputs["before"] is second[-1].made[0] is first[-1].made[0]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "channels, channels_last, innermost, aligned",
    [(48, 0, False, False), (40, 1, True, False), (48, 1, True, True), (1, 1, False, False)],
)
def test_layouts(operation, channels, channels_last, innermost, aligned):
    shapes = (2, channels, 5, 6), (3, channels, 2, 2)
    found = launches(operation, *shapes, channels_last=channels_last)
    (last,) = (each for each in found if "INNERMOST" in each.constants)
    assert (last.constants["INNERMOST"], last.constants["ALIGNED"]) == (innermost, aligned)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_kernel_for_all_maps_and_numbers_of_rois(operation):
    """Another constant is another compilation, which a graph cannot capture."""

    def constants(shape, count):
        return [each.constants for each in launches(operation, shape, (count, 20, 7, 7))]

    assert constants((1, 20, 5, 6), 1) == constants((9, 20, 300, 400), 5000)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_types(dtype):
    real = "float64" if dtype == "float64" else "float32"
    for operation in OPERATIONS:
        taps, *_ = launches(operation, (1, 2, 8, 8), (3, 2, 2, 2), dtype=dtype)
        assert taps.made[-1].dtype == real
        assert taps.constants["REAL"] == getattr(triton.language, real)


def test_too_many_programs():
    most = launch.MAX_PROGRAMS
    with pytest.raises(ValueError, match=f"at most {most} programs"):
        launches(launch.forward, (1, 1024, 8, 8), (2**26, 1024, 1, 1))
    with pytest.raises(ValueError, match=f"at most {most} programs"):
        launches(launch.box_gradient, (1, 1024, 8, 8), (2**26, 1024, 1, 1))
    with pytest.raises(ValueError, match=f"at most {most} programs"):
        launches(launch.adjoint, (2**28, 16, 64, 8), (1, 16, 1, 1))
    assert launches(launch.forward, (1, 16, 8, 8), (2**30, 16, 1, 1))


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
