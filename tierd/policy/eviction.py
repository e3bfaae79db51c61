"""Which copies make room: those of least worth, but nobody's fair share for somebody else's greed."""

import heapq
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

# What a copy is worth now; None: it may not go (in flight, or a call reads it).
WorthOf = Callable[[int], float | None]


@dataclass
class _Owned:
    """One owner's copies. `order`: (worth when last looked at, copy id), a heap; worths only grow, so the real order is not far."""

    used_bytes: int = 0
    count: int = 0
    order: list[tuple[float, int]] = field(default_factory=list)


class Shelf:
    """Who owns which copies of one region of scratch. An owner is a session with all its forks: they read the same copies, and would push
    them out for one another if each had a share of its own. Every copy has one owner.

    An owner that is active has a fair share: the region divided by the number of active owners. Below it, room is made for it from
    whoever has most above theirs, whatever that is worth; so nobody starves. Above it, a record only displaces copies of less worth,
    which are its own, an idle owner's, or above another's share.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._owned: defaultdict[str, _Owned] = defaultdict(_Owned)
        self._copies: dict[int, tuple[str, int]] = {}

    def __len__(self) -> int:
        return len(self._copies)

    def used_bytes(self, owner: str) -> int:
        return self._owned[owner].used_bytes if owner in self._owned else 0

    def put(self, copy_id: int, owner: str, nbytes: int, worth: float) -> None:
        """A new copy of `owner`."""
        assert copy_id not in self._copies
        self._copies[copy_id] = owner, nbytes
        owned = self._owned[owner]
        owned.used_bytes += nbytes
        owned.count += 1
        if len(owned.order) > 64 + 2 * owned.count:  # mostly of copies that are gone
            owned.order = [entry for entry in owned.order if entry[1] in self._copies]
            heapq.heapify(owned.order)
        heapq.heappush(owned.order, (worth, copy_id))

    def drop(self, copy_id: int) -> None:
        """The copy is gone."""
        owner, nbytes = self._copies.pop(copy_id)
        owned = self._owned[owner]
        owned.used_bytes -= nbytes
        owned.count -= 1
        if not owned.count:
            del self._owned[owner]

    def reorder(self, factor: float) -> None:
        """All worths have been multiplied by `factor` (> 0)."""
        for owned in self._owned.values():
            owned.order = [(worth * factor, copy_id) for worth, copy_id in owned.order]

    def choose(self, owner: str, nbytes: int, worth: float, active: Collection[str], worth_of: WorthOf) -> list[int]:
        """Ids of copies that together hold `nbytes`, to make room for a record of `owner` and this `worth`; none if there are not enough.

        Nothing is dropped here. `active`: owners that have a fair share; `owner` is one anyway.
        """
        search = _Search(self._owned, self._copies, worth_of)
        fair = self.capacity_bytes / len({owner, *active})
        left = {name: owned.used_bytes for name, owned in self._owned.items()}
        freed = 0
        while freed < nbytes:
            others = [name for name in left if name != owner and (name not in active or left[name] > fair)]
            entitled = left.get(owner, 0) + nbytes <= fair
            who = search.of_the_largest(others, left) if entitled else None
            if who is None:  # also below a fair share: what is left of a region, in pieces or less than a record, is nobody's
                who = search.of_least_worth([*others, owner], worth)
            if who is None:
                break
            size = self._copies[search.take(who)][1]
            left[who] -= size
            freed += size
        chosen = search.end()
        return chosen if freed >= nbytes else []


class _Search:
    """Takes copies out of their owners' orders for as long as one choice lasts."""

    def __init__(self, owned: Mapping[str, _Owned], copies: Mapping[int, tuple[str, int]], worth_of: WorthOf) -> None:
        self._owned, self._copies, self._worth_of = owned, copies, worth_of
        self._taken: list[tuple[str, float, int]] = []
        self._may_not: list[tuple[str, float, int]] = []

    def of_the_largest(self, owners: list[str], used_bytes: Mapping[str, int]) -> str | None:
        """The owner with most bytes of those who have a copy that may go."""
        return next((name for name in sorted(owners, key=lambda name: -used_bytes[name]) if self._top(name) is not None), None)

    def of_least_worth(self, owners: list[str], worth: float) -> str | None:
        """The owner of the copy of least worth, if that is below `worth`."""
        least, who = min(((top, name) for name in owners if (top := self._top(name)) is not None), default=(worth, None))
        return who if least < worth else None

    def take(self, owner: str) -> int:
        """The owner's copy of least worth, which is not offered again."""
        worth, copy_id = heapq.heappop(self._owned[owner].order)
        self._taken.append((owner, worth, copy_id))
        return copy_id

    def end(self) -> list[int]:
        """Puts everything back; returns the ids that were taken."""
        for owner, worth, copy_id in (*self._taken, *self._may_not):
            heapq.heappush(self._owned[owner].order, (worth, copy_id))
        return [copy_id for _, _, copy_id in self._taken]

    def _top(self, owner: str) -> float | None:
        """What the owner's copy of least worth is worth, of those that may go; it is now on top of its order."""
        order = self._owned[owner].order if owner in self._owned else []
        while order:
            stored, copy_id = order[0]
            current = self._worth_of(copy_id) if copy_id in self._copies else None
            if current is not None and current <= stored:
                return stored
            if current is not None:
                heapq.heapreplace(order, (current, copy_id))
                continue
            heapq.heappop(order)
            if copy_id in self._copies:
                self._may_not.append((owner, stored, copy_id))
        return None
