"""Value pass in Numba: one work item is a group of 1024 tokens of one KV head, for all its rows.

Inside a block FP32 sums in token order; blocks and groups are added in float64, so the depth of FP32 sums is the block size.
"""

import numpy as np
from numba import prange

from tierd_kernels.arrays import Bytes, Doubles, Flags, Ints, Singles
from tierd_kernels.attend.lanes import weigh_codes, weigh_values
from tierd_kernels.bound.reference import GROUP_TOKENS
from tierd_kernels.floats import compiled, widen
from tierd_kernels.vector import LANES, PREFETCH_BLOCKS, ROW_TILE, prefetch, widen_halves


@compiled()
def read_values(lay: Ints, hot: Bytes, record: int, scales: Singles, offsets: Singles, out: Singles) -> None:
    """Dequantises one record's values into FP32 `out` [B, d], for head dimensions whose halves are not whole registers: code * scale
    is exact in FP32, the offset costs one rounding."""
    d, B, g = lay[1], lay[2], lay[3]
    half = d // 2
    codes = hot[record + lay[7] : record + lay[7] + B * half]
    for t in range(B):
        for c in range(d):
            code = codes[t * half + c] & 15 if c < half else codes[t * half + c - half] >> 4
            group = c // g * B + t
            out[t * d + c] = np.float32(code) * scales[group] + offsets[group]


@compiled(parallel=True)
def attend(
    lay: Ints, memory_hot: Bytes, memory_scratch: Bytes, memory_originals: Bytes, visible_R: Ints, hot_offsets: Ints,
    original_offsets: Ints, value_locations: Ints, raw_Hb: Flags, value_exact_HRb: Flags, keep_HRb: Flags, factor_HRb: Doubles,
    weights_HRt: Singles, partial_HRGd: Doubles
) -> None:  # fmt: skip
    """Sums of factor * weight * value per group of 1024 tokens: partial_HRGd float64 [Hkv, R, groups, d], R a multiple of ROW_TILE.

    `factor_HRb` float64 carries a block's weights to the row's scale; a block that no row keeps is not read, and a row that keeps none
    gets zeros.
    `raw_Hb` marks full blocks whose values were never quantised (the flags themselves lie in a cache line of their own, which cost a
    fifth of the pass), `value_exact_HRb` the blocks whose values are read in original precision for that row.
    """
    heads, rows, groups, d = partial_HRGd.shape
    B = lay[2]
    num_blocks, full = len(original_offsets), len(hot_offsets)
    per_group = GROUP_TOKENS // B
    stride = num_blocks * B
    whole = d // 2 % LANES == 0
    weights, partial = weights_HRt.reshape(-1), partial_HRGd.reshape(-1)
    for item in prange(heads * groups):
        h, group = item // groups, item % groups
        scales = np.empty(B * lay[4], np.float32)
        offsets = np.empty(B * lay[4], np.float32)
        exact = np.empty(B * d, np.float32)
        coded = np.empty(0 if whole else B * d, np.float32)
        scaled = np.empty(ROW_TILE * lay[4] * B, np.float32)
        sums = np.empty(lay[4] * LANES, np.float32)
        factors = np.empty(ROW_TILE, np.float64)
        first, last = group * per_group, min((group + 1) * per_group, num_blocks)
        needed = np.zeros(per_group + PREFETCH_BLOCKS, np.bool_)
        for r in range(rows):
            partial_HRGd[h, r, group, :] = 0.0
            for b in range(first, last):
                needed[b - first] |= keep_HRb[h, r, b]
        for b in range(first, last):
            if needed[b - first + PREFETCH_BLOCKS] and b + PREFETCH_BLOCKS < full:
                later = hot_offsets[b + PREFETCH_BLOCKS] + h * lay[5]
                prefetch(memory_hot, later + lay[10], lay[5] - lay[10])
            if not needed[b - first]:
                continue
            raw = b >= full or raw_Hb[h, b]
            record = int(hot_offsets[b] + h * lay[5]) if b < full else 0
            have_exact = have_coded = False
            for start in range(0, rows, ROW_TILE):
                any_exact = any_coded = False
                for r in range(start, start + ROW_TILE):
                    if keep_HRb[h, r, b]:
                        if raw or value_exact_HRb[h, r, b]:
                            any_exact = True
                        else:
                            any_coded = True
                if any_exact and not have_exact:
                    have_exact = True
                    count = min(B, visible_R[rows - 1] - b * B) * d
                    where = int(original_offsets[b] + (heads + h) * lay[6])
                    arena = memory_originals
                    if b < full:
                        where = int(value_locations[b, h])
                        if where >= 0:
                            arena = memory_scratch
                        else:
                            where = ~where
                    exact[count:] = 0.0
                    widen(arena[where : where + count * lay[16]], lay[17], exact[:count])
                if any_coded and not have_coded:
                    have_coded = True
                    widen_halves(memory_hot, record + lay[10], B * lay[4], scales)
                    widen_halves(memory_hot, record + lay[11], B * lay[4], offsets)
                    if not whole:
                        read_values(lay, memory_hot, record, scales, offsets, coded)
                at = (h * rows + start) * stride + b * B
                out_at = ((h * rows + start) * groups + group) * d
                for use_exact in (False, True):
                    if any_exact if use_exact else any_coded:
                        for i in range(ROW_TILE):
                            own = (raw or value_exact_HRb[h, start + i, b]) == use_exact
                            factors[i] = factor_HRb[h, start + i, b] if own and keep_HRb[h, start + i, b] else 0.0
                        if whole and not use_exact:
                            weigh_codes(
                                memory_hot, record + lay[7], B, d // 2, lay[3], scales, offsets, weights, at, stride, factors, scaled, sums,
                                partial, out_at, groups * d
                            )  # fmt: skip
                        else:
                            values = exact if use_exact else coded
                            weigh_values(values, B, d, weights, at, stride, factors, partial, out_at, groups * d)


@compiled(parallel=True)
def means(partial_RGd: Doubles, rows_i: Ints, divisor_i: Doubles, out_id: Doubles) -> None:
    """The rows' outputs: sums of their groups' partial sums, over the divisor."""
    for i in prange(len(rows_i)):
        out_id[i] = 0.0
        for group in range(partial_RGd.shape[1]):
            out_id[i] += partial_RGd[rows_i[i], group]
        out_id[i] /= divisor_i[i]


@compiled(parallel=True, reassociate=True)
def group_dots(partial_RGd: Doubles, rows_i: Ints, divisor_i: Doubles, output_id: Doubles, dot_RG: Doubles) -> None:
    """o_G . O of the rows `rows_i` into dot_RG."""
    for i in prange(len(rows_i)):
        for group in range(partial_RGd.shape[1]):
            dot = 0.0
            for c in range(output_id.shape[1]):
                dot += partial_RGd[rows_i[i], group, c] * output_id[i, c]
            dot_RG[rows_i[i], group] = dot / divisor_i[i]
