"""Score pass in Numba: one work item is a chunk of blocks of one KV head, for all query rows of that head.

Scores of quantised blocks are (q sigma) . code + q . z in FP32, with q divided by a power of two so that it lies in [-1, 1]; scores
of original keys are float64, rounded to FP32. The pass leaves weights relative to the block's own largest score: the value pass
uses the very same numbers, so that no mass is ever computed twice.
"""

import math

import numpy as np
from numba import prange

from tierd_kernels.arrays import Bytes, Doubles, Flags, Ints, Singles
from tierd_kernels.bound.statistics import D_NORM, DELTA, EPSILON, NUM_STATISTICS
from tierd_kernels.floats import compiled, widen
from tierd_kernels.layout import RAW_KEYS, RAW_VALUES
from tierd_kernels.numerics import U32, U64
from tierd_kernels.score.lanes import (
    FACT_TOP_ABS,
    NUM_FACTS,
    NUM_QUERY_SUMS,
    QUERY_OFFSET,
    block_errors,
    block_weights,
    dot_codes,
    round_query,
)
from tierd_kernels.vector import LANES, PREFETCH_BLOCKS, ROW_TILE, copy_line, prefetch, widen_halves, widen_norms

# Norms below this share of the largest are raised to it: their squares stay far from underflow and the bound only grows.
NORM_FLOOR = 2.0**-50
# Products below FP32's smallest normal are off by 2^-150 each, times a code and d channels: |scale| 2^-120 covers them; a scale
# below FP32's smallest normal loses less than 2^-90 of a score.
PRODUCT_FLOOR, SCORE_FLOOR = 2.0**-120, 2.0**-90
# The weight e^x, as a share of itself: r is off by 0.8 u (two fused steps, the low part of ln 2), the series of degree 7 on
# |r| <= 0.35 by 0.1 u, its Horner steps by 2.2 u; measured over 10^6 arguments: 1.3 u.
EXP_ERROR = 5.0 * U32
# Roundings of a score and of s - m, in units of the largest |score|: scale, product, and twice for the difference.
SCORE_ROUNDINGS = 5.0 * U32
# FP32 sums of at most 256 positive terms in 16 lanes, 21 u, and what an error term is computed from them by, 16 u at most.
FACT_SUM = 1.0 + 2.0**-17
STORE = 1.0 + 2.0**-22  # rounding to FP32, from above


@compiled()
def read_originals(arena: Bytes, offset: int, count: int, lay: Ints, narrow: Singles, out: Doubles) -> None:
    """Widens `count` elements at byte `offset` of `arena` into float64 `out`, exactly; `narrow` is float32 working space."""
    widen(arena[offset : offset + count * lay[16]], lay[17], narrow[:count])
    for i in range(count):
        out[i] = narrow[i]


@compiled()
def trailing_norms(values: Doubles, count: int, d: int, unit: float, norms: Singles) -> None:
    """nu_t of `count` original values [count, d], rounded up."""
    for t in range(count):
        n2 = 0.0
        for c in range(d):
            v = values[t * d + c] / unit
            n2 += v * v
        norms[t] = max(math.sqrt(n2) * STORE, NORM_FLOOR)


@compiled()
def exact_scores(q_Rd: Doubles, r: int, scale: float, keys: Doubles, count: int, d: int, scores: Singles, at: int) -> float:
    """Scores of original keys (float64 `keys`, [count, d]) rounded to FP32, from `at` on; returns a bound on their float64 error."""
    q2 = k2_max = 0.0
    for c in range(d):
        q2 += q_Rd[r, c] * q_Rd[r, c]
    for t in range(count):
        s = k2 = 0.0
        for c in range(d):
            k = keys[t * d + c]
            s += q_Rd[r, c] * k
            k2 += k * k
        scores[at + t] = s * scale
        k2_max = max(k2_max, k2)
    return float(abs(scale) * (2.0 * d + 16.0) * U64 * math.sqrt(q2) * math.sqrt(k2_max))


