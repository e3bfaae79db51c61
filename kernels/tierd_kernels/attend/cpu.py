"""Value pass in Numba: one work item is a group of 1024 tokens of one KV head, for all its rows.

Inside a block FP32 sums in token order; blocks and groups are added in float64, so the depth of FP32 sums is the block size.
"""

import math

import numpy as np
from numba import prange

from tierd_kernels.arrays import Bytes, Doubles, Flags, Ints, Singles
from tierd_kernels.bound.reference import GROUP_TOKENS
from tierd_kernels.floats import compiled, widen_f16
from tierd_kernels.layout import RAW_VALUES
from tierd_kernels.score.cpu import read_originals


@compiled()
def read_values(lay: Ints, hot: Bytes, record: int, scales: Singles, offsets: Singles, out: Singles) -> None:
    """Dequantises one record's values into FP32 `out` [B, d]: code * scale is exact in FP32, the offset costs one rounding."""
    d, B, g, groups = lay[1], lay[2], lay[3], lay[4]
    half = d // 2
    codes = hot[record + lay[7] : record + lay[7] + B * half]
    widen_f16(hot[record + lay[10] : record + lay[10] + 2 * B * groups].view(np.uint16), scales)
    widen_f16(hot[record + lay[11] : record + lay[11] + 2 * B * groups].view(np.uint16), offsets)
    for t in range(B):
        for group in range(groups):
            s = scales[t * groups + group]
            z = offsets[t * groups + group]
            for c in range(group * g, min((group + 1) * g, d)):
                code = codes[t * half + c] & 15 if c < half else codes[t * half + c - half] >> 4
                out[t * d + c] = np.float32(code) * s + z


@compiled(parallel=True)
def attend(
    lay: Ints, memory_hot: Bytes, memory_scratch: Bytes, memory_originals: Bytes, visible_R: Ints, hot_offsets: Ints,
    original_offsets: Ints, value_locations: Ints, keep_HRb: Flags, value_exact_HRb: Flags, rows_H: Bytes,
    scores_HRt: Singles, top_HR: Doubles, partial_HRGd: Doubles, mass_HRG: Doubles
) -> None:  # fmt: skip
    """Adds weight * value over kept blocks: partial_HRGd float64 [Hkv, R, groups, d] and the weights' sums mass_HRG.

    The weight of a token is e^{s - top} rounded to FP32. `rows_H` uint8 [Hkv, R] marks the rows to compute, `value_exact_HRb` the
    blocks whose values are read in original precision for that row.
    """
    heads, rows, groups, d = partial_HRGd.shape
    B = lay[2]
    num_blocks, full = len(original_offsets), len(hot_offsets)
    per_group = GROUP_TOKENS // B
    for item in prange(heads * groups):
        h, group = item // groups, item % groups
        wide = np.empty(B * d, np.float64)
        narrow = np.empty(B * d, np.float32)
        scales = np.empty(B * lay[4], np.float32)
        offsets = np.empty(B * lay[4], np.float32)
        exact = np.empty(B * d, np.float32)
        coded = np.empty(B * d, np.float32)
        acc = np.empty(d, np.float32)
        for r in range(rows):
            if rows_H[h, r]:
                partial_HRGd[h, r, group, :] = 0.0
                mass_HRG[h, r, group] = 0.0
        for b in range(group * per_group, min((group + 1) * per_group, num_blocks)):
            stored = min(B, visible_R[rows - 1] - b * B)
            raw = b >= full
            record = 0
            if b < full:
                record = int(hot_offsets[b] + h * lay[5])
                raw = (memory_hot[record + lay[15] : record + lay[15] + 4].view(np.uint32)[0] & RAW_VALUES) != 0
            have_exact = have_coded = False
            for r in range(rows):
                count = min(B, visible_R[r] - b * B)
                if count <= 0 or not (rows_H[h, r] and keep_HRb[h, r, b]):
                    continue
                use_exact = raw or value_exact_HRb[h, r, b]
                if use_exact and not have_exact:
                    if b >= full:
                        read_originals(memory_originals, original_offsets[b] + (heads + h) * lay[6], stored * d, lay, narrow, wide)
                    elif value_locations[b, h] >= 0:
                        read_originals(memory_scratch, value_locations[b, h], B * d, lay, narrow, wide)
                    else:
                        read_originals(memory_originals, ~value_locations[b, h], B * d, lay, narrow, wide)
                    for i in range(stored * d):
                        exact[i] = wide[i]
                    have_exact = True
                if not use_exact and not have_coded:
                    read_values(lay, memory_hot, record, scales, offsets, coded)
                    have_coded = True
                values = exact if use_exact else coded
                acc[:] = np.float32(0.0)
                mass = np.float64(0.0)
                for t in range(count):
                    w = np.float32(math.exp(np.float64(scores_HRt[h, r, b * B + t]) - top_HR[h, r]))
                    mass += w
                    for c in range(d):
                        acc[c] += w * values[t * d + c]
                for c in range(d):
                    partial_HRGd[h, r, group, c] += acc[c]
                mass_HRG[h, r, group] += mass
