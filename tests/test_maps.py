"""Several maps and a level per RoI: the rows of single calls, bit for bit, in the RoIs' order.

Through the adapters: there is no public function of several maps yet.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import tolerance
from backends import three
from roialign import _core, _rule
from roialign._adapter import adapter_of
from roialign._rois import Rois

SIZES = (9, 11), (5, 8)
SCALES = (0.5, 0.4), (0.25, 0.3)
FLAT = (*SCALES[0], *SCALES[1])


@pytest.fixture
def pyramid(make_problem):
    """Two maps, RoIs on them and on none, and functions of their arrays."""

    def pyramid(dtype=np.float64, sampling=2, channels=3, count=7):
        options = {"dtype": dtype, "sampling": sampling, "count": count, "inside": True}
        problem, coarse = (
            make_problem(seed, shape=(2, channels, *size), **options)
            for seed, size in enumerate(SIZES)
        )
        maps, size = [problem.features, coarse.features], problem.size
        shapes = [m.shape for m in maps]
        rule = _rule.vector(problem.convention, sampling)
        levels = np.resize([1, 0, -1, 1, 0, 0, 1], count)

        def forward(fine, coarse, boxes, index, levels, out=None):
            rois, adapter = Rois(boxes, index, levels), adapter_of("maps", fine)
            return adapter.forward((fine, coarse), rois, size, FLAT, rule, out=out)

        def adjoint(d_output, boxes, index, levels, out=None):
            rois, adapter = Rois(boxes, index, levels), adapter_of("d_output", d_output)
            return adapter.adjoint(d_output, rois, shapes, FLAT, rule, out=out)

        def box_gradient(d_output, fine, coarse, *rois):
            adapter = adapter_of("d_output", d_output)
            return adapter.box_gradient(d_output, (fine, coarse), Rois(*rois), FLAT, rule)

        def together(d_output, fine, coarse, *rois):
            output, d_maps = forward(fine, coarse, *rois), adjoint(d_output, *rois)
            return output, *d_maps, box_gradient(d_output, fine, coarse, *rois)

        def loss(fine, coarse, boxes, index, levels, d_output):
            return (forward(fine, coarse, boxes, index, levels) * d_output).sum()

        return SimpleNamespace(
            maps=maps, rois=(*problem.rois, levels), d_output=problem.draw_output(),
            problem=problem, rule=rule, forward=forward, adjoint=adjoint,
            box_gradient=box_gradient, together=together, loss=loss,
        )  # fmt: skip

    return pyramid


def close(actual, expected, atol=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def draw(seed, *arrays):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(a.shape) for a in arrays]


@pytest.mark.backends("values", "maps")
@pytest.mark.parametrize("sampling, layout", [(2, "contiguous"), (0, "channels_last")])
@pytest.mark.parametrize("dtype", [*tolerance.DTYPES, np.dtype(np.uint8)], ids=str)
def test_rows_are_those_of_single_calls(backend, pyramid, layouts, dtype, sampling, layout):
    if dtype == tolerance.BFLOAT16 and "bfloat16" not in backend.traits:
        return  # it has none
    p = pyramid(dtype, sampling, channels=19)
    d_output, *maps = (layouts[layout](a) for a in (p.d_output, *p.maps))
    output, *d_maps, d_boxes = backend.run(p.together, d_output, *maps, *p.rois)
    boxes, index, levels = p.rois
    for level, (features, scale) in enumerate(zip(maps, SCALES, strict=True)):
        on = levels == level
        alone = replace(p.problem, features=features, boxes=boxes[on], index=index[on], scale=scale)
        given = features, d_output[on], boxes[on], index[on]
        results = output[on], d_maps[level], d_boxes[on]
        for actual, expected in zip(results, backend.run(three(alone), *given), strict=True):
            assert expected.any() and actual.dtype == expected.dtype
            if "exact" in backend.traits:
                assert actual.tobytes() == expected.tobytes()
            else:
                bound = 64 * float(_eps(actual.dtype)) * np.abs(expected.astype(np.float64)).max()
                close(actual.astype(np.float64), expected.astype(np.float64), bound)
    assert not output[levels < 0].any() and not d_boxes[levels < 0].any()


def _eps(dtype):
    return 2.0**-7 if dtype == tolerance.BFLOAT16 else np.finfo(dtype).eps


@pytest.mark.backends("grad", "maps", "-interprets")
def test_gradients(backend, pyramid):
    p = pyramid()
    _, *expected = backend.run(p.together, p.d_output, *p.maps, *p.rois)
    given = backend.array((*p.maps, *p.rois, p.d_output))
    for argnums in ((0, 1, 2), (1,)):  # what is left out is a constant
        gradients = backend.numpy(backend.grad(p.loss, argnums)(*given))
        for i, gradient in zip(argnums, gradients, strict=True):
            close(gradient, expected[i])
            assert gradient.any()


@pytest.mark.backends("jvp", "maps", "-interprets")
def test_forward_mode(backend, pyramid):
    """It is the transpose of the gradients; along one map it pools that map's tangent alone."""
    p = pyramid()
    boxes, *others = p.rois
    u, v, w = draw(3, *p.maps, boxes)
    _, *gradients = p.together(p.d_output, *p.maps, *p.rois)
    fixed = backend.array(others)

    def pool(fine, coarse, boxes):
        return p.forward(fine, coarse, boxes, *fixed)

    given, tangents = backend.array(([*p.maps, boxes], [u, v, w]))
    _, along = backend.numpy(backend.jvp(pool, given, tangents))
    right = sum(np.vdot(a, b) for a, b in zip(gradients, (u, v, w), strict=True))
    close(np.vdot(p.d_output, along), right, 1e-11)
    of_coarse = lambda coarse: pool(given[0], coarse, given[2])  # noqa: E731
    _, along = backend.numpy(backend.jvp(of_coarse, given[1:2], tangents[1:2]))
    close(along, p.forward(0 * u, v, *p.rois))


