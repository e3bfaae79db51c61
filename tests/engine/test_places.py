"""Places that are kept from call to call are those that the table has, whatever happened in between."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tierd_kernels.layout import Layout, Memory

from tierd.pools import Arenas
from tierd.residency import NO_COPY, Places, Residency

LAYOUT = Layout(2, 64, 16, 16, "float16")
EVENTS = st.lists(st.tuples(st.sampled_from(["grow", "cut", "copy", "evict", "ask"]), st.integers(0, 99)), max_size=60)


def residency() -> Residency:
    size = LAYOUT.original_block_bytes
    hot, scratch, originals = (np.zeros(n, np.uint8) for n in (400 * LAYOUT.hot_block_bytes, 30 * size, 400 * size))
    return Residency(Arenas(Memory(hot, scratch, originals)), lambda layout: layout.hot_block_bytes)


@given(EVENTS, st.integers(0, 1 << 30))
def test_places_are_the_tables(events: list[tuple[str, int]], seed: int) -> None:
    owner, places, random = residency(), Places(), np.random.default_rng(seed)
    table = owner.table(LAYOUT)
    ids = np.empty(0, np.int64)
    for event, number in [*events, ("ask", 0)]:
        if event == "grow":
            spared = table.add_tails(number % 3)  # blocks of others come and go between
            fresh = table.add_tails(1 + number % 5)
            table.give_hot(fresh)
            table.seal(fresh)
            owner.release(table, spared)
            ids = np.concatenate([ids, random.permutation(fresh)])
        elif event == "cut":
            kept = number % (len(ids) + 1)
            owner.release(table, ids[kept:])
            ids = ids[:kept]
        elif event == "copy" and len(ids):
            kind, block, head = number % 2, int(ids[number % len(ids)]), number // 2 % 2
            if table.copy_id[kind, block, head] == NO_COPY and owner.arenas.scratch[kind].free_bytes >= LAYOUT.original_record_bytes:
                copy = owner.begin_copy(table, kind, block, head)
                if number % 5:
                    assert owner.finish_copy(copy.copy_id, copy.checksum) is None
        elif event == "evict":
            for copy in [x for x in owner.copies() if not x.pinned][: number % 3]:
                owner.evict(copy.copy_id)
        else:
            known, found = table.location[:, ids], places.of(table, ids)
            assert (found is None) == bool((known < 0).all())
            assert found is None or np.array_equal(found, known)
        owner.check_integrity()


def test_what_is_out_of_step_is_noticed() -> None:
    owner = residency()
    table = owner.table(LAYOUT)
    ids = table.add_tails(1)
    table.give_hot(ids)
    table.seal(ids)
    table.resident[ids] += 1
    with pytest.raises(AssertionError, match="miscounted"):
        owner.check_integrity()
