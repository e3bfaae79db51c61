"""Places that are kept from call to call are those that the table has, whatever happened in between."""

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scratch_copies import copies_begun
from tierd_kernels.in_scratch import InScratch
from tierd_kernels.layout import Layout, Memory

from tierd.pools import Arenas
from tierd.residency import NO_COPY, BlockTable, Places, Residency

LAYOUT = Layout(2, 64, 16, 16, "float16")
KINDS = "grow", "fill", "cut", "reopen", "copy", "evict"
WEIGHTS = 2, 3, 1, 1, 8, 2  # so that at most times some copies are there


def residency() -> Residency:
    size = LAYOUT.original_block_bytes
    hot, scratch, originals = (np.zeros(n, np.uint8) for n in (400 * LAYOUT.hot_block_bytes, 30 * size, 400 * size))
    return Residency(Arenas(Memory(hot, scratch, originals)), lambda layout: layout.hot_block_bytes)


@given(st.randoms(use_true_random=False))
def test_places_are_the_tables(random: Random) -> None:
    owner, places = residency(), Places()
    table = owner.table(LAYOUT)
    ids, full = np.empty(0, np.int64), 0
    for event in random.choices(KINDS, WEIGHTS, k=80):
        number = random.randrange(100)
        if event == "grow":
            spared = table.add_tails(number % 3)  # blocks of others come and go between
            fresh = table.add_tails(1 + number % 5)
            owner.release(table, spared)
            ids = np.concatenate([ids, np.array(random.sample(fresh.tolist(), len(fresh)))])
        elif event == "fill":
            filling = ids[full : full + number % 4]
            table.give_hot(filling)
            table.seal(filling)
            full += len(filling)
        elif event == "cut":
            kept = number % (len(ids) + 1)
            if random.random() < 0.5:  # another has them too: their copies stay
                owner.retain(table, ids[kept:full])
            owner.release(table, ids[kept:])
            ids, full = ids[:kept], min(full, kept)
        elif event == "reopen" and full and table.references[ids[full - 1]] == 1:
            owner.release(table, ids[full:])
            ids, full = ids[:full], full - 1
            owner.reopen(table, int(ids[full]))
        elif event == "copy" and full:
            kind, block, head = number % 2, int(ids[number % full]), number // 2 % 2
            if table.copy_id[kind, block, head] == NO_COPY and owner.arenas.scratch[kind].free_bytes >= LAYOUT.original_record_bytes:
                copied(owner, table, block, kind, head, arrives=number % 5 > 0)
        elif event == "evict":
            owner.evict(np.array([x.copy_id for x in owner.copies() if not x.pinned][: number % 3], np.int64))
        if random.random() < 0.5:
            says(places.of(table, ids[:full]), table, ids[:full])
        owner.check_integrity()


def says(found: InScratch | None, table: BlockTable, ids: NDArray[np.int64]) -> None:
    """It is what the table says, told anew."""
    known = table.location[:, ids]
    assert (found is None) == bool((known < 0).all())
    if found is not None:
        assert np.array_equal(found.locations(LAYOUT, table.original_offset[ids]), known)
        anew = InScratch.of(known)
        assert anew is not None and np.array_equal(found.words, anew.words) and np.array_equal(found.places, anew.places)


def filled(table: BlockTable, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    table.give_hot(ids)
    table.seal(ids)
    return ids


def copied(owner: Residency, table: BlockTable, block: int, kind: int = 0, head: int = 0, arrives: bool = True) -> NDArray[np.int64]:
    ids = copies_begun(owner, table, kind, np.array([block]), np.array([head]))
    if arrives:
        checksum = np.array([owner.copy(int(ids[0])).checksum], np.uint64)
        assert owner.finish_copies(ids, checksum).settled.tolist() == ids.tolist()
    return ids


@pytest.mark.parametrize("asks", [False, True])
def test_blocks_that_take_the_places_of_others_are_noticed(asks: bool) -> None:
    owner, places = residency(), Places()
    table = owner.table(LAYOUT)
    ids = filled(table, table.add_tails(4))
    kept = copied(owner, table, int(ids[0]))
    assert places.of(table, ids) is not None
    later = table.add_tails(3)
    owner.release(table, ids[1:])
    if asks:  # while nothing lies in scratch, and after the new blocks have been added
        owner.evict(kept)
        assert places.of(table, ids[:1]) is None
        copied(owner, table, int(ids[0]))
    ids = np.concatenate([ids[:1], filled(table, later)])
    says(places.of(table, ids), table, ids)


@pytest.mark.parametrize("at", [0, 7, 8, 20, 39])
def test_the_first_copy_of_many_blocks_is_told_from_those_that_have_none(at: int) -> None:
    owner, places = residency(), Places()
    table = owner.table(LAYOUT)
    ids = filled(table, table.add_tails(40))
    assert places.of(table, ids) is None
    copied(owner, table, int(ids[at]), kind=1, head=1)
    says(places.of(table, ids), table, ids)
    ids = np.concatenate([ids, filled(table, table.add_tails(9))])
    copied(owner, table, int(ids[-1]))
    says(places.of(table, ids), table, ids)


def test_blocks_that_another_session_keeps_are_forgotten_with_their_copies() -> None:
    owner, places = residency(), Places()
    table = owner.table(LAYOUT)
    ids = filled(table, table.add_tails(4))
    copied(owner, table, int(ids[2]))
    says(places.of(table, ids), table, ids)
    owner.retain(table, ids[1:])
    owner.release(table, ids[1:])
    ids = np.concatenate([ids[:1], filled(table, table.add_tails(3))])  # as many as there were, and no copy has come or gone
    assert places.of(table, ids) is None


def test_what_has_not_changed_is_told_by_the_same_arrays() -> None:
    owner, places = residency(), Places()
    table = owner.table(LAYOUT)
    ids, others = filled(table, table.add_tails(4)), filled(table, table.add_tails(2))
    copied(owner, table, int(ids[2]))
    found = places.of(table, ids)
    copied(owner, table, int(others[0]))
    assert places.of(table, ids) is found and found is not None
    copied(owner, table, int(ids[2]), kind=1)
    assert places.of(table, ids) is not found and len(found.places) == 1


def test_what_is_out_of_step_is_noticed() -> None:
    owner = residency()
    table = owner.table(LAYOUT)
    ids = filled(table, table.add_tails(1))
    table.resident[ids] += 1
    with pytest.raises(AssertionError, match="miscounted"):
        owner.check_integrity()
