"""Carries out the scratch cache's policy after a batch: notes hits, starts copies, evicts, and takes in finished copies."""

import logging

import numpy as np

from tierd.engine.batch import Work
from tierd.engine.counters import Counters
from tierd.errors import CapacityExceeded
from tierd.migrator import CopyOrder, Migrator
from tierd.policy import PrefetchSnapshot, choose_evictions, choose_prefetches
from tierd.residency import Residency, ScratchCopy

log = logging.getLogger(__name__)


class ScratchCache:
    """Owned by the engine's thread. `limit`: copies started between two batches."""

    def __init__(self, residency: Residency, migrator: Migrator, counters: Counters, limit: int) -> None:
        self._residency = residency
        self._migrator = migrator
        self._counters = counters
        self._limit = limit
        self._step = 0

    def collect(self) -> None:
        """Make finished copies visible to kernels; one that failed or does not match its checksum is dropped and counted."""
        for done in self._migrator.poll():
            arrived = self._residency.finish_copy(done.copy_id, done.digest)
            if done.digest is None:
                self._counters.events["failed_copy"] += 1
            elif not arrived:
                self._counters.events["corrupt_copy"] += 1
                log.warning("a copy to scratch failed its checksum and was dropped")

    def update(self, works: list[Work]) -> None:
        """Learn from answered rows: keep what they read, fetch what they had to read from the host."""
        self._step += 1
        readers = [work for work in works if work.read_originals]
        for work in readers:
            self._count(work)
        room = min(self._limit, self._migrator.room) if readers else 0
        orders: list[CopyOrder] = []
        for work in readers:
            orders += self._prefetch(work, room - len(orders))
        if orders:  # or the copier would be woken by every call, to contend with the caller that has its answer now
            self._counters.prefetched += len(orders)
            self._migrator.submit(orders)

    def _count(self, work: Work) -> None:
        missed = work.host_reads
        hit = work.reads & ~missed
        self._counters.hits += int(np.count_nonzero(hit))
        self._counters.misses += int(np.count_nonzero(missed))
        if work.locations is not None:
            kind, block, head = np.nonzero(hit)
            self._residency.touch(work.session.table.copy_id[kind, work.ids[block], head], self._step)

    def _prefetch(self, work: Work, room: int) -> list[CopyOrder]:
        assert work.result is not None
        table = work.session.table
        # The table of now, not the call's: a batch may hold several sessions that share blocks.
        host_only = table.copy_id[:, work.ids] < 0
        snapshot = PrefetchSnapshot(work.reads & host_only, work.result.candidates().shares(len(work.ids)), work.exact_heads)
        orders: list[CopyOrder] = []
        for record in choose_prefetches(snapshot, room):
            copy = self._begin(work, record.kind, int(work.ids[record.block]), record.head)
            if copy is None:
                break
            orders.append(CopyOrder(copy.copy_id, copy.source, copy.target, copy.nbytes))
        return orders

    def _begin(self, work: Work, kind: int, block: int, head: int) -> ScratchCopy | None:
        """Reserve scratch for one record, evicting if that helps; None: there is no room."""
        table = work.session.table
        try:
            return self._residency.begin_copy(table, kind, block, head, self._step)
        except CapacityExceeded:
            needed = table.layout.original_record_bytes - self._residency.arenas.scratch.free_bytes
            evictions = choose_evictions(self._residency.oldest_first(), max(needed, 1), self._step)
        for copy_id in evictions:
            self._residency.evict(copy_id)
        self._counters.evicted += len(evictions)
        try:
            return self._residency.begin_copy(table, kind, block, head, self._step) if evictions else None
        except CapacityExceeded:  # enough bytes, but in pieces: sessions of different geometries share the pool
            return None
