"""Derivatives, of one map and of two: they are made of the operations, which the oracle tests."""

from dataclasses import replace

import numpy as np
import pytest

import oracle
import tolerance
from backends import array, operations, pair, pooling, summed
from tolerance import close


def draw(array, seed):
    return np.random.default_rng(seed).standard_normal(array.shape)


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


each_number_of_maps = pytest.mark.parametrize("maps", [1, 2])


@pytest.mark.backends("grad")
@each_number_of_maps
def test_first_order(backend, pyramid, maps):
    """Together and alone they are those that the adjoint and the box gradient give."""
    p = pyramid(maps=maps)
    _, *expected = p.together(p.d_output, *p.maps, *p.rois)
    given, every = backend.array((*p.maps, *p.rois, p.d_output)), tuple(range(maps + 1))
    together = backend.numpy(backend.grad(p.loss, every)(*given))
    for i, gradient in zip(every, together, strict=True):
        close(gradient, expected[i])
        close(backend.numpy(backend.grad(p.loss, i)(*given)), expected[i])
        assert gradient.any()


@pytest.mark.backends("jvp")
@each_number_of_maps
def test_forward_mode(backend, pyramid, maps):
    """Along all arguments, and along each alone: the transpose of the gradients."""
    p = pyramid(maps=maps)
    boxes, *others = p.rois
    tangents = [draw(each, 3) for each in (*p.maps, boxes)]
    output, *gradients = p.together(p.d_output, *p.maps, *p.rois)
    given, along, fixed = backend.array(([*p.maps, boxes], tangents, others))
    steps = [np.vdot(*pair) for pair in zip(gradients, tangents, strict=True)]

    def pool(*leaves):
        return p.forward(*leaves, *fixed)

    found, moved = backend.numpy(backend.jvp(pool, given, along))
    close(found, output)
    close(np.vdot(p.d_output, moved), sum(steps), 1e-11)
    for i, step in enumerate(steps):

        def of_one(each):
            return pool(*given[:i], each, *given[i + 1 :])

        _, moved = backend.numpy(backend.jvp(of_one, given[i : i + 1], along[i : i + 1]))
        close(np.vdot(p.d_output, moved), step, 1e-11)
    if maps == 1:
        expected = oracle.forward(p.problems[0], tangents[1])
        bound = tolerance.forward(p.problems[0], expected, tangents[1])
        tolerance.check(moved, expected, backend.bound(p.problems[0], bound, 0))


@pytest.mark.backends("jvp", "maps")
@each_number_of_maps
def test_forward_mode_of_the_adjoint_and_the_box_gradient(backend, pyramid, maps):
    """Each is linear in its arrays; along the boxes the adjoint is the transpose of pooling."""
    p = pyramid(maps=maps)
    boxes, *others = p.rois
    g, w, *u = (draw(each, 3) for each in (p.d_output, boxes, *p.maps))
    along_g, along, *along_maps = backend.array((g, w, *u))
    d_output, boxes, *given = backend.array((p.d_output, boxes, *p.maps, *others))
    given, others = given[:maps], given[maps:]

    def pasted(d_output, boxes):
        d_maps = p.adjoint(d_output, boxes, *others)
        return sum((d_maps[i] * along_maps[i]).sum() for i in range(maps))

    def moved(d_output, *maps):
        return (p.box_gradient(d_output, *maps, boxes, *others) * along).sum()

    of_maps = np.vdot(p.box_gradient(p.d_output, *u, *p.rois), w)
    _, found = backend.numpy(backend.jvp(pasted, (d_output, boxes), (along_g, along)))
    close(found, np.vdot(g, p.forward(*u, *p.rois)) + of_maps, 1e-11)
    _, found = backend.numpy(backend.jvp(moved, (d_output, *given), (along_g, *along_maps)))
    close(found, np.vdot(p.box_gradient(g, *p.maps, *p.rois), w) + of_maps, 1e-11)


# Second order, of the sum of the squares of what is pooled


def squares(backend, pool, rois):
    _, *others = backend.array(rois)

    def loss(*leaves):
        output = pool(*leaves, *others)
        return (output * output).sum() / 2

    return loss


def weighed(backend, function, argument, weight):
    """The weighted sum of one of its gradients."""
    gradient, weight = backend.grad(function, argument), backend.array(weight)

    def number(*given):
        return (gradient(*given) * weight).sum()

    return number


