"""The residency machine beside a few dicts: blocks with references, a pinned table, and copies in flight, resident, orphaned or barred."""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scratch_copies import copies_begun, original_at
from tierd_kernels.host import hot_block_bytes, reserve
from tierd_kernels.layout import Layout

from tierd.engine.counters import Counters
from tierd.engine.scratch import Asker, Scratch
from tierd.errors import CapacityExceeded, CertificateUnavailable
from tierd.notes import NOTE
from tierd.pools import Arenas
from tierd.residency import BARRED, NO_COPY, BlockTable, CopyState, Ids, Pinned, Residency, ScratchCopy, without_copies

LAYOUT = Layout(2, 64, 16, 16, "float16")
BLOCKS, HOT, COPIES = 6, 4, 3  # copies of each kind
Record = tuple[int, int, int]  # kind, block, head
RECORDS = [(kind, head) for kind in (0, 1) for head in (0, 1)]


def make() -> Residency:
    memory = reserve(HOT * LAYOUT.hot_block_bytes, 2 * COPIES * LAYOUT.original_record_bytes, BLOCKS * LAYOUT.original_block_bytes)
    return Residency(Arenas(memory), hot_block_bytes)


def ids(*blocks: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(blocks, np.int64)


@dataclass
class Block:
    full: bool = False
    references: int = 1


class Machine(RuleBasedStateMachine):
    """`copies`: id -> (copy as it began, the record it stands for, or None once orphaned). `failed`: ids of copies that failed once.
    `barred`: records. `told`: what the residency said of copies that ended, as (target, whether read); `ended`: what it should have."""

    @initialize()
    def begin(self) -> None:
        self.residency = make()
        self.table = self.residency.table(LAYOUT)
        self.blocks, self.copies = dict[int, Block](), dict[int, tuple[ScratchCopy, Record | None]]()
        self.failed, self.barred, self.read = set[int](), set[Record](), set[int]()
        self.pins = ExitStack()
        self.num_pins = 0
        self.told, self.ended = Counter[tuple[int, bool]](), Counter[tuple[int, bool]]()
        self.residency.on_gone(lambda gone, used: self.told.update(zip(self.residency.ways(gone)[1].tolist(), used.tolist(), strict=True)))

    @rule(count=st.integers(0, 3), seed=st.integers(0, 255))
    def add_tails(self, count: int, seed: int) -> None:
        if len(self.blocks) + count > BLOCKS:
            with pytest.raises(CapacityExceeded):
                self.table.add_tails(count)
            return
        for block in self.table.add_tails(count).tolist():
            assert block not in self.blocks
            self.blocks[block] = Block()
            for part in self.table.originals(block):
                part[:] = np.random.default_rng(seed + block).standard_normal(part.shape)

    @precondition(lambda self: self.which(full=False))
    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.which(full=False)))
        if len(self.which(full=True)) == HOT:
            with pytest.raises(CapacityExceeded):
                self.table.give_hot(ids(block))
            return
        self.table.give_hot(ids(block))
        self.table.seal(ids(block))
        self.blocks[block].full = True

    @precondition(lambda self: self.which(full=True))
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.which(full=True)))
        self.residency.retain(self.table, ids(block))
        self.blocks[block].references += 1

    @precondition(lambda self: self.which(full=False))
    @rule(data=st.data())
    def a_tail_is_never_shared(self, data: st.DataObject) -> None:
        with pytest.raises(AssertionError, match="never shared"):
            self.residency.retain(self.table, ids(data.draw(st.sampled_from(self.which(full=False)))))

    @precondition(lambda self: self.blocks and not self.num_pins)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.which()), unique=True, min_size=1, max_size=3))
        self.residency.release(self.table, ids(*chosen))
        for block in chosen:
            self.blocks[block].references -= 1
            if not self.blocks[block].references:
                del self.blocks[block]
                self.lose_copies(block)

    @precondition(lambda self: self.which(full=True, shared=False) and not self.num_pins)
    @rule(data=st.data())
    def reopen(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.which(full=True, shared=False)))
        self.residency.reopen(self.table, block)
        self.blocks[block].full = False
        self.lose_copies(block)
        self.table.originals(block)[0][:] += 1  # written again: a copy that comes back now would be stale

    @precondition(lambda self: self.uncopied())
    @rule(data=st.data(), kind=st.integers(0, 1))
    def begin_copies(self, data: st.DataObject, kind: int) -> None:
        """As many as there is room for, the first ones."""
        wanted = [record for record in self.uncopied() if record[0] == kind]
        records = data.draw(st.permutations(wanted))[: data.draw(st.integers(0, 4))]
        room = COPIES - sum(copy.kind == kind for copy, _ in self.copies.values())
        begun = copies_begun(self.residency, self.table, kind, ids(*(x[1] for x in records)), ids(*(x[2] for x in records)))
        assert len(begun) == min(room, len(records))
        for copy_id, record in zip(begun.tolist(), records, strict=False):
            assert copy_id not in self.copies
            self.copies[copy_id] = self.residency.copy(copy_id), record

    @precondition(lambda self: self.in_state(CopyState.IN_FLIGHT, CopyState.ORPHAN))
    @rule(data=st.data(), nothing=st.sampled_from([False, False, False, True]))
    def finish_copies(self, data: st.DataObject, nothing: bool) -> None:
        chosen = data.draw(st.permutations(self.in_state(CopyState.IN_FLIGHT, CopyState.ORPHAN)))[: data.draw(st.integers(1, 4))]
        good = [not nothing and data.draw(st.sampled_from([True, True, True, False])) for _ in chosen]
        digests = [self.landed(copy_id, arrives) for copy_id, arrives in zip(chosen, good, strict=True)]
        done = self.residency.finish_copies(ids(*chosen), None if nothing else np.array(digests, np.uint64))
        settled, again, failures = [], [], 0
        for copy_id, arrives in zip(chosen, good, strict=True):
            record = self.copies[copy_id][1]
            failures += record is not None and not arrives
            if record is not None and arrives:
                settled.append(copy_id)
            elif record is not None and copy_id not in self.failed:
                self.failed.add(copy_id)
                again.append(copy_id)
            else:
                self.barred |= {record} if record else set()
                self.end(copy_id)
        assert (done.settled.tolist(), done.again.tolist(), done.failures) == (settled, again, failures)

    def landed(self, copy_id: int, arrives: bool) -> int:
        """Copies its bytes, one of them wrong if it does not arrive; their hash."""
        copy, memory = self.copies[copy_id][0], self.residency.arenas.memory
        landing = memory.scratch[copy.target : copy.target + copy.nbytes]
        landing[:] = memory.originals[copy.source : copy.source + copy.nbytes]
        if not arrives:
            landing[7] ^= 1
        return int(xxhash.xxh3_64_intdigest(landing.data))

    @precondition(lambda self: self.in_state(CopyState.RESIDENT))
    @rule(data=st.data())
    def read_copy(self, data: st.DataObject) -> None:
        copy_id = data.draw(st.sampled_from(self.in_state(CopyState.RESIDENT)))
        record = self.copies[copy_id][1]
        assert record is not None
        self.table.used[record] = True
        self.read.add(copy_id)

    @precondition(lambda self: self.in_state(CopyState.RESIDENT))
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        chosen = data.draw(st.permutations(self.in_state(CopyState.RESIDENT)))[: data.draw(st.integers(1, 3))]
        if self.num_pins:
            with pytest.raises(AssertionError, match="a call reads"):
                self.residency.evict(ids(*chosen))
        else:
            self.residency.evict(ids(*chosen))
            for copy_id in chosen:
                self.end(copy_id)

    @precondition(lambda self: self.in_state(CopyState.IN_FLIGHT))
    @rule(data=st.data())
    def what_is_under_way_is_not_evicted(self, data: st.DataObject) -> None:
        with pytest.raises(AssertionError):
            self.residency.evict(ids(data.draw(st.sampled_from(self.in_state(CopyState.IN_FLIGHT)))))

    @rule()
    def pin(self) -> None:
        self.pins.enter_context(Pinned(self.table))
        self.num_pins += 1

    @precondition(lambda self: self.num_pins)
    @rule()
    def unpin_all(self) -> None:
        self.pins.close()
        self.num_pins = 0

    @precondition(lambda self: self.num_pins and self.which(shared=False))
    @rule(data=st.data())
    def what_is_read_is_not_freed(self, data: st.DataObject) -> None:
        """Asked of the table: a residency drops the block's copies before."""
        block = data.draw(st.sampled_from(self.which(shared=False)))
        with pytest.raises(AssertionError, match="a call reads"):
            self.table.free(ids(block))

    @invariant()
    def agrees(self) -> None:
        arenas, table = self.residency.arenas, self.table
        of_kind = [sum(copy.kind == kind for copy, _ in self.copies.values()) for kind in (0, 1)]
        assert [pool.num_owned for pool in arenas.pools] == [len(self.which(full=True)), *of_kind, len(self.blocks)]
        assert self.residency.num_in_flight == len(self.in_state(CopyState.IN_FLIGHT, CopyState.ORPHAN)) and self.told == self.ended
        assert table.num_live == len(self.blocks)
        assert [copy.copy_id for copy in self.residency.copies()] == sorted(self.copies)
        resident = {self.copies[copy.copy_id][1]: copy for copy in self.residency.copies() if copy.state is CopyState.RESIDENT}
        for block, expected in self.blocks.items():
            assert table.references[block] == expected.references
            for kind, head in RECORDS:
                copy = resident.get((kind, block, head))
                assert (table.copy_id[kind, block, head] == BARRED) == ((kind, block, head) in self.barred)
                assert table.location[kind, block, head] == (copy.target if copy else ~original_at(table, kind, block, head))
                if copy:
                    seen = arenas.memory.scratch[copy.target : copy.target + copy.nbytes].view(np.float16)
                    np.testing.assert_array_equal(seen, table.originals(block)[kind][head].reshape(-1))
        for copy in self.residency.copies():
            began, record = self.copies[copy.copy_id]
            assert (copy.kind, copy.block, copy.head, copy.source, copy.target) == (
                began.kind, began.block, began.head, began.source, began.target)  # fmt: skip
            assert (copy.state is CopyState.ORPHAN) == (record is None) and copy.failures == (copy.copy_id in self.failed)
            assert copy.pinned == (copy.state is not CopyState.RESIDENT or self.num_pins > 0)
        if not self.num_pins:
            self.residency.check_integrity()

    def which(self, full: bool | None = None, shared: bool | None = None) -> list[int]:
        return [i for i, b in sorted(self.blocks.items())
                if (full is None or b.full == full) and (shared is None or (b.references > 1) == shared)]  # fmt: skip

    def uncopied(self) -> list[Record]:
        have = {record for _, record in self.copies.values()} | self.barred
        every = [(kind, block, head) for block in self.which(full=True) for kind, head in RECORDS]
        return [record for record in every if record not in have]

    def in_state(self, *states: CopyState) -> list[int]:
        return [copy.copy_id for copy in self.residency.copies() if copy.state in states]

    def end(self, copy_id: int) -> None:
        copy, _ = self.copies.pop(copy_id)
        self.ended[copy.target, copy_id in self.read] += 1
        self.failed.discard(copy_id)  # ids are used again
        self.read.discard(copy_id)

    def lose_copies(self, block: int) -> None:
        self.barred = {record for record in self.barred if record[1] != block}
        kept = {copy.copy_id for copy in self.residency.copies()}
        for copy_id, (copy, record) in list(self.copies.items()):
            if record is not None and record[1] == block:
                if copy_id in kept:
                    self.copies[copy_id] = copy, None
                else:
                    self.end(copy_id)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=50)


