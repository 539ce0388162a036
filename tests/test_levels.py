"""`assign_levels`: other libraries' levels to the last bit, and the rules by definition."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

import roialign
from backends import array, arrays_of, batched, pair, per_image

GOLDEN = Path(__file__).parent / "golden"
RULES = "torchvision", "detectron2", "mmdet"


def tables():
    """(rule, dtype, number of the setting, arguments) of the recorded tables."""
    for rule in RULES:
        (case,) = json.loads((GOLDEN / f"levels_{rule}" / "manifest.json").read_text())["cases"]
        for i, setting in enumerate(case["params"]["settings"]):
            size = setting.get("canonical_size", setting.get("finest_scale"))
            level = setting.get("canonical_level", 0)
            ends = setting.get("min_level", 0), setting.get("max_level")
            if ends[1] is None:
                ends = 0, setting["num_levels"] - 1
            for dtype in ("float16", "float32", "float64"):
                yield rule, dtype, i, (ends, {"canonical_size": size, "canonical_level": level})


@pytest.mark.backends("pyramids")
@pytest.mark.parametrize("rule, dtype, i, arguments", list(tables()))
def test_levels_of_other_libraries(backend, rule, dtype, i, arguments):
    """Those that they compute for boxes of each dtype."""
    ends, options = arguments
    with np.load(GOLDEN / f"levels_{rule}" / "public_000.npz") as table:
        boxes, expected = table[f"boxes_{dtype}"], table[f"levels_{dtype}"][i]
    index = np.zeros(len(boxes), np.int32)

    def assign(boxes, index):
        return roialign.assign_levels((boxes, index), ends, rule=rule, **options)

    assert np.array_equal(backend.run(assign, boxes, index), expected)


@pytest.mark.backends("pyramids")
@pytest.mark.parametrize("form", [pair, array, per_image, batched])
def test_forms(backend, form):
    boxes = np.zeros((6, 4), np.float32)
    boxes[:, 2:] = np.array([100, 112, 224, 450, np.nan, 900])[:, None]
    rois = arrays_of(form, boxes, np.repeat([0, 1], 3))

    def assign(*rois):
        return roialign.assign_levels(form(*rois), (2, 5))

    levels = backend.run(assign, *rois)
    assert levels.shape == ((2, 3) if form is batched else (6,))
    assert levels.ravel().tolist() == [0, 1, 2, 3, -1, 3]
    if backend.family in ("numpy", "torch"):
        assert levels.dtype == np.int64


@pytest.mark.backends("pyramids", "fast")
@pytest.mark.parametrize("dtype", ["int8", "int64"])
def test_integer_boxes(backend, dtype):
    boxes, index = np.array([[0, 0, 100, 100], [3, 2, 127, 120]], dtype), np.zeros(2, np.int32)
    levels = backend.run(lambda *rois: roialign.assign_levels(rois, (2, 5)), boxes, index)
    assert levels.tolist() == [0, 1]


def level_of(box, rule, ends, size, level):
    """By definition; one rounding to the boxes' dtype after each step."""
    T = type(box[0])
    if rule == "detectron2" or (rule == "torchvision" and T is np.float16):
        T = np.float32
    x1, y1, x2, y2 = map(T, box)
    side = T(np.sqrt(np.float64(T(T(x2 - x1) * T(y2 - y1)))))
    if np.isnan(side):
        return -1
    constant = np.float32 if T is np.float16 else T
    ratio = T(np.float64(side) / np.float64(constant(size)))
    if rule != "torchvision":
        ratio = T(np.float64(ratio) + np.float64(constant(1e-8 if rule == "detectron2" else 1e-6)))
    log = T(-math.inf if ratio == 0 else math.log2(ratio))
    if rule != "mmdet":
        log = T(level + np.float64(log))
    if rule == "torchvision":
        log = T(np.float64(log) + np.float64(T(1e-6)))
    found = np.floor(np.float64(log)) + (level if rule == "mmdet" else 0)
    return int(min(max(found, ends[0]), ends[1])) - ends[0]


