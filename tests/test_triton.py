"""What is the Triton kernels' own, interpreted: their blocks, their launches, bad values.

All else is tested as of every backend. The kernels are those for GPUs and the matrix products for
Ascend.
"""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

import oracle
import roialign
import tolerance

pytest.importorskip("torch", reason="the interpreter runs on torch tensors")
pytest.importorskip("triton", reason="the kernels need Triton")

import torch
from triton.runtime import interpreter

import roialign.torch.kernels as kernels_of_torch
from backends import named
from conftest import GOLDEN_FIXTURES, draw_pyramid, golden_cases
from roialign import _rule
from roialign._ascend import launch as launch_of_products
from roialign._triton import compiled, launch, rows
from roialign.torch.calls import Call, flat
from test_torch import LAYOUTS as LAYOUTS_OF_TORCH

LAYOUTS = LAYOUTS_OF_TORCH | {"transposed": lambda t: t.mT.contiguous().mT}
both = pytest.mark.backends("kernels")
of_gpus = pytest.mark.backends("kernels", "-narrow")
of_ascend = pytest.mark.backends("kernels", "narrow")
TORCH = named("torch")
TORCH.start(None)


def compute(operation, problem, g=None, tangent=None, laid=LAYOUTS["contiguous"]):
    """By the kernels whose backend is started; all arrays are so laid out."""
    compiled.operation_of.cache_clear()  # tests change the sizes of blocks
    features, (boxes, index) = problem.features, TORCH.array(problem.rois)
    rule, size = _rule.vector(problem.convention, problem.sampling), features.shape[2:]
    call = Call(operation, problem.size, len(features), (size,), problem.scale, rule)
    given = {"boxes": boxes, "image_index": index}
    given |= {} if tangent is None else {"tangent": TORCH.array(tangent)}
    given |= {} if operation == "forward" else {"d_output": laid(TORCH.array(g))}
    given |= {} if operation == "adjoint" else {"features": [laid(TORCH.array(features))]}
    out = None
    if operation != "box_gradient":
        like = problem.draw_output() if operation == "forward" else features
        out = laid(TORCH.array(np.full_like(like, np.nan)))
    out = (out,) if operation == "adjoint" else out
    result = kernels_of_torch.run(call, flat(given), out)
    return TORCH.numpy(result[0] if operation == "adjoint" else result)


def results(problem, g):
    return [compute(operation, problem, g) for operation in ("forward", "adjoint", "box_gradient")]


def check(backend, problem, tangent=None, **options):
    """All operations, or those that take a tangent, against the oracle."""
    g, along = problem.draw_output(), {} if tangent is None else {"tangent": tangent}
    options |= along
    along["narrow"] = "narrow" in backend.traits
    expected = oracle.forward(problem, tangent)
    bound = tolerance.forward(problem, expected, **along)
    tolerance.check(compute("forward", problem, **options), expected, bound)
    expected = oracle.adjoint(problem, g, tangent)
    bound = tolerance.adjoint(problem, g, expected, **along)
    tolerance.check(compute("adjoint", problem, g, **options), expected, bound)
    if tangent is None:
        expected = oracle.box_gradient(problem, g)
        bound = tolerance.box_gradient(problem, g, expected, **along)
        tolerance.check(compute("box_gradient", problem, g, **options), expected, bound)


def draw_tangent(problem):
    return np.random.default_rng(5).standard_normal(problem.boxes.shape).astype(problem.boxes.dtype)


def same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


# Blocks and launches


@both
@pytest.mark.parametrize("dtype", tolerance.DTYPES, ids=str)
def test_tangents(backend, make_problem, dtype):
    problem = make_problem(dtype=dtype, shape=(2, 3, 9, 11), count=4, sampling=0, size=(2, 3))
    check(backend, problem, draw_tangent(problem))


@both
@pytest.mark.parametrize(
    "layout, channels",
    [*[("channels_last", c) for c in (3, 16, 48)], ("sliced", 18), ("transposed", 2)],
)
def test_strides(backend, make_problem, layout, channels):
    """Channels innermost, and in sixteens; a block of channels that is full, or not, or several."""
    dtype = np.float16 if channels == 16 else np.float32
    shape = 2, channels if backend.name == "triton" else 3, 9, 6
    problem = make_problem(dtype=dtype, count=2, shape=shape, size=(2, 2), inside=True)
    check(backend, problem, laid=LAYOUTS[layout])


