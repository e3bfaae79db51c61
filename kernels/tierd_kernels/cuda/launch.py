"""Compiling and launching the CUDA kernels. Needs CuPy and a device of compute capability 9.0 or more.

Rung 0 so far: quantise; score, value and finish, three launches without a host synchronisation between them. What they do not do
yet, selection, promotion and exact heads, is the CPU backend's alone.
"""

from functools import cache
from typing import Any

import cupy as cp
import numpy as np

from tierd_kernels.cuda.record import Record
from tierd_kernels.cuda.sources import FINISH_THREADS, LANES, PARTIALS, QUANTISE_THREADS, WARPS, shared_bytes, source
from tierd_kernels.layout import Layout

SPLIT_TOKENS_MAX, RESIDENT = 2048, 4  # splits larger than that chain too many MMAs; thread blocks of a pass on one multiprocessor
FIELDS = ("bound", "budget", "key_error", "value_error", "arith_error", "value_norm", "output_norm", "candidate_bound")
# `Call` of common.cuh: addresses on the device, or of pinned memory.
CALL = np.dtype(
    [(name, np.uint64) for name in ("pool", "scratch", "originals", "q", "output", "hot", "original", "key_at", "value_at")]
    + [(name, np.uint64) for name in ("unit", "group_values", "group_errors", "weights", "statistics", "partials", "sums", "fields")]
    + [(name, np.int32) for name in ("n", "tokens", "full", "splits", "per", "relative_to_output")]
    + [(name, np.float32) for name in ("scale", "rtol", "atol", "pad")]
)


@cache
def kernel(layout: Layout, name: str) -> Any:
    """The compiled kernel."""
    text, options = source(layout, name)
    function = cp.RawModule(code=text, options=options, backend="nvrtc").get_function(name)
    function.max_dynamic_shared_size_bytes = shared_bytes(layout, name)
    return function


class Kernels:
    """The kernels of one layout. All launches are asynchronous, on `stream`."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.record = layout, Record(layout)

    def quantise(self, originals: int, hot: int, original_at: Any, hot_at: Any, norms: Any, stream: Any) -> None:
        """Writes the hot records of n full blocks; offsets int64 [n] on the device; norms float32 [n, Hkv], max ||V_t||."""
        args = (np.uint64(originals), np.uint64(hot), original_at, hot_at, norms, np.int32(self.layout.num_kv_heads))
        self._launch("quantise", (len(hot_at), self.layout.num_kv_heads), QUANTISE_THREADS, args, stream)

    def split_blocks(self, full: int, tiles: int, processors: int) -> int:
        """Blocks of a split: the fewest, a power of two times the warps, with which all splits are resident at once (131,072 tokens:
        113 us in one wave, 121 in two)."""
        per = WARPS
        while per * self.layout.block_size < SPLIT_TOKENS_MAX and -(-full // per) * tiles > RESIDENT * processors:
            per *= 2
        return per

    def attend(self, calls: Any, count: int, grid: tuple[int, int, int], group: int, stream: Any) -> None:
        """Score, value and finish over `count` calls (device array of CALL); grid: most splits + 1, most tiles of rows, most rows."""
        splits, tiles, rows = grid
        args = (calls, np.int32(self.layout.num_kv_heads), np.int32(group))
        self._launch("score", (tiles, splits, count), WARPS * LANES, args, stream)
        self._launch("value", (tiles, splits, count), WARPS * LANES, args, stream)
        self._launch("finish", (rows, self.layout.num_kv_heads, count), FINISH_THREADS, args, stream, 4 * splits * PARTIALS)

    def _launch(
        self, name: str, grid: tuple[int, ...], threads: int, args: tuple[Any, ...], stream: Any, shared: int | None = None
    ) -> None:
        size = shared_bytes(self.layout, name) if shared is None else shared
        kernel(self.layout, name)(grid, (threads,), args, shared_mem=size, stream=stream)
