"""Score pass in Numba: one work item is a chunk of blocks of one KV head, for all query rows of that head.

Scores of quantised blocks are (q sigma) . code + q . z in FP32, summed over channels in order, with q divided by a power of two
so that it lies in [-1, 1]; scores of original keys are float64. Statistics are float64 over FP32 scores.
"""

import math

import numpy as np
from numba import prange

from tierd_kernels.arrays import Bytes, Doubles, Flags, Ints, Singles
from tierd_kernels.bound.reference import (
    D_NORM,
    DELTA,
    EPSILON,
    MAX_SCORE,
    SUM,
    SUM_ERROR,
    SUM_NORM,
    SUM_SQUARE_ERROR,
    SUM_SQUARE_USED,
    SUM_SQUARES,
    SUM_SQUARES_NORM,
)
from tierd_kernels.floats import compiled, widen, widen_bf16, widen_f16
from tierd_kernels.layout import RAW_KEYS, RAW_VALUES, RK, SK, H
from tierd_kernels.numerics import U32, U64, gamma

# Norms below this share of the largest are raised to it: their squares stay far from underflow and the bound only grows.
NORM_FLOOR = 2.0**-50
# Products that underflow FP32 together stay below this, with q in [-1, 1] and FP16 scales: 128 * 256 * 2^-126 is 4e-34.
SCORE_FLOOR = 1e-30
# The weight is e^{s - m} in float64, rounded to FP32: 2 u covers it.
EPS_WEIGHT = 2.0 * U32


@compiled()
def read_originals(arena: Bytes, offset: int, count: int, lay: Ints, narrow: Singles, out: Doubles) -> None:
    """Widens `count` elements at byte `offset` of `arena` into float64 `out`, exactly; `narrow` is float32 working space."""
    widen(arena[offset : offset + count * lay[16]], lay[17], narrow[:count])
    for i in range(count):
        out[i] = narrow[i]


@compiled()
def block_statistics(
    scores: Singles, count: int, norms: Doubles, errors: Doubles, delta: float, dnorm: float, eps: float,
    out: Doubles
) -> None:  # fmt: skip
    """Fills one row and block's statistics from `count` visible scores; see `bound.reference` for the indices."""
    top = scores[0]
    for t in range(1, count):
        top = max(top, scores[t])
    z = z2 = p = p2 = e1 = used2 = e2 = 0.0
    for t in range(count):
        w = math.exp(np.float64(scores[t]) - top)
        nu, eta = norms[t], errors[t]
        z += w
        z2 += w * w
        p += w * nu
        p2 += w * w * nu * nu
        e1 += w * eta
        e2 += w * eta * eta
        used2 += w * (nu + eta) * (nu + eta)
    out[MAX_SCORE] = top
    out[SUM] = z
    out[SUM_SQUARES] = z2
    out[SUM_NORM] = p
    out[SUM_SQUARES_NORM] = p2
    out[SUM_ERROR] = e1
    out[SUM_SQUARE_ERROR] = e2
    out[SUM_SQUARE_USED] = used2
    out[DELTA] = delta
    out[D_NORM] = dnorm
    out[EPSILON] = eps


@compiled()
def read_value_norms(lay: Ints, hot: Bytes, record: int, unit: float, narrow: Singles, norms: Doubles, errors: Doubles) -> None:
    """nu_t and eta_t of a quantised block in units of `unit`, raised to the floor."""
    B = lay[2]
    eta = hot[record + lay[12] : record + lay[12] + 2 * B].view(np.uint16)
    nu = hot[record + lay[13] : record + lay[13] + 2 * B].view(np.uint16)
    raw = (hot[record + lay[15] : record + lay[15] + 4].view(np.uint32)[0] & RAW_VALUES) != 0
    widen_bf16(nu, narrow[:B])
    for t in range(B):
        norms[t] = max(np.float64(narrow[t]) / unit, NORM_FLOOR)
    widen_bf16(eta, narrow[:B])
    for t in range(B):
        errors[t] = 0.0 if raw else max(np.float64(narrow[t]) / unit, NORM_FLOOR)


@compiled()
def exact_scores(q_Rd: Doubles, r: int, scale: float, keys: Doubles, count: int, d: int, scores: Singles) -> float:
    """Scores of original keys (float64 `keys`, [count, d]) rounded to FP32; returns a bound on their error."""
    q2 = k2_max = top = 0.0
    for c in range(d):
        q2 += q_Rd[r, c] * q_Rd[r, c]
    for t in range(count):
        s = k2 = 0.0
        for c in range(d):
            k = keys[t * d + c]
            s += q_Rd[r, c] * k
            k2 += k * k
        s *= scale
        scores[t] = s
        k2_max = max(k2_max, k2)
        top = max(top, abs(s))
    return abs(scale) * gamma_64(d) * math.sqrt(q2) * math.sqrt(k2_max) + 2.0 * U32 * top + SCORE_FLOOR


@compiled()
def gamma_64(d: int) -> float:
    return (2.0 * d + 16.0) * U64


