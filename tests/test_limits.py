"""What no library can compute with: numbers beyond every limit, arrays whose memory is gone."""

from itertools import product

import numpy as np
import pytest

import oracle
import roialign
from backends import array, arrays_of, named, operations, pair, per_image
from isolation import isolated

FEATURES = np.ones((1, 2, 8, 9), np.float32)
ROIS = np.array([[0, 1, 1, 6, 5]], np.float32)
D_OUTPUT = np.ones((1, 2, 2, 2), np.float32)

pytestmark = pytest.mark.backends("fast")


def check_an_output_of_more_bytes_than_63_bits_count(name):
    backend = named(name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        backend.start(monkeypatch)
        features, rois = np.zeros((1, 2**20, 1, 1)), np.zeros((2**12, 5), np.float32)
        with pytest.raises(ValueError, match="`output` must have fewer|too big"):
            roialign.roi_align(*backend.array((features, rois)), (2**15, 2**15))


def test_an_output_of_more_bytes_than_63_bits_count_is_refused(backend):
    isolated(check_an_output_of_more_bytes_than_63_bits_count, backend.name)


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
    forward, _, box_gradient = operations(problem, form)

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
