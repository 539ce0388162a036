"""`Convention` records, their names and aliases, and the tables of docs/conventions.md."""

import dataclasses
import re
from collections.abc import Mapping, MutableMapping
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import roialign
from roialign import Convention, conventions

# pixel_offset, input_offset, end_offset, min_size, adaptive
NUMBERS = {
    "mindspore": (0, 0, 1, None, "floor"),
    "mindspore_legacy": (0, 0, 0, 1, "floor"),
    "asymmetric": (0, 0, 0, 1, "ceil"),
    "half_pixel": (0.5, 0, 0, None, "ceil"),
    "openvino_half_pixel": (0.5, 0.5, 0, None, "ceil"),
    "mmdet_legacy": (0, 0, 1, 0, "ceil"),
}
ALIASES = {
    "mindspore:roi_end_mode=1": "mindspore",
    "mindspore:roi_end_mode=0": "mindspore_legacy",
    "torchvision:aligned=False": "asymmetric",
    "torchvision:aligned=True": "half_pixel",
    "mmcv:aligned=False": "asymmetric",
    "mmcv:aligned=True": "half_pixel",
    "mxnet:aligned=False": "asymmetric",
    "mxnet:aligned=True": "half_pixel",
    "paddle:aligned=False": "asymmetric",
    "paddle:aligned=True": "half_pixel",
    "ncnn:aligned=0": "asymmetric",
    "ncnn:aligned=1": "half_pixel",
    "detectron2:aligned=False": "asymmetric",
    "detectron2:aligned=True": "half_pixel",
    "onnx:output_half_pixel": "asymmetric",
    "onnx:half_pixel": "half_pixel",
    "openvino:asymmetric": "asymmetric",
    "openvino:half_pixel_for_nn": "half_pixel",
    "openvino:half_pixel": "openvino_half_pixel",
}
FIELDS = ("pixel_offset", "input_offset", "end_offset", "min_size", "adaptive")
FEATURES = np.random.default_rng(5).standard_normal((2, 3, 12, 10))
ROIS = np.array([[0, 1.3, 2.1, 13.2, 17.9], [1, 0.4, 3.3, 16.6, 12.7]])


def test_canonical_names_come_first():
    assert tuple(conventions)[: len(NUMBERS)] == tuple(NUMBERS)
    assert set(ALIASES) <= set(tuple(conventions)[len(NUMBERS) :])


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name):
    assert dataclasses.astuple(conventions[name]) == NUMBERS[name]


@pytest.mark.parametrize("alias, name", ALIASES.items())
def test_alias_is_its_canonical_record(alias, name):
    assert conventions[alias] == conventions[name]


def test_every_name_is_a_canonical_record():
    canonical = {conventions[name] for name in NUMBERS}
    assert len(canonical) == len(NUMBERS)
    assert set(conventions.values()) == canonical


def test_no_bare_library_name_where_a_setting_exists():
    with_setting = {name.split(":")[0] for name in conventions if ":" in name}
    assert with_setting >= {"torchvision", "onnx", "openvino"}
    assert with_setting & set(conventions) == {"mindspore"}  # a canonical name, not the library


def test_mapping_is_read_only():
    assert isinstance(conventions, Mapping) and not isinstance(conventions, MutableMapping)
    with pytest.raises(TypeError):
        conventions["mine"] = Convention()
    with pytest.raises(TypeError):
        del conventions["half_pixel"]
    assert len(conventions) == len(list(conventions)) and "mine" not in conventions


@pytest.mark.parametrize("alias", [*NUMBERS, *ALIASES])
def test_a_name_means_its_record(alias):
    record = conventions[ALIASES.get(alias, alias)]
    named, recorded = (
        roialign.roi_align(FEATURES, ROIS, (4, 3), convention=convention, spatial_scale=0.6)
        for convention in (alias, record)
    )
    assert named.tobytes() == recorded.tobytes()


PAGE = Path(__file__).parent.parent / "docs" / "conventions.md"


def rows_of_page(columns):
    """The tables' rows with that many columns, each cell stripped of backticks."""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and len(cells) == columns:
            yield cells


def test_the_page_has_the_numbers():
    found = {}
    for name, *cells in rows_of_page(1 + len(FIELDS)):
        if name.strip("`") in conventions:
            *numbers, adaptive = cells
            found[name.strip("`")] = (
                *(None if cell == "none" else float(cell) for cell in numbers),
                adaptive,
            )
    assert found == NUMBERS


def test_the_page_has_every_alias():
    found = {
        alias: name.strip("`")
        for name, cell in rows_of_page(2)
        if name.strip("`") in NUMBERS
        for alias in re.findall("`([^`]+)`", cell)
    }
    assert set(found) == set(conventions) - set(NUMBERS)
    for alias, name in found.items():
        assert conventions[alias] == conventions[name]


