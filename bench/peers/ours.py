"""roialign, on NumPy arrays; and its core alone, without a check before."""

from functools import partial
from unittest.mock import patch

import numpy as np

import roialign

PACKAGES = ("roialign", "numpy")


def _call(function, problem, like, *arguments):
    roialign.set_num_threads(problem.threads)
    # [like's layout]; its pages are touched
    out = {"out": np.full_like(like, np.nan)} if problem.out else {}
    return partial(function, *arguments, **problem.options, **out)


def forward(problem):
    arguments = problem.features, problem.rois, problem.output_size
    call = _call(roialign.roi_align, problem, problem.d_output, *arguments)
    if problem.peer.way != "core":
        return call
    core = roialign._core
    with patch.object(core, "forward", wraps=core.forward) as asked:
        result = call()
    alone = partial(core.forward, *asked.call_args.args, **asked.call_args.kwargs)
    return lambda: (alone(), result)[1]


def adjoint(problem):
    features, rois, d_output = problem.features, problem.rois, problem.d_output
    return _call(roialign.roi_align_adjoint, problem, features, d_output, rois, features.shape)


def box_gradient(problem):
    features, rois, d_output = problem.features, problem.rois, problem.d_output
    return _call(roialign.roi_align_box_gradient, problem, rois, d_output, features, rois)
