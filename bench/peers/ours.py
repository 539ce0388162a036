"""roialign, on NumPy arrays; and its core alone, without a check before."""

from functools import partial
from unittest.mock import patch

import numpy as np

import roialign

PACKAGES = ("roialign", "numpy")


def _call(name, problem, like, *arguments):
    roialign.set_num_threads(problem.threads)
    if problem.operation.rotated:
        name = name.replace("roi_align", "roi_align_rotated")
    function, out = getattr(roialign, ("multiscale_" if problem.pyramid else "") + name), {}
    if problem.out:  # [like's layout]; its pages are touched
        several = isinstance(like, list)
        out["out"] = _touched(like) if not several else list(map(_touched, like))
    return partial(function, *arguments, **problem.options, **out)


def _touched(like):
    return np.full_like(like, np.nan)


def _features(problem):
    """A map, or those of a pyramid."""
    if problem.pyramid:
        return problem.maps(problem.features, np.ascontiguousarray)
    return problem.features


def forward(problem):
    arguments = _features(problem), problem.rois, problem.output_size
    call = _call("roi_align", problem, problem.d_output, *arguments)
    if problem.peer.way != "core":
        return call
    core = roialign._core
    name = "forward_rows" if problem.out else "forward"
    with patch.object(core, name, wraps=getattr(core, name)) as asked:
        result = call()
    alone = partial(getattr(core, name), *asked.call_args.args, **asked.call_args.kwargs)
    return lambda: (alone(), result)[1]


def adjoint(problem):
    features, rois, d_output = _features(problem), problem.rois, problem.d_output
    shapes = [m.shape for m in features] if problem.pyramid else features.shape
    call = _call("roi_align_adjoint", problem, features, d_output, rois, shapes)
    return call if problem.operation.reduction == "mean" else partial(call, features=features)


def box_gradient(problem):
    features, rois, d_output = _features(problem), problem.rois, problem.d_output
    return _call("roi_align_box_gradient", problem, rois, d_output, features, rois)
