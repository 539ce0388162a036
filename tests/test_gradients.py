"""Derivatives: against finite differences of NumPy's results, and against the oracle."""

from dataclasses import replace

import numpy as np
import pytest

import oracle
import tolerance
from backends import operations, pooling


@pytest.fixture
def problem(make_problem):
    """In float64, away from kinks."""
    return make_problem(dtype=np.float64, shape=(2, 2, 6, 7), count=3, size=(2, 3), inside=True)


def draw(array, seed):
    return np.random.default_rng(seed).standard_normal(array.shape)


def differences(function, x, step=1e-6):
    """The gradient of a function of an array that gives a number."""
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[i] += sign * step
            ends.append(function(moved))
        out[i] = (ends[0] - ends[1]) / (2 * step)
    return out


def close(actual, expected, atol=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.mark.backends("grad")
@pytest.mark.parametrize("sampling", [0, 2])
def test_first_order(backend, problem, sampling):
    problem = replace(problem, sampling=sampling)
    pool, g = pooling(problem), problem.draw_output()
    features, boxes, index, d_output = backend.array((problem.features, *problem.rois, g))

    def loss(features, boxes):
        return (pool(features, boxes, index) * d_output).sum()

    def in_numpy(features, boxes):
        return np.vdot(pool(features, boxes, problem.index), g)

    d_features, d_boxes = backend.numpy(backend.grad(loss, (0, 1))(features, boxes))
    close(d_features, differences(lambda f: in_numpy(f, problem.boxes), problem.features), 1e-7)
    close(d_boxes, differences(lambda b: in_numpy(problem.features, b), problem.boxes), 1e-7)
    for argument, both in enumerate((d_features, d_boxes)):
        alone = backend.numpy(backend.grad(loss, argument)(features, boxes))
        assert np.array_equal(alone, both)


@pytest.mark.backends("jvp")
def test_forward_mode(backend, problem):
    u, v = draw(problem.features, 3), draw(problem.boxes, 4)
    features, boxes, index = backend.array((problem.features, *problem.rois))
    pool = pooling(problem)

    def of_boxes(boxes):
        return pool(features, boxes, index)

    def of_both(features, boxes):
        return pool(features, boxes, index)

    output, along = backend.numpy(backend.jvp(of_boxes, [boxes], backend.array([v])))
    close(output, oracle.forward(problem))
    expected = oracle.forward(problem, v)
    bound = backend.bound(problem, tolerance.forward(problem, expected, v), 0)
    tolerance.check(along, expected, bound)
    tangents = backend.array([u, v])
    _, both = backend.numpy(backend.jvp(of_both, [features, boxes], tangents))
    close(both, along + oracle.forward(replace(problem, features=u)))


@pytest.mark.backends("grad", "twice")
def test_of_the_adjoint_and_the_box_gradient(backend, problem):
    """The derivatives of each are the others."""
    _, adjoint, box_gradient = operations(problem)
    g, w, v = problem.draw_output(), draw(problem.features, 7), draw(problem.boxes, 8)
    given = problem.features, problem.boxes, problem.boxes, problem.index, g, w, v
    features, boxes, held, index, d_output, on_features, on_boxes = backend.array(given)

    def of_adjoint(d_output, boxes):
        return (adjoint(None, d_output, boxes, index) * on_features).sum()

    def of_box_gradient(d_output, features):
        return (box_gradient(features, d_output, held, index) * on_boxes).sum()

    dd_output, d_boxes = backend.numpy(backend.grad(of_adjoint, (0, 1))(d_output, boxes))
    on_w = replace(problem, features=w)
    close(dd_output, oracle.forward(on_w))
    close(d_boxes, oracle.box_gradient(on_w, g))
    gradients = backend.grad(of_box_gradient, (0, 1))(d_output, features)
    dd_output, d_features = backend.numpy(gradients)
    close(dd_output, oracle.forward(problem, v))
    close(d_features, oracle.adjoint(problem, g, v))


@pytest.mark.backends("jvp", "func")
def test_forward_mode_of_the_adjoint_and_the_box_gradient(backend, problem):
    _, adjoint, box_gradient = operations(problem)
    g, h = problem.draw_output(), problem.draw_output(seed=2)
    u, v = draw(problem.features, 3), draw(problem.boxes, 4)
    given = problem.features, problem.boxes, problem.index, g
    features, boxes, index, d_output = backend.array(given)

    def of_adjoint(d_output, boxes):
        return adjoint(None, d_output, boxes, index)

    def of_box_gradient(d_output, features):
        return box_gradient(features, d_output, boxes, index)

    along = backend.jvp(of_adjoint, [d_output, boxes], backend.array([h, v]))[1]
    close(backend.numpy(along), oracle.adjoint(problem, h) + oracle.adjoint(problem, g, v))
    along = backend.jvp(of_box_gradient, [d_output, features], backend.array([h, u]))[1]
    expected = oracle.box_gradient(problem, h)
    close(backend.numpy(along), expected + oracle.box_gradient(replace(problem, features=u), g))


# Second order, of the sum of the cubes of what is pooled


def cubes(backend, problem):
    pool, index = pooling(problem), backend.array(problem.index)

    def loss(features, boxes):
        output = pool(features, boxes, index)
        return (output * output * output).sum()

    return loss


def weighed(backend, problem, argument, weight):
    """The weighted sum of one of its gradients."""
    gradient, weight = backend.grad(cubes(backend, problem), argument), backend.array(weight)

    def number(features, boxes):
        return (gradient(features, boxes) * weight).sum()

    return number


def in_numpy(problem, argument, weight):
    forward, *gradients = operations(problem)

    def number(features, boxes):
        rois = boxes, problem.index
        d_output = 3 * forward(features, None, *rois) ** 2
        return np.vdot(gradients[argument](features, d_output, *rois), weight)

    return number


@pytest.mark.backends("twice")
def test_second_order_of_features(backend, problem):
    """The features' gradient, differentiated in features and in boxes."""
    weight = draw(problem.features, 5)
    features, boxes = backend.array((problem.features, problem.boxes))
    second = backend.grad(weighed(backend, problem, 0, weight), (0, 1))
    in_features, in_boxes = backend.numpy(second(features, boxes))
    first = in_numpy(problem, 0, weight)
    close(in_features, differences(lambda f: first(f, problem.boxes), problem.features), 1e-6)
    close(in_boxes, differences(lambda b: first(problem.features, b), problem.boxes), 1e-6)


@pytest.mark.backends("twice", "mixed")
def test_second_order_of_boxes(backend, problem):
    """The boxes' gradient, differentiated in features."""
    weight = draw(problem.boxes, 6)
    features, boxes = backend.array((problem.features, problem.boxes))
    second = backend.grad(weighed(backend, problem, 1, weight), 0)
    first = in_numpy(problem, 1, weight)
    expected = differences(lambda f: first(f, problem.boxes), problem.features)
    close(backend.numpy(second(features, boxes)), expected, 1e-6)


@pytest.mark.backends("twice")
def test_second_order_in_boxes_raises(backend, problem):
    features, boxes = backend.array((problem.features, problem.boxes))
    second = backend.grad(weighed(backend, problem, 1, np.ones(problem.boxes.shape)), 1)
    error, message = backend.no_second_derivative
    with pytest.raises(error, match=message):
        backend.numpy(second(features, boxes))


# The names that JAX and torch.func share


@pytest.mark.backends("func", "-slow")
@pytest.mark.parametrize("argument", [0, 1])
def test_jacobians(backend, problem, argument):
    """The reverse mode's, the forward mode's, and the gradients that they hold."""
    pool, g = pooling(problem), problem.draw_output()
    features, boxes, index, d_output = backend.array((problem.features, *problem.rois, g))

    def f(features, boxes):
        return pool(features, boxes, index)

    def loss(features, boxes):
        return (f(features, boxes) * d_output).sum()

    reverse = backend.numpy(backend.func.jacrev(f, argument)(features, boxes))
    close(reverse, backend.numpy(backend.func.jacfwd(f, argument)(features, boxes)))
    output, pull = backend.func.vjp(f, features, boxes)
    assert np.array_equal(backend.numpy(output), backend.run(pool, problem.features, *problem.rois))
    expected = backend.numpy(backend.grad(loss, argument)(features, boxes))
    assert np.array_equal(backend.numpy(pull(d_output)[argument]), expected)
    close(np.tensordot(g, reverse, 4), expected)


@pytest.mark.backends("func", "-slow")
def test_mixed_jacobians(backend, problem):
    """d/d features of the gradient in the boxes, and the other way round."""
    loss, func = cubes(backend, problem), backend.func
    given = backend.array((problem.features, problem.boxes))
    of_features, of_boxes = backend.grad(loss, 0), backend.grad(loss, 1)
    by_features = backend.numpy(func.jacrev(of_boxes, 0)(*given))
    by_boxes = backend.numpy(func.jacrev(of_features, 1)(*given))
    close(by_features, np.moveaxis(by_boxes, (4, 5), (0, 1)))
    close(by_boxes, backend.numpy(func.jacfwd(of_features, 1)(*given)))


@pytest.mark.backends("func", "-slow")
def test_hessian(backend, problem):
    problem = replace(problem, features=problem.features[:, :1, :4, :5])
    loss, func = cubes(backend, problem), backend.func
    features, boxes, u = backend.array((problem.features, problem.boxes, draw(problem.features, 1)))

    def of_features(features):
        return loss(features, boxes)

    _, product = backend.jvp(backend.grad(of_features), [features], [u])
    hessian = backend.numpy(func.hessian(of_features)(features))
    close(np.tensordot(hessian, backend.numpy(u), 4), backend.numpy(product))


@pytest.mark.backends("func")
def test_hessian_in_boxes_raises(backend, problem):
    loss, func = cubes(backend, problem), backend.func
    features, boxes = backend.array((problem.features, problem.boxes))
    forward, reverse = (lambda f, j=j: j(j(f)) for j in (func.jacfwd, func.jacrev))
    for twice in (func.hessian, forward, reverse):
        with pytest.raises(NotImplementedError, match="second derivative in the boxes"):
            backend.way(twice(lambda boxes: loss(features, boxes)))(boxes)


@pytest.mark.backends("grad", "bytes")
@pytest.mark.parametrize("dtype", tolerance.BYTES, ids=str)
def test_features_of_bytes_are_constants(backend, make_problem, dtype):
    """The boxes have derivatives, those of the same numbers as floats; so have batches of bytes."""
    problem = make_problem(dtype=dtype, inside=True)
    pool, floats = pooling(problem), problem.features.astype(np.float32)
    v = np.random.default_rng(2).standard_normal(problem.boxes.shape).astype(np.float32)
    given = problem.features, floats, *problem.rois, problem.draw_output(), v
    features, floats, boxes, index, d_output, v = backend.array(given)
    results = []
    for each in (features, floats):

        def loss(boxes, each=each):
            return (pool(each, boxes, index) * d_output).sum()

        results.append([backend.grad(loss)(boxes)])
        if "jvp" in backend.traits:
            results[-1] += backend.jvp(lambda b, each=each: pool(each, b, index), (boxes,), (v,))
        if "vmap" in backend.traits:
            several = backend.vmap(lambda each: pool(each, boxes, index))
            results[-1].append(several(each.expand(2, *each.shape)))
    for actual, expected in zip(*map(backend.numpy, results), strict=True):
        assert actual.dtype == np.float32 and expected.any()
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())


@pytest.mark.backends("grad")
@pytest.mark.parametrize("boxes_dtype", tolerance.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", tolerance.DTYPES, ids=str)
def test_dtypes(backend, make_problem, dtype, boxes_dtype):
    """Gradients have the dtypes of what they are gradients of."""
    problem = make_problem()
    pool, g = pooling(problem), problem.draw_output()  # a sum of bfloat16 is not in MindSpore
    given = problem.features.astype(dtype), problem.boxes.astype(boxes_dtype)
    features, boxes, index, d_output = backend.array((*given, problem.index, g))

    def loss(features, boxes):
        return (pool(features, boxes, index) * d_output).sum()

    d_features, d_boxes = backend.numpy(backend.grad(loss, (0, 1))(features, boxes))
    assert (d_features.dtype, d_boxes.dtype) == (dtype, boxes_dtype)
    assert d_features.any() and d_boxes.any()
    wide = np.float64 if dtype == np.float64 else np.float32
    output = backend.run(pool, *given, problem.index)
    assert output.dtype == dtype
    same = backend.run(pool, given[0], given[1].astype(wide), problem.index)
    assert np.array_equal(output, same)
