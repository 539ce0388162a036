"""Every library that has one of our conventions gives our result."""

import re

import numpy as np
import pytest

import roialign


def seed(case):
    """The seed as MindSpore was called."""
    names = "pooled_height", "pooled_width", "spatial_scale", "sample_num", "roi_end_mode"
    return roialign.ROIAlign(*(case.parameter(name) for name in names))


def test_forward(golden):
    problem = golden.problem
    output = roialign.roi_align(golden.features, golden.rois, problem.size, **problem.options)
    assert output.dtype == golden.features.dtype
    golden.check_forward(output)
    assert np.isfinite(output).all()


def test_adjoint(golden_gradient):
    d_output, shape = golden_gradient.d_output, golden_gradient.features.shape
    options = golden_gradient.problem.options
    d_features = roialign.roi_align_adjoint(d_output, golden_gradient.rois, shape, **options)
    assert d_features.dtype == d_output.dtype
    golden_gradient.check_adjoint(d_features)


def test_seed(golden_mindspore):
    output = seed(golden_mindspore)(golden_mindspore.features, golden_mindspore.rois)
    assert output.dtype == golden_mindspore.features.dtype
    golden_mindspore.check_forward(output)


def test_fractional_index(golden_fractional):
    features, rois = golden_fractional.features, golden_fractional.rois
    d_output, options = golden_fractional.arrays["dy"], golden_fractional.problem.options
    row = re.escape(f"RoI {np.flatnonzero(rois[:, 0] % 1)[0]} ")
    with pytest.raises(IndexError, match=row):
        seed(golden_fractional)(features, rois)
    with pytest.raises(IndexError, match=row):
        roialign.roi_align_adjoint(d_output, rois, features.shape, **options)
    with pytest.raises(IndexError, match=row):
        roialign.roi_align_box_gradient(d_output, features, rois, **options)
