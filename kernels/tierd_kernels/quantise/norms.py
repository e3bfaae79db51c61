"""Upper bounds of norms, compiled, in float64. No power iteration: that is a lower estimate."""

import math

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.floats import compiled
from tierd_kernels.quantise.reference import SPECTRAL_ROOM, SUM_ROOM

Array = NDArray[np.float64]


@compiled()
def add_gram(x: Array, gram: Array) -> None:
    """gram[n, n] += x^T x for x [m, n]; exactly symmetric."""
    for c in range(x.shape[0]):
        for i in range(x.shape[1]):
            a = x[c, i]
            for j in range(x.shape[1]):
                gram[i, j] += a * x[c, j]


@compiled()
def spectral_norm_above(gram: Array) -> float:
    """Upper bound of the spectral norm of x given gram [n, n] = x^T x.

    The lesser of the Frobenius and the Schatten-16 norm, over the trace, so that nothing overflows.
    """
    n = gram.shape[0]
    trace = 0.0
    for i in range(n):
        trace += gram[i, i]
    if trace == 0.0:
        return 0.0
    if not trace < math.inf:
        return math.inf
    share = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            share[i, j] = gram[i, j] / trace
    squared = np.zeros((n, n))
    add_gram(share, squared)
    fourth = np.zeros((n, n))
    add_gram(squared, fourth)
    total = 0.0
    for i in range(n):
        for j in range(n):
            total += fourth[i, j] * fourth[i, j]
    return math.sqrt(trace * min(1.0, total**0.125)) * SPECTRAL_ROOM


@compiled()
def row_norms_above(x: Array, out: Array) -> None:
    """out[t] = upper bound of the norm of x[:, t]."""
    out[:] = 0.0
    for c in range(x.shape[0]):
        for t in range(x.shape[1]):
            out[t] += x[c, t] * x[c, t]
    for t in range(x.shape[1]):
        out[t] = math.sqrt(out[t]) * SUM_ROOM
