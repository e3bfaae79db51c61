"""Rungs 3 and 4 in Numba: float64 over the originals, so that an exact head's bound is float64's rounding and the output's own."""

import math

import numpy as np
from numba import prange

from tierd_kernels.arrays import Bytes, Doubles, Ints
from tierd_kernels.floats import compiled
from tierd_kernels.numerics import U64
from tierd_kernels.score.cpu import read_originals


@compiled(parallel=True)
def dense(
    lay: Ints, memory_originals: Bytes, heads_i: Ints, rows_i: Ints, q_HRd: Doubles, scale_HR: Doubles,
    visible_R: Ints, unit_H: Doubles, original_offsets: Ints, out_id: Doubles, facts_i4: Doubles
) -> None:  # fmt: skip
    """Computes item i = (KV head heads_i, row rows_i): out_id float64 [items, d] and facts_i4 float64 [items, 4].

    The facts: largest |score|, sum rho_t ||V_t|| in units of the head, largest ||V_t|| likewise, and eps, the error of a score
    (and weight), so that the caller can state the bound. Two passes per item, scores in float64.
    """
    heads, _, d = q_HRd.shape
    B = lay[2]
    for i in prange(len(heads_i)):
        h, r = heads_i[i], rows_i[i]
        n = visible_R[r]
        block = np.empty(B * d, np.float64)
        narrow = np.empty(B * d, np.float32)
        scores = np.empty(n, np.float64)
        acc = np.zeros(d, np.float64)
        q2 = k2_max = top_abs = 0.0
        top = -math.inf
        for c in range(d):
            q2 += q_HRd[h, r, c] * q_HRd[h, r, c]
        for b in range((n + B - 1) // B):
            count = min(B, n - b * B)
            read_originals(memory_originals, original_offsets[b] + h * lay[6], count * d, lay, narrow, block)
            for t in range(count):
                s = k2 = 0.0
                for c in range(d):
                    k = block[t * d + c]
                    s += q_HRd[h, r, c] * k
                    k2 += k * k
                s *= scale_HR[h, r]
                scores[b * B + t] = s
                top = max(top, s)
                top_abs = max(top_abs, abs(s))
                k2_max = max(k2_max, k2)
        z = norm = norm_max = 0.0
        for b in range((n + B - 1) // B):
            count = min(B, n - b * B)
            read_originals(memory_originals, original_offsets[b] + (heads + h) * lay[6], count * d, lay, narrow, block)
            for t in range(count):
                w = math.exp(scores[b * B + t] - top)
                z += w
                v2 = 0.0
                for c in range(d):
                    v = block[t * d + c] / unit_H[h]
                    v2 += v * v
                    acc[c] += w * v
                norm += w * math.sqrt(v2)
                norm_max = max(norm_max, math.sqrt(v2))
        for c in range(d):
            out_id[i, c] = acc[c] / z
        facts_i4[i, 0] = top_abs
        facts_i4[i, 1] = norm / z
        facts_i4[i, 2] = norm_max
        size = abs(scale_HR[h, r]) * math.sqrt(q2) * math.sqrt(k2_max)
        # d products and sums, the scale, the difference from the maximum, and exp's own ulp, doubled.
        facts_i4[i, 3] = 2.0 * U64 * ((d + 8.0) * size + 2.0 * top_abs + 8.0)
