"""Where original records lie and what they should hash to, compiled: one pass finds all that is asked of those that a call read from the
host. Numpy's dozen questions took 10 of the 16 us in which four records of 909 are checked, where all of them lie in the caches.
"""

import numpy as np
from numpy.typing import NDArray

from tierd.compiling import compiled

Ints = NDArray[np.int64]
START, CHECKSUM = 3, 4  # rows, behind kinds, block ids and heads


@compiled
def stored(
    records: Ints, which: NDArray[np.bool_], ids: Ints, original_offset: Ints, checksum: NDArray[np.uint64], nbytes: int
) -> Ints:  # fmt: skip
    """Of those in `which` [n] of `records` [3, n] (kinds, indices of blocks in `ids` [m], heads): int64 [5, k] of kinds, block ids, heads,
    byte offsets in the originals, and bits of checksums. Of a table are `original_offset` [C], `checksum` [2, C, Hkv], and `nbytes`, a
    record's. One array: numba takes 1 us more to hand out three."""
    count, heads = 0, checksum.shape[2]
    for i in range(len(which)):
        count += which[i]
    found, at = np.empty((5, count), np.int64), 0
    for i in range(len(which)):
        if which[i]:
            kind, block, head = records[0, i], ids[records[1, i]], records[2, i]
            found[0, at], found[1, at], found[2, at] = kind, block, head
            found[START, at] = original_offset[block] + (kind * heads + head) * nbytes
            found[CHECKSUM, at] = np.int64(checksum[kind, block, head])
            at += 1
    return found


def prepare() -> None:
    """Compiles it, or loads it."""
    none = np.zeros(0, np.int64)
    stored(np.zeros((3, 0), np.int64), np.zeros(0, np.bool_), none, none, np.zeros((2, 0, 1), np.uint64), 1)