@both
def test_many(backend, make_problem, monkeypatch):
    """RoIs in several words, bins in several blocks, a map of several tiles."""
    if backend.name == "triton":
        many = make_problem(shape=(1, 2, 9, 19), count=34, size=(2, 2), sampling=1, inside=True)
        check(backend, many)
        few = replace(many, boxes=many.boxes[:2], index=many.index[:2], size=(9, 8))
    else:
        for name, value in {"SIDE": 16, "MAX_BINS": 16, "LANES": 512, "BLOCK_C": 2}.items():
            monkeypatch.setattr(launch_of_products, name, value)
        few = make_problem(shape=(1, 3, 35, 21), count=2, size=(18, 3), scale=(1, 1), inside=True)
        few.boxes[0] = 0, 0, 21, 35
    check(backend, few)
    check(backend, few, draw_tangent(few))


@of_ascend
def test_turns(backend, make_problem, monkeypatch):
    """Of few programs, where a device takes no more."""
    problem = make_problem(shape=(2, 2, 9, 11), count=3, inside=True)
    expected = results(problem, problem.draw_output())
    monkeypatch.setattr(launch_of_products, "MAX_PROGRAMS", 3)
    same(results(problem, problem.draw_output()), expected)


@both
def test_least(backend, make_problem):
    """One RoI, channel, bin and pixel."""
    problem = make_problem(shape=(1, 1, 1, 1), count=1, size=(1, 1), scale=(1, 1))
    check(backend, replace(problem, boxes=np.float32([[-0.25, 0, 1, 0.5]])))


