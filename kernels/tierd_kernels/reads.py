"""Which original records a call read, as a list: one compiled pass over what its kernels marked, since few are read of the many there are.

Legend: m full blocks of the call, Hkv KV heads, n records; kind 0 keys and 1 values. A mark is of one block and one tile of ROW_TILE rows
of a KV head: a bit for each row for which keys were read, then for each for which values were. Its other bits say nothing here.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.floats import compiled
from tierd_kernels.in_scratch import NOTHING, InScratch, holds
from tierd_kernels.vector import ROW_TILE

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Marks = NDArray[np.uint32]
OF_KIND = np.uint32((1 << ROW_TILE) - 1)
EVERY = np.uint32((1 << 2 * ROW_TILE) - 1)
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
    blocks = _touched(marks, bool(exact.any()))
    read, keys, values = _by_head(marks, exact, blocks)
    records, from_host = np.empty((3, keys + values), np.int64), np.empty(keys + values, np.bool_)
    heads, next_of = len(exact), np.array([0, keys])
    tiles = len(marks) // heads
    for i in range(len(blocks)):
        for head in range(heads):
            if not read[i, head]:
                continue
            for kind in range(2):
                if not read[i, head] >> np.uint32(ROW_TILE * kind) & OF_KIND:
                    continue
                block, at = blocks[i], next_of[kind]
                next_of[kind] += 1
                records[0, at], records[1, at], records[2, at] = kind, block, head
                is_cold = not (len(words) and holds(words, (2 * block + kind) * heads + head))
                from_host[at] = is_cold or exact[head]
                for tile in range(head * tiles, (head + 1) * tiles if is_cold else 0):
                    rows = marks[tile, block] >> np.uint32(ROW_TILE * kind)
                    for row in range(ROW_TILE):
                        cold[tile * ROW_TILE + row] += np.int64(rows >> np.uint32(row) & np.uint32(1))
    return records, from_host


@compiled()
def _touched(marks: Marks, every: bool) -> Ints:
    """The blocks of which any row read something, or `every` one. Tiles are first put together, 16 marks at a time and without a branch:
    5 us for the marks of 131,072 tokens and 8 KV heads, where to look at each took 40."""
    together = np.full(marks.shape[1], EVERY if every else np.uint32(0), np.uint32)
    for tile in range(len(marks)):
        for block in range(len(together)):
            together[block] |= marks[tile, block]
    blocks, count = np.empty(len(together), np.int64), 0
    for block in range(len(together)):
        blocks[count] = block
        count += int(together[block] & EVERY != 0)
    return blocks[:count]


@compiled()
def _by_head(marks: Marks, exact: Mask, blocks: Ints) -> tuple[Marks, int, int]:
    """The marks of these blocks [k], all tiles of a head in one, [k, Hkv]; how many keys they name, and how many values."""
    heads = len(exact)
    read, tiles, keys, values = np.zeros((len(blocks), heads), np.uint32), len(marks) // heads, 0, 0
    for i in range(len(blocks)):
        for head in range(heads):
            found = EVERY if exact[head] else np.uint32(0)
            for tile in range(head * tiles, (head + 1) * tiles):
                found |= marks[tile, blocks[i]] & EVERY
            read[i, head] = found
            keys += int(found & OF_KIND != 0)
            values += int(found > OF_KIND)
    return read, keys, values


def prepare() -> None:
    """Compiles the pass, or loads it."""
    listed(np.zeros((1, 0), np.uint32), np.zeros(1, np.bool_), None)
