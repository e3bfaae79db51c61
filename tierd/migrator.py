"""Has records copied from originals to scratch, in the background. It makes no choices."""

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tierd_kernels.copying import Copying

from tierd.residency.digests import digests

log = logging.getLogger(__name__)
Ints = NDArray[np.int64]
# (sources, targets, nbytes): n byte offsets each -> copies of the first of them, at least one. Only once those begun before are done.
Begin = Callable[[Ints, Ints, int], Copying]


class CopyOrders(NamedTuple):
    """Copy `nbytes` from each of `sources` in the originals to its of `targets` in scratch (byte offsets, int64 [n]). `ids` int64 [n]."""

    ids: Ints
    sources: Ints
    targets: Ints
    nbytes: int


class CopiesDone(NamedTuple):
    """The bytes that arrived hash (xxh3, 64 bit) to `digests` [n]; None: the copies failed."""

    ids: Ints
    digests: NDArray[np.uint64] | None


class Migrator:
    """At most `limit` copies wait or are under way. Those under way were begun together, and fail together. Owned by whoever has the
    engine's turn: a thread of its own, which waited for the device and hashed, took the interpreter's lock from it for 85 us a call."""

    def __init__(self, begin: Begin, limit: int) -> None:
        self._begin = begin
        self._limit = limit
        self._orders: deque[CopyOrders] = deque()
        self._under_way: tuple[Ints, Copying] | None = None  # with their ids
        self._done: list[CopiesDone] = []
        self._outstanding = 0

    @property
    def room(self) -> int:
        """How many more copies `submit` takes now."""
        return self._limit - self._outstanding

    def submit(self, orders: CopyOrders) -> None:
        """Copies, no more than `room`, that begin as soon as none are under way. The ranges must stay reserved until `poll` has reported
        them."""
        assert len(orders.ids) <= self.room
        self._orders.append(orders)
        self._outstanding += len(orders.ids)
        self._go_on()

    def poll(self) -> list[CopiesDone]:
        """Copies finished since the last poll; begins those that wait."""
        while self._take_in():
            pass
        done, self._done = self._done, []
        self._outstanding -= sum(len(each.ids) for each in done)
        return done

    def wait(self, timeout_s: float) -> bool:
        """Until something is finished that `poll` has not reported; False: nothing was, for so long."""
        end_s = time.perf_counter() + timeout_s
        while self._under_way is not None and not self._done and not self._take_in():
            if time.perf_counter() > end_s:
                return False
            time.sleep(0)  # others may have the interpreter's lock
        return bool(self._done)

    def _take_in(self) -> bool:
        """Whether those under way have ended; then others have begun."""
        if self._under_way is None:
            return False
        ids, copying = self._under_way
        try:
            if not copying.done():
                return False
            count, nbytes = copying.arrived.shape
            self._done.append(CopiesDone(ids, digests(copying.arrived.reshape(-1), np.arange(count) * nbytes, nbytes)))
        except Exception as error:
            self._fail(ids, error)
        self._under_way = None
        self._go_on()
        return True

    def _go_on(self) -> None:
        """Begins what waits, if nothing is under way."""
        while self._under_way is None and self._orders:
            ids, sources, targets, nbytes = self._orders.popleft()
            try:
                copying = self._begin(sources, targets, nbytes)
            except Exception as error:
                self._fail(ids, error)
                continue
            count = len(copying.arrived)
            if count < len(ids):
                self._orders.appendleft(CopyOrders(ids[count:], sources[count:], targets[count:], nbytes))
            self._under_way = ids[:count], copying

    def _fail(self, ids: Ints, error: Exception) -> None:
        """Whoever waits for the copies must hear of their end."""
        log.warning("%d copies to scratch failed: %s", len(ids), error)
        self._done.append(CopiesDone(ids, None))
