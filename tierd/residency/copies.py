"""All copies in scratch, as columns: what is done is done with hundreds at once, and an object for each made it 25 us to begin one."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from tierd.residency.blocks import BlockTable, Ids

COLUMNS = "state", "table", "kind", "failures", "block", "head", "source", "target", "nbytes", "turn"
GROWS_BY_MIN = 64


class CopyState(IntEnum):
    """Where a copy stands; a record without a copy is host only, or barred. GONE: there is no copy of that id."""

    GONE = 0
    IN_FLIGHT = 1
    RESIDENT = 2
    ORPHAN = 3


@dataclass(frozen=True)
class ScratchCopy:
    """What is known of one copy at a moment. `source`, `target`: byte offsets in originals and scratch. `failures`: attempts that failed.
    `checksum`: of the original; meaningless once orphaned. `pinned`: it may not be evicted."""

    copy_id: int
    table: BlockTable
    kind: int
    block: int
    head: int
    source: int
    target: int
    nbytes: int
    failures: int
    state: CopyState
    checksum: int
    pinned: bool


class Copies:
    """Columns by copy id, of which `ScratchCopy` tells; `table` is a table's number. Ids are reused once a copy is gone, so the columns
    stay as long as the most copies at a time. `turn`: the residency's when it began. Written by the residency only."""

    def __init__(self) -> None:
        self.state: NDArray[np.int8] = np.zeros(0, np.int8)
        self.table: NDArray[np.int32] = np.zeros(0, np.int32)
        self.kind: NDArray[np.int8] = np.zeros(0, np.int8)
        self.failures: NDArray[np.int8] = np.zeros(0, np.int8)
        self.block, self.head, self.source, self.target, self.nbytes, self.turn = (np.zeros(0, np.int64) for _ in range(6))
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self.state) - len(self._free)

    @property
    def ids(self) -> Ids:
        """Of all copies, in rising order."""
        return np.flatnonzero(self.state)

    def add(self, table: BlockTable, kind: int, blocks: Ids, heads: Ids, targets: Ids, turn: int) -> Ids:
        """Copies in flight of these n records to `targets`; returns their ids, int64 [n]."""
        count = len(blocks)
        if len(self._free) < count:
            self._grow(count)
        ids = np.array(self._free[len(self._free) - count :][::-1], np.int64)  # in rising order while they are new
        del self._free[len(self._free) - count :]
        self.state[ids], self.table[ids], self.kind[ids], self.failures[ids] = CopyState.IN_FLIGHT, table.number, kind, 0
        self.block[ids], self.head[ids], self.target[ids], self.nbytes[ids] = blocks, heads, targets, table.layout.original_record_bytes
        self.turn[ids] = turn
        self.source[ids] = table.offsets_of(kind, blocks, heads)
        return ids

    def forget(self, ids: Ids) -> None:
        """They are gone."""
        assert self.state[ids].all()
        self.state[ids] = CopyState.GONE
        self._free.extend(ids.tolist())

    def at(self, ids: Ids) -> tuple[NDArray[np.int8], Ids, Ids]:
        """Indices of their records in a table's columns."""
        return self.kind[ids], self.block[ids], self.head[ids]

    def _grow(self, count: int) -> None:
        old = len(self.state)
        extra = max(GROWS_BY_MIN, old, count)
        for name in COLUMNS:
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros(extra, column.dtype)]))
        self._free.extend(range(old + extra - 1, old - 1, -1))