@pytest.mark.backends("jvp", "maps", "-interprets")
def test_forward_mode_of_the_adjoint_and_the_box_gradient(backend, pyramid):
    """Each is linear in its arrays; along the boxes the adjoint is the transpose of pooling."""
    p = pyramid()
    boxes, *others = p.rois
    g, u, v, w = draw(3, p.d_output, *p.maps, boxes)
    along_g, fine, coarse, along, *others = backend.array((g, u, v, w, *others))
    d_output, boxes, *maps = backend.array((p.d_output, boxes, *p.maps))

    def pasted(d_output, boxes):
        d_fine, d_coarse = p.adjoint(d_output, boxes, *others)
        return (d_fine * fine).sum() + (d_coarse * coarse).sum()

    def moved(d_output, *maps):
        return (p.box_gradient(d_output, *maps, boxes, *others) * along).sum()

    of_maps = np.vdot(p.box_gradient(p.d_output, u, v, *p.rois), w)
    _, found = backend.numpy(backend.jvp(pasted, (d_output, boxes), (along_g, along)))
    close(found, np.vdot(g, p.forward(u, v, *p.rois)) + of_maps, 1e-11)
    _, found = backend.numpy(backend.jvp(moved, (d_output, *maps), (along_g, fine, coarse)))
    close(found, np.vdot(p.box_gradient(g, *p.maps, *p.rois), w) + of_maps, 1e-11)


@pytest.mark.backends("twice", "maps", "-interprets")
def test_second_order(backend, pyramid):
    """Of squares, in a map; there is none in the boxes."""
    p = pyramid()
    u, v = draw(3, p.maps[0], p.maps[0])
    fine, coarse, boxes, *others, along = backend.array((*p.maps, *p.rois, u))

    def squares(fine, boxes):
        return (p.forward(fine, coarse, boxes, *others) ** 2).sum() / 2

    def step(fine):
        return (backend.grad(squares)(fine, boxes) * along).sum()

    def box_step(boxes):
        return backend.grad(squares, 1)(fine, boxes).sum()

    found = backend.numpy(backend.grad(step)(fine))
    pooled = [p.forward(a, 0 * p.maps[1], *p.rois) for a in (u, v)]
    close(np.vdot(found, v), np.vdot(*pooled), 1e-11)
    error, message = backend.no_second_derivative
    with pytest.raises(error, match=message):
        backend.numpy(backend.grad(box_step)(boxes))


@pytest.mark.backends("mixed", "maps", "-interprets")
def test_second_order_in_boxes_and_another(backend, pyramid):
    """The box gradient is linear in the maps, and in d_output."""
    p = pyramid()
    u, v, g, w = draw(3, *p.maps, p.d_output, p.rois[0])
    *maps, boxes, index, levels, d_output, along = backend.array((*p.maps, *p.rois, p.d_output, w))

    def step(fine, coarse, d_output):
        gradient = backend.grad(p.loss, 2)(fine, coarse, boxes, index, levels, d_output)
        return (gradient * along).sum()

    found = backend.numpy(backend.grad(step, (0, 1, 2))(*maps, d_output))
    of_maps = np.vdot(p.box_gradient(p.d_output, u, v, *p.rois), w)
    close(np.vdot(found[0], u) + np.vdot(found[1], v), of_maps, 1e-11)
    close(np.vdot(found[2], g), np.vdot(p.box_gradient(g, *p.maps, *p.rois), w), 1e-11)


@pytest.mark.backends("func", "maps", "-interprets")
@pytest.mark.parametrize("mapped", ["fine coarse", "coarse d_output", "boxes", "levels",
                                    "fine coarse boxes index levels d_output"])  # fmt: skip
