"""Derivatives, batching and other ways to run what takes samples one by one: largest samples, and
boxes that are turned."""

import numpy as np
import pytest

import roialign
from backends import SAMPLED, summed
from tolerance import close

SIZE = (2, 3)
OPTIONS = {"spatial_scale": 0.5, "sampling_ratio": 2}
REDUCTIONS = "max", "max_corner"
KINDS = *REDUCTIONS, "rotated"


each_kind = pytest.mark.parametrize("kind", KINDS)


def draw(kind):
    """Features, boxes, image index and d_output."""
    rng = np.random.default_rng(5)
    low, sides = rng.uniform(1, 5, (3, 2)), rng.uniform(4, 9, (3, 2))
    if kind == "rotated":
        boxes = np.hstack([low + sides / 2, sides, rng.uniform(-90, 90, (3, 1))])
    else:
        boxes = np.hstack([low, low + sides])
    return (
        rng.standard_normal((2, 2, 8, 9)),
        boxes,
        np.array([0, 1, 1]),
        rng.standard_normal((3, 2, *SIZE)),
    )


def functions(kind):
    """pool(features, boxes, index), adjoint(d_output, features, boxes, index) and box gradient."""
    shape, options = (2, 2, 8, 9), dict(OPTIONS)
    if kind == "rotated":

        def pool(features, *rois):
            return roialign.roi_align_rotated(features, rois, SIZE, **options)

        def adjoint(d_output, features, *rois):
            return roialign.roi_align_rotated_adjoint(d_output, rois, shape, **options)

        def box_gradient(d_output, features, *rois):
            return roialign.roi_align_rotated_box_gradient(d_output, features, rois, **options)

        return pool, adjoint, box_gradient
    options["reduction"] = kind

    def pool(features, *rois):
        return roialign.roi_align(features, rois, SIZE, **options)

    def adjoint(d_output, features, *rois):
        return roialign.roi_align_adjoint(d_output, rois, shape, features=features, **options)

    def box_gradient(d_output, features, *rois):
        return roialign.roi_align_box_gradient(d_output, features, rois, **options)

    return pool, adjoint, box_gradient


def derivative(kind, features, direction, *rois):
    """Of pooling in the features, along a direction: exact, as no other sample wins so near."""
    pool, _, _ = functions(kind)
    step = 1e-7 * direction
    return (pool(features + step, *rois) - pool(features - step, *rois)) / 2e-7


@pytest.mark.backends("grad", *SAMPLED)
@each_kind
def test_first_order(backend, kind):
    features, boxes, index, g = draw(kind)
    pool, adjoint, box_gradient = functions(kind)
    given = backend.array((features, boxes, index))
    loss = summed(pool, backend.array(g))

    def of_features(features):
        return loss(features, *given[1:])

    d_features = backend.numpy(backend.grad(of_features)(given[0]))
    close(d_features, adjoint(g, features, boxes, index))
    if kind == "max_corner":
        error = NotImplementedError, RuntimeError
        with pytest.raises(error, match="max_corner"):
            backend.numpy(backend.grad(loss, 1)(*given))
        return
    both = backend.numpy(backend.grad(loss, (0, 1))(*given))
    close(both[0], d_features)
    close(both[1], box_gradient(g, features, boxes, index))
    assert both[1].any()


@pytest.mark.backends("jvp", *SAMPLED)
@each_kind
def test_forward_mode(backend, kind):
    """Along the features and the boxes: the transpose of the gradients."""
    features, boxes, index, g = draw(kind)
    pool, adjoint, box_gradient = functions(kind)
    rng, fixed = np.random.default_rng(1), backend.array(index)
    u, v = rng.standard_normal(features.shape), rng.standard_normal(boxes.shape)
    if kind == "max_corner":
        v = 0 * v
    given, along = backend.array(([features, boxes], [u, v]))
    if kind == "max_corner":
        held, given, along = given[1], given[:1], along[:1]

        def moved(features):
            return pool(features, held, fixed)

    else:

        def moved(features, boxes):
            return pool(features, boxes, fixed)

    output, change = backend.numpy(backend.jvp(moved, given, along))
    close(output, pool(features, boxes, index))
    expected = np.vdot(adjoint(g, features, boxes, index), u)
    if kind != "max_corner":
        expected += np.vdot(box_gradient(g, features, boxes, index), v)
    close(np.vdot(change, g), expected, 1e-11)


@pytest.mark.backends("twice", *SAMPLED)
@each_kind
def test_second_order(backend, kind):
    """Of the sum of squares: the winners stay, so it is linear in what is pooled."""
    features, boxes, index, _ = draw(kind)
    pool, adjoint, _ = functions(kind)
    u = np.random.default_rng(2).standard_normal(features.shape)
    rois = backend.array((boxes, index))

    def loss(features):
        output = pool(features, *rois)
        return (output * output).sum() / 2

    def step(features):
        return (backend.grad(loss)(features) * weights).sum()

    weights = backend.array(u)
    found = backend.numpy(backend.grad(step)(backend.array(features)))
    along = derivative(kind, features, u, boxes, index)
    np.testing.assert_allclose(found, adjoint(along, features, boxes, index), atol=1e-6)


@pytest.mark.backends("vmap", *SAMPLED)
@each_kind
@pytest.mark.parametrize("axes", ["0..", ".0.", "0.0", "00."])
def test_vmap(backend, kind, axes):
    """Over these axes of features, boxes and index: results and gradients in the features."""
    features, boxes, index, g = draw(kind)
    pool, adjoint, _ = functions(kind)
    one, other = (features, boxes, index), (features[::-1], boxes * 0.9, 1 - index)
    weights = backend.array(g)

    def gradient(*given):
        return adjoint(weights, *given)

    if "func" in backend.traits:  # MindSpore's vmap takes no gradient in it
        gradient = backend.grad(summed(pool, weights))

    def results(*given):
        return pool(*given), gradient(*given)

    stacked = [
        np.stack([a, b]) if x == "0" else a for a, b, x in zip(one, other, axes, strict=True)
    ]
    numbers = tuple([0 if x == "0" else None for x in axes])
    batched = backend.numpy(backend.vmap(results, numbers)(*backend.array(stacked)))
    for i in range(2):
        each = [a[i] if x == "0" else a for a, x in zip(stacked, axes, strict=True)]
        for actual, expected in zip(batched, backend.run(results, *each), strict=True):
            close(actual[i], expected)


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python:Warning")  # torch.jit.trace's
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated:FutureWarning")  # torch's own
@pytest.mark.backends("ways", *SAMPLED)
@pytest.mark.parametrize("kind", ["max", "rotated"])
def test_ways_to_run(backend, kind):
    """The same bits of the output and of the gradient in the features."""
    features, *rois, g = draw(kind)
    pool, _, _ = functions(kind)
    given = backend.array((features.astype(np.float32), *rois))
    weights = backend.array(g.astype(np.float32))

    def results(pool, *given):
        d_features = backend.backward(summed(pool, weights), 0)(*given)
        return backend.numpy((pool(*given), d_features))

    expected = results(pool, *given)
    for function, context in backend.ways(pool, given):
        with context():
            found = results(function, *given)
        for actual, right in zip(found, expected, strict=True):
            assert actual.tobytes() == right.tobytes() and right.any()
