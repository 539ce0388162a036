"""The tables of taps that a kernel makes: the core's weights, to the bit."""

from dataclasses import replace

import numpy as np
import pytest

import oracle
import roialign
from roialign import numpy as adapter
from roialign._rois import Rois

pytest.importorskip("torch", reason="the interpreter runs on torch tensors")
pytest.importorskip("triton", reason="the kernels need Triton")

import torch
import triton

import triton_interpreter
from backends import named
from roialign import _rule
from roialign._triton import kernels, launch

TORCH = named("torch")
TORCH.start(None)
triton_interpreter.hasten()
tensor, array = TORCH.array, TORCH.numpy
LENGTH = 11
SPANS = [
    *[(1.3, 7.9), (-2.2, 4.6), (6.1, 14.3), (-5.5, 17), (3.4, 4.1), (0.2, 10.1)],
    *[(7.3, 2.1), (20, -9), (LENGTH, -1)],  # inverted
    *[(-2, 4), (-1, 1), (-1, -1), (0, LENGTH), (LENGTH - 1, LENGTH + 2), (LENGTH, LENGTH + 1)],
    *[(np.nan, 3), (3, np.nan), (np.inf, 4), (-np.inf, 5), (2, np.inf), (-np.inf, np.inf)],
    (5, -np.inf),
    *[(-1e9, 1e9), (-4e9, 3), (2, 4.2e6), (-9e6, 40), (-3e38, 3e38), (2.2e9, -2.2e9)],
    *[(4.2, 4.201), (4, 4), (1e-45, 2e-45), (-0.0, 0.0), (2.9999, 3.0001), (100, 110), (-50, -40)],
]


def call(kernel, grid, inputs, outputs, **constants):
    """Runs a kernel; what it is to make is NaN or -1 before."""
    arrays = [unwritten(o) if isinstance(o, launch.New) else o for o in outputs]
    with np.errstate(all="ignore"):  # NaN and overflow are silent on a GPU
        kernel[grid](*inputs, *arrays, **constants)
    return arrays


def wide_call(kernel, grid, inputs, outputs, **constants):
    """With the taps of all RoIs in one program for an axis."""
    if kernel is kernels.axis_taps:
        grid, constants["BLOCK_K"] = (2,), triton.next_power_of_2(len(inputs[0]))
    return call(kernel, grid, inputs, outputs, **constants)


def unwritten(new):
    dtype = getattr(torch, new.dtype)
    return torch.full(new.shape, float("nan") if dtype.is_floating_point else -1, dtype=dtype)


def rule(problem):
    return _rule.vector(problem.convention, problem.sampling)


def problem_of(
    spans, length, bins, *, axis=1, dtype=np.float32, sampling=0, convention="half_pixel"
):
    """Boxes that have these spans on an axis; on the other a bin is the one pixel, of weight 1."""
    other = [(0, 1)] * len(spans)
    (x1, x2), (y1, y2) = (np.transpose(s) for s in ((spans, other) if axis else (other, spans)))
    shape, size, scale = [1, 1], [1, 1], [2.0**-10] * 2
    shape[axis], size[axis], scale[axis] = length, bins, 1.0
    return oracle.Problem(
        features=np.zeros((1, 1, *shape), dtype),
        boxes=np.stack([x1, y1, x2, y2], 1).astype(dtype),
        index=np.zeros(len(spans), np.int64),
        size=tuple(size),
        scale=tuple(scale),
        sampling=sampling,
        convention=roialign.conventions.get(convention, convention),
    )


def taps_of(problem, *, columns, tables=1, levels=None, maps=1, level=0, call=wide_call):
    features, given = tensor(problem.features), tensor(problem.rois)
    given = Rois(*given, None if levels is None else tensor(levels))
    pooled = launch.New(problem.output_shape, features.dtype)
    job = launch.Job(
        call, [features] * maps, pooled, given, None, problem.scale * maps,
        rule(problem),
    )  # fmt: skip
    return launch.axis_taps(job, level, tables, columns=columns)


def entries_of(problem, axis, *, columns, tables=1, call=wide_call):
    """([n, 3]: RoI, bin, pixel, in order; [tables, n]: weights) of what tables hold on an axis."""
    size = problem.features.shape[2:]
    taps = taps_of(problem, columns=columns, tables=tables, call=call)
    bins, spread = problem.size[axis], taps.spread[axis]
    ranges, weights = taps.ranges.numpy(), taps.weights.numpy()
    found, slots = [], []
    for k in range(len(problem.boxes)):
        if columns:
            slot = axis * (size[0] + taps.spread[0] * problem.size[0])
            first, last, backwards = taps.extents[k, axis].tolist()
            for pixel in range(first, last + 1):
                low, high = ranges[k, axis * size[0] + pixel]
                for rank in range(low, high + 1):
                    found.append((k, bins - 1 - rank if backwards else rank, pixel))
                    slots.append((k, slot + pixel + spread * rank))
        else:
            for b in range(bins):
                first, count = ranges[k, axis * problem.size[0] + b]
                for slot in range(first, first + count):
                    found.append((k, b, int(taps.pixels[k, slot])))
                    slots.append((k, slot))
    found, slots = np.array(found, int).reshape(-1, 3), np.array(slots, int).reshape(-1, 2)
    order, (k, slot) = np.lexsort(found.T[::-1]), slots.T
    return found[order], weights[:, k[order], slot[order]]


