"""One launch: parts of calls over one layout, packed, run through the ladder on the device, and read back.

A part is a run of query tokens of a call. The order on the device: score, value pass, bound; then, for rows that missed their budget,
selection, their promoted blocks anew, value pass and bound again; then the exact rungs. Nothing in between waits for the host: all of it
is one CUDA graph.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.call import idle
from tierd_kernels.cuda.late import Late, Place
from tierd_kernels.cuda.launch import CALL, CERTIFIED, FIELDS, Grid, Program, above, kernels
from tierd_kernels.cuda.memory import DeviceMemory, Region
from tierd_kernels.cuda.packing import Packed, Part
from tierd_kernels.cuda.plan import ANSWERS, ASKED, INPUTS, LATE, WORKSPACE
from tierd_kernels.cuda.sources import ROW_TILE
from tierd_kernels.layout import Layout
from tierd_kernels.numerics import Array
from tierd_kernels.policy import Budget, Coverage, Policy
from tierd_kernels.reads import NONE_READ, Reads, exact_heads, listed
from tierd_kernels.select.candidates import Candidates

PROMOTED = slice(FIELDS.index("promoted_key_blocks"), FIELDS.index("promoted_value_blocks") + 1)


@dataclass
class Answer:
    """Of a part: output raw [Hq, n, d]; fields by name, float64 [Hq, n]; states int32 [Hq, n]; failures bool [canaries, Hkv]; reads, and of
    the records promoted for a row how many had no copy in scratch, int64 [Hq, n]; candidates of this part, once the device has them."""

    output: NDArray[Any]
    fields: dict[str, Array]
    states: NDArray[np.int32]
    failures: NDArray[np.bool_]
    reads: Reads
    cold: NDArray[np.int64]
    candidates: Callable[[], Candidates]


def _program(policies: list[Policy]) -> Program:
    """Of the calls that are not exact from the start."""
    ranks = any(isinstance(x, Budget) and x.require_rank for x in policies)
    return Program(bool(policies), ranks, any(isinstance(x, Coverage) for x in policies))


class Step:
    """`launch` may run again and again, with the same bits; `answers` waits for it."""

    def __init__(self, layout: Layout, memory: DeviceMemory, parts: list[Part], split_blocks: int | None = None) -> None:
        self.layout, self.memory, self.kernels = layout, memory, kernels(layout)
        if memory.late:  # its candidates lie where this step's answers come
            memory.late.collect()
        heads, number = layout.num_kv_heads, len(parts)
        self.group = group = parts[0].call.q.shape[0] // heads
        tiles = [heads * -(-group * part.n // ROW_TILE) for part in parts]
        region = Region(memory.workspace.nbytes)
        inputs, outputs = memory.inputs.reset(), memory.outputs.reset()
        calls_most = above(number, 1)
        # First in the staged range, so that all steps find their calls at one address; those beyond the last are empty.
        self.at = memory.inputs.at + inputs.take(calls_most * CALL.itemsize)
        pools = memory.hot_at, memory.scratch_at, memory.originals_at, 0
        self.packed = packed = [Packed(layout, memory, part, sum(tiles), split_blocks) for part in parts]
        bases = [
            (memory.workspace_at + region.take(x.plan.sizes[WORKSPACE]), memory.inputs.at + inputs.take(x.plan.sizes[INPUTS]),
             memory.outputs.at + outputs.take(x.plan.sizes[ANSWERS])) for x in packed
        ]  # fmt: skip
        self.answers_end = outputs.used
        if number < calls_most:
            memory.inputs.view(self.at - memory.inputs.at, (calls_most,), CALL)[number:] = np.zeros((), CALL)
        # A few KB, which their kernel writes over the link by itself.
        late = [memory.outputs.host_at + outputs.take(x.plan.sizes[LATE]) for x in packed]
        asked = [memory.outputs.at + outputs.take(x.plan.sizes[ASKED]) for x in packed]
        for i, (x, own) in enumerate(zip(packed, bases, strict=True)):
            x.write((*own, late[i], asked[i], *pools), i)
        splits, canaries = max(x.splits for x in packed) + 1, max(len(x.canaries) for x in packed)
        self.grid = Grid(number, splits, max(tiles), group * max(part.n for part in parts), group, canaries).rounded()
        self.program = _program([x.part.call.policy for x in packed if not x.exact_only])

    def upload(self) -> None:
        self.memory.inputs.upload(self.memory.stream)

    def enqueue(self, stream: Any) -> None:
        """All kernels, in order."""
        self.kernels.step(self.at, self.grid, self.program, stream)

    def launch(self) -> None:
        """The same as a graph, captured by the first launch of this shape."""
        self.memory.graphs.launch((self.layout, self.grid, self.program), self.enqueue, self.memory.stream)

    def answers(self, meanwhile: Callable[[], None] = idle) -> list[Answer]:
        """What came back; waits for the device, but not for the candidates, which it begins behind the answers. Once all of it is enqueued
        `meanwhile` runs."""
        memory = self.memory
        memory.outputs.download(memory.stream, 0, self.answers_end)
        memory.answered.record(memory.stream)
        late = memory.late = self._begin_late()
        meanwhile()
        memory.answered.synchronize()
        return [self._answer(x, partial(late.of, i)) for i, x in enumerate(self.packed)]

    def _answer(self, x: Packed, candidates: Callable[[], Candidates]) -> Answer:
        outputs, places, q = self.memory.outputs, x.plan.places, x.part.call.q
        start = x.at("fields") - outputs.at
        own = outputs.host[start : start + x.plan.sizes[ANSWERS]].copy()  # the next step writes there
        shape = q.shape[0], x.part.n

        def view(name: str, size: tuple[int, ...], dtype: Any) -> NDArray[Any]:
            return np.ndarray(size, dtype, own, places[name][1])

        fields, states = view("fields", (len(FIELDS), *shape), np.float64), view("state", shape, np.int32)
        failures = view("failures", (len(x.canaries), self.layout.num_kv_heads), np.bool_)
        reads, cold = self._reads(x, states != CERTIFIED, bool(x.full and fields[PROMOTED].any()))
        return Answer(
            view("output", (*shape, q.shape[2]), q.dtype), dict(zip(FIELDS, fields, strict=True)), states, failures, reads, cold, candidates
        )

    def _begin_late(self) -> Late:
        memory, heads = self.memory, self.layout.num_kv_heads
        if any(x.candidates for x in self.packed):
            memory.graphs.launch((self.layout, self.grid), partial(self.kernels.candidates, self.at, self.grid), memory.stream)
        memory.arrived.record(memory.stream)

        def view(x: Packed, name: str, dtype: Any) -> NDArray[Any]:
            return memory.outputs.view(x.at(name) - memory.outputs.host_at, (2, heads, x.candidates), dtype)

        return Late(memory.arrived, [
            Place(view(x, "candidate_blocks", np.int32), view(x, "candidate_scores", np.float32)) for x in self.packed
        ])  # fmt: skip

    def _reads(self, x: Packed, exact: NDArray[np.bool_], promoted: bool) -> tuple[Reads, NDArray[np.int64]]:
        """As `Answer` has them, of a part whose rows [Hq, n] are `exact` or not. Most often none is, and nothing was `promoted`."""
        if not promoted and not exact.any():
            return NONE_READ, np.zeros(exact.shape, np.int64)
        heads = self.layout.num_kv_heads
        marks = self._marks(x) if promoted else np.zeros((x.plan.tiles, x.full), np.uint32)
        reads, cold = listed(marks, exact_heads(exact, heads), x.part.call.in_scratch)
        return reads, cold.reshape(heads, -1)[:, : exact.size // heads].reshape(exact.shape)

    def _marks(self, x: Packed) -> NDArray[np.uint32]:
        """Where they lie in pinned memory, until the next step: copied beside the candidates, which may not have been found yet."""
        memory, start = self.memory, x.at("marks") - self.memory.outputs.at
        marks = memory.outputs.view(start, (x.plan.tiles, x.full), np.uint32)
        memory.outputs.download(memory.asked, start, start + marks.nbytes)
        memory.asked.synchronize()
        return marks
