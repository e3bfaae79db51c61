"""Owner of every block's state. Only the engine's thread may call it.

A block:

    add_tails        fill              release
  ----------> TAIL ---------> FULL ------------> gone
               ^  \\------------|---- release --> gone
               +--- reopen ----+
                 (one reference)

A record's copy in scratch (one block, keys or values, one KV head):

  HOST_ONLY --begin_copy--> IN_FLIGHT --finish_copy--> RESIDENT --evict, or block gone or reopened--> HOST_ONLY
                             |  ^  | \\
        failed once: retried +--+  |  +--failed twice--> BARRED --block gone or reopened--> HOST_ONLY
                                   |
            block gone or reopened +--> ORPHAN --finish_copy--> gone

A TAIL has its originals only and exactly one reference; a FULL block has a hot slot, checksums and any number of references
and is never written. A RESIDENT copy of a pinned block stays where it is. A copy has failed if none arrived or its bytes are not
the original's; kernels have not seen it. A BARRED record is read from the originals for as long as its block is full. An ORPHAN keeps its
scratch bytes until the copier has let go of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
from tierd_kernels.layout import Layout

from tierd.pools import Arenas
from tierd.residency.blocks import BARRED, NO_COPY, BlockTable, Ids

ATTEMPTS = 2  # a copy that failed so often is not tried again


class CopyState(Enum):
    """Where a copy stands; a record without a copy is host only, or barred."""

    IN_FLIGHT = "in flight"
    RESIDENT = "resident"
    ORPHAN = "orphan"


@dataclass
class ScratchCopy:
    """One original record's copy. `source`, `target`: byte offsets in originals and scratch. `failures`: attempts that failed."""

    copy_id: int
    table: BlockTable
    kind: int
    block: int
    head: int
    source: int
    target: int
    nbytes: int
    failures: int = 0
    state: CopyState = CopyState.IN_FLIGHT

    @property
    def checksum(self) -> int:
        """Of the original. Meaningless once orphaned."""
        return int(self.table.checksum[self.kind, self.block, self.head])

    @property
    def pinned(self) -> bool:
        """It may not be evicted."""
        return bool(self.table.pins[self.block] > 0) or self.state is not CopyState.RESIDENT