@compiled(parallel=True)
def score(
    lay: Ints, memory_hot: Bytes, memory_scratch: Bytes, memory_originals: Bytes, q_HRd: Doubles, scale_HR: Doubles,
    visible_R: Ints, unit_H: Doubles, hot_offsets: Ints, original_offsets: Ints, key_locations: Ints,
    key_exact_HRb: Flags, todo_HRb: Flags, chunk: int, weights_HRt: Singles, statistics_sHRb: Singles
) -> None:  # fmt: skip
    """Weights and statistics of the rows and blocks marked in `todo_HRb`, and of the rows that share a tile with these.

    q_HRd float64 [Hkv, R, d] within [-1, 1], R a multiple of ROW_TILE, scale_HR its scale, visible_R the tokens that row r sees,
    unit_H the norm unit of each KV head, a power of two. `key_exact_HRb` marks rows and blocks to be scored with original keys;
    blocks flagged raw and the trailing one always are. Writes weights_HRt float32 [Hkv, R, tokens], e^{s - m} with m the block's
    largest score, and statistics_sHRb float32. Blocks that a row does not see keep a sum of zero.
    """
    heads, rows, d = q_HRd.shape
    B = lay[2]
    num_blocks, full = len(original_offsets), len(hot_offsets)
    chunks = (num_blocks + chunk - 1) // chunk
    stride = num_blocks * B
    root = math.sqrt(np.float64(B))
    # Of the code part: q, q sigma, its integer (two), step, conversion, product, sum: eight. Of q . z: d / 16 + 4 sums, q, sum.
    roundings = (d / 16.0 + 10.0) * U32
    gamma_q = roundings / (1.0 - roundings)
    weights, statistics, plane = weights_HRt.reshape(-1), statistics_sHRb.reshape(-1), heads * rows * num_blocks
    floor = np.full(1, NORM_FLOOR, np.float32)
    constants = np.array([gamma_q, PRODUCT_FLOOR, SCORE_FLOOR + EXP_ERROR, SCORE_ROUNDINGS, root, FACT_SUM], np.float32)
    for item in prange(heads * chunks):
        h = item // chunks
        keys = np.empty(B * d, np.float64)
        narrow = np.empty(B * d, np.float32)
        norms = np.empty(B, np.float32)
        errors = np.empty(B, np.float32)
        notes = np.empty(LANES, np.float32)
        bits = notes.view(np.uint32)
        sigma = np.empty(d, np.float32)
        offset = np.empty(d, np.float32)
        q = q_HRd[h].astype(np.float32).reshape(-1)
        q_norms = np.empty(rows, np.float32)
        for r in range(rows):
            q_norms[r] = math.sqrt(np.sum(q_HRd[h, r] * q_HRd[h, r])) * FACT_SUM
        wide = np.empty(ROW_TILE * d, np.float32)
        qs = np.empty(ROW_TILE * d, np.int16)
        sums = np.zeros(NUM_QUERY_SUMS, np.float32)
        dots = np.zeros(ROW_TILE * B, np.float32)
        scales = np.empty(ROW_TILE, np.float32)
        offsets = np.empty(ROW_TILE, np.float32)
        counts = np.empty(ROW_TILE, np.int64)
        epsilons = np.empty(ROW_TILE, np.float64)
        facts = np.empty(NUM_FACTS, np.float32)
        # 1 / unit in two halves, for it may lie outside of FP32's range where the unit does not.
        exponent = math.frexp(unit_H[h])[1] - 1
        halves = np.array([math.ldexp(1.0, -(exponent // 2)), math.ldexp(1.0, -(exponent - exponent // 2))], np.float32)
        first = (item % chunks) * chunk
        for b in range(first, min(first + chunk, num_blocks)):
            wanted = exact_wanted = False
            for r in range(rows):
                wanted = wanted or todo_HRb[h, r, b]
                exact_wanted = exact_wanted or key_exact_HRb[h, r, b]
            if not wanted:
                continue
            record = int(hot_offsets[b] + h * lay[5]) if b < full else 0
            later = record
            if b + PREFETCH_BLOCKS < full:
                later = int(hot_offsets[b + PREFETCH_BLOCKS] + h * lay[5])
                prefetch(memory_hot, later + lay[8], lay[10] - lay[8])
            raw = True
            if b < full:
                copy_line(memory_hot, record + lay[14], notes)
                raw = (bits[8] & RAW_KEYS) != 0
                widen_norms(memory_hot, record + lay[13], B, halves, floor, norms)
                widen_norms(memory_hot, record + lay[12], B, halves, floor, errors)
                if bits[8] & RAW_VALUES:
                    errors[:] = 0.0
            if not raw:
                widen_halves(memory_hot, record + lay[8], d, sigma)
                widen_halves(memory_hot, record + lay[9], d, offset)
            if raw or exact_wanted:
                where = original_offsets[b] + h * lay[6]
                if b >= full:
                    stored = min(B, visible_R[rows - 1] - b * B)
                    read_originals(memory_originals, where + heads * lay[6], stored * d, lay, narrow, keys)
                    norms[:] = 0.0
                    errors[:] = 0.0
                    trailing_norms(keys, stored, d, unit_H[h], norms)
                    read_originals(memory_originals, where, stored * d, lay, narrow, keys)
                elif key_locations[b, h] >= 0:
                    read_originals(memory_scratch, key_locations[b, h], B * d, lay, narrow, keys)
                else:
                    read_originals(memory_originals, ~key_locations[b, h], B * d, lay, narrow, keys)
            for start in range(0, rows, ROW_TILE):
                coded = wanted = False
                for i in range(ROW_TILE):
                    r = start + i
                    wanted = wanted or todo_HRb[h, r, b]
                    coded = coded or not (raw or key_exact_HRb[h, r, b])
                    counts[i] = visible_R[r] - b * B
                if not wanted:
                    continue
                if coded:
                    round_query(q, start * d, d, sigma, offset, wide, qs, sums)
                    for i in range(ROW_TILE):
                        scales[i] = scale_HR[h, start + i]
                        offsets[i] = sums[QUERY_OFFSET + i]
                    for tile in range(0, B, 16):
                        dot_codes(memory_hot, record + tile * d, later + tile * d, qs, d, sums, dots, tile, B)
                if raw or exact_wanted:
                    for i in range(ROW_TILE):
                        if counts[i] > 0 and (raw or key_exact_HRb[h, start + i, b]):
                            scales[i], offsets[i] = 1.0, 0.0
                            epsilons[i] = exact_scores(q_HRd[h], start + i, scale_HR[h, start + i], keys, min(B, counts[i]), d, dots, i * B)
                at = (h * rows + start) * stride + b * B
                block_weights(dots, B, scales, offsets, counts, norms, errors, weights, at, stride, facts)
                if coded:
                    block_errors(sums, notes, scales, q_norms, start, constants, facts)
                if raw or exact_wanted:
                    for i in range(ROW_TILE):
                        if raw or key_exact_HRb[h, start + i, b]:
                            eps = (epsilons[i] + SCORE_ROUNDINGS * facts[FACT_TOP_ABS + i] + SCORE_FLOOR + EXP_ERROR) * FACT_SUM
                            facts[DELTA * ROW_TILE + i] = facts[EPSILON * ROW_TILE + i] = eps
                            facts[D_NORM * ROW_TILE + i] = root * FACT_SUM * eps
                for i in range(ROW_TILE):
                    if counts[i] > 0:
                        to = (h * rows + start + i) * num_blocks + b
                        for k in range(NUM_STATISTICS):
                            statistics[k * plane + to] = facts[k * ROW_TILE + i]
