"""The small parts: who has a lease, the copier, names and clocks."""

from functools import partial

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray
from tierd_kernels.host import copy_to_scratch
from tierd_kernels.layout import Memory

from tierd.clock import ManualClock, SystemClock
from tierd.ids import new_epoch, new_session_id
from tierd.leases import Leases
from tierd.migrator import CopiesDone, CopyOrders, Migrator


def test_leases() -> None:
    clock = ManualClock()
    leases = Leases(clock, 10.0)
    leases.touch("stranger")
    leases.bind("a", "s2")
    leases.bind("a", "s1")
    clock.advance(4.0)
    leases.bind("b", "s3")
    assert (leases.num_workers, leases.sessions_of("a"), leases.sessions_of("stranger")) == (2, ["s1", "s2"], [])
    clock.advance(6.0)
    assert leases.expired() == []
    clock.advance(0.1)
    assert leases.expired() == ["a"]
    leases.touch("a")
    clock.advance(5.0)
    assert leases.expired() == ["b"]
    leases.unbind("b", "s3")
    leases.unbind("a", "s1")
    assert (leases.expired(), leases.num_workers, leases.sessions_of("a")) == ([], 1, ["s2"])
    with pytest.raises(KeyError):
        leases.unbind("b", "s3")


def orders(nbytes: int, *each: tuple[int, int, int]) -> CopyOrders:
    """Of (id, source, target)."""
    ids, sources, targets = (np.array(column, np.int64) for column in zip(*each, strict=True))
    return CopyOrders(ids, sources, targets, nbytes)


def told(done: list[CopiesDone]) -> dict[int, int | None]:
    """Digest by id, in order."""
    found: dict[int, int | None] = {}
    for each in done:
        digests = [None] * len(each.ids) if each.digests is None else each.digests.tolist()
        found |= zip(each.ids.tolist(), digests, strict=True)
    return found


def make_migrator(limit: int) -> tuple[Migrator, Memory]:
    memory = Memory(np.zeros(0, np.uint8), np.zeros(256, np.uint8), np.arange(256, dtype=np.uint8))
    return Migrator(partial(copy_to_scratch, memory), limit), memory


@pytest.mark.parametrize("threaded", [False, True])
def test_a_copy_that_fails_is_reported_and_the_next_is_done(threaded: bool) -> None:
    memory = make_migrator(1)[1]

    def copier(sources: NDArray[np.int64], targets: NDArray[np.int64], nbytes: int) -> NDArray[np.uint8]:
        if 64 in sources:
            raise RuntimeError("broken")
        return copy_to_scratch(memory, sources, targets, nbytes)

    migrator = Migrator(copier, 2)
    if threaded:
        migrator.start()
    migrator.submit(orders(32, (5, 64, 128)))
    migrator.submit(orders(16, (6, 0, 0)))
    if threaded:
        migrator.stop()
    assert told(migrator.poll()) == {5: None, 6: xxhash.xxh3_64_intdigest(bytes(range(16)))}
    assert migrator.room == 2


@pytest.mark.parametrize("threaded", [False, True])
def test_the_copier_copies_what_it_is_told(threaded: bool) -> None:
    migrator, memory = make_migrator(3)
    if threaded:
        migrator.start()
    migrator.submit(orders(32, (5, 64, 128)))
    migrator.submit(orders(16, (6, 0, 0)))
    assert migrator.room == 1
    if threaded:
        migrator.stop()
    expected = {i: xxhash.xxh3_64_intdigest(bytes(range(a, b))) for i, a, b in ((5, 64, 96), (6, 0, 16))}
    assert told(migrator.poll()) == expected and migrator.poll() == [] and migrator.room == 3
    np.testing.assert_array_equal(memory.scratch[128:160], np.arange(64, 96))
    np.testing.assert_array_equal(memory.scratch[:16], np.arange(16))
    assert not memory.scratch[16:128].any() and not memory.scratch[160:].any()


def test_copies_of_one_size_that_wait_together_are_one_call() -> None:
    _, memory = make_migrator(9)
    calls: list[tuple[list[int], list[int], int]] = []

    def copier(sources: NDArray[np.int64], targets: NDArray[np.int64], nbytes: int) -> NDArray[np.uint8]:
        calls.append((sources.tolist(), targets.tolist(), nbytes))
        return copy_to_scratch(memory, sources, targets, nbytes)

    migrator = Migrator(copier, 9)
    for each in (orders(16, (1, 0, 16)), orders(16, (2, 64, 0), (5, 16, 32)), orders(32, (3, 32, 64)), orders(16, (4, 128, 128))):
        migrator.submit(each)
    done = migrator.poll()
    assert calls == [([0, 64, 16], [16, 0, 32], 16), ([32], [64], 32), ([128], [128], 16)]
    ranges = {1: (0, 16), 2: (64, 80), 5: (16, 32), 3: (32, 64), 4: (128, 144)}
    assert told(done) == {i: xxhash.xxh3_64_intdigest(bytes(range(a, b))) for i, (a, b) in ranges.items()}


def test_the_copier_takes_no_more_than_its_limit() -> None:
    migrator, _ = make_migrator(1)
    with pytest.raises(AssertionError):
        migrator.submit(orders(16, (1, 0, 0), (2, 0, 16)))


def test_names_are_never_the_same() -> None:
    assert len({new_session_id() for _ in range(1000)} | {new_epoch() for _ in range(1000)}) == 2000
    assert all(name.startswith("s-") and len(name) == 18 for name in (new_session_id() for _ in range(10)))


def test_clocks_do_not_run_backwards() -> None:
    clock = SystemClock()
    assert clock.now() <= clock.now()
    with pytest.raises(AssertionError):
        ManualClock().advance(-1.0)
