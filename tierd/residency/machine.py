"""Owner of every block's state. Only the engine's thread may call it.

A block:                                     A record's copy in scratch (one block, keys or values, one KV head):

    add_tails        fill              release        HOST_ONLY --begin_copy--> IN_FLIGHT --finish_copy--> RESIDENT
  ----------> TAIL ---------> FULL ------------> gone     ^                      |     |                     |
               ^  \\------------|---- release --> gone     |   bad checksum, drop |     | block gone or       | evict, or block
               |               |                          +----------------------+     | reopened            | gone or reopened
               +--- reopen ----+                          +----------------------------|---------------------+
                 (one reference)                                                       v
                                                                        ORPHAN --finish_copy--> gone

A TAIL has its originals only and exactly one reference; a FULL block has a hot slot, checksums and any number of references
and is never written. A RESIDENT copy of a pinned block stays where it is. An ORPHAN keeps its scratch bytes until the copier
has let go of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray
from tierd_kernels.layout import Layout

from tierd.pools import Arenas
from tierd.residency.blocks import BlockTable, Ids


class CopyState(Enum):
    """Where a copy stands; a record without a copy is host only."""

    IN_FLIGHT = "in flight"
    RESIDENT = "resident"
    ORPHAN = "orphan"


@dataclass
class ScratchCopy:
    """One original record's copy. `source`, `target`: byte offsets in originals and scratch. `last_used`: engine step."""

    copy_id: int
    table: BlockTable
    kind: int
    block: int
    head: int
    source: int
    target: int
    nbytes: int
    last_used: int
    state: CopyState = CopyState.IN_FLIGHT

    @property
    def pinned(self) -> bool:
        return bool(self.table.pins[self.block] > 0) or self.state is not CopyState.RESIDENT


