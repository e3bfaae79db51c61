"""The canary: chosen quantised blocks are scored with their original keys too, and the difference is held against Delta."""

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.kvview import read_record
from tierd_kernels.layout import Layout, Memory
from tierd_kernels.numerics import Array
from tierd_kernels.quantise.reference import decode, dequantise_keys


def canary_failures(
    layout: Layout, memory: Memory, blocks: NDArray[np.int64], hot_offsets: NDArray[np.int64], key_locations: NDArray[np.int64],
    q_HRd: Array, scale_HR: Array, visible_R: NDArray[np.int64], allowed_HRb: Array
) -> list[tuple[int, int]]:  # fmt: skip
    """(block, KV head) whose original keys contradict `allowed_HRb`, the bound of their score errors: codes, annotations or
    originals are corrupt. Everything in float64, whose own rounding (2^-40 of the scores) is allowed on top."""
    failures = []
    for b in blocks.tolist():
        for h in range(layout.num_kv_heads):
            start = int(hot_offsets[b]) + h * layout.hot_record_bytes
            record = decode(memory.hot[start : start + layout.hot_record_bytes], layout)
            if record.raw_keys:
                continue
            original = read_record(layout, memory, int(key_locations[b, h]))
            rows = visible_R > b * layout.block_size
            seen = np.arange(layout.block_size) < (visible_R[rows, None] - b * layout.block_size)
            with np.errstate(all="ignore"):
                stored, true = (q_HRd[h, rows] @ k.T * scale_HR[h, rows, None] for k in (dequantise_keys(record), original))
                excess = np.abs(stored - true) - 2.0**-40 * (np.abs(stored) + np.abs(true))
                good = (excess <= allowed_HRb[h, rows, b, None]) | ~seen
            if not np.all(good):
                failures.append((b, h))
    return failures
