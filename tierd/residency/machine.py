"""Owner of every block's state. Only whoever has the engine's turn may call it.

A block:

    add_tails        fill              release
  ----------> TAIL ---------> FULL ------------> gone
               ^  \\------------|---- release --> gone
               +--- reopen ----+
                 (one reference)

A record's copy in scratch (one block, keys or values, one KV head):

  HOST_ONLY --begin_copies-> IN_FLIGHT --finish_copies-> RESIDENT --evict, or block gone or reopened--> HOST_ONLY
                             |  ^  | \\
        failed once: retried +--+  |  +--failed twice--> BARRED --block gone or reopened--> HOST_ONLY
                                   |
            block gone or reopened +--> ORPHAN --finish_copies-> gone

A TAIL has its originals only and exactly one reference; a FULL block has a hot slot, checksums and any number of references
and is never written. A RESIDENT copy of a pinned table stays where it is. A copy has failed if none arrived or its bytes are not
the original's; kernels have not seen it. A BARRED record is read from the originals for as long as its block is full. An ORPHAN keeps its
scratch bytes until the copier has let go of them.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tierd_kernels.layout import Layout

from tierd.pools import Arenas
from tierd.residency.blocks import BARRED, NO_COPY, BlockTable, Ids
from tierd.residency.copies import Copies, CopyState, ScratchCopy
from tierd.residency.counting import add
from tierd.residency.moving import COPY, begin, detach, find_used, settle
from tierd.residency.reading import begun_before

NO_COPIES: Ids = np.empty(0, np.int64)
ATTEMPTS = 2  # a copy that failed so often is not tried again


class Finished(NamedTuple):
    """What became of copies that the copier is done with: ids of those that are resident now, and of those that failed for the first time,
    which are still in flight and must be made once more; how many failed, for the first time or the last. Of orphans nothing is said."""

    settled: Ids
    again: Ids
    failures: int


class Residency:
    """All tables and all scratch copies over one set of arenas. `hot_block_bytes`: of a layout's hot block, as the backend stores it."""

    def __init__(self, arenas: Arenas, hot_block_bytes: Callable[[Layout], int]) -> None:
        self.arenas = arenas
        self._hot_block_bytes = hot_block_bytes
        self.tables: dict[Layout, BlockTable] = {}
        self._numbered: list[BlockTable] = []
        self._copies = Copies()
        self._num_in_flight = self._turn = 0
        self._some_under_way = False  # when the turn began
        self._gone: Callable[[Ids, NDArray[np.bool_]], None] = lambda ids, used: None

    def on_gone(self, tell: Callable[[Ids, NDArray[np.bool_]], None]) -> None:
        """`tell` hears of all copies (ids [n]) whose scratch bytes are free again, for whatever reason, and whether each was ever read.
        Their ids stand for other copies soon after."""
        self._gone = tell

    def table(self, layout: Layout) -> BlockTable:
        """The table of `layout`, made when first asked for."""
        if layout not in self.tables:
            self.tables[layout] = BlockTable(layout, self.arenas, self._hot_block_bytes(layout), len(self._numbered))
            self._numbered.append(self.tables[layout])
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

    # Copies

    @property
    def num_copies(self) -> int:
        return len(self._copies)

    @property
    def num_in_flight(self) -> int:
        """Copies that the copier has not let go of, orphans too."""
        return self._num_in_flight

    def next_turn(self) -> None:
        """A new batch of calls begins."""
        self._turn += 1
        self._some_under_way = self._num_in_flight > 0

    def num_late(self, table: BlockTable, records: Ids, exact_heads: NDArray[np.bool_]) -> int:
        """Of these records (int64 [3, n]: kinds, block ids, heads; rows behind are not read), which the last batch read from the host, how
        many had a copy on its way when that began. It may have arrived meanwhile; one that failed for good is not counted, nor what
        `exact_heads` [Hkv] read, who never look for copies."""
        if not self._some_under_way:
            return 0
        return begun_before(records, exact_heads, table.copy_id, self._copies.turn, self._turn)

    def copies(self) -> Iterator[ScratchCopy]:
        """What is known of each copy now, in the order of their ids."""
        return (self.copy(copy_id) for copy_id in self._copies.ids.tolist())

    def copy(self, copy_id: int) -> ScratchCopy:
        """What is known of one copy now."""
        c, state = self._copies, CopyState(int(self._copies.state[copy_id]))
        assert state is not CopyState.GONE
        table, kind, block, head = self._numbered[c.table[copy_id]], int(c.kind[copy_id]), int(c.block[copy_id]), int(c.head[copy_id])
        return ScratchCopy(
            copy_id, table, kind, block, head, int(c.source[copy_id]), int(c.target[copy_id]), int(c.nbytes[copy_id]),
            int(c.failures[copy_id]), state, int(table.checksum[kind, block, head]),
            pinned=table.pins > 0 or state is not CopyState.RESIDENT,
        )  # fmt: skip

    def ways(self, ids: Ids) -> tuple[Ids, Ids, Ids]:
        """Where these copies come from and go to, byte offsets in originals and scratch, and how many bytes each."""
        return self._copies.source[ids], self._copies.target[ids], self._copies.nbytes[ids]

    def reserve(self, table: BlockTable, kind: int, count: int) -> Ids:
        """Byte offsets in scratch for so many of the table's records, of which copies begin next, fewer where there is no room. They are
        given back when the copies go."""
        return self.arenas.scratch[kind].allocate_some(table.layout.original_record_bytes, count)

    def begin_copies(self, table: BlockTable, kinds: Ids, blocks: Ids, heads: Ids, targets: Ids) -> Ids:
        """Of (distinct) host-only records of full blocks, to what was reserved for them: int64 [n] each. Returns the copies' ids."""
        like = np.array([(0, 0, 0, 0, table.layout.original_record_bytes, self._turn, table.number, CopyState.IN_FLIGHT, 0, 0)], COPY)
        ids = self._copies.reserve(len(targets))
        offsets = table.original_offset, table.hot_offset
        sound = begin(self._copies.records, ids, like, kinds, blocks, heads, targets, *offsets, table.notes, table.used, table.in_flight)
        assert sound, "a record is not of a full block, has a copy, or is given twice"
        self._num_in_flight += len(ids)
        return ids

    def refuse_copies(self, table: BlockTable, records: Ids) -> None:
        """The turn of these records [n, 3] (kinds, block ids, heads) has come, and those that have no copy get none: there is no room."""
        table.notes["waits"][*records.T] = 0

    def finish_copies(self, ids: Ids, digests: NDArray[np.uint64] | None) -> Finished:
        """The copier is done with these, and their bytes hash to `digests` (None: nothing arrived)."""
        good, blocks, records = np.zeros(len(ids), np.bool_), np.empty(len(ids), np.int64), self._copies.records
        if digests is not None:
            for table in self._tables_of(ids):
                of_table = table.checksum, table.location, table.in_flight, table.resident
                count = settle(records, ids, table.number, digests, *of_table, good, blocks)
                table.move(blocks[:count])
        if good.all():
            self._num_in_flight -= len(ids)
            return Finished(ids, NO_COPIES, 0)
        states = self._copies.state[ids]
        orphans, bad = ids[states == CopyState.ORPHAN], ids[states == CopyState.IN_FLIGHT]
        assert len(orphans) + len(bad) + np.count_nonzero(good) == len(ids)
        self._copies.failures[bad] += 1
        final = self._copies.failures[bad] >= ATTEMPTS
        self._give_up(bad[final])
        self._num_in_flight -= len(ids) - int(np.count_nonzero(~final))
        self._forget(orphans)
        return Finished(ids[good], bad[~final], len(bad))

    def evict(self, ids: Ids) -> None:
        """Drop resident copies that no running call can see."""
        assert (self._copies.state[ids] == CopyState.RESIDENT).all()
        assert not any(table.pins for table in self._tables_of(ids)), "a call reads the copy"
        self._detach(ids)
        self._forget(ids)

    def drop_copies(self, table: BlockTable, blocks: Ids) -> None:
        """Every copy of these blocks goes: at once, or as soon as the copier lets go of it."""
        at = table.copy_id[:, blocks]
        table.copy_id[:, blocks] = np.where(at == BARRED, NO_COPY, at)
        ids = at[at >= 0]
        if not len(ids):
            return
        in_flight = self._copies.state[ids] == CopyState.IN_FLIGHT
        self._detach(ids)
        add(table.in_flight, self._copies.block[ids[in_flight]], -1)
        self._copies.state[ids[in_flight]] = CopyState.ORPHAN
        self._forget(ids[~in_flight])

    def _give_up(self, ids: Ids) -> None:
        for table in self._tables_of(ids):
            kind, block, head = self._copies.at(ids[self._copies.table[ids] == table.number])
            table.copy_id[kind, block, head] = BARRED
            add(table.in_flight, block, -1)
        self._forget(ids)

    def _detach(self, ids: Ids) -> None:
        blocks = np.empty(len(ids), np.int64)
        for table in self._tables_of(ids):
            count = detach(self._copies.records, ids, table.number, table.location, table.notes, table.resident, blocks)
            table.move(blocks[:count])

    def _forget(self, ids: Ids) -> None:
        if not len(ids):
            return
        used = np.zeros(len(ids), np.bool_)
        for table in self._tables_of(ids):
            find_used(self._copies.records, ids, table.number, table.used, used)
        kinds = self._copies.kind[ids]
        for kind in set(kinds.tolist()):
            self.arenas.scratch[kind].release_many(self._copies.target[ids[kinds == kind]])
        self._gone(ids, used)
        self._copies.forget(ids)

    def _tables_of(self, ids: Ids) -> list[BlockTable]:
        """Those that these copies are of; mostly there is one."""
        if len(self._numbered) == 1:
            return self._numbered
        return [self._numbered[number] for number in np.unique(self._copies.table[ids]).tolist()]

    # Checks

    def check_integrity(self) -> None:
        """Assert that every byte has one owner, that the accounts agree and that kernels would read the right places."""
        self.arenas.check()
        hot = originals = num_blocks = num_hot = 0
        for layout, table in self.tables.items():
            live = np.flatnonzero(table.references > 0)
            assert len(live) == table.num_live and (table.references >= 0).all(), "block ids are miscounted"
            assert (table.original_offset[live] >= 0).all() and not table.pins, (
                "a live block without originals, or a pinned table"
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
        copies = list(self.copies())
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
        expected, at = table.layout.own_locations(table.original_offset[live]), {int(block): i for i, block in enumerate(live)}
        for copy in self.copies():
            if copy.table is table and copy.state is not CopyState.ORPHAN:
                assert table.copy_id[copy.kind, copy.block, copy.head] == copy.copy_id, "a record's copy is not its own"
                if copy.state is CopyState.RESIDENT:
                    expected[copy.kind, at[copy.block], copy.head] = copy.target
        assert (table.location[:, live] == expected).all(), "kernels would read the wrong place"