@pytest.mark.parametrize("damage", ["references", "hot", "location", "pin", "copy", "in flight", "id"])
def test_the_integrity_check_notices(damage: str) -> None:
    residency = make()
    table = residency.table(LAYOUT)
    block = int(table.add_tails(2)[0])
    table.give_hot(ids(block))
    table.seal(ids(block))
    copy = residency.copy(int(copies_begun(residency, table, 0, ids(block), ids(1))[0]))
    residency.check_integrity()
    match damage:
        case "references":
            table.references[block] -= 1
        case "hot":
            residency.arenas.hot.allocate(1)
        case "location":
            table.location[0, block, 1] = copy.target
        case "pin":
            table.pins += 1
        case "copy":
            residency.arenas.scratch[0].release(copy.target)
        case "in flight":
            table.in_flight[block] += 1
        case "id":
            table.copy_id[1, block, 0] = 7
    with pytest.raises(AssertionError):
        residency.check_integrity()


def filled(table: BlockTable, count: int) -> Ids:
    """Full blocks."""
    blocks = table.add_tails(count)
    table.give_hot(blocks)
    table.seal(blocks)
    return blocks


def test_a_copy_made_again_is_unread_until_it_is_read_itself() -> None:
    residency = make()
    table = residency.table(LAYOUT)
    block = filled(table, 1)
    told: list[bool] = []
    residency.on_gone(lambda gone, used: told.extend(used.tolist()))
    for read in (True, False):
        copies = copies_begun(residency, table, 1, block, ids(0))
        assert residency.finish_copies(copies, table.checksum[1, block, 0]).settled.tolist() == copies.tolist()
        table.used[1, block, 0] |= read
        residency.evict(copies)
    assert told == [True, False]


