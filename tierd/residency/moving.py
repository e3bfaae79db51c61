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
def begin(
    copies: NDArray[Any], ids: Ints, record: Any, blocks: Ints, heads: Ints, targets: Ints, original_offset: Ints, hot_offset: Ints,
    notes: NDArray[Any], used: NDArray[np.bool_], in_flight: Counts,
) -> bool:  # fmt: skip
    """These records (int64 [n] each) are on their way to `targets` as the copies `ids`, which are like `record` (of COPY, [1]) otherwise.
    False where one is not of a full block, has a copy, or is given twice: our fault, and what is before it is written."""
    kind, nbytes, num_heads = record[0].kind, record[0].nbytes, notes.shape[2]
    for i in range(len(ids)):
        block, head = blocks[i], heads[i]
        note = notes[kind, block, head]
        if hot_offset[block] < 0 or note.copy_id != NO_COPY:
            return False
        note.copy_id = ids[i]
        used[kind, block, head] = False
        in_flight[block] += 1
        copies[ids[i]] = record[0]
        copy = copies[ids[i]]
        copy.block, copy.head, copy.target = block, head, targets[i]
        copy.source = original_offset[block] + (kind * num_heads + head) * nbytes
    return True


@compiled
def settle(
    copies: NDArray[Any], ids: Ints, digests: NDArray[np.uint64], checksum: NDArray[np.uint64], location: Ints, in_flight: Counts,
    resident: Counts,
) -> NDArray[np.bool_]:  # fmt: skip
    """Makes those copies in flight whose bytes hash to their originals' `checksum` [2, C, Hkv] visible by `location`; returns which."""
    good = np.empty(len(ids), np.bool_)
    for i in range(len(ids)):
        copy = copies[ids[i]]
        good[i] = digests[i] == checksum[copy.kind, copy.block, copy.head]
        if good[i]:
            copy.state = RESIDENT
            location[copy.kind, copy.block, copy.head] = copy.target
            in_flight[copy.block] -= 1
            resident[copy.block] += 1
    return good


@compiled
def detach(copies: NDArray[Any], ids: Ints, location: Ints, notes: NDArray[Any], resident: Counts) -> None:
    """These copies are their records' no more."""
    for i in ids:
        copy = copies[i]
        resident[copy.block] -= copy.state == RESIDENT
        notes[copy.kind, copy.block, copy.head].copy_id = NO_COPY
        location[copy.kind, copy.block, copy.head] = ~copy.source


def prepare() -> None:
    """Compiles them, or loads them."""
    none, counts, places, notes = np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros((2, 0, 1), np.int64), np.zeros((2, 0, 1), NOTE)
    copies = np.zeros(0, COPY)
    begin(copies, none, np.zeros(1, COPY), none, none, none, none, none, notes, places.astype(np.bool_), counts)
    settle(copies, none, none.astype(np.uint64), places.astype(np.uint64), places, counts, counts)
    detach(copies, none, places, notes, counts)
