"""Compiling and launching the CUDA kernels. Needs CuPy and a device of compute capability 9.0 or more."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import cupy as cp
import numpy as np

from tierd_kernels.cuda.record import Record
from tierd_kernels.cuda.sources import (
    FINISH_THREADS,
    LANES,
    PARTIALS,
    PARTS,
    QUANTISE_THREADS,
    SELECT_THREADS,
    SPLIT_TOKENS_MAX,
    WARPS,
    shared_bytes,
    source,
)
from tierd_kernels.layout import Layout

log = logging.getLogger(__name__)
RESIDENT = 4  # thread blocks of a pass on one multiprocessor
FIELDS = (
    "bound", "budget", "key_error", "value_error", "arith_error", "value_norm", "output_norm", "candidate_bound", "promoted_key_blocks",
    "promoted_value_blocks", "score_top",
)  # fmt: skip
# Of `state` in common.cuh, when a step is over: the row is certified, or was computed exactly.
CERTIFIED, EXACT = 1, 4
# `Call` of common.cuh: addresses on the device, or of pinned memory.
POINTERS = (
    "pool", "scratch", "originals", "q", "output", "hot", "original", "key_at", "value_at", "unit", "group_values", "group_errors",
    "weights", "statistics", "partials", "sums", "fields", "facts", "dots", "state", "marks", "dense", "canaries", "failures",
)  # fmt: skip
NUMBERS = ("n", "tokens", "full", "splits", "per", "groups", "relative_to_output", "exact_only", "num_canaries")
CALL = np.dtype(
    [(name, np.uint64) for name in POINTERS] + [(name, np.float64) for name in ("scale", "rtol", "atol")]
    + [(name, np.int32) for name in (*NUMBERS, "pad")]
)  # fmt: skip


@cache
def kernel(layout: Layout, name: str) -> Any:
    """The compiled kernel."""
    text, options = source(layout, name)
    function = cp.RawModule(code=text, options=options, backend="nvrtc").get_function(name)
    function.max_dynamic_shared_size_bytes = shared_bytes(layout, name)
    return function


@cache
def prepare(layout: Layout) -> None:
    """Compiles all kernels of a layout, side by side: NVRTC lets other threads run. CuPy keeps on disk what it compiled."""
    log.info("compiling the CUDA kernels of %s", layout)
    start_s = time.monotonic()
    with ThreadPoolExecutor(len(PARTS)) as threads:
        list(threads.map(partial(kernel, layout), PARTS))
    log.info("the CUDA kernels of %s are ready after %.1f s", layout, time.monotonic() - start_s)


@dataclass(frozen=True)
class Grid:
    """The largest of any call in a launch: splits and the trailing block, tiles of rows of all KV heads, rows of a KV head."""

    calls: int
    splits: int
    tiles: int
    rows: int
    group: int  # query heads of a KV head


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

    def certify(self, calls: int, grid: "Grid", stream: Any) -> None:
        """Rung 0 of all calls (address of an array of CALL): score, value, finish."""
        self._passes(("score", "value"), calls, grid, stream)
        self._finish(calls, grid, False, stream)

    def climb(self, calls: int, grid: "Grid", stream: Any) -> None:
        """What is above rung 0, for rows that need it: promotion, and the exact rungs. Where none does, every kernel returns at once."""
        args = (np.uint64(calls), np.int32(self.layout.num_kv_heads), np.int32(grid.group))
        self._launch("select_blocks", (grid.rows, self.layout.num_kv_heads, grid.calls), SELECT_THREADS, args, stream)
        self._passes(("rescore", "value", "correct"), calls, grid, stream)
        self._finish(calls, grid, True, stream)
        self.dense(calls, grid, stream)

    def due(self, calls: int, grid: "Grid", stream: Any) -> None:
        """Marks the rows of calls that only want to be exact."""
        self._finish(calls, grid, False, stream)

    def dense(self, calls: int, grid: "Grid", stream: Any) -> None:
        """The exact rungs, for the rows that are due."""
        args = (np.uint64(calls), np.int32(self.layout.num_kv_heads), np.int32(grid.group))
        self._passes(("dense",), calls, grid, stream)
        threads = -(-self.layout.head_dim // LANES) * LANES
        self._launch("dense_finish", (grid.rows, self.layout.num_kv_heads, grid.calls), threads, args, stream)

    def canary(self, calls: int, grid: "Grid", most: int, stream: Any) -> None:
        """Scores canaries from codes and originals; `most`: of any call."""
        args = (np.uint64(calls), np.int32(self.layout.num_kv_heads), np.int32(grid.group))
        self._launch("canary", (most, self.layout.num_kv_heads, grid.calls), WARPS * LANES, args, stream)

    def _passes(self, names: tuple[str, ...], calls: int, grid: "Grid", stream: Any) -> None:
        again = np.int32("rescore" in names)
        for name in names:
            args = (np.uint64(calls), np.int32(self.layout.num_kv_heads), np.int32(grid.group)) + ((again,) if name == "value" else ())
            self._launch(name, (grid.tiles, grid.splits, grid.calls), WARPS * LANES, args, stream)

    def _finish(self, calls: int, grid: "Grid", again: bool, stream: Any) -> None:
        args = (np.uint64(calls), np.int32(self.layout.num_kv_heads), np.int32(grid.group), np.int32(again))
        shape = (grid.rows, self.layout.num_kv_heads, grid.calls)
        self._launch("finish", shape, FINISH_THREADS, args, stream, 4 * grid.splits * PARTIALS)

    def _launch(
        self, name: str, grid: tuple[int, ...], threads: int, args: tuple[Any, ...], stream: Any, shared: int | None = None
    ) -> None:
        size = shared_bytes(self.layout, name) if shared is None else shared
        kernel(self.layout, name)(grid, (threads,), args, shared_mem=size, stream=stream)