@of_gpus
def test_the_same_bits(backend, make_problem, monkeypatch):
    """In every run, and however the work is cut."""
    problem = make_problem(shape=(1, 3, 8, 18), count=2, inside=True)
    g, by_jit = problem.draw_output(), compiled.by_jit
    expected = results(problem, g)

    def smaller(kernel, grid, arguments, constants):
        if kernel is launch.kernels.axis_taps:
            grid, constants = (2 * len(arguments[0]),), constants | {"BLOCK_K": 1}
        if kernel is launch.kernels.forward:
            channels, bins = problem.output_shape[1], np.prod(problem.size)
            constants = constants | {"BLOCK_C": 1, "BLOCK_B": 4}
            grid = (len(problem.boxes) * channels * -(-int(bins) // 4),)
        return by_jit(kernel, grid, arguments, constants)

    monkeypatch.setattr(compiled, "by_jit", smaller)
    monkeypatch.setattr(launch, "TILE", (4, 8))
    same(results(problem, g), expected)


@of_gpus
def test_offsets_beyond_31_bits(backend, make_problem):
    """Strides of memory of which a few pages are touched."""
    problem = make_problem(shape=(2, 2, 3, 4), count=2, size=(2, 2), dtype=np.float16)
    boxes = np.float32([[0.2, 0.7, 2.4, 1.9], [0.6, 0.1, 1.8, 1.5]])
    problem = replace(problem, boxes=boxes, scale=(1, 1), index=np.array([1, 0]))

    def far(tensor):
        """Two images or RoIs, 4 GiB apart."""
        memory = torch.from_numpy(np.empty(2**31 + 6 + tensor[0].numel(), np.float16))
        return memory.as_strided(tensor.shape, (2**31 + 6, *tensor.stride()[1:])).copy_(tensor)

    check(backend, problem, laid=far)


# Forward and box gradient by sorted rows of bins: of channels in sixteens

FORWARD = [rows.plan, rows.gather]
BOX_GRADIENT = [rows.plan, rows.box_rows, launch.kernels.sum_blocks]


@pytest.fixture
def ran(monkeypatch):
    """The kernels that ran; what is called with each of them and its arrays and numbers."""
    by_jit, found = compiled.by_jit, SimpleNamespace(kernels=[], then=lambda *_: None)

    def spy(kernel, grid, arguments, constants):
        made = by_jit(kernel, grid, arguments, constants)
        found.kernels.append(kernel)
        found.then(kernel, arguments)
        return made

    monkeypatch.setattr(compiled, "by_jit", spy)
    return found


def check_rows(problem, ran, layout="contiguous"):
    """The forward, and the box gradient where it goes by rows."""
    expected = oracle.forward(problem)
    output = compute("forward", problem, laid=LAYOUTS[layout])
    assert ran.kernels == FORWARD
    tolerance.check(output, expected, tolerance.forward(problem, expected))
    short = problem.features.dtype != np.float32
    if problem.size[1] > launch.SLOPED or (short and problem.sampling not in (1, 2)):
        return
    g = problem.draw_output()
    expected = oracle.box_gradient(problem, g)
    d_boxes = compute("box_gradient", problem, g, laid=LAYOUTS[layout])
    packed = [rows.pack] * (layout != "channels_last")
    assert ran.kernels == FORWARD + packed + BOX_GRADIENT
    tolerance.check(d_boxes, expected, tolerance.box_gradient(problem, g, expected))


@of_gpus
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [d for d in tolerance.DTYPES if d != np.float64], ids=str)
@pytest.mark.parametrize("sampling", [0, 1, 2, 3])
def test_sorted_rows(backend, make_problem, ran, layout, dtype, sampling):
    problem = make_problem(shape=(2, 16, 9, 11), dtype=dtype, sampling=sampling, size=(3, 5))
    check_rows(problem, ran, layout)


@of_gpus
@pytest.mark.parametrize("sampling", [0, 2])
def test_sorted_rows_of_any_convention(backend, make_problem, ran, convention, sampling):
    options = {"shape": (1, 48, 9, 11), "sampling": sampling, "convention": convention}
    check_rows(make_problem(**options), ran)


@of_gpus
@pytest.mark.parametrize("channels, size", [(96, (2, 3)), (16, (1, 33)), (64, (9, 2))])
def test_blocks_of_sorted_rows(backend, make_problem, ran, monkeypatch, channels, size):
    """Several blocks of channels, of taps and of RoIs, and programs of several steps."""
    monkeypatch.setattr(launch, "ENOUGH", 2)
    problem = make_problem(shape=(1, channels, 17, 35), count=30, size=size)
    check_rows(problem, ran, "channels_last")


@of_gpus
def test_what_is_not_by_sorted_rows(backend, make_problem, ran):
    """Float64, channels not in sixteens, few RoIs for a map to be packed, or many bins.

    Of the box gradient 16 bits with many taps too, and fewer bins.
    """
    usual = {"shape": (1, 16, 6, 7), "count": 3}
    for options, by_rows in (
        ({"dtype": np.float64}, set()),
        ({"shape": (1, 15, 6, 7)}, set()),
        ({"shape": (1, 16, 60, 70)}, set()),
        ({"size": (1, 65), "count": 1}, set()),
        ({"size": (1, 17)}, {rows.gather}),
        ({"dtype": np.float16, "sampling": 0}, {rows.gather}),
    ):
        ran.kernels.clear()
        problem = make_problem(**usual | options)
        compute("forward", problem)
        compute("box_gradient", problem, problem.draw_output())
        assert {rows.gather, rows.box_rows} & set(ran.kernels) == by_rows


def order_in(problem, table):
    """Of a table of `rows.plan`: the RoIs' rows, and where they are in it."""
    count, (p, q) = len(problem.boxes), problem.size
    after = 0 if problem.sampling else 2 * count * (p + q)
    return table[len(table) - after - count * p : len(table) - after]


@of_gpus
@pytest.mark.parametrize("sampling", [0, 2])
def test_no_bit_depends_on_the_order(backend, make_problem, ran, sampling):
    problem = make_problem(shape=(2, 16, 9, 70), count=12, sampling=sampling)
    expected, seen = compute("forward", problem), []
    shuffle = np.random.default_rng(0).permutation
    for change in (np.sort, lambda order: np.sort(order)[::-1], shuffle):

        def reorder(kernel, given, change=change):
            if kernel is rows.plan:
                order = order_in(problem, given[-2])
                seen.append(order.numpy().copy())
                order[:] = torch.from_numpy(change(seen[-1]).copy())

        ran.then = reorder
        same([compute("forward", problem)], [expected])
    units = [roi << 32 | p for roi in range(12) for p in range(problem.size[0])]
    assert all(sorted(order.tolist()) == units for order in seen)


@of_gpus
@pytest.mark.parametrize("sampling", [0, 2])
def test_rows_are_sorted_by_tile(backend, make_problem, ran, sampling):
    """Image after image, and there from the top, those of a tile behind one another."""
    problem = make_problem(shape=(2, 16, 64, 64), count=8, size=(12, 4), scale=(1, 1))
    x, y = np.float32([2, 34, 2, 34] * 2), np.float32([3.5, 3.5, 35.5, 35.5] * 2)
    boxes, index = np.stack([x, y, x + 8, y + 24], 1), np.repeat([0, 1], 4)
    shuffled = np.random.default_rng(2).permutation(8)
    problem = replace(problem, boxes=boxes[shuffled], index=index[shuffled], sampling=sampling)
    found = []
    ran.then = lambda kernel, given: found.append(given[-2]) if kernel is rows.plan else None
    compute("forward", problem, laid=LAYOUTS["channels_last"])
    order = order_in(problem, found[0]).numpy()
    x, y, *_ = problem.boxes[order >> 32].T
    tile, _ = launch.SORTED[not sampling]
    row = (y + 2 * (order & 0xFFFF) + 1) // tile  # a bin is 2 pixels high
    assert np.all(np.diff(problem.index[order >> 32] * 100 + row) >= 0)
    tiles = list(zip(problem.index[order >> 32], row, x, strict=True))
    changes = sum(a != b for a, b in pairwise(tiles))
    assert changes == len(set(tiles)) - 1


@of_gpus
@pytest.mark.parametrize("sampling", [0, 2])
def test_sorted_rows_of_several_maps(backend, ran, sampling):
    """Each map's launches write the rows of its own RoIs; the first those on no map, too."""
    drawn = draw_pyramid(np.float32, sampling=sampling, channels=16, count=21)
    boxes, index, levels = drawn.rois
    index = np.where(np.arange(21) == 5, 7, index)
    given = TORCH.array((*drawn.maps, boxes, index, levels))
    g = np.random.default_rng(1).standard_normal((21, 16, *drawn.problems[0].size), np.float32)
    output = TORCH.numpy(drawn.forward(*given))
    assert ran.kernels == FORWARD * 2
    ran.kernels.clear()
    d_boxes = TORCH.numpy(drawn.box_gradient(TORCH.array(g), *given))
    assert ran.kernels == [rows.pack] + BOX_GRADIENT * 2
    for level, problem in enumerate(drawn.problems):
        on = (levels == level) & (index < 2)
        problem = replace(problem, boxes=boxes[on], index=index[on], sampling=sampling)
        expected = oracle.forward(problem)
        tolerance.check(output[on], expected, tolerance.forward(problem, expected))
        expected = oracle.box_gradient(problem, g[on])
        bound = tolerance.box_gradient(problem, g[on], expected)
        tolerance.check(d_boxes[on], expected, bound)
    assert not output[(levels < 0) | (index > 1)].any()
    assert not d_boxes[(levels < 0) | (index > 1)].any()


@of_gpus
@pytest.mark.parametrize("dtype", [d for d in tolerance.DTYPES if d != np.float64], ids=str)
@pytest.mark.parametrize("sampling", [0, 2])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_pixels_of_sorted_rows(backend, make_problem, ran, dtype, sampling, poison):
    """What is not finite makes those not finite that weigh it, and no others."""
    problem = make_problem(shape=(2, 16, 9, 11), count=9, sampling=sampling, dtype=dtype)
    problem.boxes[:4] = (-50, -30, 90, 80), (11, 6, 16, 11), (15, 9, 8, 5), (0, np.nan, 9, 9)
    hot = np.zeros_like(problem.features)
    hot[0, 3, 4, 5] = hot[1, 6, 0, 0] = 1
    problem.features[hot == 1] = poison
    output = compute("forward", problem)
    assert ran.kernels == [rows.plan, rows.gather]
    reached = oracle.forward(replace(problem, features=hot)) != 0
    assert np.array_equal(~np.isfinite(output.astype(np.float32)), reached) and reached.any()
    ones = np.ones_like(output)
    d_boxes = compute("box_gradient", problem, ones)
    sloped = oracle.box_gradient(replace(problem, features=hot), ones, bound=True) != 0
    assert np.array_equal(~np.isfinite(d_boxes), sloped) and 0 < sloped.sum() < sloped.size


@of_gpus
@pytest.mark.parametrize("dtype", [np.float16, tolerance.BFLOAT16], ids=str)
@pytest.mark.parametrize("sampling", [0, 2])
def test_infinite_pixels_of_sorted_rows(backend, make_problem, ran, dtype, sampling):
    """Infinities of both signs and NaN in the same bins.

    Where the infinite pixels of a bin have one sign, it is infinite; the core may make it NaN.
    """
    problem = make_problem(shape=(2, 16, 9, 11), count=9, sampling=sampling, dtype=dtype)
    random = np.random.default_rng(4)
    kind = random.choice([0, 1, 2, 3], problem.features.shape, p=[0.94, 0.02, 0.02, 0.02])
    values = np.array([0, np.inf, -np.inf, np.nan])
    problem.features[kind > 0] = values[kind[kind > 0]]
    output = compute("forward", problem).astype(np.float32)
    plus, minus, nan = (
        oracle.forward(replace(problem, features=np.float32(kind == k))) != 0 for k in (1, 2, 3)
    )
    expected = values[np.where(nan | (plus & minus), 3, plus + 2 * minus)]
    same([np.where(np.isfinite(output), 0, output)], [expected])
    assert plus.any() and minus.any() and nan.any() and ran.kernels == FORWARD


# The adjoint by rows of the map


def check_map_rows(problem, ran, layout="contiguous"):
    g = problem.draw_output()
    expected = oracle.adjoint(problem, g)
    d_features = compute("adjoint", problem, g, laid=LAYOUTS[layout])
    assert ran.kernels == [launch.kernels.axis_taps, rows.columns, rows.scatter]
    tolerance.check(d_features, expected, tolerance.adjoint(problem, g, expected))
    return d_features


@of_gpus
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [d for d in tolerance.DTYPES if d != np.float64], ids=str)
@pytest.mark.parametrize("sampling", [0, 1, 2, 3])
def test_map_rows(backend, make_problem, ran, layout, dtype, sampling):
    """Of boxes of which some have at most two bins on each pixel, and some more."""
    problem = make_problem(shape=(2, 16, 9, 21), dtype=dtype, sampling=sampling, size=(3, 5))
    found = []
    ran.then = lambda kernel, given: found.append(given[-2]) if kernel is rows.columns else None
    check_map_rows(problem, ran, layout)
    most = found[0]
    assert {False, True} == set((most.amax(1) > 2).tolist())


