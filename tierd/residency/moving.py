"""What happens to many copies at once, compiled: one pass over their records, each of which is somewhere else in memory.

Legend: n copies of one table, kind 0 keys and 1 values. Column by column, with numpy, to begin 27 copies took 40 us and to take them in 60.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd.compiling import compiled
from tierd.notes import NOTE
from tierd.residency.blocks import NO_COPY

Ints = NDArray[np.int64]
Counts = NDArray[np.int32]
GONE, IN_FLIGHT, RESIDENT, ORPHAN = range(4)
# By copy id; see `Copies`.
COPY = np.dtype([
    ("block", np.int64), ("head", np.int64), ("source", np.int64), ("target", np.int64), ("nbytes", np.int64), ("turn", np.int64),
    ("table", np.int32), ("state", np.int8), ("kind", np.int8), ("failures", np.int8),
], align=True)  # fmt: skip


@compiled
def without_copies(
    records: Ints, worths: NDArray[np.float64], of: Ints, notes: NDArray[Any]
) -> tuple[Ints, Ints, NDArray[np.float64], Ints, int]:
    """Those of these records [n, 3] (kinds, block ids, heads) that have no copy and may get one: keys first, else in their order. Their
    blocks, heads, `worths` and whom each is `of` [n]; and how many are keys."""
    blocks, heads, theirs, wishes = np.empty_like(of), np.empty_like(of), np.empty_like(worths), np.empty_like(of)
    count = num_keys = 0
    for kind in range(2):
        for i in range(len(records)):
            if records[i, 0] == kind and notes[kind, records[i, 1], records[i, 2]].copy_id == NO_COPY:
                blocks[count], heads[count], theirs[count], wishes[count] = records[i, 1], records[i, 2], worths[i], of[i]
                count += 1
        if kind == 0:
            num_keys = count
    return blocks[:count], heads[:count], theirs[:count], wishes[:count], num_keys


@compiled
def begin(
    copies: NDArray[Any], ids: Ints, record: Any, kinds: Ints, blocks: Ints, heads: Ints, targets: Ints, original_offset: Ints,
    hot_offset: Ints, notes: NDArray[Any], used: NDArray[np.bool_], in_flight: Counts,
) -> bool:  # fmt: skip
    """These records (int64 [n] each) are on their way to `targets` as the copies `ids`, which are like `record` (of COPY, [1]) otherwise.
    False where one is not of a full block, has a copy, or is given twice: our fault, and what is before it is written."""
    nbytes, num_heads = record[0].nbytes, notes.shape[2]
    for i in range(len(ids)):
        kind, block, head = kinds[i], blocks[i], heads[i]
        note = notes[kind, block, head]
        if hot_offset[block] < 0 or note.copy_id != NO_COPY:
            return False
        note.copy_id, note.waits = ids[i], 0
        used[kind, block, head] = False
        in_flight[block] += 1
        copies[ids[i]] = record[0]
        copy = copies[ids[i]]
        copy.kind, copy.block, copy.head, copy.target = kind, block, head, targets[i]
        copy.source = original_offset[block] + (kind * num_heads + head) * nbytes
    return True


@compiled
def settle(
    copies: NDArray[Any], ids: Ints, table: int, digests: NDArray[np.uint64], checksum: NDArray[np.uint64], location: Ints,
    in_flight: Counts, resident: Counts, good: NDArray[np.bool_], blocks: Ints,
) -> int:  # fmt: skip
    """Of these copies makes those in flight that are the table's, and whose bytes hash to their originals' `checksum` [2, C, Hkv], visible
    by `location`; says in `good` which, writes their `blocks`, and returns how many they are."""
    count = 0
    for i in range(len(ids)):
        copy = copies[ids[i]]
        if copy.table != table or copy.state != IN_FLIGHT or digests[i] != checksum[copy.kind, copy.block, copy.head]:
            continue
        good[i] = True
        copy.state = RESIDENT
        location[copy.kind, copy.block, copy.head] = copy.target
        in_flight[copy.block] -= 1
        resident[copy.block] += 1
        blocks[count] = copy.block
        count += 1
    return count


@compiled
def detach(copies: NDArray[Any], ids: Ints, table: int, location: Ints, notes: NDArray[Any], resident: Counts, blocks: Ints) -> int:
    """Those of these copies that are the table's are their records' no more: writes the `blocks` of them, and returns how many they are."""
    count = 0
    for i in ids:
        copy = copies[i]
        if copy.table != table:
            continue
        resident[copy.block] -= copy.state == RESIDENT
        notes[copy.kind, copy.block, copy.head].copy_id = NO_COPY
        location[copy.kind, copy.block, copy.head] = ~copy.source
        blocks[count] = copy.block
        count += 1
    return count


@compiled
def find_used(copies: NDArray[Any], ids: Ints, table: int, of_table: NDArray[np.bool_], used: NDArray[np.bool_]) -> None:
    """Says in `used` which of these copies, of those in scratch that are the table's, were read."""
    for i in range(len(ids)):
        copy = copies[ids[i]]
        if copy.table == table and copy.state == RESIDENT:
            used[i] = of_table[copy.kind, copy.block, copy.head]


def prepare() -> None:
    """Compiles them, or loads them."""
    none, counts, places, notes = np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros((2, 0, 1), np.int64), np.zeros((2, 0, 1), NOTE)
    copies = np.zeros(0, COPY)
    used, which = places.astype(np.bool_), none.astype(np.bool_)
    without_copies(np.zeros((0, 3), np.int64), none.astype(np.float64), none, notes)
    begin(copies, none, np.zeros(1, COPY), none, none, none, none, none, none, notes, used, counts)
    settle(copies, none, 0, none.astype(np.uint64), places.astype(np.uint64), places, counts, counts, which, none)
    detach(copies, none, 0, places, notes, counts, none)
    find_used(copies, none, 0, used, which)
