"""`Convention` records, their names and aliases, and the tables of docs/conventions.md."""

import dataclasses
import json
import re
from collections.abc import Mapping, MutableMapping
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import roialign
from backends import three
from conftest import GOLDEN, Golden
from roialign import Convention, conventions

FIELDS = ("pixel_offset", "input_offset", "end_offset", "min_size", "adaptive")
CANONICAL = tuple(conventions)[:6]
PAGE = Path(__file__).parent.parent / "docs" / "conventions.md"


def rows_of_page(columns):
    """The tables' rows on a convention with that many columns: its name and the other cells."""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        name, *cells = (cell.strip() for cell in line.strip().strip("|").split("|"))
        if line.startswith("|") and 1 + len(cells) == columns and name.strip("`") in CANONICAL:
            yield name.strip("`"), cells


ALIASES = {
    alias: name for name, (cell,) in rows_of_page(2) for alias in re.findall("`([^`]+)`", cell)
}


def test_names():
    """The canonical ones come first; every other is an alias of one that the page has."""
    assert set(conventions) == {*CANONICAL, *ALIASES}
    for alias, name in ALIASES.items():
        assert conventions[alias] == conventions[name]
    libraries = {alias.split(":")[0] for alias in ALIASES if ":" in alias}
    assert libraries >= {"torchvision", "detectron2", "mmcv", "mxnet", "paddle", "ncnn", "onnx"}
    assert libraries & set(conventions) == {"mindspore"}  # the canonical name


def test_the_page_has_the_numbers():
    found = {
        name: (*(None if cell == "none" else float(cell) for cell in numbers), adaptive)
        for name, (*numbers, adaptive) in rows_of_page(1 + len(FIELDS))
    }
    assert found == {name: dataclasses.astuple(conventions[name]) for name in CANONICAL}


def test_mapping_is_read_only():
    assert isinstance(conventions, Mapping) and not isinstance(conventions, MutableMapping)
    with pytest.raises(TypeError):
        conventions["mine"] = Convention()
    with pytest.raises(TypeError):
        del conventions["half_pixel"]
    assert len(conventions) == len(list(conventions)) and "mine" not in conventions


@pytest.mark.parametrize("sampling", [0, 2])
@pytest.mark.parametrize("name", conventions)
def test_a_name_means_its_record_in_every_operation(make_problem, name, sampling):
    problem = make_problem(convention=ALIASES.get(name, name), sampling=sampling)
    given = problem.features, problem.draw_output(), *problem.rois
    named = three(dataclasses.replace(problem, convention=name))(*given)
    for actual, expected in zip(named, three(problem)(*given), strict=True):
        assert actual.tobytes() == expected.tobytes()


def test_default_is_half_pixel(make_problem):
    problem = make_problem()
    given = problem.features, problem.rois, 3
    y = roialign.roi_align(*given)
    assert (y == roialign.roi_align(*given, convention="half_pixel")).all()
    assert not np.allclose(y, roialign.roi_align(*given, convention="asymmetric"))


# The record


def test_fields_and_defaults():
    assert tuple(f.name for f in dataclasses.fields(Convention)) == FIELDS
    assert dataclasses.astuple(Convention()) == (0, 0, 0, None, "ceil")
    assert all(type(getattr(Convention(), name)) is float for name in FIELDS[:3])
    with pytest.raises(TypeError):
        Convention(0.5)


def test_is_frozen():
    record = Convention()
    for name in ("end_offset", "other"):
        with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
            setattr(record, name, 1.0)
    assert record == Convention()


def test_is_hashable_and_equal_by_value():
    record = Convention(pixel_offset=0.5)
    assert record == conventions["half_pixel"] and hash(record) == hash(conventions["half_pixel"])
    assert record != Convention() and record != Convention(pixel_offset=0.5, min_size=0)
    assert len({Convention(end_offset=one) for one in (1, 1.0, np.float32(1))}) == 1


def test_repr_gives_the_record_back():
    for record in conventions.values():
        assert eval(repr(record), {"Convention": Convention}) == record


