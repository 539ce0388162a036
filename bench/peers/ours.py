"""roialign, on NumPy arrays."""

import numpy as np
import roialign

DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("nchw", "nhwc")
array = np.asarray


def versions():
    return {
        "roialign": roialign.__version__,
        "numpy": np.__version__,
        "isa": roialign._core.isa,
    }


def _call(function, problem, like, *arguments):
    roialign.set_num_threads(problem.threads)
    options = {
        "spatial_scale": problem.spatial_scale,
        "sampling_ratio": problem.sampling_ratio,
        "convention": problem.convention,
    }
    if problem.out:
        options["out"] = np.full_like(like, np.nan)  # [like's layout]; its pages are touched
    return lambda: function(*arguments, **options)


def forward(problem):
    features, rois, size = problem.features, problem.rois, problem.output_size
    return _call(roialign.roi_align, problem, problem.d_output[: len(rois)], features, rois, size)


def adjoint(problem):
    features, rois, d_output = problem.features, problem.rois, problem.d_output
    return _call(roialign.roi_align_adjoint, problem, features, d_output, rois, features.shape)


def box_gradient(problem):
    features, rois, d_output = problem.features, problem.rois, problem.d_output
    return _call(roialign.roi_align_box_gradient, problem, rois, d_output, features, rois)
