"""How far a result may be from the oracle: one table per dtype, and the reason.

A sum of T rounded terms differs from the exact one by at most about T * u * sum |terms|, where u is
the unit roundoff of the type that sums. Making the weights costs some roundings more (`WEIGHTS`).
The result is then rounded once to its own dtype. The oracle has the kernel's own coordinates, so
nothing is due to them (docs/spec.md, error bounds).
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
WEIGHTS = 8

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


def forward(problem, expected, tangent=None):
    """Bound of a forward result; T is the rows and columns that one bin reads."""
    magnitude = replace(problem, features=abs(problem.features))
    tangent = None if tangent is None else np.abs(tangent)
    size = oracle.forward(magnitude, tangent, bound=True)  # without a tangent: at most max|F|
    axes = [[np.sum(axis.weights > 0, 1).max() for axis in pair] for pair in problem.axes]
    terms = max((rows + cols for rows, cols in axes), default=0)
    return _bound(problem.features, terms, size, expected, problem.features.dtype)


def adjoint(problem, d_output, expected, tangent=None):
    """Bound of an adjoint result; T is the bins that one pixel is in."""
    bins = np.zeros(problem.features.shape[2:])
    for y, x in problem.axes:
        bins += np.outer(np.sum(y.weights > 0, 0), np.sum(x.weights > 0, 0))
    tangent = None if tangent is None else np.abs(tangent)
    size = oracle.adjoint(problem, abs(d_output), tangent, bound=True)
    return _bound(d_output, bins.max(initial=0), size, expected, d_output.dtype)


def box_gradient(problem, d_output, expected):
    """Bound of a box gradient; T is the bins of one RoI, over the channels."""
    magnitude = replace(problem, features=abs(problem.features))
    size = oracle.box_gradient(magnitude, abs(d_output), bound=True)
    return _bound(d_output, np.prod(d_output.shape[1:]), size, expected, problem.boxes.dtype)


def _size(values):
    return np.abs(values.astype(np.float64)).max(initial=0)


def _bound(values, terms, size, expected, dtype):
    sums = TABLE[values.dtype][0]
    _, sums_unit, sums_step = TABLE[sums]
    _, unit, step = TABLE[dtype]
    underflow = sums_step * max(1, _size(values))
    return (terms + WEIGHTS) * (sums_unit * size + underflow) + unit * np.abs(expected) + step
