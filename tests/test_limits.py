"""What no library can compute with: numbers beyond every limit, arrays whose memory is gone."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest

import oracle
import roialign
from backends import array, arrays_of, named, operations as operations_of, pair, per_image
from isolation import isolated

FEATURES = np.ones((1, 2, 8, 9), np.float32)
ROIS = np.array([[0, 1, 1, 6, 5]], np.float32)
D_OUTPUT = np.ones((1, 2, 2, 2), np.float32)
ENDLESS = 10**5000  # Python writes no int of so many digits

pytestmark = pytest.mark.backends("fast")


def operations(backend, output_size=2, feature_shape=FEATURES.shape, **options):
    features, rois, d_output = backend.array((FEATURES, ROIS, D_OUTPUT))
    yield lambda: roialign.roi_align(features, rois, output_size, **options)
    yield lambda: roialign.roi_align_adjoint(d_output, rois, feature_shape, **options)
    yield lambda: roialign.roi_align_box_gradient(d_output, features, rois, **options)


def layers(backend, height=2, width=2, samples=2):
    """Makers of the layers of a library."""
    arguments = height, width, 1.0, samples
    for kind in backend.layer_kinds:
        yield lambda kind=kind: kind(*arguments)
    if backend.name == "torch":
        from roialign.compat import detectron2, torchvision

        yield lambda: torchvision.RoIAlign(2, 1.0, samples)
        yield lambda: torchvision.MultiScaleRoIAlign(["a"], 2, samples)
        yield lambda: detectron2.ROIAlign(2, 1.0, samples)


@pytest.mark.parametrize("samples", [4097, 2**31, 2**63, ENDLESS], ids=lambda n: f"{n:x}"[:9])
def test_more_samples_than_4096_are_refused(backend, samples):
    calls = [*operations(backend, sampling_ratio=samples), *layers(backend, samples=samples)]
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        text = str(caught.value)
        assert text.split(" must be at most 4096, ")[0] in ("`sampling_ratio`", "`sample_num`")
        assert text.endswith("0 adapts to the box")
        assert ("digits" if samples == ENDLESS else str(samples)) in text


def test_4096_samples_are_accepted(backend):
    for call in [*operations(backend, sampling_ratio=4096), *layers(backend, samples=4096)]:
        call()


@pytest.mark.parametrize("count", [2**31, 2**63, 2**64, ENDLESS], ids=lambda n: f"{n:x}"[:9])
def test_more_bins_than_32_bits_count_are_refused(backend, count):
    for size in (count, (2, count)):
        forward, *_ = operations(backend, output_size=size)
        with pytest.raises(ValueError, match="`output_size` must be at most 2147483647, got"):
            forward()
    for name, (layer, *_) in (
        ("pooled_height", layers(backend, height=count)),
        ("pooled_width", layers(backend, width=count)),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be at most 2147483647, got"):
            layer()
    layer, *_ = layers(backend, height=2**16, width=2**15)
    with pytest.raises(ValueError, match=r"`\(pooled_height, pooled_width\)` .*2147483647 bins"):
        layer()


@pytest.mark.parametrize("images", [2**58, 2**62, 2**63, ENDLESS], ids=lambda n: f"{n:x}"[:9])
@pytest.mark.parametrize("channels", [2, 0])
def test_a_feature_shape_of_more_bytes_than_63_bits_count_is_refused(backend, images, channels):
    rois, d_output = backend.array((ROIS, D_OUTPUT[:, :channels]))
    with pytest.raises(ValueError, match=r"`feature_shape` must have fewer than 2\*\*60 elements"):
        roialign.roi_align_adjoint(d_output, rois, (images, channels, 4, 4))


def check_an_output_of_more_bytes_than_63_bits_count(name):
    backend = named(name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        backend.start(monkeypatch)
        features, rois = np.zeros((1, 2**20, 1, 1)), np.zeros((2**12, 5), np.float32)
        with pytest.raises(ValueError, match="`output` must have fewer|too big"):
            roialign.roi_align(*backend.array((features, rois)), (2**15, 2**15))


def test_an_output_of_more_bytes_than_63_bits_count_is_refused(backend):
    isolated(check_an_output_of_more_bytes_than_63_bits_count, backend.name)


@pytest.mark.parametrize("integer", [-ENDLESS, Fraction(ENDLESS), (ENDLESS, 1, 1)], ids=type)
def test_a_number_of_too_many_digits_is_an_error_of_its_own(backend, integer):
    error = TypeError if isinstance(integer, Fraction) else ValueError
    forward, *_ = operations(backend, output_size=integer)
    with pytest.raises(error, match="`output_size` must be .*digits"):
        forward()


def test_an_array_is_no_pair(backend):
    """But what has an `__index__` is an integer, if no bool."""
    forward, *_ = operations(backend, output_size=np.array([8, 12]))
    with pytest.raises(
        TypeError, match=r"`output_size` must be an int or a pair \(height, width\)"
    ):
        forward()
    for call in operations(backend, spatial_scale=np.array([0.5, 0.5])):
        with pytest.raises(
            TypeError, match=r"`spatial_scale` must be a number or a pair \(scale_y"
        ):
            call()
    for make in (np.array, lambda value: backend.array(np.array(value))):
        if hasattr(make(3), "__index__"):
            forward, *_ = operations(backend, output_size=make(3))
            assert forward().shape == (1, 2, 3, 3)
        forward, *_ = operations(backend, output_size=make(True))
        with pytest.raises(TypeError, match="`output_size` must be an int"):
            forward()


# The memory is gone


@pytest.mark.backends("fast", "grad")
@pytest.mark.parametrize(
    "form, names", [(array, ["rois"]), (pair, ["boxes", "image_index"]), (per_image, ["rois[0]"])]
)
def test_memory_that_is_gone_is_an_error_that_names_the_argument(backend, form, names):
    rois = arrays_of(form, ROIS[:, 1:], np.zeros(1, np.int32), images=1)
    names = ["features", "d_output", *names]
    arrays = backend.array([FEATURES, D_OUTPUT, *rois])
    problem = oracle.Problem(FEATURES, ROIS[:, 1:], None, (2, 2), convention="half_pixel")
    forward, _, box_gradient = operations_of(problem, form)

    def adjoint(features, d_output, *rois):
        rois = form(*rois)
        return roialign.roi_align_adjoint(d_output, rois, FEATURES.shape, features=features)

    for call, (i, name), gone in product(
        (forward, adjoint, box_gradient), enumerate(names), backend.gone
    ):
        call(*arrays)
        if call is forward and name == "d_output":
            continue
        with pytest.raises(TypeError) as caught:
            call(*arrays[:i], gone(arrays[i]), *arrays[i + 1 :])
        assert str(caught.value).startswith(f"`{name}` must be in memory"), caught.value
