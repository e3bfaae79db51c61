"""Which original records of a call have a copy in scratch, and where: little, where few have one. An offset for each of the 131,072 records
of 131,072 tokens and 8 KV heads was 1 MB a call, written on the host and carried to the device.

Legend: m full blocks, Hkv KV heads, kind 0 keys and 1 values. Records are numbered by block, then kind, then KV head.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.floats import compiled
from tierd_kernels.layout import ALIGNMENT, Layout

Ints = NDArray[np.int64]
Places = NDArray[np.uint32]
RECORDS = 32  # of a word
UNIT = ALIGNMENT  # bytes; scratch is handed out in multiples of it, so that 32 bits name places in 256 GiB
LOW = 0xFFFFFFFF
NOTHING = np.zeros(0, np.int64)


@compiled()
def holds(words: Ints, record: int) -> bool:
    """Whether a copy of the record lies in scratch."""
    return bool(words[record // RECORDS] >> record % RECORDS & 1)


@compiled()
def ones(bits: int) -> int:
    """How many of 32 bits are set."""
    bits -= bits >> 1 & 0x55555555
    bits = (bits & 0x33333333) + (bits >> 2 & 0x33333333)
    return ((bits + (bits >> 4) & 0x0F0F0F0F) * 0x01010101 & LOW) >> 24


@compiled()
def copies_before(words: Ints, record: int) -> int:
    """How many records of lower numbers have copies: where in `places` the record's own is. `record` is at most the number of records."""
    word = int(words[record // RECORDS])
    return (word >> 32) + ones(word & (1 << record % RECORDS) - 1)


@compiled()
def say(words: Ints, places: Places, count: int, record: int, at: int) -> int:
    """Says of a record, all of lower numbers having been told, whether it has a copy, at byte offset `at` >= 0 in scratch. So far there are
    `count` places; returns how many then."""
    if record % RECORDS == 0:
        words[record // RECORDS] = count << 32
    if at < 0:
        return count
    words[record // RECORDS] |= 1 << record % RECORDS
    places[count] = at // UNIT
    return count + 1


@compiled()
def take_over(old: Ints, old_places: Places, start: int, stop: int, words: Ints, places: Places, count: int) -> int:
    """Says of records [start, stop), all of lower numbers having been told, what `old` says of them; `count` and what is returned as with
    `say`. Whole words go as they are, but for what they count: masked and counted anew, those of 131,072 records took 12 us, and here 4."""
    if start >= stop:
        return count
    first, last = copies_before(old, start), copies_before(old, stop)
    places[count : count + last - first] = old_places[first:last]
    more, whole, end = count - first << 32, -(-start // RECORDS), stop // RECORDS
    if start < whole * RECORDS:
        words[whole - 1] |= old[whole - 1] & (1 << min(RECORDS, stop - (whole - 1) * RECORDS)) - (1 << start % RECORDS)
    ours, theirs = words[whole:end], old[whole:end]  # from 0 on, or the loop is not made one of vectors
    for i in range(len(ours)):
        ours[i] = theirs[i] + more
    if whole <= end and stop % RECORDS:
        words[end] = (old[end] & ((1 << stop % RECORDS) - 1 | ~LOW)) + more
    return count + last - first


@compiled()
def close(words: Ints, records: int, count: int) -> None:
    """All `records` have been told, and there are `count` places."""
    if records % RECORDS == 0:
        words[records // RECORDS] = count << 32


@compiled()
def count_copies(words: Ints) -> int:
    """Writes the counts that go with the words' bits; returns the number of copies."""
    count = 0
    for i in range(len(words)):
        bits = words[i] & LOW
        words[i] = count << 32 | bits
        count += ones(bits)
    return count


class InScratch(NamedTuple):
    """Not to be written. `words` int64 [2 m Hkv // 32 + 1]: of 32 records each, a bit that says whether there is a copy (the low half, from
    the lowest), and the number of copies of all records before (the high half). `places` uint32 [copies], by record: byte offset in scratch
    over `UNIT`. A call that has none is told None instead."""

    words: Ints
    places: Places

    @staticmethod
    def of(locations: Ints) -> "InScratch | None":
        """From int64 [2, m, Hkv]: a byte offset in scratch, or a number below zero."""
        at = locations.transpose(1, 0, 2).reshape(-1)
        records = np.flatnonzero(at >= 0)
        words = empty_words(len(at))
        np.bitwise_or.at(words, records // RECORDS, 1 << records % RECORDS)
        return InScratch(words, (at[records] // UNIT).astype(np.uint32)) if count_copies(words) else None

    def locations(self, layout: Layout, original_offsets: Ints) -> Ints:
        """Written out, int64 [2, m, Hkv]: a byte offset in scratch, or ~offset of the record among the originals, whose blocks lie at byte
        offsets [m]: the call's, or its first ones."""
        heads, blocks = layout.num_kv_heads, len(original_offsets)
        found = np.ascontiguousarray(layout.own_locations(original_offsets).transpose(1, 0, 2)).reshape(-1)
        bits = self.words[:, None] >> np.arange(RECORDS) & 1
        records = np.flatnonzero(bits.reshape(-1)[: len(found)])
        found[records] = self.places[: len(records)].astype(np.int64) * UNIT
        return found.reshape(blocks, 2, heads).transpose(1, 0, 2)


def empty_words(records: int) -> Ints:
    """Of so many records, none of which has a copy."""
    return np.zeros(records // RECORDS + 1, np.int64)
