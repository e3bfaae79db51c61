"""The predictive policy's inner loop, compiled: one pass over a call's candidates.

Legend: see `snapshot.py`. Time goes into waiting for notes, which are anywhere in memory, and into branches that are mispredicted: so what
is needed of them is fetched first, without a branch, many at once.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd.compiling import compiled
from tierd.notes import NOTE
from tierd.policy.snapshot import NO_READS, NONE, Ids, Worths

Mask = NDArray[np.bool_]
SAME = 4.5  # steps: what was seen no longer ago was seen when the layer was last looked at
ZERO, ONE = np.float32(0.0), np.float32(1.0)
LEVELS, LEVELS_PER_NEED = 64, 16.0


@compiled
def weigh(
    ids: Ids, reads: Ids, key_reads: Mask, value_reads: Mask, exact_heads: Mask, all_blocks: NDArray[np.int32],
    all_scores: NDArray[np.float32], notes: NDArray[Any], now: float, weight: float, near: float, floor: float, found: Ids,
    worths: Worths,
) -> tuple[int, int]:  # fmt: skip
    """Writes notes; fills `found` [., 3] and `worths` with the records that deserve a copy, best first, and from the end, in any order,
    with the ids of copies that have gained; returns how many of both. One array for both: numba takes its time to be told of each."""
    kinds, heads, most = all_blocks.shape
    needs, kept = np.empty(most, np.bool_), np.empty(most, np.int64)
    shares, copies = np.empty(most, np.float32), np.empty(most, np.int64)
    count = known = 0
    for kind in range(kinds):
        of_kind = key_reads if kind == 0 else value_reads
        for head in range(heads):
            blocks, scores = all_blocks[kind, head], all_scores[kind, head]
            length, threshold = _needs(blocks, scores, of_kind[:, head], exact_heads[head], needs)
            number = _near(scores, length, needs, np.float32(0.5 * floor) * threshold, kept)
            for i in range(number):
                at = ids[blocks[kept[i]]]
                note = notes[kind, at, head]
                shares[i] = note.share if now - note.seen < SAME else scores[kept[i]]
                copies[i] = note.copy_id
            for i in range(number):
                j = kept[i]
                at, score = ids[blocks[j]], scores[j]
                note = notes[kind, at, head]
                closeness = min((score + max(score - shares[i], ZERO)) / threshold, ONE)
                note.share, note.seen = score, now
                gain = 1.0 if needs[j] else near * closeness if closeness >= floor else 0.0
                note.worth += weight * gain
                if gain > 0.0:
                    count, known = _put(found, worths, count, known, kind, at, head, copies[i], note.worth)
    if reads.shape[1]:
        count, known = _unnamed(ids, reads, exact_heads, all_blocks, notes, now, weight, found, worths, count, known)
    if count > 1:
        _order(found[:count], worths[:count], weight)
    return count, known


@compiled
def _put(
    found: Ids, worths: Worths, count: int, known: int, kind: int, at: int, head: int, copy: int, worth: float
) -> tuple[int, int]:  # fmt: skip
    """Puts a record without a copy in front, and the copy of one that has some at the end."""
    if copy == NONE:
        found[count, 0], found[count, 1], found[count, 2], worths[count] = kind, at, head, worth
        return count + 1, known
    if copy >= 0:
        known += 1
        found[len(found) - known, 0], worths[len(found) - known] = copy, worth
    return count, known


@compiled
def _unnamed(
    ids: Ids, reads: Ids, exact_heads: Mask, all_blocks: NDArray[np.int32], notes: NDArray[Any], now: float, weight: float, found: Ids,
    worths: Worths, count: int, known: int,
) -> tuple[int, int]:  # fmt: skip
    """What was needed and is no candidate: its share is not known, so it is noted as the whole, from which none grows."""
    for i in range(reads.shape[1]):
        kind, block, head = reads[0, i], reads[1, i], reads[2, i]
        if exact_heads[head] or _among(all_blocks[kind, head], block):
            continue
        note = notes[kind, ids[block], head]
        note.share, note.seen = ONE, now
        note.worth += weight
        count, known = _put(found, worths, count, known, kind, ids[block], head, note.copy_id, note.worth)
    return count, known


@compiled
def _among(blocks: NDArray[np.int32], block: int) -> bool:
    """Whether `block` is one of a head's candidates, which rise until they end in -1."""
    low, high = 0, len(blocks)
    while low < high:
        middle = (low + high) // 2
        if 0 <= blocks[middle] < block:
            low = middle + 1
        else:
            high = middle
    return low < len(blocks) and blocks[low] == block


def prepare() -> None:
    """Compiles `weigh`, or loads it, for what every call shows it."""
    none, reads, ids = np.empty((2, 1, 0), np.int32), np.zeros((0, 1), np.bool_), np.empty(0, np.int64)
    shown = ids, NO_READS, reads, reads, np.zeros(1, np.bool_), none, none.astype(np.float32), np.zeros((2, 0, 1), NOTE)
    weigh(*shown, 0.0, 1.0, 0.0, 0.0, np.empty((0, 3), np.int64), np.empty(0))


@compiled
def _needs(
    blocks: NDArray[np.int32], scores: NDArray[np.float32], reads: Mask, exact: bool, needs: Mask
) -> tuple[int, np.float32]:
    """Which of a head's candidates were needed; how many there are, and from which share on the head promoted."""
    threshold, length = ONE, 0
    for j in range(len(blocks)):
        if blocks[j] < 0:
            break
        length += 1
        needs[j] = reads[blocks[j]] and not exact
        threshold = min(threshold, scores[j] if needs[j] else ONE)
    return length, threshold


@compiled
def _near(scores: NDArray[np.float32], length: int, needs: Mask, cut: np.float32, kept: Ids) -> int:
    """Which candidates may pass the floor: all above half of it, if they have grown from nothing."""
    number = 0
    for j in range(length):
        kept[number] = j
        number += needs[j] or scores[j] >= cut
    return number


@compiled
def _order(records: Ids, worths: Worths, weight: float) -> None:
    """Best first, to a sixteenth of a need: by counting, since 300 records take 7 us to compare."""
    levels, starts = np.empty(len(worths), np.int64), np.zeros(LEVELS + 1, np.int64)
    for i in range(len(worths)):
        levels[i] = LEVELS - 1 - min(LEVELS - 1, int(worths[i] / weight * LEVELS_PER_NEED))
        starts[levels[i] + 1] += 1
    starts = np.cumsum(starts)
    had, worth = records.copy(), worths.copy()
    for i in range(len(worths)):
        place = starts[levels[i]]
        starts[levels[i]] += 1
        records[place], worths[place] = had[i], worth[i]
