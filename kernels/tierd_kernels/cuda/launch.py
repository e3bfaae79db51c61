"""Compiling and launching the CUDA kernels. Needs CuPy and a device of compute capability 9.0 or more."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from struct import Struct
from typing import Any, NamedTuple

import cupy as cp
import numpy as np

from tierd_kernels.cuda import dependent
from tierd_kernels.cuda.record import Record
from tierd_kernels.cuda.sources import (
    CANDIDATE_PARTS,
    CANDIDATE_THREADS,
    COVER_THREADS,
    GATHER_THREADS,
    LANES,
    MANY_ROWS,
    PARTIALS,
    PARTS,
    PICK_BLOCKS,
    PICK_GROUPS,
    PICK_PARTS,
    PICK_THREADS,
    QUANTISE_THREADS,
    RANK_THREADS,
    READERS,
    RESIDENT,
    SPLIT_TOKENS_MAX,
    SPLIT_TOKENS_SHORT,
    SPLITS_MAX,
    WARPS,
    finish_warps,
    shared_bytes,
    source,
)
from tierd_kernels.layout import Layout

log = logging.getLogger(__name__)
ANY, OF_ANY_LAYOUT = Layout(1, 128, 16, 16, "float16"), ("gather", "self_test")
FIELDS = (
    "bound", "budget", "key_error", "value_error", "skip_error", "arith_error", "value_norm", "output_norm", "skipped_blocks",
    "candidate_bound", "promoted_key_blocks", "promoted_value_blocks", "score_top", "rank_certified", "paper_key_bound",
)  # fmt: skip
# Of `state` in common.cuh, when a step is over: the row is certified, or was computed exactly.
CERTIFIED, EXACT = 1, 3
# `Call` of common.cuh: addresses on the device, or of pinned memory.
NUMBERS = (
    "n", "tokens", "full", "splits", "per", "groups", "unit", "relative_to_output", "exact_only", "num_canaries", "require_rank",
    "coverage", "k_min", "k_max", "preference", "candidates_max",
)  # fmt: skip
POINTERS = (
    "q", "hot", "pool", "statistics", "partials", "marks", "scratch", "originals", "output", "original", "copied", "copies",
    "group_values", "group_errors", "sums", "fields", "facts", "dots", "state", "counts", "picks", "dense", "canaries", "failures",
    "shares", "tickets", "candidate_blocks", "candidate_scores", "row_weights", "reads", "cold",
)  # fmt: skip
REALS = ("rtol", "atol", "tau_cov", "key_bound_max", "v_tol")
CALL = np.dtype([
    *((name, np.int32) for name in NUMBERS), ("scale", np.float64), *((name, np.uint64) for name in POINTERS),
    *((name, np.float64) for name in REALS), ("unused", np.uint8, 24),
])  # fmt: skip
PACKED = Struct(f"={len(NUMBERS)}id{len(POINTERS)}Q{len(REALS)}d24x")  # the same: a record of numpy takes five times as long to fill
assert CALL.itemsize == PACKED.size == 384


@cache
def kernel(layout: Layout, name: str, naive: bool = False) -> Any:
    """The compiled kernel."""
    text, options = source(layout, name, naive)
    function = cp.RawModule(code=text, options=options, backend="nvrtc").get_function(name)
    function.max_dynamic_shared_size_bytes = shared_bytes(layout, name)
    return function


def gather(source: int, target: int, back: int, source_at: int, target_at: int, count: int, nbytes: int, stream: Any) -> None:
    """Copies `count` records of `nbytes` from `source` to `target`, and from there to `back`, one behind the other. All are addresses, of
    pinned host memory too: of the memories, and of the records' offsets in the first two, int64 [count]."""
    args = (*map(np.uint64, (source, target, back, source_at, target_at)), np.int32(nbytes))
    kernel(ANY, "gather")((count,), (GATHER_THREADS,), args, stream=stream)