def test_a_record_waits_until_its_copy_begins_or_is_refused() -> None:
    residency = make()
    table = residency.table(LAYOUT)
    block = filled(table, 1)
    table.notes["waits"][:, block] = 1
    copies_begun(residency, table, 1, block, ids(0))
    assert table.notes["waits"][:, block[0]].tolist() == [[1, 1], [0, 1]]
    residency.refuse_copies(table, np.array([[0, block[0], 1]]))
    assert table.notes["waits"][:, block[0]].tolist() == [[1, 0], [0, 1]]
    residency.release(table, block)
    assert not table.notes["waits"][:, table.add_tails(1)].any(), "a new block's records have no past"


def test_no_record_gets_two_copies_at_once() -> None:
    residency = make()
    table = residency.table(LAYOUT)
    block = filled(table, 1)
    with pytest.raises(AssertionError, match="given twice"):
        copies_begun(residency, table, 0, np.repeat(block, 2), ids(1, 1))


def test_a_tail_gets_no_copy() -> None:
    residency = make()
    table = residency.table(LAYOUT)
    with pytest.raises(AssertionError, match="not of a full block"):
        copies_begun(residency, table, 0, table.add_tails(1), ids(0))


def test_a_corrupt_record_is_named() -> None:
    residency = make()
    table = residency.table(LAYOUT)
    block = int(filled(table, 1)[0])
    table.require_sound(block)
    residency.arenas.memory.originals[original_at(table, 1, block, 1) + 5] ^= 0x20
    with pytest.raises(CertificateUnavailable, match=f"values of block {block}, KV head 1"):
        table.require_sound(block)
    records = np.array([[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]])
    for which, bad in (([0, 0, 1, 1], [(1, block, 1)]), ([0, 0, 1, 0], []), ([1, 1, 0, 0], []), ([0, 0, 0, 0], [])):
        some = table.stored(records, np.array(which, np.bool_), np.array([block]))
        assert table.corrupt(some) == bad and some.shape == (5, sum(which))
        assert np.array_equal(some[3], original_at(table, *some[:3]))


