"""Carries out the scratch cache's policy after a batch: counts hits, starts copies, evicts, and takes in finished copies."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from tierd.clock import Clock
from tierd.config import EngineConfig
from tierd.engine.batch import Job, Work
from tierd.engine.counters import Counters
from tierd.engine.ledger import Ledger
from tierd.engine.scratch import Asker, Scratch
from tierd.engine.wanted import Part, Wanted, Wish, that_count, together
from tierd.migrator import CopyOrders, Migrator
from tierd.policy import FIRST_STEP, LinkBudget, Snapshot, Turns, named
from tierd.residency import NO_COPIES, Ids, Residency, mark_used, without_copies
from tierd.session import Session

log = logging.getLogger(__name__)
ACTIVE_STEPS = 16.0  # who has not called for so long has no fair share: eight half-lives of the predictive policy's worths


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
        self._wanted = Wanted()
        self._may_wait = False  # what looks want: the last turn was hidden
        self._now = FIRST_STEP
        self._began_s = clock.now()
        self.ledger = Ledger(self._began_s)

    @property
    def candidates_max(self) -> int:
        """How many blocks of each KV head and kind calls should name; none if the policy does not look at them."""
        return self._config.prefetch_candidates_max if self._policy.wants_candidates else 0

    @property
    def preference(self) -> int:
        """How many times its share an original counts that has a copy, where calls choose what to promote."""
        return self._policy.preference

    def looks_at(self, session: Session, layer: int) -> Callable[[int, int], bool]:
        """Whether the policy will look at the layer's next call, once that has read so many originals, so many of them from the host."""
        state = session.layers[layer]
        asked = partial(self._policy.looks_at, state.calls + 1 + layer, state.looks.settled)
        return (lambda needs, misses: asked(needs, that_count(misses))) if self._may_wait else asked

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
        sizes = sorted(set(nbytes.tolist()))
        for size in sizes:
            some = nbytes == size if len(sizes) > 1 else slice(None)
            self._migrator.submit(CopyOrders(ids[some], sources[some], targets[some], size))
        return int(nbytes.sum())

    @property
    def is_behind(self) -> bool:
        """Whether answered rows wait for `update`, or copies that they want."""
        return bool(self._answered or self._wanted)

    def answered(self, works: list[Work]) -> None:
        """These rows are there to learn from. Until `update` has, nothing may free blocks of theirs."""
        self._answered += works

    def update(self, hidden: bool = False) -> None:
        """Learn from answered rows: count what they read, and start the copies that the policy chooses. Nothing is behind then, whatever
        fails.

        With `hidden`, while a call's kernels run: they hide 0.15 to 0.2 ms on an H100's host, where a look at a call of 900 originals and
        its 54 copies take 0.7. So rows are learnt from, but of the copies only a part begins, of those that earlier looks want; nothing may
        free blocks until a turn that is not hidden. A copy that the kernels read may go, and is unread if none did before; the batch says
        what that needs.
        """
        self._may_wait = hidden
        if hidden:
            self._begin(self._wanted.due())
            self.collect()
            self._learn()
            return
        try:
            self._learn()
            self._begin(len(self._wanted))
        finally:
            self._wanted.clear()

    def _learn(self) -> None:
        """Counts what answered rows read; what the policy chooses is wanted then."""
        works, self._answered = self._answered, []
        if not works:
            return
        if len(self.ledger) > len(self._sessions):  # some are closed, and nobody may ever ask for the status
            self._forget_closed()
        self._advance(works)
        for work in works:
            needs, misses = self._count(work)
            self._wanted.missed(misses)
            session, layer = work.session, work.row.layer
            state = session.layers[layer]
            state.calls += 1
            if work.call.is_looked_at(needs, misses):
                choice, nbytes = self._policy.choose(self._snapshot(work)), session.layout.original_record_bytes
                state.looks.add(self._now, choice.settled)
                asker = Asker(session.session_id, session.family, len(session.layers), layer, nbytes)
                self._scratch.gain(choice)
                self._wanted.add(Wish(asker, session.table, choice))
        self._link.refill(self._clock.now(), self._active)

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
            self._wanted.rescale(factor)

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
        self._note(
            work.session.session_id, len(work.session.layers), work.row.layer,
            hits=hits, misses=misses, late=work.late_records, demand_bytes=misses * nbytes,
        )  # fmt: skip
        return hits + misses, misses

    def _note(self, session_id: str, num_layers: int, layer: int, **amounts: int) -> None:
        """For the status, which tells of sessions that are open."""
        if session_id in self._sessions:
            self.ledger.add(session_id, num_layers, layer, **amounts)

    def _snapshot(self, work: Work) -> Snapshot:
        assert work.result is not None
        # The table's columns of now, not the call's: a batch may hold several sessions that share blocks.
        notes, last = work.session.table.notes, work.session.layers[work.row.layer].looks.last
        return Snapshot(work.ids, work.reads.records, work.exact_heads, *work.result.candidates(), notes, self._now, last)

    def _begin(self, most: int) -> None:
        """Begins so many copies of what is wanted, until room, link or scratch is used up; all are given to the copier together."""
        if not most:
            return
        begun: list[Ids] = []

        def room(wish: Wish, taken: int) -> int:
            return self._may_begin(wish.asker, taken, sum(map(len, begun)))

        self._wanted.serve(most, room, lambda parts: begun.append(self._place(parts)))
        ids = np.concatenate([NO_COPIES, *begun])
        if len(ids):
            self._submit(ids)

    def _may_begin(self, asker: Asker, taken: int, begun: int) -> int:
        """How many copies may begin for it now, besides those `taken` for its session and what the copier will get, `begun` for others."""
        name = asker.session_id
        affordable = self._link.available(name) // asker.nbytes - taken
        if not affordable:
            return 0
        room = min(self._turns.room(name, self._active), self._migrator.room - begun) - taken
        if not room:
            self._turns.refuse(name)
        return min(affordable, room)

    def _place(self, parts: list[Part]) -> Ids:
        """Begins copies of what layers of one session want; returns their ids. Of a kind without room for them nothing is wanted any more.
        All of them at once: the few that each layer wants were placed in 0.1 ms a layer."""
        wishes = [wish for wish, _ in parts]
        asker, table = wishes[0].asker, wishes[0].table
        name, nbytes = asker.session_id, asker.nbytes
        assert name in self._sessions, "a closed session wants copies"
        records, worths, of = together(parts)
        # Some have a copy by now: another row may share the block.
        blocks, heads, worths, of, num_keys = without_copies(records, worths, of, table.notes)
        askers = np.array([wish.asker for wish in wishes], object)[of]
        placed = self._scratch.place(askers, table, blocks, heads, worths, num_keys, wishes[0].choice.displace, self._families)
        begun = len(placed.ids)
        if begun < len(records):
            left_out = [rest for kind in placed.short for rest in self._wanted.leave_out(name, kind)]
            self._residency.refuse_copies(table, np.concatenate([records, *left_out]))
        if begun:
            self._turns.start(name, begun)
            self._link.spend(name, begun * nbytes)
            self._counters.prefetched += begun
            self._counters.prefetch_bytes += begun * nbytes
        for own, count in self._scratch.askers(placed.ids).items():
            self._under_way[own.family, own.layer] += count
            self._note(name, own.num_layers, own.layer, prefetched=count, prefetch_bytes=count * nbytes)
        return placed.ids

    def _wasted(self, asker: Asker, count: int) -> None:
        """So many copies begun for it are gone and were never read."""
        nbytes = count * asker.nbytes
        self._counters.wasted += count
        self._counters.wasted_bytes += nbytes
        self._note(asker.session_id, asker.num_layers, asker.layer, wasted=count, wasted_bytes=nbytes)
