"""Room in scratch: finds it for copies, remembers for whom each was begun, and whom it goes to next.

Legend: n copies or records; kind 0 keys and 1 values.
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tierd.engine.counters import Counters
from tierd.policy import Choice, Shelf
from tierd.residency import NO_COPIES, BlockTable, Ids, Residency


@dataclass(eq=False)
class Asker:
    """For whom copies were begun, and how large each is."""

    session_id: str
    family: str
    num_layers: int
    layer: int
    nbytes: int


class Scratch:
    """`wasted` hears of askers whose copies went unread, and of how many."""

    def __init__(self, residency: Residency, counters: Counters, wasted: Callable[[Asker, int], None]) -> None:
        self._residency, self._counters, self._wasted = residency, counters, wasted
        self._shelf = Shelf(*(pool.total_bytes for pool in residency.arenas.scratch))
        self._askers = np.empty(0, object)  # by copy id
        residency.on_gone(self._gone)

    def place(
        self, asker: Asker, table: BlockTable, kind: int, blocks: Ids, heads: Ids, worths: NDArray[np.float64], displace: float,
        families: Collection[str],
    ) -> Ids:  # fmt: skip
        """Begins copies of n records of falling `worths`, evicting what is worth less than `displace` of that; returns the ids of those for
        which there was room, which are the first. `families`: who has a share."""
        pool = self._residency.arenas.scratch[kind]
        size, free_bytes, done = pool.size_of(asker.nbytes), pool.free_bytes, NO_COPIES
        while True:
            room = self._shelf.choose(kind, asker.family, size, displace * worths[len(done) :], free_bytes, families)
            if len(room.evictions):
                self._residency.evict(room.evictions)
                self._counters.evicted += len(room.evictions)
            some = slice(len(done), len(done) + room.placed)
            ids = self._residency.begin_copies(table, kind, blocks[some], heads[some])
            self._remember(ids, asker)
            self._shelf.put(kind, ids, asker.family, size, worths[some][: len(ids)])
            done = np.concatenate([done, ids])
            if len(ids) == room.placed or not free_bytes:
                return done
            free_bytes = 0  # there were enough bytes but in pieces: sessions of different geometries share a pool

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

    def _remember(self, ids: Ids, asker: Asker) -> None:
        most, old = int(ids.max(initial=-1)) + 1, len(self._askers)
        if most > old:
            self._askers = np.concatenate([self._askers, np.empty(max(most - old, old), object)])
        self._askers[ids] = asker

    def _gone(self, ids: Ids, used: NDArray[np.bool_]) -> None:
        """The bytes of these copies are free again."""
        self._shelf.drop(ids)
        for asker, count in self.askers(ids[~used]).items():
            self._wasted(asker, count)
