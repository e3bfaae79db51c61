"""All copies in scratch, as columns: what is done is done with hundreds at once, and an object for each made it 25 us to begin one."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd.residency import moving
from tierd.residency.blocks import BlockTable, Ids
from tierd.residency.moving import COPY

LONG = "block", "head", "source", "target", "nbytes", "turn"
GROWS_BY_MIN = 64


class CopyState(IntEnum):
    """Where a copy stands; a record without a copy is host only, or barred. GONE: there is no copy of that id."""

    GONE = moving.GONE
    IN_FLIGHT = moving.IN_FLIGHT
    RESIDENT = moving.RESIDENT
    ORPHAN = moving.ORPHAN


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
        self._free: list[int] = []
        self._name(np.zeros(0, COPY))

    def __len__(self) -> int:
        return len(self.state) - len(self._free)

    @property
    def ids(self) -> Ids:
        """Of all copies, in rising order."""
        return np.flatnonzero(self.state)

    def reserve(self, count: int) -> Ids:
        """Ids for so many new copies, int64 [n]; whoever asks writes their records."""
        if len(self._free) < count:
            self._grow(count)
        ids = np.array(self._free[len(self._free) - count :][::-1], np.int64)  # in rising order while they are new
        del self._free[len(self._free) - count :]
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
        old = len(self.records)
        extra = max(GROWS_BY_MIN, old, count)
        self._name(np.concatenate([self.records, np.zeros(extra, COPY)]))
        self._free.extend(range(old + extra - 1, old - 1, -1))

    def _name(self, records: NDArray[Any]) -> None:
        """Columns are views of the records, of which a copy's lies in one line of the cache."""
        self.records = records
        self.state: NDArray[np.int8] = records["state"]
        self.table: NDArray[np.int32] = records["table"]
        self.kind: NDArray[np.int8] = records["kind"]
        self.failures: NDArray[np.int8] = records["failures"]
        self.block, self.head, self.source, self.target, self.nbytes, self.turn = (records[name] for name in LONG)