def test_vmap(backend, pyramid, mapped):
    """What each call alone gives: the three operations, and the gradients in maps and boxes."""
    p = pyramid()
    names = "fine", "coarse", "boxes", "index", "levels", "d_output"
    given = dict(zip(names, (*p.maps, *p.rois, p.d_output), strict=True))
    others = {name: (1 - given[name]) % 2 for name in ("index", "levels")}
    calls = [given, {n: others.get(n, 0.9 * a) if n in mapped else a for n, a in given.items()}]
    axes = [1 if name in mapped and given[name].ndim > 1 else 0 for name in names]
    axes = [axis if name in mapped else None for name, axis in zip(names, axes, strict=True)]
    stacked = [
        given[name] if axis is None else np.stack([call[name] for call in calls], axis)
        for name, axis in zip(names, axes, strict=True)
    ]
    gradients = backend.grad(p.loss, (0, 1, 2))

    def results(*arrays):
        return *p.together(arrays[5], *arrays[:5]), *gradients(*arrays)

    batched = backend.numpy(backend.vmap(results, tuple(axes))(*backend.array(stacked)))
    for i, call in enumerate(calls):
        for actual, expected in zip(batched, backend.run(results, *call.values()), strict=True):
            close(actual[i], expected)


@pytest.mark.backends("out", "maps")
def test_out(backend, pyramid):
    p = pyramid()
    given = backend.array((*p.maps, *p.rois))
    output, d_maps = p.forward(*given), p.adjoint(backend.array(p.d_output), *given[2:])
    out, *outs = backend.array([np.full_like(a, np.nan) for a in (p.d_output, *p.maps)])
    assert p.forward(*given, out=out) is out
    outs = tuple(outs)
    assert p.adjoint(backend.array(p.d_output), *given[2:], out=outs) is outs
    for actual, expected in zip((out, *outs), (output, *d_maps), strict=True):
        np.testing.assert_array_equal(backend.numpy(actual), backend.numpy(expected))


@pytest.mark.backends("exact", "maps")
def test_bits_do_not_depend_on_threads(backend, pyramid):
    p = pyramid(np.float32, channels=40, count=600)
    found = set()
    for threads in (1, 2, 7):
        with backend.threads(threads):
            results = backend.run(p.together, p.d_output, *p.maps, *p.rois)
        found.add(b"".join(array.tobytes() for array in results))
    assert len(found) == 1


# Levels


@pytest.mark.backends("exact", "maps")
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "float32", "float16"])
def test_dtypes_of_levels(backend, pyramid, dtype):
    p = pyramid()
    boxes, index, levels = p.rois
    output = backend.run(p.forward, *p.maps, boxes, index, levels.astype(dtype))
    np.testing.assert_array_equal(output, p.forward(*p.maps, *p.rois))


@pytest.mark.backends("values", "maps")
@pytest.mark.parametrize("level", [2, -2, 2**31 - 1])
def test_any_other_level(backend, pyramid, level):
    """An error, or no map."""
    p = pyramid(np.float32)
    boxes, index, levels = p.rois
    right, levels = p.forward(*p.maps, *p.rois), levels.copy()
    levels[3] = level
    if "raises" in backend.traits or backend.name == "torch.compile":
        message = rf"`levels` of RoI 3 must be an integer in \[-1, 2\), got {level}"
        with pytest.raises(IndexError, match=message):
            backend.run(p.forward, *p.maps, boxes, index, levels)
    else:
        output = backend.run(p.forward, *p.maps, boxes, index, levels)
        assert right[3].any() and not output[3].any()
        close(output[:3], right[:3], 1e-5)


@pytest.mark.parametrize(
    "level", [np.int64(2**40), np.uint64(2**64 - 1), np.float32(0.5), np.float64("nan")]
)
def test_an_error_writes_nothing(pyramid, level):
    p = pyramid()
    boxes, index, levels = p.rois
    levels = np.zeros(len(levels), type(level))
    levels[5] = level
    out = np.full(p.d_output.shape, np.nan)
    with pytest.raises(IndexError, match=r"`levels` of RoI 5 must be an integer in \[-1, 2\), got"):
        p.forward(*p.maps, boxes, index, levels, out=out)
    assert np.isnan(out).all()


def test_maps_that_do_not_fit_are_refused(pyramid):
    p = pyramid()
    fine, coarse = p.maps
    boxes, index, levels = p.rois
    single = coarse.astype(np.float32)
    for wrong in (coarse[:1], coarse[:, :2], single, coarse[:, :, :0]):
        with pytest.raises(ValueError, match="roialign"):
            p.forward(fine, wrong, *p.rois)
    for wrong in (None, levels[1:]):
        with pytest.raises(ValueError):
            p.forward(fine, coarse, boxes, index, wrong)
    with pytest.raises(ValueError):
        adapter_of("", fine).forward(p.maps, Rois(*p.rois), p.problem.size, FLAT[:-1], p.rule)


@pytest.mark.backends("exact", "maps")
def test_no_rois(backend, pyramid):
    p = pyramid(count=0)
    output, *d_maps, d_boxes = backend.run(p.together, p.d_output, *p.maps, *p.rois)
    assert output.shape == p.d_output.shape and d_boxes.shape == (0, 4)
    for d, m in zip(d_maps, p.maps, strict=True):
        assert d.shape == m.shape and not d.any()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64", "uint64"])
def test_an_index_is_read_as_it_is(dtype):
    """Indices of any integer dtype and stride are checked where they lie."""
    index = np.arange(12, dtype=dtype)[::2]
    _core.check_index("image_index", index, 11)
    with pytest.raises(IndexError, match=r"`image_index` of RoI 4 .*\[0, 8\), got 8$"):
        _core.check_index("image_index", index, 8)