class Residency:
    """All tables and all scratch copies over one set of arenas. `hot_block_bytes`: of a layout's hot block, as the backend stores it."""

    def __init__(self, arenas: Arenas, hot_block_bytes: Callable[[Layout], int]) -> None:
        self.arenas = arenas
        self._hot_block_bytes = hot_block_bytes
        self.tables: dict[Layout, BlockTable] = {}
        self._copies: dict[int, ScratchCopy] = {}  # least recently used first
        self._next_copy_id = 0

    def table(self, layout: Layout) -> BlockTable:
        """The table of `layout`, made when first asked for."""
        if layout not in self.tables:
            self.tables[layout] = BlockTable(layout, self.arenas, self._hot_block_bytes(layout))
        return self.tables[layout]

    # Blocks

    def retain(self, table: BlockTable, ids: Ids) -> None:
        """One more reference to each of these full blocks."""
        assert (table.hot_offset[ids] >= 0).all(), "a tail is never shared"
        table.references[ids] += 1

    def release(self, table: BlockTable, ids: Ids) -> None:
        """One reference less to each (distinct) block; those without any are freed, with their copies."""
        assert (table.references[ids] > 0).all()
        table.references[ids] -= 1
        dead = ids[table.references[ids] == 0]
        self.drop_copies(table, dead)
        table.free(dead)

    def reopen(self, table: BlockTable, block: int) -> None:
        """A full block with one reference becomes a tail, so that it can be written again."""
        assert table.references[block] == 1 and table.hot_offset[block] >= 0
        self.drop_copies(table, np.array([block], dtype=np.int64))
        table.take_hot(block)

    def pin(self, table: BlockTable, ids: Ids) -> None:
        """Keep the copies of these (distinct) blocks in place while a call reads them."""
        table.pins[ids] += 1

    def unpin(self, table: BlockTable, ids: Ids) -> None:
        assert (table.pins[ids] > 0).all()
        table.pins[ids] -= 1

    # Copies

    @property
    def num_copies(self) -> int:
        return len(self._copies)

    def oldest_first(self) -> Iterator[ScratchCopy]:
        """Copies, least recently used first; read only."""
        return iter(self._copies.values())

    def begin_copy(self, table: BlockTable, kind: int, block: int, head: int, step: int) -> ScratchCopy:
        """Reserve scratch for a host-only record of a full block. Raises CapacityExceeded; nothing changes then."""
        assert table.hot_offset[block] >= 0 and table.copy_id[kind, block, head] < 0
        nbytes = table.layout.original_record_bytes
        target = self.arenas.scratch.allocate(nbytes)
        source = table.record_offset(kind, block, head)
        copy = ScratchCopy(self._next_copy_id, table, kind, block, head, source, target, nbytes, step)
        self._next_copy_id += 1
        self._copies[copy.copy_id] = copy
        table.copy_id[kind, block, head] = copy.copy_id
        return copy

    def finish_copy(self, copy_id: int, digest: int | None) -> bool:
        """The copier is done and its bytes hash to `digest` (None: none arrived). False: they are not the original's; the copy was
        dropped."""
        copy = self._copies[copy_id]
        if copy.state is CopyState.ORPHAN:
            self._forget(copy)
            return True
        assert copy.state is CopyState.IN_FLIGHT
        if digest != int(copy.table.checksum[copy.kind, copy.block, copy.head]):
            copy.table.copy_id[copy.kind, copy.block, copy.head] = -1
            self._forget(copy)
            return False
        copy.state = CopyState.RESIDENT
        copy.table.location[copy.kind, copy.block, copy.head] = copy.target
        copy.table.resident[copy.block] += 1
        return True

    def evict(self, copy_id: int) -> None:
        """Drop a resident copy that no running call can see."""
        copy = self._copies[copy_id]
        assert not copy.pinned
        self._detach(copy)
        self._forget(copy)

    def touch(self, copy_ids: NDArray[np.int64], step: int) -> None:
        """Note that these copies were read in `step`. Ids of copies dropped meanwhile are ignored."""
        for copy_id in copy_ids.tolist():
            copy = self._copies.pop(copy_id, None)
            if copy is not None:
                copy.last_used = step
                self._copies[copy_id] = copy

    def drop_copies(self, table: BlockTable, ids: Ids) -> None:
        """Every copy of these blocks goes: at once, or as soon as the copier lets go of it."""
        copy_ids = table.copy_id[:, ids]
        for copy_id in copy_ids[copy_ids >= 0].tolist():
            copy = self._copies[copy_id]
            in_flight = copy.state is CopyState.IN_FLIGHT
            self._detach(copy)
            if in_flight:
                copy.state = CopyState.ORPHAN
            else:
                self._forget(copy)

    def _detach(self, copy: ScratchCopy) -> None:
        copy.table.copy_id[copy.kind, copy.block, copy.head] = -1
        copy.table.resident[copy.block] -= copy.state is CopyState.RESIDENT
        copy.table.location[copy.kind, copy.block, copy.head] = ~copy.source

    def _forget(self, copy: ScratchCopy) -> None:
        del self._copies[copy.copy_id]
        self.arenas.scratch.release(copy.target)

    # Checks

    def check_integrity(self) -> None:
        """Assert that every byte has one owner, that the accounts agree and that kernels would read the right places."""
        self.arenas.check()
        hot = originals = num_blocks = num_hot = 0
        for layout, table in self.tables.items():
            live = np.flatnonzero(table.references > 0)
            assert len(live) == table.num_live and (table.references >= 0).all(), "block ids are miscounted"
            assert (table.original_offset[live] >= 0).all() and not table.pins.any(), (
                "a live block without originals, or pinned"
            )
            full = live[table.hot_offset[live] >= 0]
            assert (table.references[np.setdiff1d(live, full)] == 1).all(), "a tail is shared"
            assert (np.flatnonzero(table.hot_offset >= 0) == full).all(), "a dead block owns a hot slot"
            hot += len(full) * self.arenas.hot.size_of(table.hot_block_bytes)
            originals += len(live) * self.arenas.originals.size_of(layout.original_block_bytes)
            num_blocks, num_hot = num_blocks + len(live), num_hot + len(full)
            self._check_locations(table, live)
        assert (hot, originals) == (self.arenas.hot.used_bytes, self.arenas.originals.used_bytes), "a pool leaks"
        assert (num_hot, num_blocks) == (self.arenas.hot.num_owned, self.arenas.originals.num_owned), (
            "a slot is owned twice"
        )
        assert len(self._copies) == self.arenas.scratch.num_owned, "scratch leaks"

    def _check_locations(self, table: BlockTable, live: Ids) -> None:
        assert (table.resident[live] == (table.location[:, live] >= 0).sum(axis=(0, 2))).all(), "records in scratch are miscounted"
        for kind in (0, 1):
            expected = ~table.record_offsets(kind, live)
            at = {int(block): i for i, block in enumerate(live)}
            for copy in self._copies.values():
                if copy.table is table and copy.kind == kind and copy.state is not CopyState.ORPHAN:
                    assert table.copy_id[kind, copy.block, copy.head] == copy.copy_id, "a record's copy is not its own"
                    if copy.state is CopyState.RESIDENT:
                        expected[at[copy.block], copy.head] = copy.target
            assert (table.location[kind, live] == expected).all(), "kernels would read the wrong place"
