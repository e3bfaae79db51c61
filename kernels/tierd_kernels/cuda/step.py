"""One launch: parts of calls over one layout, packed, run through the ladder on the device, and read back.

A part is a run of query tokens of a call. The order on the device: scores and values, bound; then, for rows that missed their budget,
selection, what changes with the originals of their promoted blocks, and the bound again; then the exact rungs. Nothing in between waits for
the host: all of it is one CUDA graph.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.call import idle
from tierd_kernels.cuda.arrangement import Placed, arrangement
from tierd_kernels.cuda.late import Late
from tierd_kernels.cuda.launch import CERTIFIED, FIELDS, Program, kernels
from tierd_kernels.cuda.memory import DeviceMemory
from tierd_kernels.cuda.packing import Part
from tierd_kernels.cuda.plan import KEPT_ARRAYS, Terms
from tierd_kernels.layout import Layout
from tierd_kernels.numerics import Array
from tierd_kernels.reads import NONE_READ, Reads, Words, exact_heads, listed
from tierd_kernels.select.candidates import Candidates

PROMOTED = slice(FIELDS.index("promoted_key_blocks"), FIELDS.index("promoted_value_blocks") + 1)


@dataclass
class Answer:
    """Of a part: output raw [Hq, n, d]; fields by name, float64 [Hq, n]; states int32 [Hq, n]; failures bool [canaries, Hkv]; reads, and
    of the records promoted for a row how many had no copy in scratch, int32 [Hq, n]; candidates of this part, once the device has them, or
    none."""

    output: NDArray[Any]
    fields: dict[str, Array]
    states: NDArray[np.int32]
    failures: NDArray[np.bool_]
    reads: Reads
    cold: NDArray[np.int32]
    candidates: Callable[[], Candidates]

    @property
    def read(self) -> tuple[int, int]:
        """How many originals, and how many of them from the host."""
        from_host = self.reads.from_host
        return from_host.size, int(np.count_nonzero(from_host))


def _program(terms: list[Terms]) -> Program:
    """Of the calls that are not exact from the start."""
    return Program(bool(terms), any([x.ranks for x in terms]), any([x.covers for x in terms]))


class Step:
    """`launch` may run again and again, with the same bits; `answers` waits for it. The next step may be made once it has."""

    def __init__(self, layout: Layout, memory: DeviceMemory, parts: list[Part], split_blocks: int | None = None) -> None:
        """Raises ValueError as `Arrangement` and `Kept` do."""
        self.layout, self.memory, self.parts, self.kernels = layout, memory, parts, kernels(layout)
        self.arranged = arranged = arrangement(layout, memory, tuple(part.shape for part in parts), split_blocks)
        self.at, self.answers_end = arranged.at, arranged.answers_end
        self.grid = arranged.grid if any(len(part.canaries) for part in parts) else arranged.grid._replace(canaries=0)
        kept_at, each = memory.kept.at([array for part in parts for array in part.kept]), len(KEPT_ARRAYS)
        for i, (part, placed) in enumerate(zip(parts, arranged.parts, strict=True)):
            part.write(memory, placed, kept_at[i * each : (i + 1) * each], i)
        arranged.unused.fill(0)
        self.program = _program([part.terms for part in parts if not part.exact_only])

    def upload(self) -> None:
        memory = self.memory
        memory.kept.upload(memory.stream)
        memory.inputs.upload(memory.stream, 0, self.arranged.inputs_end)

    def enqueue(self, stream: Any) -> None:
        """All kernels, in order."""
        self.kernels.step(self.at, self.grid, self.program, stream)

    def launch(self) -> None:
        """The same as a graph, captured by the first launch of this shape."""
        self.memory.graphs.launch((self.kernels, self.grid, self.program), self.enqueue, self.memory.stream)

    def answers(self, meanwhile: Callable[[], None] = idle) -> list[Answer]:
        """What came back; waits for the device, but not for the candidates, which it begins only where they will be looked at: they take
        the device an eighth of a step at 131,072 tokens, half of one at 8,192. Mostly that is known while it computes, which hides the
        launch; else the answers say so. `meanwhile` runs while it computes."""
        memory = self.memory
        if memory.late:  # its candidates lie where these answers come; the device has something to do already
            memory.late.collect()
        memory.outputs.download(memory.stream, 0, self.answers_end)
        memory.answered.record(memory.stream)
        late = self._begin_late() if self._looked_at([(0, 0)] * len(self.parts)) else None
        meanwhile()
        memory.answered.synchronize()
        answers = [self._answer(*each) for each in zip(self.parts, self.arranged.parts, strict=True)]
        if late is None and self._looked_at([answer.read for answer in answers]):
            late = self._begin_late()
        if late is not None:
            memory.late = late
            for i, answer in enumerate(answers):
                answer.candidates = partial(late.of, i)
        return answers

    def _looked_at(self, read: list[tuple[int, int]]) -> bool:
        """Whether anybody will ask for the candidates of some part, which has read so many originals, and so many from the host."""
        return self.arranged.candidates and any([part.call.is_looked_at(*each) for part, each in zip(self.parts, read, strict=True)])

    def _begin_late(self) -> Late:
        memory = self.memory
        memory.graphs.launch((self.kernels, self.grid), partial(self.kernels.candidates, self.at, self.grid), memory.stream)
        memory.arrived.record(memory.stream)
        return Late(memory.arrived, self.arranged.late)

    def _answer(self, part: Part, placed: Placed) -> Answer:
        """Copies, for the next step writes there."""
        fields, states = placed.fields.copy(), placed.state.copy()
        reads = self._reads(part, placed.reads, states != CERTIFIED, bool(part.full and np.count_nonzero(fields[PROMOTED])))
        return Answer(
            placed.output.copy(), dict(zip(FIELDS, fields, strict=True)), states, placed.failures[: len(part.canaries)].copy(), reads,
            placed.cold.copy(), partial(Candidates.none, self.layout.num_kv_heads),
        )  # fmt: skip

    def _reads(self, part: Part, read: Words, exact: NDArray[np.bool_], promoted: bool) -> Reads:
        """Of a part whose rows [Hq, n] are `exact` or not. Most often none is, and nothing was `promoted`: then `read` says nothing."""
        if not promoted and not np.count_nonzero(exact):
            return NONE_READ
        words = read if promoted else np.zeros_like(read)
        return listed(words, part.full, exact_heads(exact, self.layout.num_kv_heads), part.call.in_scratch)
