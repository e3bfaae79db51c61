"""Room in scratch: finds it for copies, remembers for whom each was begun, and whom it goes to next.

Legend: n copies or records; kind 0 keys and 1 values.
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tierd.engine.counters import Counters
from tierd.policy import Choice, Shelf
from tierd.residency import KEY, NO_COPIES, BlockTable, Ids, Residency


@dataclass(eq=False)
class Asker:
    """For whom copies were begun, and how large each is."""

    session_id: str
    family: str
    num_layers: int
    layer: int
    nbytes: int


class Placed(NamedTuple):
    """Copies begun, by their ids; and the kinds of which there was no room for all."""

    ids: Ids
    short: list[int]


class Scratch:
    """`wasted` hears of askers whose copies went unread, and of how many."""

    def __init__(self, residency: Residency, counters: Counters, wasted: Callable[[Asker, int], None]) -> None:
        self._residency, self._counters, self._wasted = residency, counters, wasted
        self._shelf = Shelf(*(pool.total_bytes for pool in residency.arenas.scratch))
        self._askers = np.empty(0, object)  # by copy id
        residency.on_gone(self._gone)

    def place(
        self, askers: NDArray[np.object_], table: BlockTable, blocks: Ids, heads: Ids, worths: NDArray[np.float64], num_keys: int,
        displace: float, families: Collection[str],
    ) -> Placed:  # fmt: skip
        """Begins copies of n records for their `askers` [n] of one session, the first `num_keys` keys, the others values, each kind of
        falling `worths`, evicting what is worth less than `displace` of that. Of each kind the first have room. `families`: who has a
        share."""
        if not len(askers):
            return Placed(NO_COPIES, [])
        family, pools = askers[0].family, self._residency.arenas.scratch
        size, free_bytes = pools[KEY].size_of(askers[0].nbytes), [pool.free_bytes for pool in pools]
        left, done = [np.arange(num_keys), np.arange(num_keys, len(blocks))], [NO_COPIES]  # left of each kind, by index
        kinds = [kind for kind, its in enumerate(left) if len(its)]
        while kinds:
            begun, targets, in_pieces = list[Ids](), list[Ids](), list[int]()
            for kind in kinds:
                room = self._shelf.choose(kind, family, size, displace * worths[left[kind]], free_bytes[kind], families)
                if len(room.evictions):
                    self._residency.evict(room.evictions)
                    self._counters.evicted += len(room.evictions)
                found = self._residency.reserve(table, kind, room.placed)
                targets.append(found)
                begun.append(left[kind][: len(found)])
                left[kind] = left[kind][len(found) :]
                if len(found) < room.placed and free_bytes[kind]:  # sessions of different geometries share a pool
                    free_bytes[kind] = 0
                    in_pieces.append(kind)
            which = np.concatenate(begun)
            of_kind = (which >= num_keys).astype(np.int64)
            ids = self._residency.begin_copies(table, of_kind, blocks[which], heads[which], np.concatenate(targets))
            self._remember(ids, askers[which])
            self._shelf.put(of_kind, ids, family, size, worths[which])
            done.append(ids)
            kinds = in_pieces
        return Placed(np.concatenate(done), [kind for kind, its in enumerate(left) if len(its)])

    def askers(self, ids: Ids) -> Counter[Asker]:
        """For whom these copies were begun."""
        return Counter(self._askers[ids].tolist())

    def arrive(self, ids: Ids) -> None:
        """These copies are resident now."""
        self._shelf.arrive(ids)

    def gain(self, choice: Choice) -> None:
        """What is held is worth what the choice says."""
        self._shelf.gain(choice.held, choice.held_worths)

    def rescale(self, factor: float) -> None:
        """All worths have been multiplied by `factor`."""
        self._shelf.rescale(factor)

    def _remember(self, ids: Ids, askers: NDArray[np.object_]) -> None:
        most, old = int(ids.max(initial=-1)) + 1, len(self._askers)
        if most > old:
            self._askers = np.concatenate([self._askers, np.empty(max(most - old, old), object)])
        self._askers[ids] = askers

    def _gone(self, ids: Ids, used: NDArray[np.bool_]) -> None:
        """The bytes of these copies are free again."""
        self._shelf.drop(ids)
        for asker, count in self.askers(ids[~used]).items():
            self._wasted(asker, count)