@compiled()
def quantised_scores(
    lay: Ints, hot: Bytes, record: int, q_Rd: Doubles, r: int, scale: float, count: int, gamma_d: float,
    sigma: Singles, offset: Singles, qs: Singles, scores: Singles
) -> tuple[float, float, float]:  # fmt: skip
    """Scores of one row over a quantised block. Returns (Delta, D, eps) of CERTIFICATE.md, section "Score error"."""
    d, B = lay[1], lay[2]
    codes = hot[record : record + B * d].view(np.int8)
    notes = hot[record + lay[14] : record + lay[14] + 32].view(np.float32)
    l1 = l2 = qz_abs = 0.0
    qz = np.float32(0.0)
    for c in range(d):
        q = np.float32(q_Rd[r, c])
        a = q * sigma[c]
        b = q * offset[c]
        qs[c] = a
        l1 += abs(np.float64(a))
        l2 += np.float64(a) * np.float64(a)
        qz += b
        qz_abs += abs(np.float64(b))
    top = 0.0
    acc = np.empty(16, np.float32)
    for tile in range((count + 15) // 16):
        for t in range(16):
            acc[t] = np.float32(0.0)
        base = tile * 16 * d
        for c in range(d):
            a = qs[c]
            for t in range(16):
                acc[t] += a * np.float32(codes[base + c * 16 + t])
        for t in range(min(16, count - tile * 16)):
            s = scale * np.float64(acc[t] + qz)
            scores[tile * 16 + t] = s
            top = max(top, abs(s))
    l1 *= 1.0 + 2.0**-20
    l2 = math.sqrt(l2) * (1.0 + 2.0**-20)
    size = abs(scale)
    eps = size * gamma_d * (128.0 * l1 + qz_abs) + 2.0 * U32 * top + SCORE_FLOOR + EPS_WEIGHT
    delta = size * min(notes[H] * l1, notes[RK] * l2) + eps
    return delta, size * notes[SK] * l2 + math.sqrt(np.float64(B)) * eps, eps


@compiled(parallel=True)
def score(
    lay: Ints, memory_hot: Bytes, memory_scratch: Bytes, memory_originals: Bytes, q_HRd: Doubles, scale_HR: Doubles,
    visible_R: Ints, unit_H: Doubles, hot_offsets: Ints, original_offsets: Ints, key_locations: Ints,
    key_exact_HRb: Flags, todo_HRb: Flags, gamma_d: float, chunk: int, scores_HRt: Singles, statistics_HRbs: Doubles
) -> None:  # fmt: skip
    """Scores and statistics of the rows and blocks marked in `todo_HRb`.

    q_HRd float64 [Hkv, R, d] within [-1, 1], scale_HR its scale, visible_R the tokens that row r sees, unit_H the norm unit of each KV
    head. `key_exact_HRb` marks rows and blocks to be scored with original keys; blocks flagged raw and the trailing one always are.
    Writes scores_HRt float32 [Hkv, R, tokens] and statistics_HRbs float64. Invisible blocks keep a sum of zero.
    """
    heads, rows, d = q_HRd.shape
    B = lay[2]
    num_blocks, full = len(original_offsets), len(hot_offsets)
    chunks = (num_blocks + chunk - 1) // chunk
    for item in prange(heads * chunks):
        h = item // chunks
        keys = np.empty(B * d, np.float64)
        values = np.empty(B * d, np.float64)
        norms = np.empty(B, np.float64)
        errors = np.empty(B, np.float64)
        qs = np.empty(d, np.float32)
        sigma = np.empty(d, np.float32)
        offset = np.empty(d, np.float32)
        narrow = np.empty(B * d, np.float32)
        first = (item % chunks) * chunk
        for b in range(first, min(first + chunk, num_blocks)):
            stored = min(B, visible_R[rows - 1] - b * B)
            raw = b >= full
            needed = raw
            record = 0
            if b < full:
                record = int(hot_offsets[b] + h * lay[5])
                raw = (memory_hot[record + lay[15] : record + lay[15] + 4].view(np.uint32)[0] & RAW_KEYS) != 0
                needed = raw
                read_value_norms(lay, memory_hot, record, unit_H[h], narrow, norms, errors)
                widen_f16(memory_hot[record + lay[8] : record + lay[8] + 2 * d].view(np.uint16), sigma)
                widen_f16(memory_hot[record + lay[9] : record + lay[9] + 2 * d].view(np.uint16), offset)
                for r in range(rows):
                    needed = needed or (todo_HRb[h, r, b] and key_exact_HRb[h, r, b])
            if needed:
                where = original_offsets[b] + h * lay[6]
                if b >= full:
                    read_originals(memory_originals, where, stored * d, lay, narrow, keys)
                    read_originals(memory_originals, where + heads * lay[6], stored * d, lay, narrow, values)
                    for t in range(stored):
                        n2 = 0.0
                        for c in range(d):
                            v = values[t * d + c] / unit_H[h]
                            n2 += v * v
                        norms[t] = max(math.sqrt(n2) * (1.0 + 2.0**-40), NORM_FLOOR)
                        errors[t] = 0.0
                elif key_locations[b, h] >= 0:
                    read_originals(memory_scratch, key_locations[b, h], B * d, lay, narrow, keys)
                else:
                    read_originals(memory_originals, ~key_locations[b, h], B * d, lay, narrow, keys)
            for r in range(rows):
                if not todo_HRb[h, r, b]:
                    continue
                count = min(B, visible_R[r] - b * B)
                if count <= 0:
                    continue
                out = scores_HRt[h, r, b * B : b * B + count]
                if raw or key_exact_HRb[h, r, b]:
                    eps = exact_scores(q_HRd[h], r, scale_HR[h, r], keys, count, d, out) + EPS_WEIGHT
                    delta, dnorm = eps, math.sqrt(np.float64(B)) * eps
                else:
                    delta, dnorm, eps = quantised_scores(
                        lay, memory_hot, record, q_HRd[h], r, scale_HR[h, r], count, gamma_d, sigma, offset, qs, out
                    )
                block_statistics(out, count, norms, errors, delta, dnorm, eps, statistics_HRbs[h, r, b])


def score_gamma(head_dim: int) -> float:
    """gamma_{d+6}: d products and sums, the rounding of q, of q sigma, of the offset's product, its sum, and of the total."""
    return gamma(2 * head_dim + 8)


