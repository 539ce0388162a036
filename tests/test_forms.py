"""The forms of rois: one array, a pair, a list of arrays. They mean the same."""

from dataclasses import replace

import numpy as np
import pytest

from backends import array, arrays_of, operations, pair, per_image, pooling, summed, three


@pytest.fixture
def problem(make_problem):
    """RoIs in the order of their images, as a list has them."""
    problem = make_problem(count=6)
    return replace(problem, index=np.sort(problem.index))


def joined(form, d_rois):
    """(K, 4): the gradient in the boxes."""
    return np.concatenate(d_rois) if form is per_image else d_rois[:, -4:]


@pytest.mark.backends("values", "-narrow")
def test_they_agree(backend, problem):
    g = problem.draw_output()
    expected = None
    for form in (pair, array, per_image):
        rois = arrays_of(form, *problem.rois)
        *results, d_rois = backend.run(three(problem, form), problem.features, g, *rois)
        if form is array:
            assert d_rois.shape == (6, 5) and not d_rois[:, 0].any()
        if form is per_image:
            assert [d.shape for d in d_rois] == [boxes.shape for boxes in rois]
        results.append(joined(form, d_rois))
        expected = expected or results
        for actual, right in zip(results, expected, strict=True):
            assert np.array_equal(actual, right) and right.any()


@pytest.mark.backends("grad")
@pytest.mark.parametrize("count", [6, 1])
def test_gradients_agree(backend, problem, count):
    """And are those that the adjoint and the box gradient give; of one RoI any stride is right."""
    problem = replace(problem, boxes=problem.boxes[:count], index=problem.index[:count])
    g = problem.draw_output()
    (_, *expected) = backend.run(three(problem), problem.features, g, *problem.rois)
    g = backend.array(g)
    for form in (pair, array, per_image):
        loss = summed(pooling(problem, form), g)
        given = backend.array((problem.features, *arrays_of(form, *problem.rois)))
        moving = (0, 1, 2) if form is per_image else (0, 1)
        d_features, *d_rois = backend.numpy(backend.grad(loss, moving)(*given))
        assert np.array_equal(d_features, expected[0])
        assert np.array_equal(backend.numpy(backend.grad(loss, 0)(*given)), d_features)
        assert np.array_equal(backend.numpy(backend.grad(loss, 1)(*given)), d_rois[0])
        assert np.array_equal(joined(form, d_rois if form is per_image else d_rois[0]), expected[1])


@pytest.mark.backends("values", "-narrow")
def test_image_index_of_a_pair(backend, problem):
    """Of any integer dtype that the library computes with."""
    pool, (boxes, index) = pooling(problem), problem.rois
    expected = backend.run(pool, problem.features, boxes, index)
    for dtype in backend.integers:
        output = backend.run(pool, problem.features, boxes, index.astype(dtype))
        assert np.array_equal(output, expected)


@pytest.mark.backends("values", "-narrow")
def test_integer_boxes(backend, problem):
    """Of any integer dtype: those of float32 are the same, and so is their gradient's dtype."""
    g, whole = problem.draw_output(), replace(problem, boxes=np.abs(problem.boxes).round())
    for form in (pair, array):
        rois = arrays_of(form, *whole.rois)
        expected = backend.run(three(problem, form), problem.features, g, *rois)
        for dtype in backend.integers:
            boxes, *index = (each.astype(dtype) for each in rois)
            results = backend.run(three(problem, form), problem.features, g, boxes, *index)
            for actual, right in zip(results, expected, strict=True):
                assert actual.dtype == np.float32 and np.array_equal(actual, right)
        if "fast" not in backend.traits:
            break


@pytest.mark.backends("values", "-narrow")
@pytest.mark.parametrize("dtypes", [("int32", "float32"), ("float32", "float16")], ids=str)
def test_list_of_different_dtypes(backend, problem, dtypes):
    given = [b.astype(d) for b, d in zip(arrays_of(per_image, *problem.rois), dtypes, strict=True)]
    alike, g = [boxes.astype(np.float32) for boxes in given], problem.draw_output()
    operations = three(problem, per_image)
    *results, d_boxes = backend.run(operations, problem.features, g, *given)
    *expected, right = backend.run(operations, problem.features, g, *alike)
    assert all(map(np.array_equal, results, expected))
    kinds = [np.float32 if d == "int32" else d for d in dtypes]
    assert [d.dtype for d in d_boxes] == kinds
    for actual, each, kind in zip(d_boxes, right, kinds, strict=True):
        assert np.array_equal(actual, each.astype(kind))


@pytest.mark.backends("values", "-narrow")
@pytest.mark.parametrize("counts", [(0, 6), (6, 0), (0, 0)])
def test_list_with_images_without_boxes(backend, problem, counts):
    index = np.repeat([0, 1], counts)
    problem = replace(problem, boxes=problem.boxes[: len(index)], index=index)
    given, g = arrays_of(per_image, *problem.rois), problem.draw_output()
    *expected, right = backend.run(three(problem), problem.features, g, *problem.rois)
    *results, d_boxes = [
        backend.run(operation, problem.features, g, *given)
        for operation in operations(problem, per_image)
    ]
    assert all(map(np.array_equal, results, expected))
    assert [len(d) for d in d_boxes] == list(counts)
    assert np.array_equal(np.concatenate(d_boxes), right)
