"""Every library that has one of our conventions gives our result, in arrays of every kind."""

import re

import numpy as np
import pytest

import roialign


def layer_arguments(case):
    """As MindSpore was called."""
    names = "pooled_height", "pooled_width", "spatial_scale", "sample_num", "roi_end_mode"
    return [case.parameter(name) for name in names]


@pytest.mark.backends("fast")
def test_forward(backend, golden, layouts):
    problem = golden.problem
    for layout in backend.layouts:
        features, rois = map(layouts[layout], (golden.features, golden.rois))
        output = backend.roi_align(features, rois, problem.size, **problem.options)
        assert output.dtype == golden.features.dtype
        golden.check_forward(output)
        assert np.isfinite(output).all()


@pytest.mark.backends("fast")
def test_adjoint(backend, golden_gradient):
    shape, options = golden_gradient.features.shape, golden_gradient.problem.options
    given = golden_gradient.d_output, golden_gradient.rois
    d_features = backend.roi_align_adjoint(*given, shape, **options)
    assert d_features.dtype == golden_gradient.d_output.dtype
    golden_gradient.check_adjoint(d_features)


@pytest.mark.backends("exact", "-slow")
def test_layers(backend, golden_mindspore):
    """`ROIAlign` and the frameworks' layers are MindSpore's."""
    for layer in backend.layers(*layer_arguments(golden_mindspore)):
        output = backend.run(layer, golden_mindspore.features, golden_mindspore.rois)
        assert output.dtype == golden_mindspore.features.dtype
        golden_mindspore.check_forward(output)


@pytest.mark.backends("raises", "fast")
def test_fractional_index(backend, golden_fractional):
    features, rois = backend.array((golden_fractional.features, golden_fractional.rois))
    d_output, options = golden_fractional.arrays["dy"], golden_fractional.problem.options
    d_output = backend.array(d_output)
    row = re.escape(f"RoI {np.flatnonzero(golden_fractional.rois[:, 0] % 1)[0]} ")
    layer, *_ = backend.layers(*layer_arguments(golden_fractional))
    for call in (
        lambda: layer(features, rois),
        lambda: roialign.roi_align_adjoint(d_output, rois, features.shape, **options),
        lambda: roialign.roi_align_box_gradient(d_output, features, rois, **options),
    ):
        with pytest.raises(IndexError, match=row):
            call()
