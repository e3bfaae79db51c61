"""Copies to scratch against a list of what was ordered, over a device that takes a few at once and ends them when it likes."""

from collections import deque

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tierd_kernels import host
from tierd_kernels.copying import Copying
from tierd_kernels.layout import Memory

from tierd.migrator import CopyOrders, Migrator

LIMIT, SIZES = 12, (16, 32)
BYTES = LIMIT * max(SIZES)
Ints = NDArray[np.int64]


class Device:
    """Takes `at_once` copies. `ends`: those under way have ended, or `faulty`, which their end tells. `refuses`: the next are not begun."""

    def __init__(self, at_once: int) -> None:
        self.memory = Memory(np.zeros(0, np.uint8), np.zeros(BYTES, np.uint8), np.arange(BYTES, dtype=np.int64).astype(np.uint8))
        self.refuses = self.ends = self.faulty = False
        self.calls: list[tuple[int, int]] = []  # copies and bytes of each, of those that were begun
        self._at_once, self._idle = at_once, True

    def begin(self, sources: Ints, targets: Ints, nbytes: int) -> Copying:
        assert self._idle, "copies are under way"
        if self.refuses:
            raise RuntimeError("refused")
        some = slice(0, self._at_once)
        arrived = host.begin_copies(self.memory, sources[some], targets[some], nbytes).arrived
        self.calls.append((len(arrived), nbytes))
        self._idle = self.ends = self.faulty = False
        return Copying(self._done, arrived)

    def _done(self) -> bool:
        if self.faulty:
            self._idle = True
            raise RuntimeError("faulty")
        self._idle = self.ends
        return self.ends


def orders(first: int, count: int, nbytes: int) -> CopyOrders:
    """Of ids from `first` on; each has a place of its own to come from and go to."""
    ids = first + np.arange(count)
    return CopyOrders(ids, ids % LIMIT * max(SIZES), (LIMIT - 1 - ids % LIMIT) * max(SIZES), nbytes)


def digest(memory: Memory, copy_id: int, nbytes: int) -> int:
    start = copy_id % LIMIT * max(SIZES)
    return xxhash.xxh3_64_intdigest(memory.originals[start : start + nbytes].tobytes())


EVENTS = st.one_of(
    st.tuples(st.just("order"), st.integers(1, LIMIT), st.sampled_from(SIZES)),
    st.tuples(st.sampled_from(["end", "fault", "refuse", "accept", "poll", "wait"]), st.just(0), st.just(0)),
)


@given(st.integers(1, LIMIT), st.lists(EVENTS, max_size=40))
def test_each_copy_is_reported_once_in_order_as_it_ended(at_once: int, events: list[tuple[str, int, int]]) -> None:
    device = Device(at_once)
    migrator = Migrator(device.begin, LIMIT)
    waiting: deque[tuple[int, int]] = deque()  # (id, bytes) of what was ordered and not reported, in order
    told: list[tuple[int, int | None]] = []
    next_id = 0

    def poll() -> None:
        for done in migrator.poll():
            digests = [None] * len(done.ids) if done.digests is None else done.digests.tolist()
            told.extend(zip(done.ids.tolist(), digests, strict=True))

    def check() -> None:
        for copy_id, found in told:
            (expected,) = [item for item in waiting if item[0] == copy_id]
            waiting.remove(expected)
            assert found in (None, digest(device.memory, *expected))
        told.clear()
        assert migrator.room == LIMIT - len(waiting)

    for event, count, nbytes in events:
        if event == "order":
            count = min(count, migrator.room)
            if count:
                waiting.extend((next_id + i, nbytes) for i in range(count))
                migrator.submit(orders(next_id, count, nbytes))
                next_id += count
        elif event == "wait":
            if migrator.wait(0.0):
                poll()
                assert told, "something was said to be finished"
        elif event == "poll":
            poll()
        else:
            device.ends, device.faulty = device.ends or event == "end", device.faulty or event == "fault"
            device.refuses = event == "refuse" or (device.refuses and event != "accept")
        check()
    for _ in range(2 * LIMIT):  # whatever is left ends
        device.ends = True
        poll()
        check()
    assert not waiting


@pytest.mark.parametrize("at_once", [2, 8])
def test_copies_go_where_they_are_told_and_those_ordered_together_are_begun_together(at_once: int) -> None:
    device = Device(at_once)
    migrator = Migrator(device.begin, LIMIT)
    migrator.submit(orders(0, 5, 32))
    migrator.submit(orders(5, 2, 16))
    assert not migrator.wait(0.0) and migrator.poll() == [], "none has ended"
    while migrator.room < LIMIT:
        device.ends = True
        assert migrator.wait(0.0)
        migrator.poll()
    assert device.calls == ([(2, 32), (2, 32), (1, 32), (2, 16)] if at_once == 2 else [(5, 32), (2, 16)])
    originals, scratch = (x.reshape(LIMIT, -1) for x in (device.memory.originals, device.memory.scratch[:].copy()))
    np.testing.assert_array_equal(scratch[::-1][:5], originals[:5])
    np.testing.assert_array_equal(scratch[::-1][5:7, :16], originals[5:7, :16])
    assert not scratch[::-1][5:7, 16:].any() and not scratch[::-1][7:].any()


def test_copies_that_are_refused_are_reported_and_the_next_are_made() -> None:
    device = Device(8)
    migrator = Migrator(device.begin, LIMIT)
    device.refuses = True
    migrator.submit(orders(0, 2, 32))
    assert migrator.wait(1.0)
    device.refuses = False
    migrator.submit(orders(2, 1, 16))
    device.ends = True
    first, second = migrator.poll()
    assert (first.ids.tolist(), first.digests) == ([0, 1], None)
    assert second.digests is not None and second.digests.tolist() == [digest(device.memory, 2, 16)]


def test_no_more_are_taken_than_the_limit() -> None:
    migrator = Migrator(Device(1).begin, 1)
    with pytest.raises(AssertionError):
        migrator.submit(orders(0, 2, 16))
