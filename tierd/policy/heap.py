"""Heaps of copies by worth, one for each owner, and the choice from them, compiled: which copies go, while worths grow all the time.

A skew heap (Sleator and Tarjan, "Self-adjusting heaps", SIAM J. Comput. 15, 1986): two are melded in O(log n) amortised, and all else is
melding. Its links are columns by copy id, so that heaps of any size need no memory of their own. A copy's `key` is its worth when it was
last looked at; worths only grow, so it is brought up to date when it comes to the top, and not before.

All in one module: what is compiled is kept on disk for as long as its own file stays as it is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])
compiled: Callable[[Function], Function] = numba.njit(cache=True)
NOBODY = -1
Ids = NDArray[np.int64]


class Columns(NamedTuple):
    """By copy id. `owner`: NOBODY where there is no copy. `held`: it is in its owner's heap. Links are copy ids, or NOBODY."""

    owner: Ids
    nbytes: Ids
    worth: NDArray[np.float64]
    key: NDArray[np.float64]
    left: Ids
    right: Ids
    parent: Ids
    held: NDArray[np.bool_]


def columns(count: int) -> Columns:
    """Of no copies."""
    owner, left, right, parent = (np.full(count, NOBODY) for _ in range(4))
    return Columns(owner, np.zeros(count, np.int64), np.zeros(count), np.zeros(count), left, right, parent, np.zeros(count, np.bool_))


@compiled
def before(c: Columns, a: int, b: int) -> bool:
    """Whether `a` goes first: of equal worths the lower id, since what was begun together lies together, and frees a larger range."""
    return bool(c.key[a] < c.key[b] or (c.key[a] == c.key[b] and a < b))


@compiled
def meld(c: Columns, a: int, b: int) -> int:
    """The root of the heaps of roots `a` and `b` together."""
    if a == NOBODY or b == NOBODY:
        return a + b - NOBODY  # the other one
    if before(c, b, a):
        a, b = b, a
    root = a
    while True:  # down the right edges; a node's children change sides
        lower = c.right[a]
        c.right[a] = c.left[a]
        if lower == NOBODY:
            break
        if before(c, b, lower):
            lower, b = b, lower
        c.left[a], c.parent[lower] = lower, a
        a = lower
    c.left[a], c.parent[b] = b, a
    return root


@compiled
def push(c: Columns, roots: Ids, copy: int) -> None:
    """Into its owner's heap, at its worth of now."""
    c.key[copy], c.held[copy] = c.worth[copy], True
    c.left[copy] = c.right[copy] = c.parent[copy] = NOBODY
    who = c.owner[copy]
    roots[who] = meld(c, roots[who], copy)


@compiled
def pull(c: Columns, roots: Ids, copy: int) -> None:
    """Out of its owner's heap, wherever it is there."""
    below, above = meld(c, c.left[copy], c.right[copy]), c.parent[copy]
    if below != NOBODY:
        c.parent[below] = above
    if above == NOBODY:
        roots[c.owner[copy]] = below
    elif c.left[above] == copy:
        c.left[above] = below
    else:
        c.right[above] = below
    c.held[copy] = False


@compiled
def push_all(c: Columns, roots: Ids, copies: Ids) -> None:
    for copy in copies:
        push(c, roots, copy)


@compiled
def pull_all(c: Columns, roots: Ids, copies: Ids) -> None:
    """Those that are in a heap."""
    for copy in copies:
        if c.held[copy]:
            pull(c, roots, copy)


@compiled
def least(c: Columns, roots: Ids, who: int) -> int:
    """The owner's copy of least worth of now, which is then on top; NOBODY: there is none."""
    while True:
        top = roots[who]
        if top == NOBODY or c.worth[top] <= c.key[top]:
            return int(top)
        pull(c, roots, top)
        push(c, roots, top)


@compiled
def choose(
    c: Columns, roots: Ids, used: Ids, owners: Ids, sharing: NDArray[np.bool_], me: int, fair: float, nbytes: int,
    worths: NDArray[np.float64], free: int, evictions: Ids,
) -> tuple[int, int]:  # fmt: skip
    """Which copies make room for `me`'s records, as `Shelf.choose` has it; how many are placed, and how many `evictions` are written.
    `used` bytes by owner, of which `owners` are some, follow what is chosen and placed; `sharing`: by owner, who has a `fair` share."""
    count = 0
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
                return i, before
            pull(c, roots, victim)
            evictions[count] = victim
            count += 1
            used[c.owner[victim]] -= c.nbytes[victim]
            free += c.nbytes[victim]
        free -= nbytes
        used[me] += nbytes
    return len(worths), count


@compiled
def _of_the_largest(c: Columns, roots: Ids, used: Ids, owners: Ids, sharing: NDArray[np.bool_], me: int, fair: float) -> int:
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
    c: Columns, roots: Ids, used: Ids, owners: Ids, sharing: NDArray[np.bool_], me: int, fair: float, worth: float
) -> int:  # fmt: skip
    """The least copy of all that may go and are worth less than `worth`; NOBODY: there is none."""
    found = NOBODY
    for who in owners:
        if who == me or not sharing[who] or used[who] > fair:
            top = least(c, roots, who)
            if top != NOBODY and c.worth[top] < worth:
                worth, found = c.worth[top], top
    return found
