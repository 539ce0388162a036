"""What holds for any RoIAlign, whatever the oracle says."""

from dataclasses import replace

import numpy as np
import pytest

import oracle
import roialign
import tolerance
from backends import three


def forward(problem, rois=None, **changes):
    rois, options = problem.rois if rois is None else rois, problem.options | changes
    return roialign.roi_align(problem.features, rois, problem.size, **options)


def adjoint(problem, d_output, rois=None, **changes):
    rois, options = problem.rois if rois is None else rois, problem.options | changes
    return roialign.roi_align_adjoint(d_output, rois, problem.features.shape, **options)


def box_gradient(problem, d_output, rois=None, **changes):
    rois, options = problem.rois if rois is None else rois, problem.options | changes
    return roialign.roi_align_box_gradient(d_output, problem.features, rois, **options)


def bits(*arrays):
    return [(a.dtype, a.shape, a.tobytes()) for a in arrays]


def forward_bound(problem):
    return tolerance.forward(problem, np.full(problem.output_shape, np.abs(problem.features).max()))


@pytest.mark.parametrize("sampling", [0, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_adjoint_is_the_transpose(make_problem, convention, dtype, sampling):
    problem = make_problem(convention=convention, sampling=sampling, dtype=dtype)
    g, y = problem.draw_output(), forward(problem)
    d_features = adjoint(problem, g)
    left = np.vdot(g.astype(np.float64), y)
    right = np.vdot(problem.features.astype(np.float64), d_features)
    slack = np.sum(abs(g) * tolerance.forward(problem, y))
    slack += np.sum(abs(problem.features) * tolerance.adjoint(problem, g, d_features))
    assert abs(left - right) <= slack


def test_linear(make_problem, convention):
    problem = make_problem(convention=convention)
    other = make_problem(seed=1).features
    y = forward(problem)
    np.testing.assert_array_equal(forward(replace(problem, features=4 * problem.features)), 4 * y)
    sum_y = forward(replace(problem, features=problem.features + other))
    bound = 3 * forward_bound(replace(problem, features=abs(problem.features) + abs(other)))
    tolerance.check(sum_y, y.astype(np.float64) + forward(replace(problem, features=other)), bound)


@pytest.mark.parametrize("dtype", tolerance.DTYPES, ids=str)
@pytest.mark.parametrize("sampling", [0, 3, 127])
def test_constant(make_problem, convention, dtype, sampling):
    problem = make_problem(convention=convention, sampling=sampling, dtype=dtype, inside=True)
    for value in (1, -60000):
        constant = replace(problem, features=np.full_like(problem.features, value))
        y = forward(constant)
        expected = np.full(y.shape, float(constant.features.flat[0]))
        tolerance.check(y, expected, tolerance.forward(constant, expected))


@pytest.mark.parametrize("sampling", [0, 3])
def test_affine_map(make_problem, convention, sampling):
    """A bin of a linear map is the map at the bin's centre."""
    problem = make_problem(convention=convention, sampling=sampling, dtype=np.float64, inside=True)
    h, w = problem.features.shape[2:]
    ramp = 3 + 2 * np.arange(h)[:, None] - 5 * np.arange(w)
    problem = replace(problem, features=np.broadcast_to(ramp + 0.0, problem.features.shape))
    centres = []
    for d, scale, bins in zip((1, 0), problem.scale, problem.size, strict=True):
        boxes = problem.boxes + convention.input_offset
        a = boxes[:, d] * scale - convention.pixel_offset
        b = (boxes[:, d + 2] + convention.end_offset) * scale - convention.pixel_offset
        size = np.maximum(b - a, -np.inf if convention.min_size is None else convention.min_size)
        centres.append(a[:, None] + size[:, None] * (np.arange(bins) + 0.5) / bins)
    y, x = centres
    expected = 3 + 2 * y[:, None, :, None] - 5 * x[:, None, None, :]
    np.testing.assert_allclose(
        forward(problem), np.broadcast_to(expected, problem.output_shape), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("dtype", tolerance.DTYPES, ids=str)
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1.0])
def test_local(make_problem, convention, dtype, poison):
    """A pixel of weight 0 is not read; a pixel that no bin reads gets no gradient."""
    problem = make_problem(convention=convention, dtype=dtype, count=3, shape=(2, 5, 20, 24))
    far = oracle.adjoint(problem, np.ones(problem.output_shape)) == 0
    assert 0.2 < far.mean() < 1
    g = problem.draw_output()
    features = problem.features.copy()
    features[far] = poison
    poisoned = replace(problem, features=features)
    assert bits(forward(poisoned)) == bits(forward(problem))
    assert bits(box_gradient(poisoned, g)) == bits(box_gradient(problem, g))
    assert not adjoint(problem, g)[far].any()
    assert not adjoint(problem, np.full_like(g, np.nan))[far].any()


def test_other_rois_do_not_leak(make_problem):
    """A RoI's NaN output gradient or image spoils its own results only."""
    problem = make_problem(count=8)
    problem = replace(problem, index=np.arange(8) % 2)
    g, first = problem.draw_output(), problem.index == 0
    bad_features, bad_g = problem.features.copy(), g.copy()
    bad_features[1], bad_g[~first] = np.nan, np.nan
    bad = replace(problem, features=bad_features)
    assert bits(forward(bad)[first]) == bits(forward(problem)[first])
    assert bits(adjoint(problem, bad_g)[0]) == bits(adjoint(problem, g)[0])
    assert bits(box_gradient(bad, bad_g)[first]) == bits(box_gradient(problem, g)[first])


def test_whole_pixels(make_problem, convention):
    """Boxes and map moved by whole pixels: the same output."""
    problem = make_problem(convention=convention, scale=(1, 1), size=(2, 4), shape=(2, 5, 30, 32))
    corners = np.random.default_rng(3).integers(8, 64, (7, 2, 2)) / 4  # exact in float32
    boxes = np.concatenate([corners.min(1), corners.max(1) + 1], 1).astype(np.float32)
    here = replace(problem, boxes=boxes)
    dy, dx = 9, 7
    features = np.roll(problem.features, (dy, dx), (2, 3))
    there = replace(problem, features=features, boxes=boxes + np.float32([dx, dy, dx, dy]))
    y = forward(here)
    tolerance.check(forward(there), y.astype(np.float64), 2 * tolerance.forward(here, y))


def test_order_of_rois(make_problem):
    problem, order = make_problem(count=40), np.random.default_rng(4).permutation(40)
    g = problem.draw_output()
    shuffled = replace(problem, boxes=problem.boxes[order], index=problem.index[order])
    assert bits(forward(shuffled)) == bits(forward(problem)[order])
    assert bits(box_gradient(shuffled, g[order])) == bits(box_gradient(problem, g)[order])
    expected = adjoint(problem, g).astype(np.float64)
    bound = 2 * tolerance.adjoint(problem, g, expected)
    tolerance.check(adjoint(shuffled, g[order]), expected, bound)


def test_order_of_images(make_problem):
    problem, order = make_problem(count=40, shape=(4, 5, 9, 11)), np.array([2, 0, 3, 1])
    g = problem.draw_output()
    index = np.argsort(order)[problem.index]
    shuffled = replace(problem, features=problem.features[order], index=index)
    assert bits(forward(shuffled)) == bits(forward(problem))
    assert bits(box_gradient(shuffled, g)) == bits(box_gradient(problem, g))
    assert bits(adjoint(shuffled, g)) == bits(adjoint(problem, g)[order])


def test_int_or_pair(make_problem):
    problem = make_problem(size=(3, 3), scale=(0.5, 0.5))
    g = problem.draw_output()
    one = roialign.roi_align(
        problem.features, problem.rois, 3, **problem.options | {"spatial_scale": 0.5}
    )
    assert bits(one) == bits(forward(problem))
    half = {"spatial_scale": 0.5}
    assert bits(adjoint(problem, g, **half)) == bits(adjoint(problem, g))
    assert bits(box_gradient(problem, g, **half)) == bits(box_gradient(problem, g))


def test_sampling_below_one_adapts(make_problem):
    problem = make_problem(sampling=0)
    for ratio in (-1, -7, -(2**31) - 1, -(2**63) - 1, -(10**5000)):
        assert bits(forward(problem, sampling_ratio=ratio)) == bits(forward(problem))


def test_a_convention_is_a_moved_box(make_problem, convention):
    """On a fixed grid, where no size is clamped."""
    problem = make_problem(convention=convention, dtype=np.float64)
    boxes = problem.boxes + convention.input_offset
    boxes -= convention.pixel_offset / np.tile(problem.scale[::-1], 2)
    boxes[:, 2:] += convention.end_offset
    other = replace(problem, boxes=boxes, convention=roialign.Convention())
    check_mirrored(problem, other, axes=(), ends=[0, 1, 2, 3])


@pytest.mark.parametrize("axis, ends", [(3, [2, 1, 0, 3]), (2, [0, 3, 2, 1])], ids="xy")
def test_an_inverted_box_mirrors_the_bins(make_problem, convention, axis, ends):
    """On a fixed grid, where no size is clamped."""
    convention = replace(convention, min_size=None)
    problem = make_problem(convention=convention, dtype=np.float64, sampling=3)
    moved = np.where(np.arange(4) == ends, 0, np.repeat([1, -1], 2) * convention.end_offset)
    check_mirrored(problem, replace(problem, boxes=problem.boxes[:, ends] + moved), axis, ends)


def check_mirrored(problem, other, axes, ends):
    """The three operations, with bins and ends of the boxes in another order."""
    g = problem.draw_output()
    output, *gradients = three(problem)(problem.features, g, *problem.rois)
    output_, *gradients_ = three(other)(other.features, np.flip(g, axes), *other.rois)
    np.testing.assert_allclose(np.flip(output_, axes), output, rtol=0, atol=1e-12)
    np.testing.assert_allclose(gradients_[0], gradients[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(gradients_[1][:, ends], gradients[1], rtol=0, atol=1e-11)
    assert output.any() and all(gradient.any() for gradient in gradients)


def test_every_convention_is_another_function(make_problem):
    """Of boxes below a pixel too, sampled adaptively."""
    problem = make_problem(dtype=np.float64, sampling=0, scale=(1, 1), inside=True)
    boxes = np.concatenate([problem.boxes[:, :2], problem.boxes[:, :2] + [[0.7, 0.6]]], 1)
    boxes = np.concatenate([boxes, problem.boxes])
    problem = replace(problem, boxes=boxes, index=np.tile(problem.index, 2))
    records = set(roialign.conventions.values())
    results = {(forward(replace(problem, convention=c)).round(3) + 0.0).tobytes() for c in records}
    assert len(results) == len(records) > 5
