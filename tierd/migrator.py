"""Carries out copies from originals to scratch, in the background. It makes no choices."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

log = logging.getLogger(__name__)
# (sources, targets, nbytes): n byte offsets each -> the bytes that arrived [n, nbytes]
Copier = Callable[[NDArray[np.int64], NDArray[np.int64], int], NDArray[np.uint8]]


class CopyOrders(NamedTuple):
    """Copy `nbytes` from each of `sources` in the originals to its of `targets` in scratch (byte offsets, int64 [n]). `ids` int64 [n]."""

    ids: NDArray[np.int64]
    sources: NDArray[np.int64]
    targets: NDArray[np.int64]
    nbytes: int


class CopiesDone(NamedTuple):
    """The bytes that arrived hash (xxh3, 64 bit) to `digests` [n]; None: the copies failed."""

    ids: NDArray[np.int64]
    digests: NDArray[np.uint64] | None


class Migrator:
    """At most `limit` copies wait or run; those of one size that wait together are one call of `copier`, and fail together.

    Until `start` is called there is no thread, and `poll` does the copying itself.
    """

    def __init__(self, copier: Copier, limit: int) -> None:
        self._copier = copier
        self._limit = limit
        lock = threading.Lock()
        self._wake, self._finished = threading.Condition(lock), threading.Condition(lock)
        self._orders: deque[CopyOrders] = deque()
        self._done: list[CopiesDone] = []
        self._outstanding = 0
        self._stopping = False
        self._thread: threading.Thread | None = None

    @property
    def room(self) -> int:
        """How many more copies `submit` takes now."""
        return self._limit - self._outstanding

    def submit(self, orders: CopyOrders) -> None:
        """Queue copies, no more than `room`. The ranges must stay reserved until `poll` has reported them."""
        with self._wake:
            assert len(orders.ids) <= self.room
            self._orders.append(orders)
            self._outstanding += len(orders.ids)
            self._wake.notify()

    def poll(self) -> list[CopiesDone]:
        """Copies finished since the last poll."""
        if not self._outstanding:
            return []
        while self._thread is None and self._orders:
            self._copy(self._next())
        with self._wake:
            done, self._done = self._done, []
            self._outstanding -= sum(len(each.ids) for each in done)
        return done

    def wait(self, timeout_s: float) -> bool:
        """Until something is finished that `poll` has not reported; False: nothing was, for so long. Without a thread it does not wait."""
        with self._wake:
            if self._thread is None:
                return bool(self._orders or self._done)
            return self._finished.wait_for(lambda: bool(self._done), timeout_s)

    def start(self) -> None:
        """Copy on a thread of its own from now on."""
        assert self._thread is None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="tierd-migrator", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Finish what is queued and end the thread; `poll` still reports it."""
        if self._thread is not None:
            with self._wake:
                self._stopping = True
                self._wake.notify()
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._orders and not self._stopping:
                    self._wake.wait()
                if not self._orders:
                    return
                orders = self._next()
            self._copy(orders)

    def _next(self) -> CopyOrders:
        """Takes the orders at the front that are of one size."""
        orders = [self._orders.popleft()]
        while self._orders and self._orders[0].nbytes == orders[0].nbytes:
            orders.append(self._orders.popleft())
        ids, sources, targets = (np.concatenate(columns) for columns in list(zip(*orders, strict=True))[:3])
        return CopyOrders(ids, sources, targets, orders[0].nbytes)

    def _copy(self, orders: CopyOrders) -> None:
        digests: NDArray[np.uint64] | None = None
        try:
            arrived = self._copier(orders.sources, orders.targets, orders.nbytes)
            digests = np.array([xxhash.xxh3_64_intdigest(record.data) for record in arrived], np.uint64)
        except Exception as error:  # whoever waits for the copies must hear of their end, and the thread must go on
            log.warning("%d copies to scratch failed: %s", len(orders.ids), error)
        with self._wake:
            self._done.append(CopiesDone(orders.ids, digests))
            self._finished.notify()