def test_replace_validates():
    record = dataclasses.replace(conventions["mindspore"], adaptive="ceil")
    assert dataclasses.astuple(record) == (0, 0, 1, None, "ceil")
    with pytest.raises(ValueError, match="`adaptive`.*round"):
        dataclasses.replace(record, adaptive="round")


INFINITE = [(v, str(v)) for v in (float("nan"), float("inf"), -float("inf"))]
INFINITE += [(kind(s * 10**400), f"{s * np.inf}") for kind in (int, Fraction) for s in (1, -1)]
WRONG = [  # fields, values and what the error names, the error
    (FIELDS[:4], [(v, type(v).__name__) for v in (True, np.True_, "0.5", 1j, [0.5], np.zeros(1))],
     TypeError),
    (FIELDS[:3], [(None, "None")], TypeError),
    (FIELDS[:4], INFINITE, ValueError),
    (FIELDS[4:], [("round", "'round'"), ("Ceil", "'Ceil'"), ("", "''")], ValueError),
    (FIELDS[4:], [(None, "None"), (1, "int")], TypeError),
]  # fmt: skip


@pytest.mark.parametrize(
    "field, value, named, error",
    [(field, *value, error) for fields, values, error in WRONG for field in fields
     for value in values],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_a_wrong_field(field, value, named, error):
    with pytest.raises(error, match=f"`{field}`.*{named}"):
        Convention(**{field: value})


@pytest.mark.parametrize("value", [1, np.float32(1), np.int64(1), Fraction(1)])
def test_any_real_number_is_a_float(value):
    record = Convention(pixel_offset=value, min_size=value)
    assert type(record.pixel_offset) is float and type(record.min_size) is float


@pytest.mark.parametrize("name, own", [
    ("openvino:pixel", ["asymmetric", "half_pixel_for_nn", "half_pixel"]),
    ("ONNX:opset=17", ["output_half_pixel", "opset=10", "half_pixel", "opset=16", "opset=22"]),
    ("tensorrt", ["output_half_pixel", "half_pixel"]),
])  # fmt: skip
def test_an_unknown_setting_of_a_library_lists_its_own(name, own):
    library = name.lower().partition(":")[0]
    listed = ", ".join(f"'{library}:{setting}'" for setting in own)
    nearest = f"`convention` '{name}' is unknown; the nearest names are {listed}"
    with pytest.raises(ValueError, match=nearest):
        roialign.roi_align(np.ones((1, 1, 2, 2)), np.ones((1, 5)), 1, convention=name)
    with pytest.raises(KeyError, match=nearest):
        conventions[name]
    assert conventions.get(name) is None and name not in conventions


@pytest.mark.parametrize("library", ["tf_model_garden", "tf_crop_and_resize"])
def test_tensorflow_inside_the_map(library):
    """As docs/different.md says: one sample for each bin, or these from corner to corner."""
    compared = 0
    for entry in json.loads((GOLDEN / library / "manifest.json").read_text())["cases"]:
        case = Golden(library, entry)
        features, y = (case.arrays[name].astype(np.float32) for name in ("features", "y"))
        last, bins = np.tile(features.shape[:1:-1], 2) - 1, np.array(y.shape[:1:-1])  # x, y
        level = entry["params"].get("level")
        boxes = case.rois[:, 1:] * (last if level is None else 0.5**level)  # in feature pixels
        inside = ((boxes >= 0) & (boxes <= last)).all(1)
        if level is None:
            half = (boxes[:, 2:] - boxes[:, :2]) / np.where(bins > 1, 2 * bins - 2, np.inf)
            boxes = np.concatenate([boxes[:, :2] - half, boxes[:, 2:] + half], 1)
        rois = boxes.astype(np.float32), case.rois[:, 0].astype(int)
        ours = roialign.roi_align(
            features, rois, y.shape[2:], sampling_ratio=1, convention=Convention()
        )
        limit = 1e-5 * max(1, np.abs(features).max())
        np.testing.assert_allclose(ours[inside], y[inside], rtol=0, atol=limit)
        compared += inside.sum()
    assert compared > 20