@of_gpus
@pytest.mark.parametrize("sampling", [0, 2])
def test_map_rows_of_any_convention(backend, make_problem, ran, convention, sampling):
    options = {"shape": (1, 48, 9, 11), "sampling": sampling, "convention": convention}
    check_map_rows(make_problem(**options), ran)


@of_gpus
@pytest.mark.parametrize("channels, size", [(16, (2, 2)), (512, (1, 3)), (64, (9, 2))])
def test_blocks_of_map_rows(backend, make_problem, ran, monkeypatch, channels, size):
    """Several blocks of channels, words of RoIs and tiles; the same bits with other tiles."""
    problem = make_problem(shape=(1, channels, 5, 35), count=40, size=size)
    problem.boxes[4:-4] += 100  # beyond the map
    expected = check_map_rows(problem, ran)
    monkeypatch.setattr(launch, "TILE_OF_ROW", 32)
    same([compute("adjoint", problem, problem.draw_output())], [expected])


@of_gpus
@pytest.mark.parametrize("sampling", [0, 2])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_output_gradients_of_map_rows(backend, make_problem, ran, sampling, poison):
    """What is not finite makes the pixels not finite that have weight in its bin, and no others."""
    problem = make_problem(shape=(2, 16, 9, 11), count=9, sampling=sampling, size=(3, 4))
    problem.boxes[:3] = (2, 1, 40, 30), (11, 6, 16, 11), (15, 9, 8, 5)
    g, hot = problem.draw_output(), np.zeros(problem.output_shape, np.float32)
    hot[0, 3, 1, 2] = hot[2, 6, 0, 0] = hot[3, 5, 2, 3] = 1
    g[hot == 1] = poison
    d_features = compute("adjoint", problem, g)
    assert ran.kernels[-1] is rows.scatter
    reached = oracle.adjoint(problem, hot) != 0
    assert np.array_equal(~np.isfinite(d_features), reached) and reached.any()


