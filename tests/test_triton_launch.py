"""Which kernels are launched, on which grids, with how much private memory: nothing runs."""

import math
from types import SimpleNamespace

import pytest

import cases
import roialign
from roialign import _conventions

torch = pytest.importorskip("torch", reason="the launched arrays are torch tensors")
triton = pytest.importorskip("triton", reason="the kernels need Triton")

from roialign._triton import kernels, launch  # noqa: E402

BYTES = {"int32": 4, "int64": 8, "float32": 4, "float64": 8}
CONVENTION = roialign.conventions["half_pixel"]


def launches(operation, shape, output_shape, *, sampling=2, dtype="float32", channels_last=False):
    """What an operation asks for, of arrays without memory."""
    found = []

    def call(kernel, grid, inputs, outputs, **constants):
        found.append(SimpleNamespace(kernel=kernel, grid=grid, made=outputs, constants=constants))
        return outputs

    def array(shape, dtype=dtype):
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    layout = torch.channels_last if channels_last else torch.contiguous_format
    features, output = (array(s).contiguous(memory_format=layout) for s in (shape, output_shape))
    rois = array((output_shape[0], 4)), array(output_shape[:1], "int64")
    rule = _conventions.rule((1.0, 1.0), sampling, CONVENTION).numbers
    if operation is launch.forward:
        operation(call, features, *rois, None, rule, output)
    elif operation is launch.adjoint:
        operation(call, output, *rois, None, rule, features)
    else:
        operation(call, output, features, *rois, rule)
    return found


def memory(found):
    """Bytes of the arrays that a call makes."""
    made = [o for each in found for o in each.made if isinstance(o, launch.New)]
    return sum(math.prod(new.shape) * BYTES[new.dtype] for new in made)


def blocks(number, size):
    return -(-number // size)


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

    taps, gradient = launches(launch.box_gradient, shape, output_shape)
    (partial,) = gradient.made
    number = blocks(40, gradient.constants["BLOCK_C"])
    assert gradient.grid == (70 * number,) and partial.shape == (number, 70, 4)


@pytest.mark.parametrize("operation", [launch.forward, launch.adjoint, launch.box_gradient])
@pytest.mark.parametrize(
    "channels, channels_last, innermost, aligned",
    [(48, 0, False, False), (40, 1, True, False), (48, 1, True, True), (1, 1, False, False)],
)
def test_layouts(operation, channels, channels_last, innermost, aligned):
    shapes = (2, channels, 5, 6), (3, channels, 2, 2)
    last = launches(operation, *shapes, channels_last=channels_last)[-1]
    assert (last.constants["INNERMOST"], last.constants["ALIGNED"]) == (innermost, aligned)


@pytest.mark.parametrize("operation", [launch.forward, launch.adjoint, launch.box_gradient])
def test_one_kernel_for_all_maps_and_numbers_of_rois(operation):
    """Another constant is another compilation, which a graph cannot capture."""

    def constants(shape, count):
        return [each.constants for each in launches(operation, shape, (count, 20, 7, 7))]

    assert constants((1, 20, 5, 6), 1) == constants((9, 20, 300, 400), 5000)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_types(dtype):
    real = "float64" if dtype == "float64" else "float32"
    for operation in (launch.forward, launch.adjoint, launch.box_gradient):
        taps, *_ = launches(operation, (1, 2, 8, 8), (3, 2, 2, 2), dtype=dtype)
        assert taps.made[-1].dtype == real
        assert taps.constants["REAL"] == getattr(triton.language, real)


def test_too_many_programs():
    most = launch.MAX_PROGRAMS
    with pytest.raises(ValueError, match=f"at most {most} programs"):
        launches(launch.forward, (1, 16, 8, 8), (2**26, 1024, 1, 1))
    with pytest.raises(ValueError, match=f"at most {most} programs"):
        launches(launch.box_gradient, (1, 16, 8, 8), (2**26, 1024, 1, 1))
    with pytest.raises(ValueError, match=f"at most {most} programs"):
        launches(launch.adjoint, (2**28, 16, 64, 8), (1, 16, 1, 1))
    assert launches(launch.forward, (1, 16, 8, 8), (2**30, 16, 1, 1))


@pytest.mark.parametrize("size", [1, 2, 40, 2**20, 2**22])
@pytest.mark.parametrize("double", [False, True])
def test_spread(size, double):
    """3 for ordinary calls; never more than a row of the matrix has pixels."""
    assert launch._spread(size, 7, 2, double) == min(size, 3 if double else 3 + size // 2**20)
    assert launch._spread(size, 7, 0, True) == min(size, 3)
    assert launch._spread(size, 7, 2**21, False) == size
    assert launch._spread(size, 2**20, 2**31, True) == size
