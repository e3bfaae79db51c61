"""Which original records a call read, as a list: one compiled pass over what its kernels marked, since few are read of the many there are.

Legend: m full blocks of the call, Hkv KV heads, n records; kind 0 keys and 1 values. A mark is of one block and one tile of ROW_TILE rows
of a KV head: a bit for each row for which keys were read, then for each for which values were. Its other bits say nothing here.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.floats import compiled
from tierd_kernels.in_scratch import NOTHING, InScratch, holds, ones
from tierd_kernels.vector import ROW_TILE

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Marks = NDArray[np.uint32]
OF_KEYS = np.uint32((1 << ROW_TILE) - 1)
OF_VALUES = np.uint32(((1 << ROW_TILE) - 1) << ROW_TILE)
HEADS_OF_WORD = 16  # a bit for each one's keys, and one for its values
OF_WORD = (1 << HEADS_OF_WORD) - 1
KEY, VALUE = np.uint32(1), np.uint32(1 << ROW_TILE)  # of a tile's first row


class Reads(NamedTuple):
    """`records` int64 [3, n]: kinds, blocks (indices among the call's) and heads, none twice, keys first, in rising order. `from_host` bool
    [n]: those read from the host, for they had no copy in scratch or are of an exact head, which never looks there."""

    records: Ints
    from_host: Mask


NONE_READ = Reads(np.empty((3, 0), np.int64), np.empty(0, np.bool_))


def exact_heads(exact: Mask, heads: int) -> Mask:
    """KV heads [Hkv] of which any row [Hq, ...] is exact."""
    return np.asarray(exact.reshape(heads, -1).any(axis=1))


def listed(marks: Marks, exact: Mask, in_scratch: InScratch | None) -> tuple[Reads, Ints]:
    """What marks [Hkv * tiles, m] name, and all of the heads that are `exact` [Hkv]; and of each row, int64 [Hkv * tiles * ROW_TILE], how
    many of the records marked for it had no copy. `in_scratch`: what the call's kernels were told."""
    cold = np.zeros(len(marks) * ROW_TILE, np.int64)
    return Reads(*_listed(marks, exact, NOTHING if in_scratch is None else in_scratch.words, cold)), cold


def united(parts: list[Reads], blocks: int, exact: Mask, in_scratch: InScratch | None) -> Reads:
    """Of parts of one call of m `blocks`: what any of them read, and all of the heads that are `exact` [Hkv] in any."""
    marks = np.zeros((len(exact), blocks), np.uint32)
    for kind, block, head in (part.records for part in parts):
        np.bitwise_or.at(marks, (head, block), np.where(kind == 0, KEY, VALUE))
    return listed(marks, exact, in_scratch)[0]


@compiled()
def _listed(marks: Marks, exact: Mask, words: Ints, cold: Ints) -> tuple[Ints, Mask]:
    heads, tiles = len(exact), len(marks) // len(exact)
    read = _by_block(marks, exact)
    keys, values = _counts(read.reshape(-1))
    records, from_host = np.empty((3, keys + values), np.int64), np.empty(keys + values, np.bool_)
    next_of = np.array([0, keys])
    for block in range(marks.shape[1]):
        for group in range(len(read)):
            bits = np.int64(read[group, block])
            if not bits:
                continue
            for kind in range(2):
                left, at = bits >> kind * HEADS_OF_WORD & OF_WORD, next_of[kind]
                while left:
                    records[0, at], records[1, at], records[2, at] = kind, block, group * HEADS_OF_WORD + ones(int((left & -left) - 1))
                    left &= left - 1
                    at += 1
                next_of[kind] = at
    for i in range(len(from_host)):
        kind, block, head = records[0, i], records[1, i], records[2, i]
        is_cold = not (len(words) and holds(words, (2 * block + kind) * heads + head))
        from_host[i] = is_cold or exact[head]
        for tile in range(head * tiles, (head + 1) * tiles if is_cold else 0):
            rows = marks[tile, block] >> np.uint32(ROW_TILE * kind)
            for row in range(ROW_TILE):
                cold[tile * ROW_TILE + row] += np.int64(rows >> np.uint32(row) & np.uint32(1))
    return records, from_host


@compiled()
def _by_block(marks: Marks, exact: Mask) -> Marks:
    """Of every block and HEADS_OF_WORD heads, [groups, m]: a bit for each head of which any row read its keys, the lower half, and one for
    each of which any read values; all for heads that are `exact`. Without a branch, 16 marks at a time: 15 us for 131,072 tokens and 8 KV
    heads, and 930 records are listed in 40 where a look at the marks of all heads of a block that had any took 63, or in 70 and 144 with
    nothing in the caches."""
    tiles, none = len(marks) // len(exact), np.uint32(0)
    read = np.zeros((-(-len(exact) // HEADS_OF_WORD), marks.shape[1]), np.uint32)
    for tile in range(len(marks)):
        head = tile // tiles
        bit = head % HEADS_OF_WORD
        key, value = np.uint32(1 << bit), np.uint32(1 << bit + HEADS_OF_WORD)
        own, into = marks[tile], read[head // HEADS_OF_WORD]
        always = key | value if exact[head] else none
        for block in range(len(into)):
            into[block] |= always | (key if own[block] & OF_KEYS else none) | (value if own[block] & OF_VALUES else none)
    return read


@compiled()
def _counts(words: Marks) -> tuple[int, int]:
    """How many bits are set in the lower halves of all words [n], and how many in the upper: a loop that is made one of vectors."""
    lower = upper = np.int64(0)
    for i in range(len(words)):
        bits = words[i]
        bits = (bits & np.uint32(0x55555555)) + (bits >> np.uint32(1) & np.uint32(0x55555555))
        bits = (bits & np.uint32(0x33333333)) + (bits >> np.uint32(2) & np.uint32(0x33333333))
        bits = (bits & np.uint32(0x0F0F0F0F)) + (bits >> np.uint32(4) & np.uint32(0x0F0F0F0F))
        bits = (bits & np.uint32(0x00FF00FF)) + (bits >> np.uint32(8) & np.uint32(0x00FF00FF))
        lower += np.int64(bits & np.uint32(OF_WORD))
        upper += np.int64(bits >> np.uint32(HEADS_OF_WORD))
    return int(lower), int(upper)


def prepare() -> None:
    """Compiles the pass, or loads it."""
    listed(np.zeros((1, 0), np.uint32), np.zeros(1, np.bool_), None)
