"""Several maps and a level per RoI: the rows of single calls, bit for bit, in the RoIs' order.

Through the adapters: there is no public function of several maps yet.
"""

from dataclasses import replace

import numpy as np
import pytest

import tolerance
from backends import calls, three
from tolerance import close


@pytest.mark.backends("values", "maps")
@pytest.mark.parametrize("sampling, layout", [(2, "contiguous"), (0, "channels_last")])
@pytest.mark.parametrize("dtype", [*tolerance.DTYPES, np.dtype(np.uint8)], ids=str)
def test_rows_are_those_of_single_calls(backend, pyramid, layouts, dtype, sampling, layout):
    p = pyramid(dtype, sampling, channels=19)
    d_output, *maps = (layouts[layout](a) for a in (p.d_output, *p.maps))
    output, *d_maps, d_boxes = backend.run(p.together, d_output, *maps, *p.rois)
    boxes, index, levels = p.rois
    for level, (features, problem) in enumerate(zip(maps, p.problems, strict=True)):
        on = levels == level
        alone = replace(problem, features=features, boxes=boxes[on], index=index[on])
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
        forward, *_ = calls([p.problems[0], replace(p.problems[1], scale=(0.25,))])
        forward(*p.maps, *p.rois)


@pytest.mark.backends("exact", "maps")
def test_no_rois(backend, pyramid):
    p = pyramid(count=0)
    output, *d_maps, d_boxes = backend.run(p.together, p.d_output, *p.maps, *p.rois)
    assert output.shape == p.d_output.shape and d_boxes.shape == (0, 4)
    for d, m in zip(d_maps, p.maps, strict=True):
        assert d.shape == m.shape and not d.any()