def test_default_is_half_pixel():
    y = roialign.roi_align(FEATURES, ROIS, 3, spatial_scale=0.6)
    same = roialign.roi_align(FEATURES, ROIS, 3, spatial_scale=0.6, convention="half_pixel")
    other = roialign.roi_align(FEATURES, ROIS, 3, spatial_scale=0.6, convention="asymmetric")
    assert (y == same).all() and not np.allclose(y, other)


def test_fields_and_defaults():
    assert tuple(f.name for f in dataclasses.fields(Convention)) == FIELDS
    assert dataclasses.astuple(Convention()) == (0, 0, 0, None, "ceil")
    assert all(type(getattr(Convention(), name)) is float for name in FIELDS[:3])


def test_is_keyword_only():
    with pytest.raises(TypeError):
        Convention(0.5)


def test_is_frozen():
    record = Convention()
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.end_offset = 1.0
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
        record.other = 1.0
    assert record == Convention()


def test_is_hashable_and_equal_by_value():
    record = Convention(pixel_offset=0.5)
    assert record == conventions["half_pixel"] and hash(record) == hash(conventions["half_pixel"])
    assert record != Convention() and record != Convention(pixel_offset=0.5, min_size=0)
    assert (
        Convention(end_offset=1)
        == Convention(end_offset=1.0)
        == Convention(end_offset=np.float32(1))
    )
    assert hash(Convention(end_offset=1)) == hash(Convention(end_offset=np.float32(1)))


def test_repr_gives_the_record_back():
    for record in conventions.values():
        assert eval(repr(record), {"Convention": Convention}) == record


def test_replace_validates():
    record = dataclasses.replace(conventions["mindspore"], adaptive="ceil")
    assert dataclasses.astuple(record) == (0, 0, 1, None, "ceil")
    with pytest.raises(ValueError, match="`adaptive`.*round"):
        dataclasses.replace(record, adaptive="round")


@pytest.mark.parametrize("field", FIELDS[:4])
@pytest.mark.parametrize(
    "value", [True, np.True_, "0.5", 1j, [0.5], np.zeros(1)], ids=lambda v: type(v).__name__
)
def test_numbers_are_real(field, value):
    with pytest.raises(TypeError, match=f"`{field}`.*({type(value).__name__})"):
        Convention(**{field: value})


@pytest.mark.parametrize("field", FIELDS[:3])
def test_offsets_are_not_none(field):
    with pytest.raises(TypeError, match=f"`{field}`.*None"):
        Convention(**{field: None})


@pytest.mark.parametrize("field", FIELDS[:4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_are_finite(field, value):
    with pytest.raises(ValueError, match=f"`{field}`.*{value}"):
        Convention(**{field: value})


@pytest.mark.parametrize("field", FIELDS[:4])
@pytest.mark.parametrize("kind", [int, Fraction])
def test_numbers_beyond_floats_are_not_finite(field, kind):
    for sign, got in ((1, "inf"), (-1, "-inf")):
        with pytest.raises(ValueError, match=f"`{field}` must be finite, got {got}"):
            Convention(**{field: kind(sign * 10**400)})


@pytest.mark.parametrize(
    "value, error",
    [
        ("round", ValueError),
        ("Ceil", ValueError),
        ("", ValueError),
        (None, TypeError),
        (1, TypeError),
    ],
)
def test_adaptive_is_ceil_or_floor(value, error):
    with pytest.raises(error, match="`adaptive`") as caught:
        Convention(adaptive=value)
    assert repr(value) in str(caught.value) or type(value).__name__ in str(caught.value)


@pytest.mark.parametrize("value", [1, np.float32(1), np.int64(1), Fraction(1)])
def test_any_real_number_is_a_float(value):
    record = Convention(pixel_offset=value, min_size=value)
    assert type(record.pixel_offset) is float and type(record.min_size) is float


def test_made_by_the_user():
    # constant shift of one pixel: the ramp's centre moves by it; min_size widens a thin box
    ramp = np.broadcast_to(np.arange(32.0), (1, 1, 32, 32))
    box = np.array([[0, 10.0, 10.0, 14.0, 14.0]])
    thin = np.array([[0, 10.0, 10.0, 10.5, 10.5]])

    def value(box, **fields):
        return roialign.roi_align(
            ramp, box, 1, sampling_ratio=2, convention=Convention(**fields)
        ).item()

    assert value(box) == 12.0
    assert value(box, pixel_offset=1.0) == 11.0
    assert value(box, input_offset=3.0) == 15.0
    assert value(box, end_offset=-2.0) == 11.0
    assert value(thin) == 10.25
    assert value(thin, min_size=3.0) == 11.5
    assert value(box, min_size=3.0) == 12.0
