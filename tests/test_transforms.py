"""vmap, and other ways to run a function: what a call alone gives, of results and derivatives."""

import importlib
import sys
from dataclasses import replace

import numpy as np
import pytest

import roialign
import test_gradients
from backends import choose, named, pooling
from conftest import draw_problem, draw_pyramid
from isolation import isolated
from tolerance import close


@pytest.fixture
def problem(make_problem):
    return make_problem(dtype=np.float64, shape=(2, 2, 6, 7), count=3, size=(2, 3), inside=True)


@pytest.mark.backends("func")
@pytest.mark.parametrize(
    "maps, axes",
    [
        *((1, axes) for axes in ["0...", ".0..", "..0.", "2.1.", "11..", "0000", "...0"]),
        *((2, axes) for axes in ["00....", ".1...0", "..1...", "....0.", "100000"]),
    ],
)
def test_vmap(backend, pyramid, maps, axes):
    """Over these axes of maps, boxes, image index (levels) and d_output: all results."""
    p = pyramid(maps=maps)
    boxes, *index = p.rois
    one = *p.maps, *p.rois, p.d_output
    other = [0.9 * each for each in (*p.maps, boxes)] + [(1 - each) % 2 for each in index]
    axes = [None if axis == "." else int(axis) for axis in axes]
    stacked = [
        a if axis is None else np.stack([a, b], axis)
        for a, b, axis in zip(one, (*other, 0.9 * p.d_output), axes, strict=True)
    ]
    gradients = backend.grad(p.loss, (0, maps))

    def results(*given):
        return *p.together(given[-1], *given[:-1]), *gradients(*given)

    batched = backend.numpy(backend.vmap(results, tuple(axes))(*backend.array(stacked)))
    for i in range(2):
        each = [
            a if axis is None else a.take(i, axis) for a, axis in zip(stacked, axes, strict=True)
        ]
        for actual, expected in zip(batched, backend.run(results, *each), strict=True):
            close(actual[i], expected)


@pytest.mark.backends("vmap")
def test_over_features_alone(backend, problem):
    pool, (boxes, index) = pooling(problem), backend.array(problem.rois)

    def of_features(features):
        return pool(features, boxes, index)

    two = backend.array(np.stack([problem.features, 2 * problem.features]))
    output = backend.numpy(backend.vmap(of_features)(two))
    expected = backend.run(of_features, problem.features)
    for actual, right in zip(output, (expected, 2 * expected), strict=True):
        if "exact" in backend.traits:
            np.testing.assert_array_equal(actual, right)
        close(actual, right)


@pytest.mark.backends("func")
def test_a_bad_index_is_not_another_calls_image(backend, problem):
    pool, boxes = pooling(problem), backend.array(problem.boxes)
    index = backend.array(np.array([[0, 1, 2], [-1, 1, 0]]))
    features = backend.array(np.stack([problem.features] * 2))
    over_both = backend.vmap(lambda features, index: pool(features, boxes, index))
    if backend.family == "torch":
        with pytest.raises(IndexError, match="`image_index` of RoI"):
            over_both(features, index)
    else:  # traced, or on a GPU
        output = backend.numpy(over_both(features, index))
        assert not output[0, 2].any() and not output[1, 0].any()
        assert output[0, :2].any((1, 2, 3)).all() and output[1, 1:].any((1, 2, 3)).all()


@pytest.mark.backends("func")
def test_of_tangents(backend, problem):
    pool, index = pooling(problem), backend.array(problem.index)
    features, boxes = backend.array((problem.features, problem.boxes))
    tangents = np.random.default_rng(0).standard_normal((2, *problem.boxes.shape))

    def along(tangent):
        return backend.jvp(lambda boxes: pool(features, boxes, index), [boxes], [tangent])[1]

    batched = backend.numpy(backend.vmap(along)(backend.array(tangents)))
    for actual, tangent in zip(batched, tangents, strict=True):
        close(actual, backend.numpy(along(backend.array(tangent))))


@pytest.mark.backends("func")
def test_of_vmap(backend, problem):
    pool, (boxes, index) = pooling(problem), backend.array(problem.rois)
    many = np.stack([problem.features, problem.features + 1, 2 * problem.features])
    scales = np.array([0.9, 1.1])

    def over_scales(features):
        return backend.vmap(lambda scale: pool(features, scale * boxes, index))(factors)

    factors = backend.array(scales)
    outputs = backend.numpy(backend.vmap(over_scales)(backend.array(many)))
    for i, j in np.ndindex(3, 2):
        expected = backend.run(pool, many[i], scales[j] * problem.boxes, problem.index)
        close(outputs[i, j], expected)


@pytest.mark.backends("func")
def test_over_nothing(backend, problem):
    """Of the output and of the box gradient."""
    pool, (boxes, index) = pooling(problem), backend.array(problem.rois)
    gradient = backend.grad(lambda *given: (pool(*given) ** 2).sum(), 1)

    def both(features):
        return pool(features, boxes, index), gradient(features, boxes, index)

    nothing = backend.array(np.zeros((0, *problem.features.shape)))
    empty = backend.numpy(backend.vmap(both)(nothing))
    for none, one in zip(empty, backend.run(both, problem.features), strict=True):
        assert none.shape == (0, *one.shape)


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python:Warning")  # torch.jit.trace's
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated:FutureWarning")  # torch's own
@pytest.mark.backends("ways")
def test_ways_to_run(backend, problem):
    """The same bits of the output and its gradients, of another number of RoIs too."""
    problem = replace(problem, features=problem.features.astype(np.float32))
    pool, rois = pooling(problem), problem.rois
    calls = [backend.array((problem.features, *(each[:k] for each in rois))) for k in (3, 2)]

    def results(pool, features, boxes, index):
        def loss(features, boxes):
            return (pool(features, boxes, index) ** 2).sum()

        gradients = backend.backward(loss, (0, 1))(features, boxes)
        return backend.numpy((pool(features, boxes, index), *gradients))

    for function, context in backend.ways(pool, calls[0]):
        for given in calls:
            expected = results(pool, *given)
            with context():
                found = results(function, *given)
            for actual, right in zip(found, expected, strict=True):
                assert actual.tobytes() == right.tobytes() and right.any()


def check_the_first_call(name):
    backend = named(name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        backend.start(monkeypatch)
        assert f"roialign.{backend.family}" not in sys.modules
        problem, layer = draw_problem(), roialign.ROIAlign(2, 2, 1.0)
        rois = np.column_stack(problem.rois[::-1]).astype(np.float32)
        output = backend.run(layer, problem.features, rois)
        assert np.array_equal(output, layer(problem.features, rois)) and output.any()


@pytest.mark.backends("values", "exact", "-fast")
def test_the_first_call_is_compiled(backend):
    """The adapter is found and loaded while the compiler reads."""
    isolated(check_the_first_call, backend.name)


def check_without(library, module, name):
    """The gradients, where a library has not what is private to it."""
    module = importlib.import_module(module)
    private = getattr(module, name)
    delattr(module, name)
    importlib.import_module(f"roialign.{library}")
    setattr(module, name, private)
    for backend in choose("grad", "-interprets"):
        if backend.family == library:
            with pytest.MonkeyPatch.context() as monkeypatch:
                backend.start(monkeypatch)
                test_gradients.test_first_order(backend, draw_pyramid, 1)
                if "jvp" in backend.traits:
                    test_gradients.test_forward_mode(backend, draw_pyramid, 1)
