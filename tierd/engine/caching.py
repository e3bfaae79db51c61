"""Carries out the scratch cache's policy after a batch: counts hits, starts copies, evicts, and takes in finished copies."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tierd.clock import Clock
from tierd.config import EngineConfig
from tierd.engine.batch import Job, Work
from tierd.engine.counters import Counters
from tierd.engine.ledger import Ledger
from tierd.engine.scratch import Asker, Scratch
from tierd.migrator import CopyOrders, Migrator
from tierd.policy import FIRST_STEP, Choice, LinkBudget, Snapshot, Turns, named
from tierd.residency import KEY, NO_COPIES, NO_COPY, VALUE, Ids, Residency, mark_used
from tierd.session import Session

log = logging.getLogger(__name__)
ACTIVE_STEPS = 16.0  # who has not called for so long has no fair share: eight half-lives of the predictive policy's worths


@dataclass(eq=False)
class _Wish:
    """What a row wants copied: `choice` from record `at` on."""

    work: Work
    choice: Choice
    at: int = 0

    @property
    def left(self) -> int:
        return len(self.choice.records) - self.at

    def end(self) -> None:
        """Nothing more is copied."""
        self.at = len(self.choice.records)


class ScratchCache:
    """Owned by whoever has the engine's turn. `sessions`: those that are open."""

    def __init__(
        self, config: EngineConfig, residency: Residency, migrator: Migrator, counters: Counters, sessions: Mapping[str, Session],
        clock: Clock,
    ) -> None:  # fmt: skip
        self._config, self._residency, self._migrator, self._counters = config, residency, migrator, counters
        self._sessions, self._clock = sessions, clock
        self._policy = named(config.tiering_policy)
        self._link = LinkBudget(config.link_bytes_per_s, config.prefetch_link_share)
        self._turns = Turns(config.migrations_max)
        self._scratch = Scratch(residency, counters, self._wasted)
        self._under_way: Counter[tuple[str, int]] = Counter()  # copies, by the family and layer that they were begun for
        self._active: dict[str, float] = {}  # when each session called last
        self._families: set[str] = set()  # theirs
        self._answered: list[Work] = []  # what `update` has not learnt from yet
        self._now = FIRST_STEP
        self._began_s = clock.now()
        self.ledger = Ledger(self._began_s)

    @property
    def candidates_max(self) -> int:
        """How many blocks of each KV head and kind calls should name; none if the policy does not look at them."""
        return self._config.prefetch_candidates_max if self._policy.wants_candidates else 0

    def wait(self, jobs: Iterable[Job]) -> float:
        """Takes in copies of the blocks that `jobs` will read, if some are under way, and gives these the configured time to arrive;
        returns the seconds that it took. Other copies are not worth a delay."""
        rows = {(session.family, row.layer) for job in jobs for session, row in zip(job.sessions, job.command.rows, strict=True)}
        if rows.isdisjoint(self._under_way):
            return 0.0
        self.collect()
        began_s = self._clock.now()
        left_s = self._config.prefetch_wait_us_max * 1e-6
        while left_s > 0 and not rows.isdisjoint(self._under_way) and self._migrator.wait(left_s):
            self.collect()
            left_s = self._config.prefetch_wait_us_max * 1e-6 - (self._clock.now() - began_s)
        return self._clock.now() - began_s

    def collect(self) -> None:
        """Make finished copies visible to kernels. One that failed or does not match its checksum is copied once more, then dropped."""
        for done in self._migrator.poll():
            askers, finished = self._scratch.askers(done.ids), self._residency.finish_copies(done.ids, done.digests)
            self._scratch.arrive(finished.settled)
            if finished.failures:
                self._counters.events["failed_copy" if done.digests is None else "corrupt_copy"] += finished.failures
                if done.digests is not None:  # of the others the migrator has told
                    log.warning("%d copies to scratch do not match their originals' checksums", finished.failures)
            if len(finished.again):
                askers -= self._scratch.askers(finished.again)
                self.ledger.retry_bytes += self._submit(finished.again)
            for asker, count in askers.items():
                self._turns.end(asker.session_id, count)
                self._under_way[asker.family, asker.layer] -= count
                if not self._under_way[asker.family, asker.layer]:
                    del self._under_way[asker.family, asker.layer]  # families come and go

    def _submit(self, ids: Ids) -> int:
        """Gives copies in flight to the migrator; returns their bytes."""
        sources, targets, nbytes = self._residency.ways(ids)
        for size in np.unique(nbytes).tolist():
            some = nbytes == size
            self._migrator.submit(CopyOrders(ids[some], sources[some], targets[some], size))
        return int(nbytes.sum())

    @property
    def is_behind(self) -> bool:
        """Whether answered rows wait for `update`."""
        return bool(self._answered)

    def answered(self, works: list[Work]) -> None:
        """These rows are there to learn from. Until `update` has, nothing may free blocks of theirs."""
        self._answered += works

    def update(self) -> None:
        """Learn from answered rows: count what they read, and start the copies that the policy chooses. Also while a call's kernels run: a
        copy that they read may go then, and is unread if none did before; the batch says what that needs."""
        works, self._answered = self._answered, []
        if not works:
            return
        if len(self.ledger) > len(self._sessions):  # some are closed, and nobody may ever ask for the status
            self._forget_closed()
        self._advance(works)
        wishes = []
        for work in works:
            needs, misses = self._count(work)
            state = work.session.layers[work.row.layer]
            state.calls += 1
            if self._policy.looks_at(state.calls + work.row.layer, needs, misses):
                wishes.append(_Wish(work, self._policy.choose(self._snapshot(work))))
                self._scratch.gain(wishes[-1].choice)
        self._link.refill(self._clock.now(), self._active)
        begun = self._start(wishes)
        if len(begun):
            self._submit(begun)

    def status(self) -> dict[str, Any]:
        """What policy, link and sessions have done, ready for JSON."""
        self._forget_closed()
        now_s, rate = self._clock.now(), self._config.link_bytes_per_s
        moved = self._counters.demand_bytes + self._counters.prefetch_bytes + self.ledger.retry_bytes
        return {
            "policy": self._policy.name,
            "link_share": moved / (rate * max(now_s - self._began_s, 1e-9)),
            "retry_bytes": self.ledger.retry_bytes,
            **self.ledger.as_dict(now_s, rate),
        }

    def _forget_closed(self) -> None:
        self.ledger.forget(self.ledger.session_ids - self._sessions.keys())

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
            self._scratch.rescale(factor)

    def _count(self, work: Work) -> tuple[int, int]:
        """Returns how many originals were read, and how many of them from the host."""
        table, nbytes = work.session.table, work.session.layout.original_record_bytes
        if not work.reads.from_host.size:
            return 0, 0
        hits, misses = mark_used(*work.reads, work.ids, table.used), work.from_host.shape[1]
        self._counters.hits += hits
        self._counters.misses += misses
        self._counters.late += work.late_records
        self._counters.demand_bytes += misses * nbytes
        self._link.read(misses * nbytes)
        self._note(work, hits=hits, misses=misses, late=work.late_records, demand_bytes=misses * nbytes)
        return hits + misses, misses

    def _note(self, work: Work, **amounts: int) -> None:
        session = work.session
        if session.session_id in self._sessions:
            self.ledger.add(session.session_id, len(session.layers), work.row.layer, **amounts)

    def _snapshot(self, work: Work) -> Snapshot:
        assert work.result is not None
        # The table's columns of now, not the call's: a batch may hold several sessions that share blocks.
        notes = work.session.table.notes
        return Snapshot(work.ids, work.reads.records, work.exact_heads, *work.result.candidates(), notes, self._now)

    def _start(self, wishes: list[_Wish]) -> Ids:
        """Begins copies, the best of each row in turn, until room, link or scratch is used up, and notes for whom; returns their ids."""
        begun: list[Ids] = []
        full: set[tuple[str, int]] = set()  # sessions and kinds for which no room can be made: what follows is worth less
        while wishes := [wish for wish in wishes if wish.left]:
            for number, wish in enumerate(wishes):
                if room := self._may_start(wish.work, sum(map(len, begun))):
                    begun += self._begin(wish, -(-room // (len(wishes) - number)), full)
                else:
                    wish.end()
        return np.concatenate([NO_COPIES, *begun])

    def _may_start(self, work: Work, begun: int) -> int:
        """How many copies a row may begin now, `begun` being what the copier will get besides."""
        name = work.session.session_id
        affordable = self._link.available(name) // work.session.layout.original_record_bytes
        if not affordable:
            return 0
        room = min(self._turns.room(name, self._active), self._migrator.room - begun)
        if not room:
            self._turns.refuse(name)
        return min(affordable, room)

    def _begin(self, wish: _Wish, most: int, full: set[tuple[str, int]]) -> list[Ids]:
        """Begins copies of what is next on the list, of each kind; returns their ids. A kind that has no room is `full` from then on."""
        work, some = wish.work, slice(wish.at, wish.at + most)
        wish.at += min(most, wish.left)
        table, name, nbytes = work.session.table, work.session.session_id, work.session.layout.original_record_bytes
        kinds, blocks, heads = wish.choice.records[some].T
        asker = Asker(name, work.session.family, len(work.session.layers), work.row.layer, nbytes)
        begun = []
        for kind in [kind for kind in (KEY, VALUE) if (name, kind) not in full]:
            # Another row of the batch may share the block.
            wanted = np.flatnonzero((kinds == kind) & (table.copy_id[kinds, blocks, heads] == NO_COPY))
            worths, displace = wish.choice.worths[some][wanted], wish.choice.displace
            ids = self._scratch.place(asker, table, kind, blocks[wanted], heads[wanted], worths, displace, self._families)
            if len(ids) < len(wanted):
                full.add((name, kind))
            begun.append(ids)
        count = sum(map(len, begun))
        if count:
            self._under_way[asker.family, asker.layer] += count
            self._turns.start(name, count)
            self._link.spend(name, count * nbytes)
            self._counters.prefetched += count
            self._counters.prefetch_bytes += count * nbytes
            self._note(work, prefetched=count, prefetch_bytes=count * nbytes)
        return begun

    def _wasted(self, asker: Asker, count: int) -> None:
        """So many copies begun for it are gone and were never read."""
        nbytes = count * asker.nbytes
        self._counters.wasted += count
        self._counters.wasted_bytes += nbytes
        if asker.session_id in self._sessions:
            self.ledger.add(asker.session_id, asker.num_layers, asker.layer, wasted=count, wasted_bytes=nbytes)