def test_a_pin_that_is_released_early_leaves_the_others() -> None:
    table = make().table(LAYOUT)
    with Pinned(table):
        with Pinned(table) as early:
            early.release()
            early.release()
            assert table.pins == 1
        assert table.pins == 1
    assert table.pins == 0


@pytest.mark.parametrize("evicted", [True, False])
def test_copies_of_two_tables_come_and_go_together(evicted: bool) -> None:
    """Block for block and head for head the same records, down to their bytes, of geometries that share the pools."""
    owner = Residency(Arenas(reserve(1 << 20, 1 << 20, 1 << 20)), hot_block_bytes)
    tables, copies = [owner.table(layout) for layout in (LAYOUT, replace(LAYOUT, value_group=32))], list[Ids]()
    for table in tables:
        blocks = table.add_tails(2)
        table.give_hot(blocks)
        table.seal(blocks)
        for kind in (0, 1):
            copies.append(copies_begun(owner, table, kind, blocks, ids(1, 1)))
    every = np.concatenate(copies)
    checksums = np.array([owner.copy(copy_id).checksum for copy_id in every.tolist()], np.uint64)
    wrong = checksums.copy()
    wrong[[0, -1]] += np.uint64(1)
    finished = owner.finish_copies(every, wrong)
    assert finished.settled.tolist() == every[1:-1].tolist() and finished.again.tolist() == every[[0, -1]].tolist()
    assert finished.failures == 2
    owner.check_integrity()
    assert owner.finish_copies(finished.again, checksums[[0, -1]]).settled.tolist() == finished.again.tolist()
    owner.check_integrity()
    tables[1].used[1, 1, 1] = True
    told = list[tuple[int, bool]]()
    owner.on_gone(lambda gone, used: told.extend(zip(gone.tolist(), used.tolist(), strict=True)))
    if evicted:
        owner.evict(every)
    else:
        for table in tables:
            owner.drop_copies(table, ids(0, 1))
    assert sorted(told) == [(copy_id, copy_id == every[-1]) for copy_id in sorted(every.tolist())] and owner.num_copies == 0
    owner.check_integrity()


