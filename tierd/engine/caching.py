"""Carries out the scratch cache's policy after a batch: counts hits, starts copies, evicts, and takes in finished copies."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from tierd.clock import Clock
from tierd.config import EngineConfig
from tierd.engine.batch import Job, Work
from tierd.engine.counters import Counters
from tierd.engine.ledger import Ledger
from tierd.errors import CapacityExceeded
from tierd.migrator import CopyOrder, Migrator
from tierd.policy import FIRST_STEP, Choice, LinkBudget, Shelf, Snapshot, Turns, named
from tierd.residency import BlockTable, CopyState, Residency, ScratchCopy
from tierd.session import Session

log = logging.getLogger(__name__)
ACTIVE_STEPS = 16.0  # who has not called for so long has no fair share: eight half-lives of the predictive policy's worths


class _Asked(NamedTuple):
    """For whom a copy was begun."""

    session_id: str
    family: str
    num_layers: int
    layer: int


class ScratchCache:
    """Owned by the engine's thread. `sessions`: those that are open."""

    def __init__(
        self, config: EngineConfig, residency: Residency, migrator: Migrator, counters: Counters, sessions: Mapping[str, Session],
        clock: Clock,
    ) -> None:  # fmt: skip
        self._config, self._residency, self._migrator, self._counters = config, residency, migrator, counters
        self._sessions, self._clock = sessions, clock
        self._policy = named(config.tiering_policy)
        self._link = LinkBudget(config.link_bytes_per_s, config.prefetch_link_share)
        self._turns = Turns(config.migrations_max)
        self._shelves = tuple(Shelf(pool.total_bytes) for pool in residency.arenas.scratch)
        self._asked: dict[int, _Asked] = {}
        self._under_way: Counter[tuple[str, int]] = Counter()  # copies, by the family and layer that they were begun for
        self._active: dict[str, float] = {}  # when each session called last
        self._families: set[str] = set()  # theirs
        self._now = FIRST_STEP
        self._began_s = clock.now()
        self.ledger = Ledger(self._began_s)
        residency.on_gone(self._gone)

    @property
    def candidates_max(self) -> int:
        """How many blocks of each KV head and kind calls should name; none if the policy does not look at them."""
        return self._config.prefetch_candidates_max if self._policy.wants_candidates else 0

    def wait(self, jobs: Iterable[Job]) -> float:
        """Gives copies of the blocks that `jobs` will read the configured time to arrive; returns the seconds that it took."""
        if not self._residency.num_in_flight or not self._config.prefetch_wait_us_max:
            return 0.0
        rows = [(session, row.layer) for job in jobs for session, row in zip(job.sessions, job.command.rows, strict=True)]
        began_s = self._clock.now()
        left_s = self._config.prefetch_wait_us_max * 1e-6
        while left_s > 0 and any(self._under_way[session.family, layer] for session, layer in rows) and self._migrator.wait(left_s):
            self.collect()
            left_s = self._config.prefetch_wait_us_max * 1e-6 - (self._clock.now() - began_s)
        return self._clock.now() - began_s

    def collect(self) -> None:
        """Make finished copies visible to kernels. One that failed or does not match its checksum is copied once more, then dropped."""
        again: list[CopyOrder] = []
        for done in self._migrator.poll():
            before = self._residency.copy(done.copy_id)
            assert before is not None
            if before.state is CopyState.IN_FLIGHT and done.digest != before.checksum:
                self._counters.events["failed_copy" if done.digest is None else "corrupt_copy"] += 1
                if done.digest is not None:  # of the others the migrator has told
                    log.warning("a copy to scratch does not match its original's checksum")
            asked = self._asked[done.copy_id]
            retry = self._residency.finish_copy(done.copy_id, done.digest)
            if retry is None:
                self._turns.end(asked.session_id)
                self._arrive(asked.family, asked.layer)
            else:
                self.ledger.retry_bytes += retry.nbytes
                again.append(CopyOrder(retry.copy_id, retry.source, retry.target, retry.nbytes))
        if again:
            self._migrator.submit(again)

    def _arrive(self, family: str, layer: int) -> None:
        self._under_way[family, layer] -= 1
        if not self._under_way[family, layer]:
            del self._under_way[family, layer]  # families come and go

    def update(self, works: list[Work]) -> None:
        """Learn from answered rows: count what they read, and start the copies that the policy chooses."""
        if not works:
            return
        self._advance(works)
        choices = []
        for work in works:
            misses = self._count(work)
            state = work.session.layers[work.row.layer]
            state.calls += 1
            if self._policy.looks_at(state.calls + work.row.layer, misses):
                choices.append((work, self._policy.choose(self._snapshot(work))))
        self._link.refill(self._clock.now(), self._active)
        orders = self._start(choices)
        if orders:  # or the copier would be woken by every call, to contend with the caller that has its answer now
            self._counters.prefetched += len(orders)
            self._migrator.submit(orders)

    def status(self) -> dict[str, Any]:
        """What policy, link and sessions have done, ready for JSON."""
        self.ledger.forget(self.ledger.session_ids - self._sessions.keys())
        now_s, rate = self._clock.now(), self._config.link_bytes_per_s
        moved = self._counters.demand_bytes + self._counters.prefetch_bytes + self.ledger.retry_bytes
        return {
            "policy": self._policy.name,
            "link_share": moved / (rate * max(now_s - self._began_s, 1e-9)),
            "retry_bytes": self.ledger.retry_bytes,
            **self.ledger.as_dict(now_s, rate),
        }

    def _advance(self, works: list[Work]) -> None:
        """One step is one call of every layer of every active session, however they are batched."""
        for work in works:
            self._active[work.session.session_id] = self._now
        for name in [name for name, then in self._active.items() if then < self._now - ACTIVE_STEPS or name not in self._sessions]:
            del self._active[name]
        self._families = {self._sessions[name].family for name in self._active}
        self._now += sum(1.0 / len(work.session.layers) for work in works) / max(1, len(self._active))
        factor = self._policy.rescale(self._now)
        if factor != 1.0:
            for table in self._residency.tables.values():
                table.notes["worth"] *= factor
            for shelf in self._shelves:
                shelf.reorder(factor)

    def _count(self, work: Work) -> int:
        """Returns how many originals were read from the host."""
        table, nbytes = work.session.table, work.session.layout.original_record_bytes
        if not len(work.reads.kind):
            return 0
        kind, index, head = work.reads.where(~work.from_host)
        table.used[kind, work.ids[index], head] = True
        hits, misses = len(kind), int(np.count_nonzero(work.from_host))
        self._counters.hits += hits
        self._counters.misses += misses
        self._counters.late += work.late_records
        self._counters.demand_bytes += misses * nbytes
        self._link.read(misses * nbytes)
        self._note(work, hits=hits, misses=misses, late=work.late_records, demand_bytes=misses * nbytes)
        return misses

    def _note(self, work: Work, **amounts: int) -> None:
        session = work.session
        if session.session_id in self._sessions:
            self.ledger.add(session.session_id, len(session.layers), work.row.layer, **amounts)

    def _snapshot(self, work: Work) -> Snapshot:
        assert work.result is not None
        table, result = work.session.table, work.result
        blocks, scores = result.candidates()
        # The table's columns of now, not the call's: a batch may hold several sessions that share blocks.
        return Snapshot(
            work.ids, result.key_reads, result.value_reads, work.exact_heads, blocks, scores, table.notes, self._now,
        )  # fmt: skip

    def _start(self, choices: list[tuple[Work, Choice]]) -> list[CopyOrder]:
        """Begins copies and notes for whom."""
        begun = self._begin_best(choices)
        for work, count in Counter(work for work, _ in begun).items():
            nbytes = count * work.session.layout.original_record_bytes
            self._counters.prefetch_bytes += nbytes
            self._note(work, prefetched=count, prefetch_bytes=nbytes)
        return [CopyOrder(copy.copy_id, copy.source, copy.target, copy.nbytes) for _, copy in begun]

    def _begin_best(self, choices: list[tuple[Work, Choice]]) -> list[tuple[Work, ScratchCopy]]:
        """The best of each row in turn, until room, link or scratch is used up."""
        begun: list[tuple[Work, ScratchCopy]] = []
        full: set[tuple[str, int]] = set()  # sessions and kinds for which no room can be made: what follows is worth less
        waiting = [(work, iter(zip(choice.records.tolist(), choice.worths.tolist(), strict=True))) for work, choice in choices]
        while waiting:
            going = []
            for work, wanted in waiting:
                record = next(wanted, None)
                if record is None or not self._may_start(work, len(begun)):
                    continue
                going.append((work, wanted))
                (kind, block, head), worth = record
                # Another row of the batch may share the block.
                if (work.session.session_id, kind) in full or work.session.table.copy_id[kind, block, head] >= 0:
                    continue
                copy = self._begin(work, kind, block, head, worth)
                if copy is None:
                    full.add((work.session.session_id, kind))
                else:
                    begun.append((work, copy))
            waiting = going
        return begun

    def _may_start(self, work: Work, begun: int) -> bool:
        name = work.session.session_id
        if self._link.available(name) < work.session.layout.original_record_bytes:
            return False
        if self._turns.room(name, self._active) and self._migrator.room > begun:
            return True
        self._turns.refuse(name)
        return False

    def _begin(self, work: Work, kind: int, block: int, head: int, worth: float) -> ScratchCopy | None:
        """Reserve scratch for one record, evicting if that helps; None: there is no room for anything of so little worth."""
        table, name = work.session.table, work.session.session_id
        copy = self._reserve(table, kind, block, head) or self._make_room(work.session.family, table, kind, block, head, worth)
        if copy is None:
            return None
        self._asked[copy.copy_id] = _Asked(name, work.session.family, len(work.session.layers), work.row.layer)
        self._under_way[work.session.family, work.row.layer] += 1
        self._shelves[kind].put(copy.copy_id, work.session.family, copy.nbytes, worth)
        self._turns.start(name)
        self._link.spend(name, copy.nbytes)
        return copy

    def _make_room(self, family: str, table: BlockTable, kind: int, block: int, head: int, worth: float) -> ScratchCopy | None:
        pool = self._residency.arenas.scratch[kind]
        missing = pool.size_of(table.layout.original_record_bytes) - pool.free_bytes
        evictions = self._shelves[kind].choose(family, max(missing, 1), worth, self._families, self._worth_of)
        for copy_id in evictions:
            self._residency.evict(copy_id)
        self._counters.evicted += len(evictions)
        # There may be enough bytes but in pieces: sessions of different geometries share a pool.
        return self._reserve(table, kind, block, head) if evictions else None

    def _reserve(self, table: BlockTable, kind: int, block: int, head: int) -> ScratchCopy | None:
        try:
            return self._residency.begin_copy(table, kind, block, head)
        except CapacityExceeded:
            return None

    def _worth_of(self, copy_id: int) -> float | None:
        copy = self._residency.copy(copy_id)
        return None if copy is None or copy.pinned else float(copy.table.notes["worth"][copy.kind, copy.block, copy.head])

    def _gone(self, copy: ScratchCopy, used: bool) -> None:
        """A copy's bytes are free again."""
        asked = self._asked.pop(copy.copy_id)
        self._shelves[copy.kind].drop(copy.copy_id)
        if not used:
            self._counters.wasted += 1
            self._counters.wasted_bytes += copy.nbytes
            if asked.session_id in self._sessions:
                self.ledger.add(asked.session_id, asked.num_layers, asked.layer, wasted=1, wasted_bytes=copy.nbytes)
