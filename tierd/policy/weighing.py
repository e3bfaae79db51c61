"""The predictive policy's inner loop, compiled: one pass over a call's candidates, and what has become of those asked for before.

A record is asked for at a grade: its worth then, in needs, doubles from one to the next. Every grade is held to what followed on what was
asked for at it, so that the policy does not go on copying what attention never comes to.

Legend: see `snapshot.py`; `asks` [3, GRADES]: how many were asked for too lately to tell, those of longer ago, and how many of these were
needed soon. Time goes into waiting for notes, which are anywhere in memory, and into branches that are mispredicted: so what
is needed of them is fetched first, without a branch, many at once.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd.compiling import compiled
from tierd.notes import NOTE
from tierd.policy.snapshot import NO_READS, NONE, Ids, Worths

Mask = NDArray[np.bool_]
Asks = NDArray[np.float64]
ZERO, ONE = np.float32(0.0), np.float32(1.0)
LEVELS, LEVELS_PER_NEED = 64, 16.0
GRADES, LEAST = 7, 0.125  # the first is below LEAST
LATELY, BEFORE, NEEDED = range(3)
# Steps: until half of what was asked for lately can be told; until half of what followed is forgotten; since the last look at a record, in
# which a need is soon, unless its layer was looked at even longer ago.
RIPENS, FADES, SOON = 8.0, 64.0, 16.0
AT_FIRST = 12.0  # asks that a grade is trusted for, with nothing known. With 8, topics that switch wait up to 0.54 of reactive, not 0.49
# So much of what was asked for must be needed soon. Recorded text and prompts, scratch for an eighth, two to three hundred steps: while
# every grade was trusted, and calls had no preference for what is at hand, 57 to 74 % of the copies were never read; now 9 to 26 %. With
# 0.4 a prompt that asks for frequent words waits for 65 % of what it does under `reactive`, not 48; with 0.2 up to 29 % are never read.
NEEDED_SHARE = 0.3


@compiled
def weigh(
    ids: Ids, reads: Ids, exact_heads: Mask, all_blocks: NDArray[np.int32], all_scores: NDArray[np.float32], notes: NDArray[Any],
    now: float, last: float, weight: float, near: float, floor: float, asks: Asks, passed: float, found: Ids, worths: Worths,
) -> tuple[int, int, int]:  # fmt: skip
    """Writes notes, and `asks`, as it was `passed` steps ago; fills `found` [., 3] and `worths` with the records that deserve a copy, best
    first, and from the end, in any order, with the ids of copies that have gained; returns how many of both, and how many records were
    needed. One array for both: numba takes its time to be told of each."""
    kinds, heads, most = all_blocks.shape
    needs = np.empty(most, np.bool_)
    gained, since = np.empty(found.shape, np.int64), np.empty(len(found))
    count = needed = _needed(ids, reads, exact_heads, notes, now, weight, gained, since)
    for kind in range(kinds):
        for head in range(heads):
            blocks, scores = all_blocks[kind, head], all_scores[kind, head]
            length, threshold = _from(ids, blocks, scores, notes[kind, :, head], now, needs)
            cut = np.float32(0.5 * floor) * threshold
            for j in range(length):
                at, score = ids[blocks[j]], scores[j]
                note = notes[kind, at, head]
                if needs[j]:
                    note.share = score
                elif score >= cut:
                    before = note.share if note.seen >= last else score
                    closeness = min((score + max(score - before, ZERO)) / threshold, ONE)
                    gain = near * closeness if closeness >= floor else 0.0
                    gained[count, 0], gained[count, 1], gained[count, 2] = kind, at, head
                    since[count] = now - note.seen
                    note.share, note.seen = score, now
                    note.worth += weight * gain
                    count += gain > 0.0
    soon = max(SOON, now - last)
    count, known = _asked_for(gained[:count], since, needed, soon, notes, weight, asks, _trusted(asks, passed), found, worths)
    if count > 1:
        _order(found[:count], worths[:count], weight)
    return count, known, needed


@compiled
def _trusted(asks: Asks, passed: float) -> Mask:
    """Which grades are, now that `passed` steps more have gone."""
    ripe, kept = 1.0 - 0.5 ** (passed / RIPENS), 0.5 ** (passed / FADES)
    trusted = np.empty(GRADES, np.bool_)
    for grade in range(GRADES):
        can_be_told = asks[LATELY, grade] * ripe
        asks[LATELY, grade] -= can_be_told
        asks[BEFORE, grade] = asks[BEFORE, grade] * kept + can_be_told
        asks[NEEDED, grade] *= kept
        trusted[grade] = asks[NEEDED, grade] + AT_FIRST >= NEEDED_SHARE * (asks[BEFORE, grade] + AT_FIRST)
    return trusted


@compiled
def _needed(
    ids: Ids, reads: Ids, exact_heads: Mask, notes: NDArray[Any], now: float, weight: float, gained: Ids, since: Worths
) -> int:
    """Notes all that was needed, and puts it to the front of what has gained; returns how much it is. Of what is no candidate the share is
    unknown: it is noted as the whole, from which none grows. From here on it is told from the rest by when it was seen."""
    count = 0
    for i in range(reads.shape[1]):
        kind, at, head = reads[0, i], ids[reads[1, i]], reads[2, i]
        if exact_heads[head]:
            continue
        note = notes[kind, at, head]
        gained[count, 0], gained[count, 1], gained[count, 2] = kind, at, head
        since[count] = now - note.seen
        note.share, note.seen = ONE, now
        note.worth += weight
        count += 1
    return count


@compiled
def _asked_for(
    gained: Ids, since: Worths, needed: int, soon: float, notes: NDArray[Any], weight: float, asks: Asks, trusted: Mask, found: Ids,
    worths: Worths,
) -> tuple[int, int]:
    """Of the records that have gained [n, 3], which were looked at `since` [n] steps ago, the first `needed` because they were: puts those
    that get a copy to the front of `found`, and the copies of those that have one to its end.

    A need speaks for the grade that its record was asked for at, unless a copy began and is gone, or scratch had no room for one: what that
    is too small for is not worth copying. Where a grade is not trusted its records are only watched.

    One loop, and all in it: compiled functions that are called take and give back references to their arrays, and three calls a record
    took 80 ns of its 90."""
    count = known = 0
    for i in range(len(gained)):
        kind, at, head = gained[i, 0], gained[i, 1], gained[i, 2]
        note = notes[kind, at, head]
        copy, worth, lately = note.copy_id, note.worth, since[i] <= soon
        if i < needed:
            if note.asked and lately and (copy >= 0 or note.waits or not trusted[note.asked - 1]):
                asks[NEEDED, note.asked - 1] += 1.0
            note.asked = 0
        if copy == NONE:
            grade, edge = 0, LEAST * weight
            while grade < GRADES - 1 and worth >= edge:
                grade, edge = grade + 1, 2.0 * edge
            if not (note.asked and lately):
                asks[LATELY, grade] += 1.0
                note.asked = grade + 1
            if trusted[grade]:
                note.waits = 1
                found[count, 0], found[count, 1], found[count, 2], worths[count] = kind, at, head, worth
                count += 1
        elif copy >= 0:
            known += 1
            found[len(found) - known, 0], worths[len(found) - known] = copy, worth
    return count, known


def prepare() -> None:
    """Compiles `weigh`, or loads it, for what every call shows it."""
    none, ids = np.empty((2, 1, 0), np.int32), np.empty(0, np.int64)
    shown = ids, NO_READS, np.zeros(1, np.bool_), none, none.astype(np.float32), np.zeros((2, 0, 1), NOTE)
    weigh(*shown, 0.0, 0.0, 1.0, 0.0, 0.0, np.zeros((3, GRADES)), 0.0, np.empty((0, 3), np.int64), np.empty(0))


@compiled
def _from(
    ids: Ids, blocks: NDArray[np.int32], scores: NDArray[np.float32], notes: NDArray[Any], now: float, needs: Mask
) -> tuple[int, np.float32]:
    """How many candidates a head has, and from which share on it promoted, by those that were needed: says in `needs` which."""
    threshold, length = ONE, 0
    for j in range(len(blocks)):
        if blocks[j] < 0:
            break
        length += 1
        needs[j] = notes[ids[blocks[j]]].seen == now
        threshold = min(threshold, scores[j] if needs[j] else ONE)
    return length, threshold


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
