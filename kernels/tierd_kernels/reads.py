"""Which original records a call read, as a list: one compiled pass over a bit a record, since few are read of the many there are.

Legend: m full blocks of the call, Hkv KV heads, n records; kind 0 keys and 1 values. Records are numbered as in_scratch.py has them.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.floats import compiled
from tierd_kernels.in_scratch import NOTHING, RECORDS, InScratch, holds, ones

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Words = NDArray[np.uint32]  # of RECORDS records each a bit, from the lowest


class Reads(NamedTuple):
    """`records` int64 [3, n]: kinds, blocks (indices among the call's) and heads, none twice, keys first, in rising order. `from_host` bool
    [n]: those read from the host, for they had no copy in scratch or are of an exact head, which never looks there."""

    records: Ints
    from_host: Mask


NONE_READ = Reads(np.empty((3, 0), np.int64), np.empty(0, np.bool_))


def exact_heads(exact: Mask, heads: int) -> Mask:
    """KV heads [Hkv] of which any row [Hq, ...] is exact."""
    return np.asarray(exact.reshape(heads, -1).any(axis=1))


def words_of(read: Mask) -> Words:
    """Of records [2, Hkv, m] that were read or not."""
    bits = read.transpose(2, 0, 1).reshape(-1)
    return np.packbits(np.append(bits, np.zeros(-len(bits) % RECORDS, np.bool_)), bitorder="little").view(np.uint32)


def listed(read: Words, blocks: int, exact: Mask, in_scratch: InScratch | None) -> Reads:
    """What `read` names of a call of m `blocks`, and all of the heads that are `exact` [Hkv]. `in_scratch`: what the call's kernels were
    told."""
    if np.count_nonzero(exact):
        read = read | words_of(np.broadcast_to(exact[:, None], (2, len(exact), blocks)))
    return Reads(*_listed(read, exact, NOTHING if in_scratch is None else in_scratch.words))


def united(parts: list[Reads], blocks: int, exact: Mask, in_scratch: InScratch | None) -> Reads:
    """Of parts of one call of m `blocks`: what any of them read, and all of the heads that are `exact` [Hkv] in any."""
    read = np.zeros((2, len(exact), blocks), np.bool_)
    for kind, block, head in (part.records for part in parts):
        read[kind, head, block] = True
    return listed(words_of(read), blocks, exact, in_scratch)


@compiled()
def _listed(read: Words, exact: Mask, copied: Ints) -> tuple[Ints, Mask]:
    """930 of 131,072 records in 12 us, where a mark of every block, head and row took 40, and its way from a device as long again."""
    heads, number, keys = len(exact), 0, 0
    each, of_keys = np.uint32(2 * heads), np.uint32(heads)  # 32 bits: divisions take half as long
    for word in read:
        number += ones(int(np.int64(word)))
    found = np.empty(number, np.uint32)
    i = 0
    for w in range(len(read)):
        left = np.int64(read[w])
        while left:
            found[i] = RECORDS * w + ones(int((left & -left) - 1))
            keys += found[i] % each < of_keys
            left &= left - 1
            i += 1
    records, from_host = np.empty((3, number), np.int64), np.empty(number, np.bool_)
    next_of = np.array([0, keys])
    for record in found:
        block = record // each
        kind, head = divmod(np.int64(record - block * each), heads)
        at = next_of[kind]
        next_of[kind] += 1
        records[0, at], records[1, at], records[2, at] = kind, block, head
        from_host[at] = exact[head] or not (len(copied) and holds(copied, int(np.int64(record))))
    return records, from_host


def prepare() -> None:
    """Compiles the pass, or loads it."""
    listed(np.zeros(0, np.uint32), 0, np.zeros(1, np.bool_), None)