@of_gpus
def test_what_is_not_by_map_rows(backend, make_problem, ran, monkeypatch):
    """Float64, channels not in sixteens, a tangent, or RoIs and tiles beyond a number."""
    problem = make_problem(shape=(1, 16, 6, 7), count=3)
    for change, tangent in (
        ({"dtype": np.float64}, False),
        ({"shape": (1, 15, 6, 7)}, False),
        ({}, True),
        ({"count": 12}, False),
    ):
        other = make_problem(**{"shape": (1, 16, 6, 7), "count": 3} | change)
        ran.kernels.clear()
        monkeypatch.setattr(launch, "MOST_BITS", 3 * 6)
        compute("adjoint", other, other.draw_output(), draw_tangent(other) if tangent else None)
        assert rows.scatter not in ran.kernels
        ran.kernels.clear()
        compute("adjoint", problem, problem.draw_output())
        assert rows.scatter in ran.kernels


@of_gpus
def test_map_rows_of_several_maps(backend, ran):
    drawn = draw_pyramid(np.float32, channels=16, count=21)
    boxes, index, levels = drawn.rois
    g = np.random.default_rng(1).standard_normal((21, 16, *drawn.problems[0].size), np.float32)
    d_maps = drawn.adjoint(*TORCH.array((g, boxes, index, levels)))
    assert ran.kernels == [launch.kernels.axis_taps, rows.columns, rows.scatter] * 2
    for level, problem in enumerate(drawn.problems):
        on = levels == level
        problem = replace(problem, boxes=boxes[on], index=index[on])
        expected = oracle.adjoint(problem, g[on])
        bound = tolerance.adjoint(problem, g[on], expected)
        tolerance.check(TORCH.numpy(d_maps[level]), expected, bound)


