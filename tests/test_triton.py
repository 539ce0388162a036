"""The Triton kernels, interpreted, against the oracle, the core and other libraries.

Each test is of both kinds: the kernels for GPUs, and the matrix products for Ascend; but for a few.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

import oracle
import roialign
import tolerance
from test_properties import problems

pytest.importorskip("torch", reason="the interpreter runs on torch tensors")
pytest.importorskip("triton", reason="the kernels need Triton")

from triton.runtime import interpreter

from triton_interpreter import ASCEND, GPU, call, call_once, wide_call

SMALL = {"shape": (2, 2, 9, 11), "count": 3, "inside": True}


DTYPES = [(GPU, dtype) for dtype in tolerance.DTYPES]
DTYPES += [(ASCEND, dtype) for dtype in tolerance.DTYPES if dtype != np.float64]


@pytest.fixture(params=[GPU, ASCEND], ids=str)
def kernels(request):
    return request.param


def draw_tangent(problem):
    return np.random.default_rng(5).standard_normal(problem.boxes.shape).astype(problem.boxes.dtype)


def check(kernels, problem, tangent=None, **options):
    """All operations, or those that take a tangent."""
    check_forward(kernels, problem, tangent, **options)
    check_adjoint(kernels, problem, tangent, **options)
    if tangent is None:
        narrow, g = kernels.narrow, problem.draw_output()
        expected = oracle.box_gradient(problem, g)
        bound = tolerance.box_gradient(problem, g, expected, narrow=narrow)
        tolerance.check(kernels.box_gradient(problem, g, **options), expected, bound)


def check_forward(kernels, problem, tangent=None, **options):
    expected = oracle.forward(problem, tangent)
    bound = tolerance.forward(problem, expected, tangent, narrow=kernels.narrow)
    actual = kernels.forward(problem, tangent, **options)
    tolerance.check(actual, expected, bound)
    return actual


def check_adjoint(kernels, problem, tangent=None, **options):
    narrow, g = kernels.narrow, problem.draw_output()
    expected = oracle.adjoint(problem, g, tangent)
    bound = tolerance.adjoint(problem, g, expected, tangent, narrow=narrow)
    tolerance.check(kernels.adjoint(problem, g, tangent, **options), expected, bound)


def results(kernels, problem, g=None):
    g = problem.draw_output() if g is None else g
    return [
        kernels.forward(problem),
        kernels.adjoint(problem, g),
        kernels.box_gradient(problem, g),
    ]


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


# Values


@pytest.mark.parametrize("kernels, dtype", DTYPES, ids=str)
def test_oracle(kernels, make_problem, dtype):
    problem = make_problem(dtype=dtype, shape=(2, 3, 9, 11), count=4, sampling=0, size=(2, 3))
    check(kernels, problem)
    check(kernels, problem, draw_tangent(problem))


# a rule's numbers, in the kernels for GPUs: test_triton_taps.py, test_rule.py
def test_conventions(make_problem, convention):
    problem = make_problem(count=2, shape=(2, 1, 9, 11), sampling=0, convention=convention)
    check(ASCEND, problem)


@pytest.mark.parametrize(
    "kernels, layout, channels",
    [
        *[(GPU, "channels_last", channels) for channels in (3, 16, 48)],
        *[(GPU, "sliced", 18), (GPU, "transposed", 2)],
        *[(ASCEND, "channels_last", 3), (ASCEND, "sliced", 3)],
    ],
    ids=str,
)
def test_strides(kernels, make_problem, layouts, layout, channels):
    """Channels innermost, and in sixteens; a block of channels that is full, or not, or several."""
    dtype = np.float16 if channels == 16 else np.float32
    problem = make_problem(
        dtype=dtype, count=2, shape=(2, channels, 9, 6), size=(2, 2), inside=True
    )
    check(kernels, problem, layout=layouts[layout])


def test_many(kernels, make_problem, monkeypatch):
    """RoIs in several words, bins in several blocks, a map of several tiles."""
    if kernels is GPU:
        problem = make_problem(shape=(1, 2, 17, 35), count=40, size=(2, 2), sampling=1, inside=True)
        check_adjoint(kernels, problem)
        few = replace(problem, boxes=problem.boxes[:2], index=problem.index[:2], size=(9, 8))
    else:
        for name, value in {"SIDE": 16, "MAX_BINS": 16, "LANES": 512, "BLOCK_C": 2}.items():
            monkeypatch.setattr(kernels.launch, name, value)
        few = make_problem(shape=(1, 3, 35, 21), count=2, size=(18, 3), scale=(1, 1), inside=True)
        few.boxes[0] = 0, 0, 21, 35
    check(kernels, few)
    check(kernels, few, draw_tangent(few))


def test_turns(make_problem, monkeypatch):
    """Of few programs, where a device takes no more."""
    problem = make_problem(**SMALL)
    expected = results(ASCEND, problem)
    monkeypatch.setattr(ASCEND.launch, "MAX_PROGRAMS", 3)
    assert_same(results(ASCEND, problem), expected)


def test_least(kernels, make_problem):
    """One RoI, channel, bin and pixel."""
    problem = make_problem(shape=(1, 1, 1, 1), count=1, size=(1, 1), scale=(1, 1))
    check(kernels, replace(problem, boxes=np.float32([[-0.25, 0, 1, 0.5]])))


def test_empty(kernels, make_problem):
    """No RoI, channel or image: no kernel runs, and results are 0."""

    def never(*_, **__):
        raise AssertionError

    problem = make_problem(**SMALL)
    no_rois = replace(problem, boxes=problem.boxes[:0], index=problem.index[:0])
    no_channels = replace(problem, features=problem.features[:, :0])
    no_images = replace(problem, features=problem.features[:0])
    for empty in (no_rois, no_channels, no_images):
        g = empty.draw_output()
        assert not kernels.forward(empty, call=never).any()
        assert not kernels.adjoint(empty, g, call=never).any()
        assert not kernels.box_gradient(empty, g, call=never).any()


@settings(max_examples=5)
@given(problem=problems().filter(lambda p: len(p.boxes) and p.features.dtype in tolerance.DTYPES))
def test_any(problem):
    check(GPU, problem)


def test_golden(golden_few):
    golden_few.check_forward(GPU.forward(golden_few.problem))


def test_golden_adjoint(golden_gradient_few):
    case = golden_gradient_few
    case.check_adjoint(GPU.adjoint(case.problem, case.d_output))


# Maps


@pytest.mark.parametrize(
    "kernels, way",
    [(GPU, wide_call), (GPU, call_once), (ASCEND, wide_call)],
    ids=lambda each: getattr(each, "__name__", str(each)),
)
def test_maps(kernels, make_problem, layouts, way):
    """Rows and gradients of several maps are those of calls with one; on no map they are 0."""
    levels = np.int8([1, 0, -1, 2, 3, 1])
    # on the GPU as many blocks of channels as a map's layout makes
    channels = 2 if kernels.narrow else 17
    drawn = [
        make_problem(shape=(2, channels, *size), count=6, size=(2, 2), scale=scale, inside=True)
        for size, scale in [((9, 6), (0.5, 0.4)), ((5, 8), (0.25, 0.5)), ((4, 3), (0.3, 0.2))]
    ]
    index = np.array([0, 1, 1, 0, 0, 7])
    maps = [replace(each, boxes=drawn[2].boxes, index=index) for each in drawn]
    maps[1] = replace(maps[1], features=layouts["channels_last"](maps[1].features))
    first, *others = maps
    g = first.draw_output()
    more = {"others": others, "levels": levels, "call": way}
    output, d_boxes = kernels.forward(first, **more), kernels.box_gradient(first, g, **more)
    d_maps = kernels.adjoint(first, g, **more)
    for level, (alone, d_map) in enumerate(zip(maps, d_maps, strict=True)):
        on = levels == level
        alone = replace(alone, boxes=alone.boxes[on], index=index[on])
        assert_same((output[on], d_map, d_boxes[on]), results(kernels, alone, g[on]))
        assert output[on][0].any() and d_map.any() and d_boxes[on][0].any()
    nowhere = [2, 4]
    assert not output[nowhere].any() and not d_boxes[nowhere].any()


# Bad values


BAD_INDEX = np.array([0, -1, 2, 0.5, np.nan, np.inf, 2.0**31, 1], np.float32)


def test_bad_index(kernels, make_problem):
    """Its row is 0, and so are its gradients: as if the RoI were not there."""
    problem = make_problem(**SMALL | {"count": len(BAD_INDEX), "size": (2, 2)})
    bad = replace(problem, index=BAD_INDEX)
    g = problem.draw_output()
    good = np.isin(BAD_INDEX, (0, 1))
    there = replace(problem, boxes=problem.boxes[good], index=BAD_INDEX[good].astype(int))
    y, d_boxes = kernels.forward(bad), kernels.box_gradient(bad, g)
    assert not y[~good].any() and not d_boxes[~good].any()
    g[~good] = 0 if kernels.narrow else np.nan
    d_features = kernels.adjoint(bad, g)
    assert_same((y[good], d_features, d_boxes[good]), results(kernels, there, g[good]))


@pytest.fixture(scope="module")
def sloped(make_problem):
    """Two RoIs on one image; the second has no slope: p < 0 in x, the last pixel in y."""
    options = {"size": (2, 2), "scale": (1, 1), "convention": "asymmetric"}
    problem = make_problem(shape=(1, 2, 7, 9), count=2, **options)
    boxes = np.float32([[1.2, 2.1, 5.3, 4.9], [-0.9, 6.2, -0.1, 6.6]])
    return replace(problem, boxes=boxes, index=np.zeros(2, int))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_pixels_without_weight(sloped, poison):
    """They are not read, nor are they given anything."""
    tangent = draw_tangent(sloped)
    g = sloped.draw_output()
    for v in (None, tangent):
        reach = oracle.adjoint(sloped, np.ones_like(g), None if v is None else abs(v), bound=True)
        far = np.broadcast_to(reach == 0, sloped.features.shape)
        assert 0.2 < far.mean() < 1
        bad = replace(sloped, features=np.where(far, np.float32(poison), sloped.features))
        np.testing.assert_array_equal(GPU.forward(bad, v), GPU.forward(sloped, v))
        assert not GPU.adjoint(sloped, np.full_like(g, poison), v)[far].any()
    np.testing.assert_array_equal(GPU.box_gradient(bad, g), GPU.box_gradient(sloped, g))


def test_a_pixel_that_is_not_finite_stays_in_its_window(make_problem):
    """The matrix products read windows, with weights of 0 too."""
    problem = make_problem(shape=(1, 1, 9, 11), count=2, scale=(1, 1))
    problem.boxes[:] = (0, 0, 4, 4), (6, 4, 10, 8)
    g = problem.draw_output()
    expected = results(ASCEND, problem, g)
    problem.features[0, 0, 5:, 7] = np.nan, np.inf, -np.inf, 1e30
    g[1, 0, 1, 0] = np.nan
    y, d_features, d_boxes = results(ASCEND, problem, g)
    assert np.isnan(y[1]).any() and np.isnan(d_features).any() and np.isnan(d_boxes[1]).all()
    np.testing.assert_array_equal(y[0], expected[0][0])
    np.testing.assert_array_equal(d_boxes[0], expected[2][0])
    np.testing.assert_array_equal(d_features[..., :5, :5], expected[1][..., :5, :5])
    assert not np.isnan(d_features[..., :3, :]).any() and not np.isnan(d_features[..., :5]).any()


def test_other_rois(sloped):
    """A RoI's output gradient is its own; one in a bin without samples is nobody's."""
    g = sloped.draw_output()
    g[1] = np.nan
    first = replace(sloped, boxes=sloped.boxes[:1], index=sloped.index[:1])
    np.testing.assert_array_equal(GPU.box_gradient(sloped, g)[:1], GPU.box_gradient(first, g[:1]))
    outside = replace(sloped, boxes=sloped.boxes + np.float32([[0], [50]]))
    for v in (None, draw_tangent(outside)):
        expected = GPU.adjoint(first, g[:1], None if v is None else v[:1])
        np.testing.assert_array_equal(GPU.adjoint(outside, g, v), expected)
    assert not GPU.box_gradient(outside, g)[1].any()


def test_boxes_that_are_not_finite(kernels, make_problem):
    """With `min_size` an end of -inf makes a box; there is no slope in any."""
    options = {"convention": "mindspore_legacy", "size": (1, 2), "inside": True}
    problem = make_problem(count=9, shape=(1, 2, 8, 11), **options)
    problem.boxes[np.arange(8), np.arange(8) % 4] = [np.nan] * 4 + [-np.inf] * 4
    check(kernels, problem)
    assert not kernels.forward(problem, draw_tangent(problem))[:8].any()
    assert not kernels.box_gradient(problem, problem.draw_output())[:8].any()


def test_tangents_that_are_not_finite(sloped):
    """They count where there is slope: in no RoI without it."""
    v = draw_tangent(sloped)
    expected = GPU.forward(sloped, v)
    v[1] = np.nan, np.inf, -np.inf, np.nan
    np.testing.assert_array_equal(GPU.forward(sloped, v), expected)


def test_subnormal_sizes(make_problem, monkeypatch):
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
    output = check_forward(GPU, problem)
    assert output[:2].all() and not output[2].any()
    assert given


def test_more_samples_than_float32_counts(make_problem):
    problem = make_problem(shape=(1, 1, 9, 11), count=2, size=(2, 2), sampling=0, scale=(1, 1))
    problem.boxes[:] = (-1e8, 0, 1e8, 8), (-3e7, -5e8, 2e9, 4e8)
    # docs/ascend.md: on an axis of L pixels and P bins, ((L + 3) + 4 P) / 2^22 of the largest pixel
    bound = (11 + 3 + 4 * 2) / 2**22 * np.abs(problem.features).max()
    tolerance.check(
        ASCEND.forward(problem), oracle.forward(problem), np.full(problem.output_shape, bound)
    )


# Bits


def test_the_same_bits(make_problem, monkeypatch):
    """In every run; for forward and adjoint, however the work is cut.

    `call` and `wide_call` differ in the RoIs of a program of `axis_taps`.
    """
    problem = make_problem(shape=(1, 3, 8, 18), count=2, inside=True)
    g = problem.draw_output()
    y, d_features, d_boxes = results(GPU, problem, g)
    np.testing.assert_array_equal(GPU.box_gradient(problem, g, call=call), d_boxes)

    def smaller(kernel, grid, inputs, outputs, **constants):
        if kernel is GPU.launch.kernels.forward:
            channels, bins = problem.output_shape[1], np.prod(problem.size)
            constants |= {"BLOCK_C": 1, "BLOCK_B": 4}
            grid = (len(problem.boxes) * channels * -(-int(bins) // 4),)
        return wide_call(kernel, grid, inputs, outputs, **constants)

    np.testing.assert_array_equal(GPU.forward(problem, call=smaller), y)
    monkeypatch.setattr(GPU.launch, "TILE", (4, 8))
    np.testing.assert_array_equal(GPU.adjoint(problem, g), d_features)


# Sizes


def test_offsets_beyond_31_bits(make_problem):
    """Strides of memory of which a few pages are touched."""
    problem = make_problem(shape=(2, 2, 3, 4), count=2, size=(2, 2), dtype=np.float16)
    boxes = np.float32([[0.2, 0.7, 2.4, 1.9], [0.6, 0.1, 1.8, 1.5]])
    problem = replace(problem, boxes=boxes, scale=(1, 1), index=np.array([1, 0]))

    def far(array):
        """Two images or RoIs, 4 GiB apart."""
        steps = 2**31 + 6, *np.array(array[0].strides) // array.itemsize
        memory = np.empty(steps[0] + array[0].size, array.dtype)
        strides = [step * array.itemsize for step in steps]
        view = np.lib.stride_tricks.as_strided(memory, array.shape, strides)
        view[...] = array
        return view

    check(GPU, problem, layout=far)
