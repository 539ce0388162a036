"""The rule is one vector: each of its numbers reaches the taps of every backend."""

import dataclasses

import numpy as np
import pytest

import oracle
import roialign
from roialign import _core, _rule

OTHER = {
    "sampling_ratio": 3,
    "pixel_offset": 0.3,
    "input_offset": 0.7,
    "end_offset": 1.1,
    "min_size": 4.5,
    "adaptive": "floor",
}
# What a position of 4 units in the last place (JAX's plain arrays) moves a weight by, twice.
ATOL = 8 * 8 * 2.0**-23


def test_its_numbers_are_the_fields_of_a_convention_and_of_a_call():
    fields = [field.name for field in dataclasses.fields(roialign.Convention)]
    assert _core.rule_names == ("sampling_ratio", *fields, "reduction", "turn")
    defaults = _rule.vector(roialign.Convention(), 0)
    assert _core.rule_defaults == defaults


def problem(changed):
    """One box on a map of one-hot channels: its output are the products of the taps of y and x."""
    numbers = {"sampling_ratio": 0} | changed
    return oracle.Problem(
        features=np.eye(8 * 7, dtype=np.float32).reshape(1, 56, 8, 7),
        boxes=np.array([[1.3, 2.2, 6.1, 5.6]], np.float32),
        index=np.zeros(1, np.int64),
        size=(2, 2),
        scale=(0.9, 0.8),
        sampling=numbers.pop("sampling_ratio"),
        convention=roialign.Convention(**numbers),
    )


@pytest.mark.parametrize("name", OTHER)
def test_each_number_moves_the_taps(backend, name):
    changed = problem({name: OTHER[name]})
    size, options = changed.size, changed.options

    def pool(features, boxes, index):
        return roialign.roi_align(features, (boxes, index), size, **options)

    taps = backend.run(pool, changed.features, changed.boxes, changed.index)
    expected = oracle.forward(changed)
    np.testing.assert_allclose(taps, expected, rtol=0, atol=ATOL)
    assert np.abs(expected - oracle.forward(problem({}))).max() > 0.01
