"""JAX: what a call costs above its kernel, and the same in jnp alone: `python -m bench.overhead_jax`.

First a map of one pixel and one RoI, so that next to nothing is left but the call: microseconds, median
with least and largest of the rounds; `kernel` is the core alone on the same memory, and is taken off the
others; `a jitted sum` of the same arguments is the least that such a call costs in JAX. Then workloads
of the benchmark against RoIAlign written in jnp, with gathers and with products of matrices, each
checked before it is timed: milliseconds.
"""

import datetime
import statistics
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import roialign
import roialign.jax
from bench import run
from bench.calls import seconds_of
from cases import WORKLOADS

COMPARED = ("W6", "W3")


def calls():
    """Name -> a call."""
    features, boxes = jnp.ones((1, 1, 1, 1)), jnp.array([[0, 0, 1.0, 1]])
    index, d_output = jnp.zeros(1, jnp.int32), jnp.ones((1, 1, 1, 1))
    rois = jnp.array([[0, 0, 0, 1.0, 1]])
    options = {"spatial_scale": 1.0, "sampling_ratio": 2, "convention": "asymmetric"}
    map_, *pair_of_rois = [np.array(a) for a in (features, boxes, index.astype(float))]
    in_numpy = map_, tuple(pair_of_rois)
    rule = (1.0, 1.0, 2, 0.0, 0.0, 0.0, 1.0, False)
    out = np.empty((1, 1, 1, 1), np.float32)

    def pool(features, rois):
        return roialign.roi_align(features, rois, 1, **options)

    def with_backward(features, boxes, index, d_output):
        output, pull = jax.vjp(lambda f: pool(f, (boxes, index)), features)
        return output, *pull(d_output)

    def sum_of(features, rois):
        return features + rois[0][0, 0] + rois[1][0]

    least, pair, array, both = map(jax.jit, (sum_of, pool, pool, with_backward))
    return {
        "kernel": lambda: roialign._core.forward(*in_numpy, None, rule, out, 1),
        "a jitted sum": lambda: least(features, (boxes, index)).block_until_ready(),
        "jitted": lambda: pair(features, (boxes, index)).block_until_ready(),
        "jitted, rois (K, 5)": lambda: array(features, rois).block_until_ready(),
        "jitted, with its backward": lambda: jax.block_until_ready(
            both(features, boxes, index, d_output)
        ),
        "eager": lambda: pool(features, (boxes, index)).block_until_ready(),
    }


# RoIAlign in jnp, for the convention `asymmetric` and fixed sampling


def positions(lo, hi, bins, samples, scale):
    """(P * samples,) on one axis, of boxes that are inside the map."""
    start = lo * scale
    size = jnp.maximum(hi * scale - start, 1)
    return start + (jnp.arange(bins * samples) + 0.5) * size / (bins * samples)


def by_gathers(features, boxes, index, size, samples, scale):
    def one(roi):
        (x1, y1, x2, y2), image = roi
        y = positions(y1, y2, size[0], samples, scale)
        x = positions(x1, x2, size[1], samples, scale)
        (y0, x0), (height, width) = (jnp.floor(p).astype(int) for p in (y, x)), features.shape[2:]
        fy, fx = (y - y0)[:, None], x - x0
        y1_, x1_ = jnp.minimum(y0 + 1, height - 1), jnp.minimum(x0 + 1, width - 1)
        corner = lambda r, c: features[image][:, r[:, None], c]  # noqa: E731
        upper = corner(y0, x0) * (1 - fx) + corner(y0, x1_) * fx
        lower = corner(y1_, x0) * (1 - fx) + corner(y1_, x1_) * fx
        values = upper * (1 - fy) + lower * fy  # [C, P * samples, Q * samples]
        return values.reshape(-1, size[0], samples, size[1], samples).mean((2, 4))

    return jax.lax.map(one, (boxes, index))


def by_products(features, boxes, index, size, samples, scale):
    def matrix(lo, hi, bins, length):
        distance = positions(lo, hi, bins, samples, scale)[:, None] - jnp.arange(length)
        return jnp.maximum(0, 1 - abs(distance)).reshape(bins, samples, length).mean(1)

    def one(roi):
        (x1, y1, x2, y2), image = roi
        height, width = features.shape[2:]
        y, x = matrix(y1, y2, size[0], height), matrix(x1, x2, size[1], width)
        return jnp.einsum("ph,chw,qw->cpq", y, features[image], x)

    return jax.lax.map(one, (boxes, index))


def pooled(features, boxes, index, size, samples, scale):
    options = {"spatial_scale": scale, "sampling_ratio": samples, "convention": "asymmetric"}
    return roialign.roi_align(features, (boxes, index), size, **options)


def formulations(name):
    """Name -> a jitted call, checked against the first."""
    workload = WORKLOADS[name]
    rois = jnp.asarray(workload.rois())
    arrays = jnp.asarray(workload.features()), rois[:, 1:], rois[:, 0].astype(jnp.int32)
    found, right = {}, None
    ways = {"roialign": pooled, "jnp, gathers": by_gathers, "jnp, products": by_products}
    for way, function in ways.items():
        jitted = jax.jit(function, static_argnums=(3, 4, 5))
        call = lambda f=jitted: f(  # noqa: E731
            *arrays, workload.output_size, workload.sampling, workload.scale
        ).block_until_ready()
        result = np.asarray(call())
        right = result if right is None else right
        np.testing.assert_allclose(result, right, rtol=0, atol=1e-4 * np.abs(right).max())
        found[way] = call
    return found


def table(heading, samples, unit, off=0.0):
    print(f"\n| {heading} |\n| --- | ---: |")
    for name, values in samples.items():
        low, middle, high = (f(values) * unit - off for f in (min, statistics.median, max))
        print(f"| {name} | {middle:.3g} ({low:.3g}..{high:.3g}) |")


def main():
    roialign.set_num_threads(1)
    overhead = seconds_of(calls())
    kernel = statistics.median(overhead["kernel"])
    above = {"kernel": overhead.pop("kernel")}
    table("a call | us above the kernel", overhead, 1e6, kernel * 1e6)
    table("the kernel alone | us", above, 1e6)
    compared = {}
    for name in COMPARED:
        compared[name] = seconds_of(formulations(name))
        table(f"{name} {WORKLOADS[name].title} | ms", compared[name], 1e3)
    record = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": run.commit(),
        "machine": run.machine(),
        "versions": {"roialign": roialign.__version__, "jax": jax.__version__},
        "seconds": above | overhead | compared,
    }
    print(run.write(record, Path(__file__).parent / "results" / "overhead_jax"))


if __name__ == "__main__":
    sys.exit(main())
