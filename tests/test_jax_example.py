"""`examples/jax_box_refinement.py`, shortened."""

import pytest

import box_refinement

pytest.importorskip("jax", reason="the example needs JAX")
pytest.importorskip("matplotlib", reason="the example needs Matplotlib (roialign[plot])")

EXAMPLE = "jax_box_refinement.py"


def test_boxes_learn_through_roi_align(tmp_path):
    box_refinement.assert_boxes_learn_through_roi_align(EXAMPLE, tmp_path)


def test_without_the_box_gradient_no_box_moves(tmp_path):
    box_refinement.assert_no_box_moves_without_the_box_gradient(EXAMPLE, tmp_path)
