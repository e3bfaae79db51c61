"""Selection in Numba: one work item is a row."""

import math

import numpy as np
from numba import prange

from tierd_kernels.arrays import Doubles, Flags, Ints, Singles
from tierd_kernels.bound.cpu import series
from tierd_kernels.bound.statistics import DELTA, SUM
from tierd_kernels.floats import compiled

BISECTIONS = 24
LOG_LEAST = -744.0  # of the least positive float64


@compiled(reassociate=True)
def within(cost_b: Doubles, threshold: float) -> float:
    """Sum of the costs at or below `threshold`."""
    total = 0.0
    for b in range(len(cost_b)):
        total += cost_b[b] if cost_b[b] <= threshold else 0.0
    return total


@compiled(parallel=True)
def skip_blocks(
    statistics_sRb: Singles, factor_Rb: Doubles, rows_i: Ints, head_R: Ints, norm_max_Hb: Doubles, output_norm_i: Doubles,
    allowance_i: Doubles, keep_Rb: Flags
) -> None:  # fmt: skip
    """Clears `keep_Rb` for the cheapest blocks whose terms m_b e^Delta_b (nu_b + ||O||) together stay within `allowance_i`; never
    for the heaviest block. A threshold on the cost is found by bisection, so that equal blocks share one fate."""
    num_blocks = statistics_sRb.shape[2]
    for i in prange(len(rows_i)):
        r = rows_i[i]
        h = head_R[r]
        delta_b, cost_b = statistics_sRb[DELTA, r].astype(np.float64), np.empty(num_blocks)
        psi_b, fall_b = np.empty(num_blocks), np.empty(num_blocks)
        series(delta_b, delta_b, psi_b, fall_b)
        kept = heaviest = 0.0
        best = 0
        for b in range(num_blocks):
            mass = factor_Rb[r, b] * statistics_sRb[SUM, r, b]
            kept += mass
            if mass > heaviest:
                heaviest, best = mass, b
            cost_b[b] = mass * (1.0 + delta_b[b] * (1.0 + delta_b[b] * psi_b[b])) * (norm_max_Hb[h, b] + output_norm_i[i])
        cost_b[best] = math.inf
        limit = allowance_i[i] * kept
        threshold = limit
        if within(cost_b, limit) > limit:
            low, high = LOG_LEAST, math.log(limit)
            threshold = 0.0
            for _ in range(BISECTIONS):
                middle = 0.5 * (low + high)
                if within(cost_b, math.exp(middle)) <= limit:
                    low, threshold = middle, math.exp(middle)
                else:
                    high = middle
        for b in range(num_blocks):
            if cost_b[b] <= threshold and b != best:
                keep_Rb[r, b] = False
