"""What type checkers know of the public functions: `mypy` reads this file, nothing runs it."""

import numpy as np
from numpy.typing import NDArray
from typing_extensions import assert_type

import roialign

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


def functions(features: Floats, boxes: Doubles, index: NDArray[np.int64], out: Floats) -> None:
    rows, pair, by_image = boxes, (boxes, index), [boxes]
    assert_type(roialign.roi_align(features, rows, 7), Floats)
    assert_type(roialign.roi_align(features, pair, (7, 7), spatial_scale=(0.5, 0.25)), Floats)
    assert_type(roialign.roi_align(features, by_image, [7, 7], out=out), Floats)
    output = roialign.roi_align(features, rows, 7, convention=roialign.Convention(end_offset=1))
    assert_type(roialign.roi_align_adjoint(output, rows, features.shape), Floats)
    assert_type(roialign.roi_align_box_gradient(output, features, rows), Doubles)
    assert_type(roialign.roi_align_box_gradient(output, features, pair), Doubles)
    assert_type(roialign.roi_align_box_gradient(output, features, by_image), list[Doubles])
    maps, scales = [features, out], [0.25, 0.125]
    assert_type(roialign.multiscale_roi_align(maps, rows, 7, spatial_scales=scales), Floats)
    d_rois = roialign.multiscale_roi_align_box_gradient(
        output, {"p2": features}, pair, spatial_scales=[(0.5, 0.25)], levels=index
    )
    assert_type(d_rois, Doubles)
    assert_type(roialign.ROIAlign(7, 7, 0.25, sample_num=0)(features, rows), Floats)
    assert_type(roialign.conventions["half_pixel"], roialign.Convention)
    assert_type(roialign.get_num_threads(), int)


def mistakes(features: Floats, rois: Doubles) -> None:
    """Each is an error: a `type: ignore` that is not needed would be one itself."""
    roialign.roi_align([[1.0]], rois, 7)  # type: ignore[type-var]
    roialign.roi_align(features, rois, 7, spatial_scale="1")  # type: ignore[arg-type]
    roialign.roi_align(features, rois, 7, 0.25)  # type: ignore[call-arg]
    roialign.roi_align(features, rois, 7.0)  # type: ignore[arg-type]
    roialign.roi_align(features, rois, 7, aligned=True)  # type: ignore[call-arg]
    roialign.roi_align_adjoint(features, rois, 4)  # type: ignore[arg-type]
    roialign.ROIAlign(7, 7, "1")  # type: ignore[arg-type]
    roialign.Convention(0.5)  # type: ignore[call-arg]
