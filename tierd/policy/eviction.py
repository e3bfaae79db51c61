"""Which copies make room: those of least worth, but nobody's fair share for somebody else's greed."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tierd.policy.heap import COPY, NO_COPY, NOBODY, Copies, Ids, choose, own_all, pull_all, push_all, raise_all

GROWS_BY_MIN = 64


class Room(NamedTuple):
    """For the first `placed` records there is room, once the copies of these ids, of the worth least, are evicted."""

    placed: int
    evictions: Ids


class Shelf:
    """Who owns which copies of each region of scratch, and what they are worth. An owner is a session with all its forks: they read the
    same copies, and would push them out for one another if each had a share of its own. Every copy has one owner. All regions are on one
    shelf, since most of what happens to copies happens to those of several regions at once.

    An owner that is active has a fair share of each region: its bytes divided by the number of active owners. Below it, room is made for it
    from whoever has most above theirs, whatever that is worth; so nobody starves. Above it, a record only displaces copies of less worth,
    which are its own, an idle owner's, or above another's share.
    """

    def __init__(self, *capacities_bytes: int) -> None:
        """Of the regions 0, 1, ..."""
        self._capacities_bytes = capacities_bytes
        self._copies = np.zeros(0, COPY)
        self._numbers: dict[str, int] = {}  # of owners; they are reused. To the heaps an owner is somebody else in each region: see `_at`
        self._used, self._count, self._roots = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64)

    def __len__(self) -> int:
        return int(self._count.sum())

    def used_bytes(self, region: int, owner: str) -> int:
        return int(self._used[self._at(region, self._numbers[owner])]) if owner in self._numbers else 0

    def put(self, regions: Ids, ids: Ids, owner: str, nbytes: int, worths: NDArray[np.float64]) -> None:
        """New copies [n] of `owner` in these regions, of `nbytes` each. They do not go before they have arrived."""
        if not len(ids):
            return
        c, owners = self._with_room_for(int(ids.max()) + 1), self._at(0, self._number(owner)) + regions
        sound = own_all(c, ids, owners, nbytes, worths, self._used, self._count)
        assert sound, "a copy has an owner"

    def arrive(self, ids: Ids) -> None:
        """From now on these copies may make room for others."""
        push_all(self._copies, self._roots, ids)

    def gain(self, ids: Ids, worths: NDArray[np.float64]) -> None:
        """These copies are worth more now."""
        raise_all(self._copies, ids, worths)

    def drop(self, ids: Ids) -> None:
        """The copies are gone."""
        c = self._copies
        pull_all(c, self._roots, ids)
        owners = c["owner"][ids]
        assert (owners != NOBODY).all()
        self._used -= np.bincount(owners, c["nbytes"][ids], len(self._used)).astype(np.int64)  # exact: bytes below 2^53
        self._count -= np.bincount(owners, minlength=len(self._count))
        c["owner"][ids] = NOBODY
        for name in [name for name, number in self._numbers.items() if not self._count[self._everywhere(number)].any()]:
            del self._numbers[name]

    def rescale(self, factor: float) -> None:
        """All worths have been multiplied by `factor` (> 0)."""
        for name in ("worth", "key"):
            self._copies[name] *= factor

    def choose(
        self, region: int, owner: str, nbytes: int, worths: NDArray[np.float64], free_bytes: int, active: Collection[str]
    ) -> Room:  # fmt: skip
        """Which copies make room in a region for n records of `owner`, of `nbytes` each, in order, of which `worths` [n] falls;
        `free_bytes` are there for the first. At the first record for which no room can be made it ends, for all that follow are worth
        less.

        What was chosen must be evicted. `active`: owners that have a fair share; `owner` is one anyway.
        """
        if len(worths) * nbytes <= free_bytes:
            return Room(len(worths), np.empty(0, np.int64))
        me = self._at(region, self._number(owner))
        names = {owner, *active}
        sharing = np.zeros(len(self._roots), np.bool_)
        sharing[[self._at(region, self._numbers[name]) for name in names if name in self._numbers]] = True
        owners = np.array([self._at(region, number) for number in self._numbers.values()], np.int64)
        fair = self._capacities_bytes[region] / len(names)
        room = Room(*choose(self._copies, self._roots, self._used.copy(), owners, sharing, me, fair, nbytes, worths, free_bytes))
        if not room.placed and not self._count[self._everywhere(self._numbers[owner])].any():
            del self._numbers[owner]  # a region too small for a record has no copy whose end would do it, and sessions come and go
        return room

    def _at(self, region: int, number: int) -> int:
        """Who an owner is in a region."""
        return number * len(self._capacities_bytes) + region

    def _everywhere(self, number: int) -> slice:
        """Who an owner is in the regions."""
        return slice(self._at(0, number), self._at(0, number + 1))

    def _number(self, owner: str) -> int:
        if owner not in self._numbers:
            taken = set(self._numbers.values())
            number = next(n for n in range(len(taken) + 1) if n not in taken)
            if self._at(0, number) == len(self._roots):
                extra = self._at(0, max(GROWS_BY_MIN, number))
                self._used, self._count = (np.concatenate([x, np.zeros(extra, np.int64)]) for x in (self._used, self._count))
                self._roots = np.concatenate([self._roots, np.full(extra, NOBODY)])
            self._numbers[owner] = number
        return self._numbers[owner]

    def _with_room_for(self, count: int) -> Copies:
        old = len(self._copies)
        if count > old:
            self._copies = np.concatenate([self._copies, np.full(max(GROWS_BY_MIN, old, count - old), NO_COPY, COPY)])
        return self._copies


def prepare() -> None:
    """Compiles what a shelf calls, or loads it."""
    shelf, one, worth = Shelf(1), np.zeros(1, np.int64), np.ones(1)
    shelf.put(one, one, "", 1, worth)
    shelf.arrive(one)
    shelf.gain(one, worth)
    shelf.drop(shelf.choose(0, "", 1, 2.0 * worth, 0, ()).evictions)
