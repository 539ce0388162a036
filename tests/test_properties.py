"""Any box, shape, dtype, strides and convention: within the bound of the oracle."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

import oracle
import roialign
import tolerance
from backends import named, operations, three
from conftest import draw_features

NUMPY = named("numpy")
LAYOUTS = ["contiguous", "channels_last", "transposed", "reversed", "sliced", "unaligned"]
HOSTILE = [np.nan, np.inf, -np.inf, 1e9, -1e9, 3e38, -3e38, 4.2e6, 2.2e9, 1e-45, -1e-40, -0.0]

coordinates = st.one_of(
    st.integers(-4, 16).map(float),  # on pixels and edges
    st.floats(-30, 30, width=16),
    st.sampled_from(HOSTILE),
)
boxes = st.tuples(*[coordinates] * 4)
conventions = st.one_of(
    st.sampled_from(sorted(roialign.conventions)).map(roialign.conventions.get),
    st.builds(
        roialign.Convention,
        pixel_offset=st.floats(-2, 2, width=16),
        input_offset=st.floats(-2, 2, width=16),
        end_offset=st.floats(-2, 2, width=16),
        min_size=st.none() | st.floats(0, 4, width=16),
        adaptive=st.sampled_from(["ceil", "floor"]),
    ),
)


@st.composite
def problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    images, channels = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    shape = images, channels, draw(st.integers(1, 12)), draw(st.integers(1, 12))
    dtype = draw(st.sampled_from(tolerance.DTYPES + tolerance.BYTES))
    drawn = np.array(draw(st.lists(boxes, max_size=6)), np.float64).reshape(-1, 4)
    boxes_dtype = draw(st.sampled_from(tolerance.DTYPES))
    with np.errstate(over="ignore"):
        drawn = drawn.astype(boxes_dtype)
    scales = st.sampled_from([1.0, 0.0625, 0.7, 2.0]) | st.floats(0.01, 4)
    return oracle.Problem(
        features=draw_features(rng, shape, dtype),
        boxes=drawn,
        index=rng.integers(images, size=len(drawn)),
        size=(draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        scale=(draw(scales), draw(scales)),
        sampling=draw(st.integers(-1, 5)),
        convention=draw(conventions),
    )


def check(problem, backend=NUMPY, layout=np.asarray):
    g = problem.draw_output()
    given = layout(problem.features), layout(g), *problem.rois
    results = backend.run(three(problem), *given)
    assert [result.dtype for result in results] == [g.dtype, g.dtype, problem.boxes.dtype]
    backend.check(problem, g, *results)
    if backend is NUMPY:  # every element is written
        for operation, result in zip(operations(problem), results, strict=True):
            out = np.full_like(result, np.nan)
            assert operation(*given, out=out).tobytes() == result.tobytes()


@given(problem=problems(), layout=st.sampled_from(LAYOUTS))
def test_anything(layouts, problem, layout):
    check(problem, layout=layouts[layout])


@pytest.mark.backends("values", "-interprets")
@pytest.mark.parametrize("size, scale", [((1, 1), (1.0, 1.0)), ((3, 7), (0.25, 0.125))])
def test_adaptive_sampling(backend, make_problem, convention, size, scale):
    """Boxes from less than a pixel to many times the map."""
    options = {"sampling": 0, "size": size, "scale": scale, "convention": convention}
    problem = make_problem(shape=(1, 2, 24, 31), count=40, **options)
    centre = problem.boxes.reshape(-1, 2, 2).mean(1)
    side = np.geomspace(0.3, 3000, 40)[:, None] / min(scale)
    boxes = np.concatenate([centre - side, centre + side], 1).astype(np.float32)
    check(backend.fair(replace(problem, boxes=boxes)), backend)


@pytest.mark.parametrize("size, sampling", [((7, 7), 3), ((3, 5), 0), ((5, 6), 2)])
def test_integer_boxes(make_problem, convention, size, sampling):
    """Samples at -1, at the map's size and on pixels, but for their rounding."""
    options = {"scale": (1, 0.7), "size": size, "sampling": sampling, "convention": convention}
    problem = make_problem(shape=(1, 1, 9, 11), count=100, **options)
    corners = np.random.default_rng(0).integers(-12, 24, (100, 2, 2))
    boxes = np.concatenate([corners.min(1), corners.max(1) + 1], 1).astype(np.float32)
    check(replace(problem, boxes=boxes))


def test_order_of_the_offsets(make_problem):
    """Each of them is added to the coordinate and rounded."""
    convention = roialign.Convention(pixel_offset=0.3, input_offset=0.1, end_offset=0.7)
    check(make_problem(convention=convention, shape=(1, 1, 90, 110), count=200))


@pytest.mark.parametrize("samples", [2**22, 2**22 + 1, 2**31 - 2**8, 2**31, 2**31 + 2**9])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_huge_adaptive_grid(make_problem, convention, samples, dtype):
    """Positions are float32, then float64, then the output is 0."""
    options = {"convention": convention, "dtype": dtype, "sampling": 0}
    problem = make_problem(size=(1, 2), scale=(1, 1), **options)
    height, width = samples + 0.0, 2.0 * samples
    boxes = [[-width / 3, -height / 2, -width / 3 + width, -height / 2 + height], [1, 1, 5, 4]]
    check(replace(problem, boxes=np.array(boxes, dtype), index=np.array([0, 1])))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_large(make_problem, layouts, dtype):
    """Results that bypass the caches, and live on huge pages of our own."""
    problem = make_problem(shape=(1, 515, 40, 56), count=250, size=(3, 3), sampling=0, dtype=dtype)
    g = problem.draw_output()
    y, d_features = oracle.forward(problem), oracle.adjoint(problem, g)
    forward_bound = tolerance.forward(problem, y)
    adjoint_bound = tolerance.adjoint(problem, g, d_features)
    rois, options = problem.rois, problem.options
    for layout in ("contiguous", "channels_last", "sliced"):
        features, strided_g = layouts[layout](problem.features), layouts[layout](g)
        actual = roialign.roi_align(features, rois, problem.size, **options)
        tolerance.check(actual, y, forward_bound)
        actual = roialign.roi_align_adjoint(strided_g, rois, features.shape, **options)
        tolerance.check(actual, d_features, adjoint_bound)
