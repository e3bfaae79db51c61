"""Counts by block, of many records at once."""


import numpy as np
from numpy.typing import NDArray

from tierd.compiling import compiled


@compiled
def add(counts: NDArray[np.int32], blocks: NDArray[np.int64], amount: int) -> None:
    """Adds to the counts of these blocks, as often as each is named: numpy's own way takes ten times as long, 20 us for 256."""
    for block in blocks:
        counts[block] += amount


@compiled
def refresh(
    ids: NDArray[np.int64], known: int, seen: int, stamp: NDArray[np.int64], resident: NDArray[np.int32], location: NDArray[np.int64],
    at: NDArray[np.int64], held: NDArray[np.int64],
) -> int:  # fmt: skip
    """Brings `at` [2, ., Hkv] up to what a table's `location` [2, C, Hkv] says of these blocks [m]: of those from `known` on, and of those
    whose stamp is above `seen` (at a place that was known there may be another block by now: its stamp is later). Fills `held` [m] with the
    blocks of which a record lies in scratch; returns how many. With numpy, 0.1 to 0.5 ms of 8192 blocks."""
    count = 0
    for i in range(len(ids)):
        block = ids[i]
        if i >= known or stamp[block] > seen:
            for kind in range(2):
                for head in range(location.shape[2]):
                    at[kind, i, head] = location[kind, block, head]
        if resident[block]:
            held[count] = block
            count += 1
    return count


def prepare() -> None:
    """Compiles them, or loads them."""
    none, places = np.zeros(0, np.int64), np.zeros((2, 0, 1), np.int64)
    add(np.zeros(1, np.int32), np.zeros(1, np.int64), 0)
    refresh(none, 0, 0, none, np.zeros(0, np.int32), places, places, none)