RECORDS_ASKED = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(0, 1)), unique=True)


@given(RECORDS_ASKED, st.lists(st.sampled_from([NO_COPY, BARRED, 0, 7]), min_size=20, max_size=20))
def test_only_records_that_may_get_a_copy_are_asked_for(asked: list[Record], copy_ids: list[int]) -> None:
    notes = np.zeros((2, 5, 2), NOTE)
    notes["copy_id"] = np.array(copy_ids).reshape(2, 5, 2)
    records, of = np.array(asked, np.int64).reshape(-1, 3), np.arange(len(asked)) * 7 % 3
    blocks, heads, worths, whose, num_keys = without_copies(records, np.arange(len(asked), dtype=float), of, notes)
    expected = [(i, *x) for i, x in enumerate(asked) if notes["copy_id"][x] == NO_COPY]
    expected.sort(key=lambda x: (x[1], x[0]))
    kinds = [0] * num_keys + [1] * (len(blocks) - num_keys)
    assert list(zip(worths.tolist(), kinds, blocks.tolist(), heads.tolist(), strict=True)) == expected
    assert whose.tolist() == of[worths.astype(int)].tolist()


def test_copies_are_their_own_askers_where_not_all_have_room() -> None:
    owner = Residency(Arenas(reserve(1 << 20, 2 * 3 * LAYOUT.original_record_bytes, 1 << 20)), hot_block_bytes)
    table, scratch = owner.table(LAYOUT), Scratch(owner, Counters(), lambda asker, count: None)
    blocks = filled(table, 8)
    askers = np.array([Asker("session", "family", 8, layer, LAYOUT.original_record_bytes) for layer in range(8)], object)
    placed = scratch.place(askers, table, blocks, np.zeros(8, np.int64), np.ones(8), 4, 1.0, ["family"])
    copies = [owner.copy(copy_id) for copy_id in placed.ids.tolist()]
    assert placed.short == [0, 1] and [(copy.kind, copy.block) for copy in copies] == [(at // 4, blocks[at]) for at in (0, 1, 2, 4, 5, 6)]
    assert [next(iter(scratch.askers(ids(copy.copy_id)))).layer for copy in copies] == [0, 1, 2, 4, 5, 6]


def test_room_that_is_there_in_pieces_is_made_whole() -> None:
    """Records of 16 and of 32 bits share a pool: every other small one goes, and a large one takes the place of the two that stay, too."""
    small, large = LAYOUT, replace(LAYOUT, dtype="float32")
    owner = Residency(Arenas(reserve(1 << 20, 2 * 4 * small.original_record_bytes, 1 << 20)), hot_block_bytes)
    counters, placed = Counters(), dict[str, Ids]()
    scratch = Scratch(owner, counters, lambda asker, count: None)
    for name, layout, heads in (("small", small, ids(0, 1, 0, 1)), ("large", large, ids(0))):
        table, askers = owner.table(layout), np.full(len(heads), Asker(name, "family", 1, 0, layout.original_record_bytes), object)
        blocks = table.add_tails(2)
        table.give_hot(blocks)
        table.seal(blocks)
        if name == "large":
            owner.evict(placed["small"][[0, 2]])
            assert owner.arenas.scratch[0].free_bytes == large.original_record_bytes
        its = blocks[ids(0, 0, 1, 1)[: len(heads)]]
        placed[name] = scratch.place(askers, table, its, heads, np.full(len(heads), 1.0 + len(placed)), len(heads), 1.0, ["family"]).ids
        assert len(placed[name]) == len(heads)
        checksums = np.array([owner.copy(copy_id).checksum for copy_id in placed[name].tolist()], np.uint64)
        scratch.arrive(owner.finish_copies(placed[name], checksums).settled)
    assert counters.evicted == 2 and [copy.copy_id for copy in owner.copies()] == placed["large"].tolist()
    owner.check_integrity()