@st.composite
def boxes_and_settings(draw):
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    size = draw(st.sampled_from([224, 56, 30.5, 1e-3, 60000]))
    side = st.sampled_from([0, -1, np.inf, np.nan, 1e-30, 65504, 1e300]) | st.floats(-2, 2000)
    # next to the borders: steps of the dtype away from the canonical size
    near = st.builds(
        lambda power, steps: size * 2.0**power * (1 + steps * float(np.finfo(dtype).eps)),
        st.integers(-3, 3),
        st.integers(-14, 3),
    )
    length = st.tuples(near | side, near | side) | near.map(lambda side: (side, side))
    sides = np.array(draw(st.lists(length, min_size=1, max_size=8)))
    start = draw(st.sampled_from([0, 1, -7.5]))
    with np.errstate(over="ignore"):
        boxes = np.concatenate([np.full_like(sides, start), start + sides], 1).astype(dtype)
    finest = draw(st.integers(-2, 4))
    ends = finest, finest + draw(st.integers(0, 5))
    return boxes, ends, size, draw(st.integers(-1, 5))


@given(boxes_and_settings(), st.sampled_from(RULES))
def test_levels_by_definition(given, rule):
    boxes, ends, size, level = given
    levels = roialign.assign_levels(
        [boxes], ends, rule=rule, canonical_size=size, canonical_level=level
    )
    with np.errstate(all="ignore"):
        expected = [level_of(box, rule, ends, size, level) for box in boxes]
    assert levels.tolist() == expected


@pytest.mark.parametrize("rule, level", [("torchvision", 0), ("detectron2", 3), ("mmdet", 10)])
def test_a_box_without_size(rule, level):
    """Its level is that of the small number which the rule adds."""
    point = np.zeros((1, 4), np.float32)
    levels = roialign.assign_levels([point], (-30, -20), rule=rule, canonical_level=0)
    assert levels.tolist() == [level]


ROIS = np.zeros((2, 5), np.float32)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"level_range": 4}, TypeError, "`level_range` must be a tuple .*int"),
        ({"level_range": (2, 5.0)}, TypeError, "`level_range` must be an int.*5.0"),
        ({"level_range": (5, 2)}, ValueError, r"`level_range` .*\(5, 2\)"),
        ({"level_range": (0, 64)}, ValueError, r"`level_range` .*at most 64"),
        ({"level_range": (2,)}, ValueError, r"`level_range` .*\(2,\)"),
        ({"rule": None}, TypeError, "`rule` must be a str"),
        ({"rule": "fpn"}, ValueError, "`rule` must be one of 'torchvision', .*'fpn'"),
        ({"canonical_size": "224"}, TypeError, "`canonical_size` must be a real number"),
        ({"canonical_size": 0}, ValueError, "`canonical_size` must be finite and > 0, got 0"),
        ({"canonical_size": math.nan}, ValueError, "`canonical_size` .*nan"),
        ({"canonical_level": 4.0}, TypeError, "`canonical_level` must be an int"),
        ({"rois": None}, TypeError, "`rois` must be a numpy.ndarray"),
        ({"rois": []}, TypeError, "`rois` must be a numpy.ndarray"),
        ({"rois": ROIS.astype(bool)}, TypeError, "`rois` .*bool"),
        ({"rois": ROIS[:, :4]}, ValueError, r"`rois` must have shape \(K, 5\) .*\(2, 4\)"),
        ({"rois": ROIS[None]}, ValueError, r"`rois` must have shape .*\(1, M, 4\), got \(1, 2, 5"),
    ],
)
def test_errors(changed, error, message):
    arguments = {"rois": ROIS, "level_range": (2, 5)} | changed
    with pytest.raises(error, match=message):
        roialign.assign_levels(arguments.pop("rois"), arguments.pop("level_range"), **arguments)
