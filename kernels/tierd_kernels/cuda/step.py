"""One launch: parts of calls over one layout, packed, run through the ladder on the device, and read back.

A part is a run of query tokens of a call. The order on the device: score, value pass, bound; then, for rows that missed their budget,
selection, their promoted blocks anew, value pass and bound again; then the exact rungs. Nothing in between waits for the host: all of it
is one CUDA graph.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import cupy as cp
import numpy as np
from numpy.typing import NDArray

from tierd_kernels.call import Call
from tierd_kernels.cuda.late import Late, Place
from tierd_kernels.cuda.launch import CALL, FIELDS, Grid, Kernels, Program
from tierd_kernels.cuda.memory import BLOCK_BYTES_MIN, DeviceMemory, Region
from tierd_kernels.cuda.record import TILE
from tierd_kernels.cuda.sources import (
    DENSE_FACTS,
    PARTIALS,
    PICK_BINS,
    PICK_PARTS,
    ROW_FACTS,
    ROW_TILE,
    SKIPS,
    SPLITS_MAX,
    STATISTIC_FLOATS,
    TILE_WEIGHT_FLOATS,
)
from tierd_kernels.layout import Layout
from tierd_kernels.numerics import Array
from tierd_kernels.policy import Coverage
from tierd_kernels.select.candidates import Candidates

# Dot products with quantised keys stay below 2^32, half of them offsets: 256 channels of 127 * 65504 at most, q within [-1, 1].
SCALE_MAX = 2.0**90
UNIT_MIN, UNIT_MAX = -60, 120  # from below: what FP32 flushes to zero stays far under 2^-40 of a unit


@dataclass
class Part:
    """Query tokens [start, stop) of a call; `tokens`, `full`: what the newest of them sees, the last block perhaps in part."""

    call: Call
    start: int
    stop: int

    @property
    def n(self) -> int:
        return self.stop - self.start

    @property
    def tokens(self) -> int:
        return self.call.num_tokens - int(self.call.q.shape[1]) + self.stop

    def full(self, layout: Layout) -> int:
        return min(len(self.call.hot_offsets), -(-self.tokens // layout.block_size))


@dataclass
class Answer:
    """Of a part: output raw [Hq, n, d]; fields by name, float64 [Hq, n]; states int32 [Hq, n]; failures bool [canaries, Hkv]; marks
    uint32 [Hkv * tiles, full], None: nothing was promoted; candidates of this part, once the device has them."""

    output: NDArray[Any]
    fields: dict[str, Array]
    states: NDArray[np.int32]
    failures: NDArray[np.bool_]
    marks: NDArray[np.uint32] | None
    candidates: Callable[[], Candidates]


def needs_exact(call: Call) -> bool:
    """Whether a call goes to the exact rungs at once: nothing else would do, FP32 flushes numbers of its queries to zero, or its scores may
    lie beyond FP32 (the queries' power of two joins the scale)."""
    if call.rtol == 0 and call.atol == 0:
        return True
    if call.q.dtype == np.float16:
        largest = float(np.max(np.abs(call.q)))
    else:
        bits = call.q.view(np.uint32) if call.q.dtype == np.float32 else call.q.astype(np.uint32) << 16
        if np.any((bits & 0x7F800000 == 0) & (bits & 0x7FFFFF != 0)):
            return True
        largest = float(np.max(bits & 0x7FFFFFFF).view(np.float32))
    return abs(call.softmax_scale) * 2.0 ** math.frexp(largest)[1] > SCALE_MAX


def policy_numbers(call: Call) -> dict[str, float]:
    """What `CALL` says of the policy. Blocks are skipped where the budget is one of values: that of an output is not known before."""
    policy = call.policy
    if isinstance(policy, Coverage):
        names = ("tau_cov", "k_min", "k_max", "key_bound_max", "v_tol", "boundary_check")
        return {name: float(getattr(policy, name)) for name in names} | {"coverage": 1.0}
    return {"skip_share": policy.skip_share if call.relative_to == "values" else 0.0, "require_rank": float(policy.require_rank)}


def picks_bytes(splits: int) -> int:
    """Of a tile: what selection adds up of its parts, which are no more than splits and a trailing block."""
    return 4 * 2 * min(PICK_PARTS, splits + 1) * ROW_TILE * PICK_BINS


def workspace_bytes(layout: Layout, group: int, part: Part, splits: int) -> int:
    """An upper bound on what `Step` takes of the workspace for a part."""
    rows = layout.num_kv_heads * group * part.n
    tiles = layout.num_kv_heads * -(-group * part.n // ROW_TILE)
    block = 4 * (layout.block_size // TILE * TILE_WEIGHT_FLOATS + STATISTIC_FLOATS + 1 + 2 * ROW_TILE)
    split = 4 * ROW_TILE * (PARTIALS + SKIPS + layout.head_dim) + 8 * ROW_TILE * (DENSE_FACTS + layout.head_dim)
    picks = picks_bytes(splits)
    head = 8 * layout.num_kv_heads * part.full(layout)
    return tiles * ((part.full(layout) + 1) * block + (splits + 1) * split + picks) + rows * 4 * (ROW_FACTS + splits + 3) + head + 16 * 256


class Step:
    """`launch` may run again and again, with the same bits; `answers` waits for it."""

    def __init__(self, layout: Layout, memory: DeviceMemory, parts: list[Part], split_blocks: int | None = None) -> None:
        self.layout, self.memory, self.parts, self.kernels = layout, memory, parts, Kernels(layout)
        heads, d = layout.num_kv_heads, layout.head_dim
        self.group = group = parts[0].call.q.shape[0] // heads
        tiles = [heads * -(-group * part.n // ROW_TILE) for part in parts]
        if memory.late:  # its candidates lie where this step's answers come
            memory.late.collect()
        memory.inputs.reset()
        memory.outputs.reset()
        region = Region(memory.workspace.nbytes)
        calls_most = Grid(len(parts), 1, 1, 1, group, 0).rounded().calls
        # First in the staged range, so that all steps find their calls at one address; those beyond the last are empty.
        self.at = memory.inputs.room(calls_most * CALL.itemsize)
        staged = memory.inputs.view(self.at, (calls_most,), CALL)
        staged[len(parts) :] = np.zeros((), CALL)
        workspace_at = int(memory.workspace.data.ptr)
        self.calls: list[dict[str, Any]] = []  # what CALL names, of each part
        for i, part in enumerate(parts):
            call, full = part.call, part.full(layout)
            per = split_blocks or self.kernels.split_blocks(full, sum(tiles), memory.processors)
            splits = -(-full // per)
            if splits >= SPLITS_MAX:
                raise ValueError(f"{full} blocks are {splits} splits; at most {SPLITS_MAX - 1}")
            rows, weights = heads * group * part.n, layout.block_size // TILE * TILE_WEIGHT_FLOATS
            sizes = {
                "weights": 4 * tiles[i] * (full + 1) * weights, "statistics": 4 * tiles[i] * (full + 1) * STATISTIC_FLOATS,
                "partials": 4 * tiles[i] * (splits + 1) * PARTIALS * ROW_TILE, "sums": 4 * tiles[i] * (splits + 1) * ROW_TILE * d,
                "skips": 4 * tiles[i] * (splits + 1) * SKIPS * ROW_TILE,
                "dense": 8 * tiles[i] * (splits + 1) * ROW_TILE * (DENSE_FACTS + d), "facts": 4 * rows * ROW_FACTS,
                "dots": 4 * rows * (splits + 1), "marks": 4 * tiles[i] * full, "counts": 8 * rows,
                "picks": tiles[i] * picks_bytes(splits), "shares": 8 * heads * full, "row_weights": 8 * tiles[i] * full * ROW_TILE,
            }  # fmt: skip
            numbers = dict.fromkeys(CALL.names or (), 0) | {
                "n": part.n, "tokens": part.tokens, "full": full, "splits": splits, "per": per, "groups": len(call.group_value_norms),
                "relative_to_output": call.relative_to == "output", "exact_only": needs_exact(call), "scale": call.softmax_scale,
                "rtol": call.rtol, "atol": call.atol, "unit": self._exponent(part, full), **policy_numbers(call),
                **self._staged(part, full),
                **{name: workspace_at + region.take(size) for name, size in sizes.items()},
            }  # fmt: skip
            assert len(numbers) == len(CALL.names or ())
            self.calls.append(numbers)
        self.answers_end = memory.outputs.region.used
        for i, numbers in enumerate(self.calls):  # behind all answers, for they are copied later
            for name in ("candidate_blocks", "candidate_scores"):
                numbers[name] = memory.outputs.room(4 * 2 * heads * int(numbers["candidates_max"]))
            staged[i] = tuple(numbers.values())
        splits_most, rows_most = max(x["splits"] for x in self.calls) + 1, group * max(part.n for part in parts)
        self.grid = Grid(len(parts), splits_most, max(tiles), rows_most, group, max(x["num_canaries"] for x in self.calls)).rounded()
        able = [x for x in self.calls if not x["exact_only"]]
        self.program = Program(len(able) > 0, any(x["require_rank"] for x in able), any(x["coverage"] for x in able))

    def _staged(self, part: Part, full: int) -> dict[str, int]:
        """Where what comes from the host lies, and what goes back to it: addresses, and the number of canaries."""
        call, heads, inputs, outputs = part.call, self.layout.num_kv_heads, self.memory.inputs, self.memory.outputs
        q, blocks = call.q[:, part.start : part.stop], -(-part.tokens // self.layout.block_size)
        canaries = call.canary_blocks if part.start == 0 else call.canary_blocks[:0]
        canaries = canaries[canaries < full]
        arrays = {
            "q": q, "hot": call.hot_offsets[:full], "original": call.original_offsets[:blocks], "group_values": call.group_value_norms,
            "group_errors": call.group_error_norms, "canaries": canaries.astype(np.int32),
            "tickets": np.zeros(heads * (1 + 2 * -(-self.group * part.n // ROW_TILE)), np.int32),
        }  # fmt: skip
        if call.key_locations is not None and call.value_locations is not None:  # 1 MB at 131,072 tokens of 8 KV heads
            arrays |= {"key_at": call.key_locations[:full], "value_at": call.value_locations[:full]}
        # In this order in `answers`: numbers of eight bytes first.
        rows = self.group * heads * part.n
        sizes = {"fields": 8 * len(FIELDS) * rows, "state": 4 * rows, "output": q.nbytes, "failures": len(canaries) * heads}
        pools = {"pool": self.memory.hot_at, "scratch": self.memory.scratch_at, "originals": self.memory.originals_at}
        return {
            **pools, **{name: inputs.put(array) for name, array in arrays.items()},
            **{name: outputs.room(size) for name, size in sizes.items()}, "num_canaries": len(canaries),
            "candidates_max": min(call.candidates_max, full),
        }  # fmt: skip

    def _exponent(self, part: Part, full: int) -> int:
        """A power of two near the largest norm of a value; no bound depends on it, but FP32's range does."""
        if full:
            return int(self.memory.exponents[part.call.hot_offsets[:full] // BLOCK_BYTES_MIN].max())
        start, size = int(part.call.original_offsets[0]), self.layout.original_block_bytes
        raw = self.memory.originals[start + size // 2 : start + size].view(part.call.q.dtype)
        values = raw.reshape(self.layout.num_kv_heads, self.layout.block_size, -1)[:, : part.tokens]
        wide = (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values
        largest = float(np.max(np.abs(wide))) * self.layout.head_dim**0.5
        return int(np.clip(np.frexp(largest)[1], UNIT_MIN, UNIT_MAX)) if largest > 0 else UNIT_MIN

    def upload(self) -> None:
        self.memory.inputs.upload(self.memory.stream)

    def enqueue(self, stream: Any) -> None:
        """All kernels, in order."""
        self.kernels.step(self.at, self.grid, self.program, stream)

    def launch(self) -> None:
        """The same as a graph, captured by the first launch of this shape."""
        self.memory.graphs.launch((self.layout, self.grid, self.program), self.enqueue, self.memory.stream)

    def answers(self) -> list[Answer]:
        """What came back; waits for the device, but not for the candidates, which it begins behind the answers."""
        memory, heads = self.memory, self.layout.num_kv_heads
        memory.outputs.download(memory.stream, 0, self.answers_end)
        memory.answered.record(memory.stream)
        late = memory.late = self._begin_late()
        memory.answered.synchronize()
        out = []
        for i, (part, call) in enumerate(zip(self.parts, self.calls, strict=True)):
            q, canaries, first = part.call.q, call["num_canaries"], call["fields"]
            shape = (q.shape[0], part.n)
            own = memory.outputs.view(first, (call["failures"] + canaries * heads - first,), np.uint8).copy()  # the next step writes there
            fields, states, output, failures = (
                np.ndarray(size, dtype, own, call[name] - first)
                for name, size, dtype in (
                    ("fields", (len(FIELDS), *shape), np.float64), ("state", shape, np.int32), ("output", (*shape, q.shape[2]), q.dtype),
                    ("failures", (canaries, heads), np.uint8),
                )
            )  # fmt: skip
            named = dict(zip(FIELDS, fields, strict=True))
            marks = None
            if part.full(self.layout) and (named["promoted_key_blocks"].any() or named["promoted_value_blocks"].any()):
                marks = self._marks(call, part)
            out.append(Answer(output, named, states, failures.astype(bool), marks, partial(late.of, i)))
        return out

    def _begin_late(self) -> Late:
        memory, heads = self.memory, self.layout.num_kv_heads
        if any(call["candidates_max"] for call in self.calls):
            self.kernels.candidates(self.at, self.grid, memory.stream)
            memory.outputs.download(memory.stream, self.answers_end, memory.outputs.region.used)
        memory.arrived.record(memory.stream)
        shapes = [(2, heads, call["candidates_max"]) for call in self.calls]
        view = memory.outputs.view
        return Late(memory.arrived, [
            Place(view(call["candidate_blocks"], shape, np.int32), view(call["candidate_scores"], shape, np.float32))
            for call, shape in zip(self.calls, shapes, strict=True)
        ])  # fmt: skip

    def _marks(self, call: dict[str, Any], part: Part) -> NDArray[np.uint32]:
        shape = (self.layout.num_kv_heads * -(-self.group * part.n // ROW_TILE), call["full"])
        marks = np.empty(shape, np.uint32)
        cp.cuda.runtime.memcpy(marks.ctypes.data, call["marks"], marks.nbytes, cp.cuda.runtime.memcpyDeviceToHost)
        return marks