def sorted_entries_of(problem, axis, slopes=False):
    """The same of `rows.plan`, whose entries are added up where they are of one pixel."""
    (count, *_, bins_y, bins_x) = problem.output_shape
    bins = bins_y + bins_x

    def of_taps(kernel, grid, inputs, outputs, **constants):
        programs = -(-count * bins // constants["BLOCK"])  # the first ones
        return call(kernel, (programs,), inputs, outputs, **constants)[0], outputs[1]

    features = tensor(np.repeat(problem.features, 16, 1))
    features = features.to(memory_format=torch.channels_last)
    pooled = torch.empty(problem.output_shape[0], 16, *problem.size, device="meta")
    given = Rois(*tensor(problem.rois))
    job = launch.Job(of_taps, [features], pooled, given, None, problem.scale, rule(problem))
    plan = launch._plan(job, 0, slopes=slopes)
    kinds, taps = 3 if slopes else 1, plan.constants["TAPS"]
    entries = plan.table[: kinds * count * plan.room].view(kinds, -1)
    rows = plan.table[-2 * count * bins :].view(-1, 2).tolist()
    found = {}
    for k in range(count):
        for b in range(problem.size[axis]):
            bin = k * bins + axis * bins_y + b
            first, number = (bin * taps, taps) if taps else rows[bin]
            assert taps or not axis or number % 4 == 0
            for each in entries[:, first : first + number].T.numpy():
                weights = (each >> 32).astype(np.int32).view(np.float32).astype(float)
                (pixel,) = {*(each & 0x7FFFFFFF).tolist()}
                found[k, b, pixel] = found.get((k, b, pixel), 0.0) + weights
    held = {key: weights for key, weights in sorted(found.items()) if weights.any()}
    index = np.array(list(held), int).reshape(-1, 3)
    return index, np.float32(list(held.values())).reshape(-1, kinds).T


def check_values(entries, expected):
    """Assert that the entries are these (RoI, bin, pixel) and these weights."""
    index, weights = entries
    held = weights[0] != 0
    assert len(np.unique(index, axis=0)) == len(index)
    np.testing.assert_array_equal(index[held], expected[0])
    np.testing.assert_array_equal(weights[0, held], expected[1])


def of_oracle(problem, axis):
    """Float32 fractions are exact in its sums, but for their divisor."""
    index, weights = [], []
    for k, axes in enumerate(problem.axes):
        rows = (axes[axis].weights * (1 / max(axes[axis].n, 1))).astype(problem.features.dtype)
        b, pixel = rows.nonzero()
        index.append(np.stack([np.full_like(b, k), b, pixel], 1))
        weights.append(rows[b, pixel])
    return np.concatenate(index), np.concatenate(weights)


def of_core(problem, axis):
    """Its output for a map that is 1 at one pixel in each channel."""
    features = problem.features
    length = features.shape[2 + axis]
    hot = np.eye(length, dtype=features.dtype).reshape(1, length, *features.shape[2:])
    rois = Rois(*problem.rois)
    rows = adapter.forward((hot,), rois, problem.size, problem.scale, rule(problem))
    rows = rows.reshape(len(rows), length, -1).transpose(0, 2, 1)
    return np.stack(rows.nonzero(), 1), rows[rows != 0]


def check_slopes(problem, axis, entries):
    index, weights = entries
    unit = np.finfo(problem.features.dtype).eps / 2
    for k, axes in enumerate(problem.axes):
        a, finite = axes[axis], all(each.finite for each in axes)
        actual = np.zeros((2, a.bins, a.length))
        of_roi = index[:, 0] == k
        actual[:, index[of_roi, 1], index[of_roi, 2]] = weights[1:, of_roi]
        expected = a.slopes() / max(a.n, 1) * finite
        # sums in float64, here and there
        terms = 2 * max(len(s.lo) for s in a.samples) + 8
        bound = terms * 2.0**-52 * a.slopes(bound=True) / max(a.n, 1) + unit * abs(expected)
        assert np.all(abs(actual - expected) <= bound)


@pytest.mark.parametrize(
    "dtype, sampling, axis", [(np.float32, 0, 1), (np.float32, 3, 0), (np.float64, 0, 0)]
)
def test_any_box(convention, dtype, sampling, axis):
    options = {"axis": axis, "dtype": dtype, "sampling": sampling, "convention": convention}
    problem = problem_of(SPANS, LENGTH, 5, **options)
    by_rows = entries_of(problem, axis, columns=False, tables=3)
    expected = of_core(problem, axis)
    check_values(by_rows, expected)
    check_values(entries_of(problem, axis, columns=True), expected)
    check_slopes(problem, axis, by_rows)
    if dtype == np.float32:
        check_values(by_rows, of_oracle(problem, axis))
        check_values(sorted_entries_of(problem, axis), expected)
        by_rows = sorted_entries_of(problem, axis, slopes=True)
        check_values(by_rows, expected)
        check_slopes(problem, axis, by_rows)


def short_side(length):
    return [(-1, 1), (0, 0.5), (-3, 5), (5, -3), (1, 2), (-1, 0), (length, 4), (-1e9, 1e9)]


def overlapping(bins, length, count=12):
    """In float32 the ends of the bins of a huge box are off by pixels."""
    rng = np.random.default_rng(bins)
    extent = bins * rng.uniform(3e6, 4.1e6, count)
    start = rng.uniform(-1, length, count) - rng.integers(1, bins, count) / bins * extent
    return np.stack([start, start + extent], 1)


# more than a block of lanes, from one pixel to all of them; ranks run both ways
MANY = [(4.2, 4.201), (-2, 13), (13, -2), (0, 130), (-1e6, 1e6), (3, -1e4)]
HUGE = [
    (3.0 * samples * start, 3.0 * samples * end)
    for samples in (2**22, 2**22 + 1, 2**31 - 2**8, 2**31, 2**31 + 2**9)
    for start, end in ((-1 / 2, 1 / 2), (-1 / 3, 2 / 3), (-1, 9 / (3.0 * samples)))
]
# many bins between two positions, where float32 has a quarter of a pixel
FAR = [(2e6 + 0.5, 2e6 + 1), (2e6 + 3, 2e6 + 2.25), (2**21 - 1.5, 2**21 + 1)]


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(
    "spans, length, bins, options, right",
    [
        (short_side(1), 1, 2, {"sampling": 3}, of_core),
        (short_side(2), 2, 2, {"sampling": 3}, of_core),
        (MANY, LENGTH, 130, {"sampling": 2}, of_core),
        (HUGE, LENGTH, 3, {"dtype": np.float32}, of_core),
        (HUGE, LENGTH, 3, {"dtype": np.float64}, of_core),
        (overlapping(128, 90), 90, 128, {}, of_oracle),
        (FAR, 2**21, 5, {"sampling": 0}, of_oracle),
        (FAR, 2**21, 5, {"sampling": 2}, of_oracle),
    ],
    ids=["1 pixel", "2 pixels", "many", "huge", "huge64", "overlapping", "far", "far of 2"],
)
def test_rare_boxes(spans, length, bins, options, right, columns):
    problem = problem_of(spans, length, bins, **options)
    expected = right(problem, 1)
    check_values(entries_of(problem, 1, columns=columns), expected)
    if not columns and problem.features.dtype == np.float32:
        check_values(sorted_entries_of(problem, 1), expected)


def test_bins_overlap_by_pixels():
    overlaps = [
        a.samples[k].lo.max(initial=-1) - a.samples[k + 1].lo.min(initial=90)
        for _, a in problem_of(overlapping(128, 90), 90, 128).axes
        for k in range(127)
    ]
    assert max(overlaps) > 3


@pytest.mark.parametrize("columns", [False, True])
def test_programs_of_some_rois(columns):
    """As they are launched: each does some of the RoIs, the last fewer."""
    problem = problem_of(SPANS[:11], LENGTH, 5, sampling=2)
    expected = entries_of(problem, 1, columns=columns)
    actual = entries_of(problem, 1, columns=columns, call=call)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


INDEX = [0, -1, 2, 1, 3, 1.5, 2.0**31, 2.0**53, -(2.0**62), np.nan, np.inf, 0.999999, 1e-30]


INTEGERS = ["int8", "uint8", "int16", "int32", "int64"]


@pytest.mark.parametrize("dtype", [*INTEGERS, "float16", "bfloat16", "float32", "float64"])
def test_indices(dtype):
    """Images and levels are read in their own type; of three only 0, 1 and 2 are."""
    kind = getattr(torch, dtype)
    if kind.is_floating_point:
        index = torch.tensor(INDEX, dtype=torch.float64).to(kind)
    else:
        limits = torch.iinfo(kind)
        index = torch.tensor([0, 1, 2, 3, limits.min, limits.max], dtype=kind)
    numbers = index.double()
    valid = (numbers >= 0) & (numbers < 3) & (numbers == numbers.floor())
    problem = problem_of([(0, 1)] * len(index), 4, 1)
    problem = replace(problem, features=np.zeros((3, 1, 4, 4), np.float32), index=array(index))
    taps = taps_of(problem, columns=False)
    assert taps.image_of.tolist() == torch.where(valid, numbers, -1).long().tolist()
    assert (taps.ranges[:, :, 1] > 0).all(1).tolist() == valid.tolist()

    problem = replace(problem, index=np.full(len(index), 2))
    for level in range(3):
        taps = taps_of(problem, columns=False, levels=array(index), maps=3, level=level)
        of_none = kernels.OTHER_MAP if level else kernels.NO_IMAGE
        elsewhere = torch.where(valid, kernels.OTHER_MAP.value, of_none.value)
        assert taps.image_of.tolist() == torch.where(numbers == level, 2, elsewhere).tolist()
        assert (taps.ranges[:, :, 1] > 0).all(1).tolist() == (numbers == level).tolist()
