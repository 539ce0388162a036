"""How far a result may be from the oracle: one table per dtype, and the reason.

A sum of T rounded terms differs from the exact one by about T * u * sum |terms| at most, where u is
the unit roundoff of the type that sums; making the weights costs some roundings more. The result
is then rounded once to its own dtype. The oracle has the kernel's own coordinates, so nothing is
due to them. Derived in docs/spec.md, error bounds.
"""

from dataclasses import replace

import ml_dtypes
import numpy as np

import oracle

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# dtype: (type of the sums, unit roundoff, smallest step)
TABLE = {
    np.dtype(np.float16): (np.dtype(np.float32), 2.0**-11, 2.0**-24),
    BFLOAT16: (np.dtype(np.float32), 2.0**-8, 2.0**-133),
    np.dtype(np.float32): (np.dtype(np.float32), 2.0**-24, 2.0**-149),
    np.dtype(np.float64): (np.dtype(np.float64), 2.0**-53, 2.0**-1074),
}
DTYPES = list(TABLE)
BYTES = [np.dtype(np.uint8), np.dtype(bool)]  # of features alone: what they are pooled to
TABLE |= dict.fromkeys(BYTES, TABLE[np.dtype(np.float32)])
WEIGHTS = 8
NARROW = 6  # more, for weights in float32: those of a mean, a slope and a tangent

# against other libraries, for features of size 1: (they round every operation, they round once)
PEERS = {
    np.dtype(np.float16): (5e-2, 1e-3),
    np.dtype(np.float32): (1e-5, 1e-5),
    np.dtype(np.float64): (1e-9, 1e-9),
}


def check(actual, expected, bound):
    """Assert |actual - expected| <= bound, element by element."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    excess = np.abs(actual.astype(np.float64) - expected) - bound
    assert np.all(excess <= 0), f"over the bound by {np.nanmax(excess)} in {np.sum(~(excess <= 0))}"


def close(actual, expected, atol=1e-12):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=atol)


def forward(problem, expected, tangent=None, narrow=False):
    """Bound of a forward result; T is the rows and columns that one bin reads.

    narrow: weights are made in float32 too, as the kernels of matrix products do.
    """
    features = problem.features
    terms = max(
        (y.sum(1).max() + x.sum(1).max() for _, y, x in _touched(problem, tangent)), default=0
    )
    magnitude, tangent = replace(problem, features=abs(features)), _abs(tangent)
    size = oracle.forward(magnitude, tangent, bound=True)  # without a tangent: at most max|F|
    terms *= 1 if tangent is None else 2
    return _bound(problem, features, terms, size, expected, features.dtype, narrow)


def adjoint(problem, d_output, expected, tangent=None, narrow=False):
    """Bound of an adjoint result; T is the bins that one pixel is in."""
    bins = np.zeros((len(problem.features), *problem.features.shape[2:]))
    for image, y, x in _touched(problem, tangent):
        bins[image] += np.outer(y.sum(0), x.sum(0))
    terms = bins.max(initial=0) * (1 if tangent is None else 2)
    size = oracle.adjoint(problem, abs(d_output), _abs(tangent), bound=True)
    return _bound(problem, d_output, terms, size, expected, d_output.dtype, narrow)


def box_gradient(problem, d_output, expected, narrow=False):
    """Bound of a box gradient; T is the bins, pixels and slopes of its two passes.

    narrow: the bins, then the pixels and the channels, which may be added in any order.
    """
    terms = 0
    for y, x in problem.axes:
        if narrow:
            pixels = [np.sum(a.weights.any(0) | a.slopes(bound=True).any((0, 1))) for a in (y, x)]
            terms = max(terms, y.bins + x.bins + np.prod(pixels) + d_output.shape[1])
            continue
        for a, b in ((y, x), (x, y)):
            pixels = np.sum(a.weights.any(0))
            runs = (
                -(-y.bins // 7) if b is x else 1
            )  # slopes of x are added for 7 rows of bins at a time
            slopes = np.sum(b.slopes(bound=True).any(0))
            terms = max(terms, a.bins + pixels + runs * slopes)
    terms += 16 + d_output.shape[1] / 8
    magnitude = replace(problem, features=abs(problem.features))
    size = oracle.box_gradient(magnitude, abs(d_output), bound=True)
    return _bound(problem, d_output, terms, size, expected, problem.boxes.dtype, narrow)


def _touched(problem, tangent):
    """(image, y [P, H], x [Q, W]) of each RoI: where there is weight, or slope under a tangent."""
    for image, axes in zip(problem.index, problem.axes, strict=True):
        slopes = [0 if tangent is None else axis.slopes(bound=True).any(0) for axis in axes]
        yield image, *((a.weights > 0) | (s > 0) for a, s in zip(axes, slopes, strict=True))


def _abs(values):
    return None if values is None else np.abs(values)


def _bound(problem, values, terms, size, expected, dtype, narrow):
    sums = TABLE[values.dtype][0]
    _, sums_unit, sums_step = TABLE[sums]
    _, unit, step = TABLE[dtype]
    roundings = terms + WEIGHTS
    lengths = [len(s.lo) for pair in problem.axes for axis in pair for s in axis.samples]
    if sums == np.float64:  # there weights are summed in their own type, and the oracle's too
        roundings = 2 * (roundings + 2 * max(lengths, default=0))
    elif narrow:
        roundings += NARROW + 2 * max(lengths, default=0)
    underflow = sums_step * max(1, np.abs(values.astype(np.float64)).max(initial=0))
    return roundings * (sums_unit * size + underflow) + unit * np.abs(expected) + step