@cache
def prepare(layout: Layout) -> None:
    """Compiles all kernels of a layout, side by side: NVRTC lets other threads run. CuPy keeps on disk what it compiled."""
    log.info("compiling the CUDA kernels of %s", layout)
    start_s = time.monotonic()
    of_layout = [name for name in PARTS if name not in OF_ANY_LAYOUT]
    with ThreadPoolExecutor(len(of_layout)) as threads:
        list(threads.map(partial(kernel, layout), of_layout))
    log.info("the CUDA kernels of %s are ready after %.1f s", layout, time.monotonic() - start_s)


class Grid(NamedTuple):
    """Of a launch, the largest of any call: calls, splits without the trailing block, tiles of rows of all KV heads, rows of a KV head,
    query heads of a KV head, canaries; and the fewest splits of a group of tokens. What lies beyond a call's own returns at once, but not
    before it has had a place on a multiprocessor."""

    calls: int
    splits: int
    tiles: int
    rows: int
    group: int
    canaries: int
    together: int

    @property
    def groups(self) -> int:
        """Of tokens, the trailing block with them."""
        return -(-self.splits // self.together) + 1

    def rounded(self) -> "Grid":
        """Up to a size that many launches share, so that a context that grows is not captured anew at each step."""
        return Grid(
            above(self.calls, 1), above(self.splits, 4), above(self.tiles, 2), above(self.rows, 2), self.group, above(self.canaries, 1),
            self.together,
        )  # fmt: skip


def above(x: int, bits: int) -> int:
    """The least number that is at least x and has at most that many significant bits."""
    unit = 1 << max(0, (x - 1).bit_length() - bits)
    return -(-x // unit) * unit


class Program(NamedTuple):
    """Which kernels a launch needs: `certifies`, some call is not exact from the start; `ranks`, `covers`: some require a ranking, or go by
    the coverage policy."""

    certifies: bool
    ranks: bool
    covers: bool


@cache
def kernels(layout: Layout, naive: bool = False) -> "Kernels":
    """Those of a layout."""
    return Kernels(layout, naive)


class Kernels:
    """The kernels of one layout. All launches are asynchronous, on `stream`. `naive` ones answer rung 0 without a certificate."""

    def __init__(self, layout: Layout, naive: bool = False) -> None:
        self.layout, self.record, self.naive = layout, Record(layout), naive

    def quantise(self, originals: int, hot: int, original_at: int, hot_at: int, norms: int, count: int, stream: Any) -> None:
        """Writes the hot records of `count` full blocks. All are addresses, of pinned host memory too: of the memories, of the blocks'
        offsets in them, int64 [count], and of where max ||V_t|| goes, float32 [count, Hkv]."""
        args = (*map(np.uint64, (originals, hot, original_at, hot_at, norms)), np.int32(self.layout.num_kv_heads))
        self._launch("quantise", (count, self.layout.num_kv_heads, 2), QUANTISE_THREADS, args, stream)

    def split_blocks(self, full: int, tiles: int, processors: int) -> int:
        """Blocks of a split: the fewest, a power of two times the warps, with which all splits are resident at once (rung 0 of
        131,072 tokens: 85 us in one wave, 89 in two, 97 in four). Short splits begin and end more than they compute, and half as many are
        better: a step of 8,192 tokens takes 19.3 us with blocks in sixteens, 20.9 in eights, of 16,384 24.7 and 25.2 with 32 and 16; but of
        32,768 35.6 and 34.4 with 64 and 32."""
        per, size = WARPS, self.layout.block_size
        while per * size < SPLIT_TOKENS_MAX:
            resident = RESIDENT if per * size >= SPLIT_TOKENS_SHORT else RESIDENT // 2
            if -(-full // per) * tiles <= resident * processors:
                break
            per *= 2
        return per

    def step(self, calls: int, grid: Grid, program: Program, stream: Any) -> None:
        """All of the ladder over calls (address of an array of CALL): rung 0; for rows that need it promotion, and the exact rungs. Where
        none does, every kernel above rung 0 returns at once."""
        if grid.canaries:
            self._over("canary", (grid.canaries, self.layout.num_kv_heads, grid.calls), WARPS * LANES, calls, grid, stream, first=True)
        if program.certifies:
            self.certify(calls, grid, program.ranks, stream)
            parts = min(PICK_PARTS, -(-grid.groups // PICK_GROUPS), max(1, PICK_BLOCKS // (grid.tiles * grid.calls)))
            self._over("pick", (grid.tiles, parts, grid.calls), PICK_THREADS, calls, grid, stream, parts)
            if program.covers:
                self._rows("cover", COVER_THREADS, calls, grid, stream)
            self._over("promote", (grid.tiles, max(1, grid.splits), grid.calls), WARPS * LANES, calls, grid, stream)
            if program.covers:
                self._rows("rank", RANK_THREADS, calls, grid, stream, 1)
            self._finish(calls, grid, stream, again=True)
        else:
            self._finish(calls, grid, stream, first=True)
        self._splits("dense", calls, grid, stream)

    def candidates(self, calls: int, grid: Grid, stream: Any) -> None:
        """What comes near needing its originals, of a step that has run. Reads what it has left; nothing of it changes."""
        shape = (2 * self.layout.num_kv_heads, CANDIDATE_PARTS, grid.calls)
        self._over("candidates", shape, CANDIDATE_THREADS, calls, grid, stream, first=True)

    def certify(self, calls: int, grid: Grid, ranks: bool, stream: Any) -> None:
        """Rung 0 alone: scores and values, bound."""
        self._splits("attend", calls, grid, stream, first=True)
        if ranks:
            self._rows("rank", RANK_THREADS, calls, grid, stream, 0)
        self._finish(calls, grid, stream)

    def _splits(self, name: str, calls: int, grid: Grid, stream: Any, first: bool = False) -> None:
        """One thread block a tile of rows, split or trailing block, and call."""
        self._over(name, (grid.tiles, grid.splits + 1, grid.calls), WARPS * LANES, calls, grid, stream, first=first)

    def _rows(self, name: str, threads: int, calls: int, grid: Grid, stream: Any, *more: int) -> None:
        """One thread block a row, KV head and call."""
        self._over(name, (grid.rows, self.layout.num_kv_heads, grid.calls), threads, calls, grid, stream, *more)

    def _finish(self, calls: int, grid: Grid, stream: Any, again: bool = False, first: bool = False) -> None:
        """One thread block a row, KV head and call; after promotion, `again`, behind those of the rows others tell what was read."""
        readers = max(1, READERS // grid.calls) if again else 0
        shape = (grid.rows + readers, self.layout.num_kv_heads, grid.calls)
        shared = 4 * min(grid.splits + 1, SPLITS_MAX) * PARTIALS  # rounded up, splits may be more than any call has
        readers_from = grid.rows if again else 0
        name = "finish_many" if grid.rows * self.layout.num_kv_heads * grid.calls >= MANY_ROWS else "finish"
        threads = finish_warps(self.layout, name) * LANES
        self._over(name, shape, threads, calls, grid, stream, readers_from, readers, shared=shared, first=first)

    def _over(
        self, name: str, shape: tuple[int, ...], threads: int, calls: int, grid: Grid, stream: Any, *more: int, shared: int | None = None,
        first: bool = False,
    ) -> None:  # fmt: skip
        """`first`: what lies ahead on the stream is no kernel of the step, or this one must not begin before it has ended."""
        args = (np.uint64(calls), *(np.int32(x) for x in (self.layout.num_kv_heads, grid.group, *more)))
        if first:
            return self._launch(name, shape, threads, args, stream, shared)
        size = shared_bytes(self.layout, name) if shared is None else shared
        dependent.launch(kernel(self.layout, name, self.naive), shape, threads, args, size, stream)

    def _launch(
        self, name: str, grid: tuple[int, ...], threads: int, args: tuple[Any, ...], stream: Any, shared: int | None = None
    ) -> None:
        size = shared_bytes(self.layout, name) if shared is None else shared
        kernel(self.layout, name, self.naive)(grid, (threads,), args, shared_mem=size, stream=stream)
