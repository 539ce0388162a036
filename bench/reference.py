"""What is right, in float64, of a part of a workload: Out = Ay F Ax^T with the oracle's weights. Of
maxima and of rotated boxes that is some RoIs by the oracle; an adjoint is what transposes them.
"""

import sys
from operator import itemgetter
from typing import NamedTuple

import numpy as np

import roialign
from bench.environments import ROOT

sys.path.insert(0, str(ROOT / "tests"))
import oracle
from oracle import Problem

CHECKED_CHANNELS = 3
CHECKED_BOXES = 64  # of a box gradient, of maxima and of rotated boxes


class Axis(NamedTuple):
    """One box on one axis: the pixels that count, and what they count in the mean of each bin."""

    pixels: np.ndarray  # [V]
    weights: np.ndarray  # [P, V]
    slopes: np.ndarray | None = None  # [2, P, V], of the weights in the box's start and end
    places: np.ndarray | None = None  # [V]: of rows, among the pixels of all maps


def samples(workload, rois, convention):
    """The oracle's (y, x) axes of every RoI, on the map of its level."""
    found, levels = [None] * len(rois), workload.levels(rois)
    for level, (size, scale) in enumerate(zip(workload.sizes, workload.scales, strict=True)):
        features = np.broadcast_to(np.float32(0), (*workload.shape[:2], *size))  # the shape counts
        rule = workload.output_size, (scale,) * 2, workload.sampling
        on = np.flatnonzero(levels == level)
        boxes, image = rois[on, 1:], rois[on, 0].astype(int)
        problem = Problem(features, boxes, image, *rule, roialign.conventions[convention])
        for k, axes in zip(on, problem.axes, strict=True):
            found[k] = axes
    return found


def axes_of(workload, rois, convention, with_slopes=False):
    pairs, levels, start = samples(workload, rois, convention), workload.levels(rois), [0]
    for height, width in workload.sizes:
        start.append(start[-1] + height * width)
    found = []
    for level, pair in zip(levels, pairs, strict=True):
        y, x = (axis(whole, with_slopes) for whole in pair)
        places = start[level] + y.pixels * workload.sizes[level][1]
        found.append((y._replace(places=places), x))
    return found


def axis(whole, with_slopes):
    rows = whole.weights[None] / max(whole.n, 1)
    if with_slopes:
        rows = np.concatenate([rows, whole.slopes() / max(whole.n, 1)])
    pixels = rows.any((0, 1)).nonzero()[0]
    weights, *slopes = rows[..., pixels]
    return Axis(pixels, weights, slopes)


def part(operation, workload, axes, convention, rois, features, d_output):
    """A part of a result, and what takes it out of the whole."""
    if operation == "box_gradient":
        some = some_of(len(rois), CHECKED_BOXES)
        slopes = axes_of(workload, rois[some], convention, with_slopes=True)
        return box_gradient(d_output[some], features, rois[some], slopes), itemgetter(some)
    some = np.s_[:, some_of(workload.shape[1], CHECKED_CHANNELS)]
    if operation == "forward":
        return forward(features[some], rois, axes), itemgetter(some)
    return adjoint(d_output[some], rois, axes, workload.stored), itemgetter(some)


def some_of(count, most):
    return np.unique(np.linspace(0, count - 1, most).astype(int))


def sampled_part(operation, workload, convention, rois, features):
    """As `part`, of maxima or of rotated boxes, whose rows `rois` are then."""
    some, channels = some_of(len(rois), CHECKED_BOXES), some_of(len(features[0]), CHECKED_CHANNELS)
    features, index = features[:, channels], rois[some, 0].astype(int)
    rule = workload.scale, workload.sampling, roialign.conventions[convention]
    given = rois[some, 1:], index, workload.output_size
    if operation.rotated:
        values, _ = oracle.rotated(features, *given, *rule, np.pi / 180)
    else:
        problem = Problem(features, *given, (workload.scale,) * 2, *rule[1:])
        _, values = oracle.largest(problem, operation.reduction)
    return values, itemgetter(np.ix_(some, channels))


def transposed(features, d_output, output):
    """As `part`, of an adjoint at these random features: <d_output, output> in each channel."""

    def dot(one, two):
        return np.einsum("ncyx,ncyx->c", one, two, dtype=np.float64)

    return dot(d_output, output), lambda d_features: dot(features, d_features)


def terms(rois, axes):
    return zip(rois[:, 0].astype(int), axes, strict=True)


def window(features, image, y, x):
    plane = features[image].reshape(features.shape[1], -1)
    return plane[:, y.places[:, None] + x.pixels].astype(np.float64)  # [C, h, w]


def forward(features, rois, axes):
    """[K, C, P, Q]"""
    return np.stack(
        [y.weights @ window(features, n, y, x) @ x.weights.T for n, (y, x) in terms(rois, axes)]
    )


def adjoint(d_output, rois, axes, shape):
    """[N, C, H, W]"""
    d_features = np.zeros((shape[0], d_output.shape[1], *shape[2:]))
    for d, (image, (y, x)) in zip(d_output, terms(rois, axes), strict=True):
        plane = d_features[image].reshape(d_output.shape[1], -1)
        plane[:, y.places[:, None] + x.pixels] += y.weights.T @ d.astype(np.float64) @ x.weights
    return d_features


def box_gradient(d_output, features, rois, axes):
    """[K, 5], the first column 0."""
    d_rois = np.zeros((len(rois), 5))
    for row, d, (image, (y, x)) in zip(d_rois, d_output, terms(rois, axes), strict=True):
        rows, columns = y.weights @ (F := window(features, image, y, x)), F @ x.weights.T
        row[1::2] = [(d * (rows @ slope.T)).sum() for slope in x.slopes]
        row[2::2] = [(d * (slope @ columns)).sum() for slope in y.slopes]
    return d_rois
