"""The range allocator beside a bitmap."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tierd.errors import CapacityExceeded
from tierd.pools import RangeAllocator

UNIT = 64


class Ranges(RuleBasedStateMachine):
    """`taken`: one flag per unit of the arena; `owned`: offset -> bytes asked for."""

    @initialize(units=st.integers(0, 40), odd=st.integers(0, UNIT - 1))
    def begin(self, units: int, odd: int) -> None:
        self.pool = RangeAllocator(units * UNIT + odd, UNIT, "test")
        self.taken, self.owned = np.zeros(units, bool), dict[int, int]()
        self.sizes: set[int] = set()

    @rule(nbytes=st.integers(1, 12 * UNIT))
    def allocate(self, nbytes: int) -> None:
        fits = max(self.runs(), default=0) >= units_of(nbytes)
        if fits:
            self.note(self.pool.allocate(nbytes), nbytes)
        else:
            with pytest.raises(CapacityExceeded, match=self.numbers()):
                self.pool.allocate(nbytes)

    @rule(nbytes=st.integers(1, 4 * UNIT), count=st.integers(0, 12))
    def allocate_many(self, nbytes: int, count: int) -> None:
        most = sum(run // units_of(nbytes) for run in self.runs())
        try:
            offsets = self.pool.allocate_many(nbytes, count)
        except CapacityExceeded:
            # Ranges of several sizes may be split in the wrong place; of one size there is always a right one.
            assert count > most or self.sizes != {units_of(nbytes)}
            self.sizes.add(units_of(nbytes))
            return
        assert count <= most and offsets.dtype == np.int64 and offsets.shape == (count,)
        for offset in offsets.tolist():
            self.note(offset, nbytes)

    @rule(nbytes=st.integers(1, 4 * UNIT), most=st.integers(0, 12))
    def allocate_some(self, nbytes: int, most: int) -> None:
        room = sum(run // units_of(nbytes) for run in self.runs())
        offsets = self.pool.allocate_some(nbytes, most)
        assert offsets.dtype == np.int64 and len(offsets) <= min(most, room)
        if len(offsets) < min(most, room):  # as above
            assert self.sizes != {units_of(nbytes)}
            self.sizes.add(units_of(nbytes))
        for offset in offsets.tolist():
            self.note(offset, nbytes)

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), count=st.integers(1, 6))
    def release_many(self, data: st.DataObject, count: int) -> None:
        offsets = data.draw(st.permutations(sorted(self.owned)))[:count]
        for offset in offsets:
            self.taken[offset // UNIT : offset // UNIT + units_of(self.owned.pop(offset))] = False
        self.pool.release_many(np.array(offsets, np.int64))

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), count=st.integers(1, 4))
    def release(self, data: st.DataObject, count: int) -> None:
        for offset in data.draw(st.permutations(sorted(self.owned)))[:count]:
            at = offset // UNIT
            self.taken[at : at + units_of(self.owned.pop(offset))] = False
            self.pool.release(offset)

    @rule(offset=st.integers(0, 40 * UNIT))
    def release_what_is_not_owned(self, offset: int) -> None:
        if offset not in self.owned:
            with pytest.raises(AssertionError, match="not owned"):
                self.pool.release(offset)
            with pytest.raises(AssertionError, match="not owned"):
                self.pool.release_many(np.array([offset]))

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        assert self.pool.used_bytes == UNIT * int(self.taken.sum())
        assert self.pool.used_bytes + self.pool.free_bytes == self.pool.total_bytes == UNIT * len(self.taken)
        assert self.pool.num_owned == len(self.owned)

    def teardown(self) -> None:
        """Once all is given back, one range takes the whole arena."""
        for offset in self.owned if hasattr(self, "pool") else ():
            self.pool.release(offset)
        if hasattr(self, "pool") and self.pool.total_bytes:
            assert self.pool.allocate(self.pool.total_bytes) == 0

    def note(self, offset: int, nbytes: int) -> None:
        at, units = offset // UNIT, units_of(nbytes)
        assert offset % UNIT == 0 and at + units <= len(self.taken), "outside the arena, or not aligned"
        assert not self.taken[at : at + units].any(), "a byte has two owners"
        self.taken[at : at + units] = True
        self.owned[offset] = nbytes
        self.sizes.add(units)

    def runs(self) -> list[int]:
        """Lengths of the runs of free units."""
        edges = np.flatnonzero(np.diff(np.concatenate([[True], self.taken, [True]]).astype(np.int8)))
        return [int(run) for run in edges[1::2] - edges[::2]]

    def numbers(self) -> str:
        used = UNIT * int(self.taken.sum())
        return f"{used} used, {UNIT * len(self.taken) - used} free of {UNIT * len(self.taken)}"


def units_of(nbytes: int) -> int:
    return -(-nbytes // UNIT)


TestRanges = Ranges.TestCase
TestRanges.settings = settings(max_examples=150, stateful_step_count=40)


def test_neighbours_that_came_back_are_merged_before_anything_is_refused() -> None:
    pool = RangeAllocator(6 * UNIT, UNIT)
    offsets = pool.allocate_many(UNIT, 6).tolist()
    for offset in (offsets[3], offsets[1], offsets[2]):
        pool.release(offset)
    assert pool.allocate(3 * UNIT) == offsets[1]
    with pytest.raises(CapacityExceeded, match=f"cannot hold {UNIT} more bytes: {6 * UNIT} used, 0 free"):
        pool.allocate(1)


def test_many_ranges_are_taken_all_or_none() -> None:
    pool = RangeAllocator(5 * UNIT, UNIT)
    offsets = pool.allocate_many(UNIT, 5).tolist()
    pool.release(offsets[0])
    pool.release(offsets[2])
    pool.release(offsets[3])
    with pytest.raises(CapacityExceeded):
        pool.allocate_many(2 * UNIT - 1, 2)  # three units are free, but only one pair of them
    with pytest.raises(CapacityExceeded):
        pool.allocate_many(UNIT, 4)
    pool.check()
    assert pool.used_bytes == 2 * UNIT
    assert sorted(pool.allocate_many(UNIT, 3).tolist()) == [offsets[0], offsets[2], offsets[3]]