@of_gpus
def test_other_libraries_by_sorted_rows(backend, ran):
    """Recorded results: each tenth, its channels repeated."""
    by_rows = 0
    for case in filter(GOLDEN_FIXTURES["golden"], [*golden_cases()][::10]):
        if case.features.dtype == np.float64:
            continue
        ran.kernels.clear()
        features = np.tile(case.features, (1, 16, 1, 1))
        problem = replace(case.problem, features=features)
        output = compute("forward", problem, laid=LAYOUTS["channels_last"])
        case.check_forward(output[:, : case.features.shape[1]])
        by_rows += rows.gather in ran.kernels
    assert by_rows > 20


# Bad values


@pytest.fixture
def sloped(make_problem):
    """Two RoIs on one image; the second has no slope: p < 0 in x, the last pixel in y."""
    options = {"size": (2, 2), "scale": (1, 1), "convention": "asymmetric"}
    problem = make_problem(shape=(1, 2, 7, 9), count=2, **options)
    boxes = np.float32([[1.2, 2.1, 5.3, 4.9], [-0.9, 6.2, -0.1, 6.6]])
    return replace(problem, boxes=boxes, index=np.zeros(2, int))


@of_gpus
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_pixels_without_weight(backend, sloped, poison):
    """They are not read, nor are they given anything."""
    g = sloped.draw_output()
    for v in (None, draw_tangent(sloped)):
        reach = oracle.adjoint(sloped, np.ones_like(g), None if v is None else abs(v), bound=True)
        far = np.broadcast_to(reach == 0, sloped.features.shape)
        assert 0.2 < far.mean() < 1
        bad = replace(sloped, features=np.where(far, np.float32(poison), sloped.features))
        same(*(compute("forward", each, tangent=v) for each in (bad, sloped)))
        assert not compute("adjoint", sloped, np.full_like(g, poison), v)[far].any()
    same(*(compute("box_gradient", each, g) for each in (bad, sloped)))


