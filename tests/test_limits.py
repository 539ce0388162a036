"""What no library can compute with: numbers beyond every limit, arrays whose memory is gone."""

from importlib import import_module
from importlib.util import find_spec
from itertools import product

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
    module, function = MAKERS[request.param]
    return request.param, getattr(import_module(module), function)


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


# The memory is gone


def emptied(array):
    """A copy of a tensor of torch, without its storage."""
    tensor = array.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def emptied_view(array):
    """The same, which starts in the midst of its storage: its address is not 0."""
    tensor = array.new_zeros(1 + array.numel())[1:].view(array.shape)
    tensor.untyped_storage().resize_(0)
    return tensor


def deleted(array):
    """A copy of an array of JAX, which was donated, say."""
    copy = array.copy()
    copy.delete()
    return copy


def forms(rois, index):
    """All forms of rois: what makes them of named arrays, and these."""
    boxes = rois[:, 1:]
    yield lambda rois: rois, {"rois": rois}
    yield lambda boxes, image_index: (boxes, image_index), {"boxes": boxes, "image_index": index}
    yield lambda first: [first], {"first": boxes}


def calls_on(features, rois, d_output, index):
    """Each operation with each form of rois, as a function of named arrays, and these."""
    for form, parts in forms(rois, index):

        def forward(features, form=form, **parts):
            return roialign.roi_align(features, form(**parts), 2)

        def adjoint(d_output, features, form=form, **parts):
            rois = form(**parts)
            return roialign.roi_align_adjoint(d_output, rois, FEATURES.shape, features=features)

        def box_gradient(d_output, features, form=form, **parts):
            return roialign.roi_align_box_gradient(d_output, features, form(**parts))

        yield forward, {"features": features, **parts}
        for call in (adjoint, box_gradient):
            yield call, {"d_output": d_output, "features": features, **parts}


GONE = {"torch": [emptied, emptied_view], "jax": [deleted]}  # others keep theirs


def test_memory_that_is_gone_is_an_error_that_names_the_argument(library):
    name, make = library
    arrays = [make(array) for array in (FEATURES, ROIS, D_OUTPUT, np.zeros(1, np.int32))]
    for call, given in calls_on(*arrays):
        call(**given)
        for argument, gone in product(given, GONE.get(name, [])):
            shown = "rois[0]" if argument == "first" else argument
            with pytest.raises(TypeError) as caught:
                call(**given | {argument: gone(given[argument])})
            assert str(caught.value).startswith(f"`{shown}` must be in memory"), caught.value
