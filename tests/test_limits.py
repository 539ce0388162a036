"""Numbers beyond every limit, in every library: a `ValueError` that names the argument."""

from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest

import roialign

FEATURES = np.ones((1, 2, 8, 9), np.float32)
ROIS = np.array([[0, 1, 1, 6, 5]], np.float32)
D_OUTPUT = np.ones((1, 2, 2, 2), np.float32)


MAKERS = {
    "numpy": ("numpy", "asarray"),
    "torch": ("torch", "from_numpy"),
    "jax": ("jax.numpy", "asarray"),
    "mindspore": ("mindspore", "Tensor"),
}


@pytest.fixture(params=[name for name in MAKERS if find_spec(name)])
def library(request):
    """An installed library's name, and what makes an array of it of one of NumPy's."""
    module, maker = MAKERS[request.param]
    return request.param, getattr(import_module(module), maker)


def operations(make, **options):
    features, rois, d_output = map(make, (FEATURES, ROIS, D_OUTPUT))
    yield lambda: roialign.roi_align(features, rois, 2, **options)
    yield lambda: roialign.roi_align_adjoint(d_output, rois, FEATURES.shape, **options)
    yield lambda: roialign.roi_align_box_gradient(d_output, features, rois, **options)


def layers(name, samples):
    """Makers of the layers of a library."""
    yield lambda: roialign.ROIAlign(2, 2, 1.0, samples)
    if name == "torch":
        from roialign.compat import detectron2, torchvision

        yield lambda: torchvision.RoIAlign(2, 1.0, samples)
        yield lambda: torchvision.MultiScaleRoIAlign(["a"], 2, samples)
        yield lambda: detectron2.ROIAlign(2, 1.0, samples)
    if name in ("torch", "mindspore"):
        module = getattr(roialign, name)
        yield lambda: module.ROIAlign(2, 2, 1.0, samples)


@pytest.mark.parametrize("samples", [4097, 2**31, 2**63, 10**5000], ids=lambda n: f"{n:x}"[:9])
def test_more_samples_than_4096_are_refused(library, samples):
    name, make = library
    calls = [*operations(make, sampling_ratio=samples), *layers(name, samples)]
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        text = str(caught.value)
        assert text.split(" must be at most 4096, ")[0] in ("`sampling_ratio`", "`sample_num`")
        assert text.endswith("0 adapts to the box")
        assert str(samples) in text if samples < 10**4000 else "digits" in text


def test_4096_samples_are_accepted(library):
    name, make = library
    for call in [*operations(make, sampling_ratio=4096), *layers(name, 4096)]:
        call()
