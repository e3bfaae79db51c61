"""Heaps of copies by worth, one for each owner, and the choice from them, compiled: which copies go, while worths grow all the time.

A skew heap (Sleator and Tarjan, "Self-adjusting heaps", SIAM J. Comput. 15, 1986): two are melded in O(log n) amortised, and all else
is melding. Its links lie in an array by copy id, so that heaps of any size need no memory of their own. A copy's `key` is its worth when
it was last looked at; worths only grow, so it is brought up to date when it comes to the top, and not before.

All in one module: what is compiled is kept on disk for as long as its own file stays as it is.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd.compiling import compiled

NOBODY = -1
Ids = NDArray[np.int64]
Copies = NDArray[Any]  # of COPY, by copy id

# `owner`: NOBODY where there is no copy. `held`: it is in its owner's heap. Links are copy ids, or NOBODY. One array of records, as with
# notes: a copy is in one line of the cache, and numba takes less time to be told of one array than of eight. (No named tuple of columns:
# what numba keeps on disk names its type, and could not be read any more once that is renamed.)
COPY = np.dtype([
    ("key", np.float64), ("worth", np.float64), ("nbytes", np.int64), ("owner", np.int32), ("left", np.int32), ("right", np.int32),
    ("parent", np.int32), ("held", np.bool_),
], align=True)  # fmt: skip
NO_COPY = np.array((0.0, 0.0, 0, NOBODY, NOBODY, NOBODY, NOBODY, False), COPY)[()]


@compiled
def before(c: Copies, a: int, b: int) -> bool:
    """Whether `a` goes first: of equal worths the lower id, since what was begun together lies together, and frees a larger range."""
    return bool(c[a].key < c[b].key or (c[a].key == c[b].key and a < b))


@compiled
def meld(c: Copies, a: int, b: int) -> int:
    """The root of the heaps of roots `a` and `b` together."""
    if a == NOBODY or b == NOBODY:
        return a + b - NOBODY  # the other one
    if before(c, b, a):
        a, b = b, a
    root = a
    while True:  # down the right edges; a node's children change sides
        lower = c[a].right
        c[a].right = c[a].left
        if lower == NOBODY:
            break
        if before(c, b, lower):
            lower, b = b, lower
        c[a].left, c[lower].parent = lower, a
        a = lower
    c[a].left, c[b].parent = b, a
    return root


@compiled
def push(c: Copies, roots: Ids, copy: int) -> None:
    """Into its owner's heap, at its worth of now."""
    c[copy].key, c[copy].held = c[copy].worth, True
    c[copy].left = c[copy].right = c[copy].parent = NOBODY
    who = c[copy].owner
    roots[who] = meld(c, roots[who], copy)


@compiled
def pull(c: Copies, roots: Ids, copy: int) -> None:
    """Out of its owner's heap, wherever it is there."""
    below, above = meld(c, c[copy].left, c[copy].right), c[copy].parent
    if below != NOBODY:
        c[below].parent = above
    if above == NOBODY:
        roots[c[copy].owner] = below
    elif c[above].left == copy:
        c[above].left = below
    else:
        c[above].right = below
    c[copy].held = False


@compiled
def push_all(c: Copies, roots: Ids, copies: Ids) -> None:
    for copy in copies:
        push(c, roots, copy)


@compiled
def pull_all(c: Copies, roots: Ids, copies: Ids) -> None:
    """Those that are in a heap."""
    for copy in copies:
        if c[copy].held:
            pull(c, roots, copy)


@compiled
def own_all(c: Copies, copies: Ids, owners: Ids, nbytes: int, worths: NDArray[np.float64], used: Ids, count: Ids) -> bool:
    """They are their `owners`', of `nbytes` each, in no heap yet, and counted as theirs by bytes (`used`) and number. False where one is
    somebody's: our fault, and what is before it is written."""
    for i in range(len(copies)):
        if c[copies[i]].owner != NOBODY:
            return False
        c[copies[i]].owner, c[copies[i]].nbytes, c[copies[i]].worth = owners[i], nbytes, worths[i]
        used[owners[i]] += nbytes
        count[owners[i]] += 1
    return True


@compiled
def raise_all(c: Copies, copies: Ids, worths: NDArray[np.float64]) -> None:
    """Their worths of now. No heap changes, for a copy's key may be less than its worth. One by one: numpy took four times as long."""
    for i in range(len(copies)):
        c[copies[i]].worth = worths[i]


@compiled
def least(c: Copies, roots: Ids, who: int) -> int:
    """The owner's copy of least worth of now, which is then on top; NOBODY: there is none."""
    while True:
        top = roots[who]
        if top == NOBODY or c[top].worth <= c[top].key:
            return int(top)
        pull(c, roots, top)
        push(c, roots, top)


@compiled
def choose(
    c: Copies, roots: Ids, used: Ids, owners: Ids, sharing: NDArray[np.bool_], me: int, fair: float, nbytes: int,
    worths: NDArray[np.float64], free: int,
) -> tuple[int, Ids]:  # fmt: skip
    """Which copies make room for `me`'s records, as `Shelf.choose` has it: how many are placed, and what is to be evicted. `used` bytes by
    owner, of which `owners` are some, follow what is chosen and placed; `sharing`: by owner, who has a `fair` share."""
    count, evictions = 0, np.empty(len(worths), np.int64)
    for i in range(len(worths)):
        before = count
        while free < nbytes:
            victim = NOBODY
            if used[me] + nbytes <= fair:
                victim = _of_the_largest(c, roots, used, owners, sharing, me, fair)
            # Also below a fair share: what is left of a region, in pieces or less than a record, is nobody's.
            if victim == NOBODY:
                victim = _of_least_worth(c, roots, used, owners, sharing, me, fair, worths[i])
            if victim == NOBODY:
                for copy in evictions[before:count]:
                    push(c, roots, copy)
                return i, evictions[:before]
            pull(c, roots, victim)
            if count == len(evictions):  # records that are larger than others take the place of several
                evictions = np.concatenate((evictions, np.empty(len(evictions), np.int64)))
            evictions[count] = victim
            count += 1
            used[c[victim].owner] -= c[victim].nbytes
            free += c[victim].nbytes
        free -= nbytes
        used[me] += nbytes
    return len(worths), evictions[:count]


@compiled
def _of_the_largest(c: Copies, roots: Ids, used: Ids, owners: Ids, sharing: NDArray[np.bool_], me: int, fair: float) -> int:
    """The least copy of the owner with most bytes, of those others who have more than a share that is theirs; NOBODY: there is none."""
    most, found = 0, NOBODY
    for who in owners:
        if who != me and used[who] > most and (not sharing[who] or used[who] > fair):
            top = least(c, roots, who)
            if top != NOBODY:
                most, found = used[who], top
    return found


@compiled
def _of_least_worth(
    c: Copies, roots: Ids, used: Ids, owners: Ids, sharing: NDArray[np.bool_], me: int, fair: float, worth: float
) -> int:  # fmt: skip
    """The least copy of all that may go and are worth less than `worth`; NOBODY: there is none."""
    found = NOBODY
    for who in owners:
        if who == me or not sharing[who] or used[who] > fair:
            top = least(c, roots, who)
            if top != NOBODY and c[top].worth < worth:
                worth, found = c[top].worth, top
    return found
