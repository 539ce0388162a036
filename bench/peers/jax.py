"""JAX: ours on its arrays, and RoIAlign written in jnp.

The latter has the convention `asymmetric`, a fixed number of samples, and boxes inside the map.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

import roialign

PACKAGES = ("roialign", "jax")


def given(array, device):
    return jnp.asarray(array)


def array(result):
    return np.asarray(result[-1] if isinstance(result, tuple) else result)


def forward(problem):
    pool, features, rois = _pooling(problem), problem.features, _rois(problem)
    pool = pool if problem.peer.way == "eager" else jax.jit(pool)
    return lambda: pool(features, rois).block_until_ready()


def gradient(problem):
    pool = _pooling(problem)

    @jax.jit
    def both(features, rois, d_output):  # without the output the compiler would leave it out
        output, pull = jax.vjp(lambda features: pool(features, rois), features)
        return output, pull(d_output)[0]

    arguments = problem.features, _rois(problem), problem.d_output
    return lambda: jax.block_until_ready(both(*arguments))


def nothing(problem):
    features, rois = problem.features, _rois(problem)
    least = jax.jit(lambda features, rois: features + rois[0][0, 0] + rois[1][0])
    return lambda: least(features, rois).block_until_ready()


def _rois(problem):
    if problem.peer.way == "rows":
        return problem.rois
    return problem.rois[:, 1:], problem.rois[:, 0].astype(jnp.int32)


def _pooling(problem):
    """A function of the map, and of the boxes and their images."""
    numbers = problem.output_size, problem.sampling_ratio, problem.spatial_scale
    if not problem.peer.ours:
        one = {"gathers": _gathers, "products": _products}[problem.peer.way]
        return lambda features, rois: jax.lax.map(lambda roi: one(features, *roi, *numbers), rois)
    roialign.set_num_threads(problem.threads)
    size, options = problem.output_size, problem.options
    return lambda features, rois: roialign.roi_align(features, rois, size, **options)


def _positions(lo, hi, bins, samples, scale):
    """(P * samples,) on one axis."""
    start = lo * scale
    size = jnp.maximum(hi * scale - start, 1)
    return start + (jnp.arange(bins * samples) + 0.5) * size / (bins * samples)


def _gathers(features, box, image, size, samples, scale):
    (x1, y1, x2, y2), numbers = box, (samples, scale)
    axes = _positions(y1, y2, size[0], *numbers), _positions(x1, x2, size[1], *numbers)
    grid = jnp.meshgrid(*axes, indexing="ij")
    at = partial(map_coordinates, coordinates=grid, order=1, mode="nearest")
    values = jax.vmap(at)(features[image])  # [C, P * samples, Q * samples]
    return values.reshape(-1, size[0], samples, size[1], samples).mean((2, 4))


def _products(features, box, image, size, samples, scale):
    def matrix(lo, hi, bins, length):
        distance = _positions(lo, hi, bins, samples, scale)[:, None] - jnp.arange(length)
        return jnp.maximum(0, 1 - abs(distance)).reshape(bins, samples, length).mean(1)

    x1, y1, x2, y2 = box
    y = matrix(y1, y2, size[0], features.shape[2])
    x = matrix(x1, x2, size[1], features.shape[3])
    return jnp.einsum("ph,chw,qw->cpq", y, features[image], x)