@pytest.mark.backends("twice")
@pytest.mark.parametrize("maps, form", [(1, pair), (1, array), (2, pair)])
def test_second_order(backend, pyramid, maps, form):
    """The gradient in the first map, differentiated in it and in the boxes; none in boxes twice."""
    p = pyramid(maps=maps, form=form)
    u, others = draw(p.maps[0], 3), [0 * each for each in p.maps[1:]]
    given = backend.array((*p.maps, p.rois[0]))
    step = weighed(backend, squares(backend, p.forward, p.rois), 0, u)
    in_map, in_boxes = backend.numpy(backend.grad(step, (0, maps))(*given))
    along, output = p.forward(u, *others, *p.rois), p.forward(*p.maps, *p.rois)
    close(in_map, p.adjoint(along, *p.rois)[0], 1e-11)
    expected = p.box_gradient(along, *p.maps, *p.rois)
    close(in_boxes, expected + p.box_gradient(output, u, *others, *p.rois), 1e-11)
    step = weighed(backend, squares(backend, p.forward, p.rois), maps, np.ones(p.rois[0].shape))
    error, message = backend.no_second_derivative
    with pytest.raises(error, match=message):
        backend.numpy(backend.grad(step, maps)(*given))


@pytest.mark.backends("mixed")
@each_number_of_maps
def test_second_order_of_boxes(backend, pyramid, maps):
    """The boxes' gradient is linear in the maps, and in d_output."""
    p = pyramid(maps=maps)
    w, g, *u = (draw(each, 3) for each in (p.rois[0], p.d_output, *p.maps))
    second = backend.grad(weighed(backend, p.loss, maps, w), (*range(maps), maps + len(p.rois)))
    *in_maps, in_output = backend.numpy(second(*backend.array((*p.maps, *p.rois, p.d_output))))
    expected = np.vdot(p.box_gradient(p.d_output, *u, *p.rois), w)
    close(sum(np.vdot(*pair) for pair in zip(in_maps, u, strict=True)), expected, 1e-11)
    close(np.vdot(in_output, g), np.vdot(p.box_gradient(g, *p.maps, *p.rois), w), 1e-11)


# The names that JAX and torch.func share


@pytest.mark.backends("func", "-slow")
@pytest.mark.parametrize("argument", [0, 1])
def test_jacobians(backend, problem, argument):
    """The reverse mode's, the forward mode's, and the gradients that they hold."""
    pool, g = pooling(problem), problem.draw_output()
    features, boxes, index, d_output = backend.array((problem.features, *problem.rois, g))

    def f(features, boxes):
        return pool(features, boxes, index)

    loss = summed(f, d_output)
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
    loss, func = squares(backend, pooling(problem), problem.rois), backend.func
    given = backend.array((problem.features, problem.boxes))
    of_features, of_boxes = backend.grad(loss, 0), backend.grad(loss, 1)
    by_features = backend.numpy(func.jacrev(of_boxes, 0)(*given))
    by_boxes = backend.numpy(func.jacrev(of_features, 1)(*given))
    close(by_features, np.moveaxis(by_boxes, (4, 5), (0, 1)))
    close(by_boxes, backend.numpy(func.jacfwd(of_features, 1)(*given)))


@pytest.mark.backends("func", "-slow")
def test_hessian(backend, problem):
    problem = replace(problem, features=problem.features[:, :1, :4, :5])
    loss, func = squares(backend, pooling(problem), problem.rois), backend.func
    features, boxes, u = backend.array((problem.features, problem.boxes, draw(problem.features, 1)))

    def of_features(features):
        return loss(features, boxes)

    _, product = backend.jvp(backend.grad(of_features), [features], [u])
    hessian = backend.numpy(func.hessian(of_features)(features))
    close(np.tensordot(hessian, backend.numpy(u), 4), backend.numpy(product))


@pytest.mark.backends("func")
def test_hessian_in_boxes_raises(backend, problem):
    loss, func = squares(backend, pooling(problem), problem.rois), backend.func
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

    def results_of(features):
        def pooled(boxes):
            return pool(features, boxes, index)

        def pooled_of(features):
            return pool(features, boxes, index)

        results = [backend.grad(summed(pool, d_output), 1)(features, boxes, index)]
        if "jvp" in backend.traits:
            results += backend.jvp(pooled, (boxes,), (v,))
        if "vmap" in backend.traits:
            several = backend.array(np.stack([backend.numpy(features)] * 2))
            results.append(backend.vmap(pooled_of)(several))
        return backend.numpy(results)

    for actual, expected in zip(results_of(features), results_of(floats), strict=True):
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

    gradients = backend.grad(summed(pool, d_output), (0, 1))
    d_features, d_boxes = backend.numpy(gradients(features, boxes, index))
    assert (d_features.dtype, d_boxes.dtype) == (dtype, boxes_dtype)
    assert d_features.any() and d_boxes.any()
    wide = np.float64 if dtype == np.float64 else np.float32
    output = backend.run(pool, *given, problem.index)
    assert output.dtype == dtype
    same = backend.run(pool, given[0], given[1].astype(wide), problem.index)
    assert np.array_equal(output, same)