class Residency:
    """All tables and all scratch copies over one set of arenas. `hot_block_bytes`: of a layout's hot block, as the backend stores it."""

    def __init__(self, arenas: Arenas, hot_block_bytes: Callable[[Layout], int]) -> None:
        self.arenas = arenas
        self._hot_block_bytes = hot_block_bytes
        self.tables: dict[Layout, BlockTable] = {}
        self._copies: dict[int, ScratchCopy] = {}
        self._next_copy_id = 0
        self._num_in_flight = 0
        self._gone: Callable[[ScratchCopy, bool], None] = lambda copy, used: None

    def on_gone(self, tell: Callable[[ScratchCopy, bool], None]) -> None:
        """`tell` hears of every copy whose scratch bytes are free again, for whatever reason, and whether it was ever read."""
        self._gone = tell

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

    @property
    def num_in_flight(self) -> int:
        """Copies that the copier has not let go of, orphans too."""
        return self._num_in_flight

    def copies(self) -> Iterator[ScratchCopy]:
        """All of them, oldest first; read only."""
        return iter(self._copies.values())

    def copy(self, copy_id: int) -> ScratchCopy | None:
        """None: it is gone."""
        return self._copies.get(copy_id)

    def begin_copy(self, table: BlockTable, kind: int, block: int, head: int) -> ScratchCopy:
        """Reserve scratch for a host-only record of a full block. Raises CapacityExceeded; nothing changes then."""
        assert table.hot_offset[block] >= 0 and table.copy_id[kind, block, head] == NO_COPY
        nbytes = table.layout.original_record_bytes
        target = self.arenas.scratch[kind].allocate(nbytes)
        source = table.record_offset(kind, block, head)
        copy = ScratchCopy(self._next_copy_id, table, kind, block, head, source, target, nbytes)
        self._next_copy_id += 1
        self._copies[copy.copy_id] = copy
        table.copy_id[kind, block, head] = copy.copy_id
        table.used[kind, block, head] = False
        table.in_flight[block] += 1
        self._num_in_flight += 1
        return copy

    def finish_copy(self, copy_id: int, digest: int | None) -> ScratchCopy | None:
        """The copier is done and its bytes hash to `digest` (None: none arrived). A first failure returns the copy, which is still in
        flight and must be copied again."""
        copy = self._copies[copy_id]
        if copy.state is CopyState.ORPHAN:
            self._num_in_flight -= 1
            self._forget(copy)
            return None
        assert copy.state is CopyState.IN_FLIGHT
        at = copy.kind, copy.block, copy.head
        good = digest == copy.checksum
        if not good:
            copy.failures += 1
            if copy.failures < ATTEMPTS:
                return copy
        self._num_in_flight -= 1
        copy.table.in_flight[copy.block] -= 1
        if good:
            copy.state = CopyState.RESIDENT
            copy.table.location[at] = copy.target
            copy.table.resident[copy.block] += 1
            copy.table.touch(copy.block)
        else:
            copy.table.copy_id[at] = BARRED
            self._forget(copy)
        return None

    def evict(self, copy_id: int) -> None:
        """Drop a resident copy that no running call can see."""
        copy = self._copies[copy_id]
        assert not copy.pinned
        self._detach(copy)
        self._forget(copy)

    def drop_copies(self, table: BlockTable, ids: Ids) -> None:
        """Every copy of these blocks goes: at once, or as soon as the copier lets go of it."""
        copy_ids = table.copy_id[:, ids]
        table.copy_id[:, ids] = np.where(copy_ids == BARRED, NO_COPY, copy_ids)
        for copy_id in copy_ids[copy_ids >= 0].tolist():
            copy = self._copies[copy_id]
            in_flight = copy.state is CopyState.IN_FLIGHT
            self._detach(copy)
            if in_flight:
                copy.state = CopyState.ORPHAN
                table.in_flight[copy.block] -= 1
            else:
                self._forget(copy)

    def _detach(self, copy: ScratchCopy) -> None:
        copy.table.resident[copy.block] -= copy.state is CopyState.RESIDENT
        copy.table.copy_id[copy.kind, copy.block, copy.head] = NO_COPY
        copy.table.location[copy.kind, copy.block, copy.head] = ~copy.source
        copy.table.touch(copy.block)

    def _forget(self, copy: ScratchCopy) -> None:
        del self._copies[copy.copy_id]
        self.arenas.scratch[copy.kind].release(copy.target)
        used = copy.state is CopyState.RESIDENT and bool(copy.table.used[copy.kind, copy.block, copy.head])
        self._gone(copy, used)

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
        self._check_copies()

    def _check_copies(self) -> None:
        copies = self._copies.values()
        for kind, pool in enumerate(self.arenas.scratch):
            held = {copy.target: pool.size_of(copy.nbytes) for copy in copies if copy.kind == kind}
            assert len(held) == sum(copy.kind == kind for copy in copies) == pool.num_owned, "scratch leaks"
            assert sum(held.values()) == pool.used_bytes, "scratch is miscounted"
        assert sum(copy.state is not CopyState.RESIDENT for copy in copies) == self._num_in_flight, "copies in flight are miscounted"
        for table in self.tables.values():
            blocks = [copy.block for copy in copies if copy.table is table and copy.state is CopyState.IN_FLIGHT]
            counts = np.bincount(np.array(blocks, np.int64), minlength=len(table.in_flight))
            assert (counts == table.in_flight).all(), "a block's copies in flight are miscounted"
            attached = sum(copy.table is table and copy.state is not CopyState.ORPHAN for copy in copies)
            assert np.count_nonzero(table.copy_id >= 0) == attached, "a record has a copy that does not exist"

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