@of_ascend
def test_a_pixel_that_is_not_finite_stays_in_its_window(backend, make_problem):
    """The matrix products read windows, with weights of 0 too."""
    problem = make_problem(shape=(1, 1, 9, 11), count=2, scale=(1, 1))
    problem.boxes[:] = (0, 0, 4, 4), (6, 4, 10, 8)
    g = problem.draw_output()
    expected = results(problem, g)
    problem.features[0, 0, 5:, 7] = np.nan, np.inf, -np.inf, 1e30
    g[1, 0, 1, 0] = np.nan
    y, d_features, d_boxes = results(problem, g)
    assert np.isnan(y[1]).any() and np.isnan(d_features).any() and np.isnan(d_boxes[1]).all()
    same((y[0], d_boxes[0]), (expected[0][0], expected[2][0]))
    same(d_features[..., :5, :5], expected[1][..., :5, :5])
    assert not np.isnan(d_features[..., :3, :]).any() and not np.isnan(d_features[..., :5]).any()


@of_gpus
def test_other_rois(backend, sloped):
    """A RoI's output gradient is its own; one in a bin without samples is nobody's."""
    g = sloped.draw_output()
    g[1] = np.nan
    first = replace(sloped, boxes=sloped.boxes[:1], index=sloped.index[:1])
    same(compute("box_gradient", sloped, g)[:1], compute("box_gradient", first, g[:1]))
    outside = replace(sloped, boxes=sloped.boxes + np.float32([[0], [50]]))
    for v in (None, draw_tangent(outside)):
        expected = compute("adjoint", first, g[:1], None if v is None else v[:1])
        same(compute("adjoint", outside, g, v), expected)
    assert not compute("box_gradient", outside, g)[1].any()


@both
def test_boxes_that_are_not_finite(backend, make_problem):
    """With `min_size` an end of -inf makes a box; there is no slope in any."""
    options = {"convention": "mindspore_legacy", "size": (1, 2), "inside": True}
    problem = make_problem(count=9, shape=(1, 2, 8, 11), **options)
    problem.boxes[np.arange(8), np.arange(8) % 4] = [np.nan] * 4 + [-np.inf] * 4
    check(backend, problem)
    assert not compute("forward", problem, tangent=draw_tangent(problem))[:8].any()
    assert not compute("box_gradient", problem, problem.draw_output())[:8].any()


@of_gpus
def test_tangents_that_are_not_finite(backend, sloped):
    """They count where there is slope: in no RoI without it."""
    v = draw_tangent(sloped)
    expected = compute("forward", sloped, tangent=v)
    v[1] = np.nan, np.inf, -np.inf, np.nan
    same(compute("forward", sloped, tangent=v), expected)


@of_gpus
def test_subnormal_sizes(backend, make_problem, monkeypatch):
    """NVIDIA's `ceil` takes a subnormal number for 0; that of the rule is 1."""
    builder, given = interpreter.InterpreterBuilder, []

    def flushed(self, number):
        given.append(number.data)
        data = np.where(abs(number.data) < np.finfo(np.float32).tiny, 0, number.data)
        return ceil(self, interpreter.TensorHandle(data.astype(np.float32), number.dtype))

    ceil = builder.create_ceil
    monkeypatch.setattr(builder, "create_ceil", flushed)
    corner = roialign.Convention(pixel_offset=0, end_offset=0, min_size=None, adaptive="ceil")
    problem = make_problem(count=3, size=(1, 1), sampling=0, scale=(1, 1), convention=corner)
    boxes = np.float32([[0, 0, 1e-39, 1e-39], [0, 0, 1e-44, 1], [0, 0, 0, 1]])
    problem = replace(problem, boxes=boxes)
    output, expected = compute("forward", problem), oracle.forward(problem)
    tolerance.check(output, expected, tolerance.forward(problem, expected))
    assert output[:2].all() and not output[2].any() and given


@of_ascend
def test_more_samples_than_float32_counts(backend, make_problem):
    problem = make_problem(shape=(1, 1, 9, 11), count=2, size=(2, 2), sampling=0, scale=(1, 1))
    problem.boxes[:] = (-1e8, 0, 1e8, 8), (-3e7, -5e8, 2e9, 4e8)
    # docs/ascend.md: on an axis of L pixels and P bins, ((L + 3) + 4 P) / 2^22 of the largest pixel
    bound = (11 + 3 + 4 * 2) / 2**22 * np.abs(problem.features).max()
    tolerance.close(compute("forward", problem), oracle.forward(problem), bound)
