"""The engine's side of tiering: late copies, deadlines, fairness under pressure, and what the status says of it. No sleeps."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engine_calls import CONFIG, EXACT, RECORD_BYTES, Bench

from tierd.commands import Attend, CloseSession, Fork, Row
from tierd.engine import EngineConfig
from tierd.migrator import CopiesDone, Migrator
from tierd.residency import CopyState

RECORDS = 16  # originals of 64 tokens at one layer


class Slow:
    """Stands between engine and migrator: what is done is reported only when a test says so, or while the engine waits for it."""

    def __init__(self, migrator: Migrator, arrives_while_waiting: bool) -> None:
        self.held, self.waits = True, list[float]()
        self._migrator, self._arrives = migrator, arrives_while_waiting

    @property
    def room(self) -> int:
        return self._migrator.room

    def submit(self, orders: Any) -> None:
        self._migrator.submit(orders)

    def poll(self) -> list[CopiesDone]:
        return [] if self.held else self._migrator.poll()

    def wait(self, timeout_s: float) -> bool:
        self.waits.append(timeout_s)
        self.held = not self._arrives
        return self._arrives


def slowed(arrives_while_waiting: bool, config: EngineConfig = CONFIG) -> tuple[Bench, Slow]:
    bench = Bench(config)
    slow = Slow(bench.engine._migrator, arrives_while_waiting)
    bench.engine._cache._migrator = slow  # type: ignore[assignment]
    return bench, slow


def test_a_call_reads_the_host_when_copies_do_not_come_in_time_and_says_so() -> None:
    bench, slow = slowed(arrives_while_waiting=False)
    name = bench.opened(tokens=64)
    (((first,),)) = bench.run(bench.attend(name))
    assert first.late_records == 0 and slow.waits == []
    ((row,),) = bench.run(bench.attend(name))
    assert row.late_records == RECORDS and slow.waits == [CONFIG.prefetch_wait_us_max * 1e-6]
    assert bench.engine.counters.late == RECORDS and bench.engine.counters.hits == 0
    slow.held = False
    bench.run()
    ((row,),) = bench.run(bench.attend(name))
    assert row.late_records == 0 and bench.engine.counters.hits == RECORDS and len(slow.waits) == 1


def test_a_copy_that_comes_while_the_call_waits_is_used() -> None:
    bench, slow = slowed(arrives_while_waiting=True)
    name = bench.opened(tokens=64)
    bench.run(bench.attend(name))
    ((row,),) = bench.run(bench.attend(name))
    assert row.late_records == 0 and bench.engine.counters.hits == RECORDS and len(slow.waits) == 1


def test_nobody_waits_where_waiting_is_off_or_the_copies_are_of_other_blocks() -> None:
    bench, slow = slowed(False, replace(CONFIG, prefetch_wait_us_max=0.0))
    name = bench.opened(tokens=64)
    bench.run(bench.attend(name))
    assert bench.run(bench.attend(name))[0][0].late_records == RECORDS and slow.waits == []
    bench, slow = slowed(arrives_while_waiting=False)
    copied, other = bench.opened(tokens=64), bench.opened(tokens=64)
    bench.run(bench.attend(copied))
    bench.run(bench.attend(other))
    assert slow.waits == []


def test_a_session_closed_with_copies_in_flight_gives_its_places_back_when_they_end() -> None:
    bench, slow = slowed(arrives_while_waiting=False)
    name = bench.opened(tokens=64)
    bench.run(bench.attend(name))
    bench.run(CloseSession(name, worker="w"))
    residency = bench.engine.residency
    assert residency.num_in_flight == RECORDS and {copy.state for copy in residency.copies()} == {CopyState.ORPHAN}
    assert sum(pool.used_bytes for pool in residency.arenas.scratch) == RECORDS * RECORD_BYTES
    slow.held = False
    bench.run()
    assert residency.num_copies == residency.num_in_flight == sum(pool.used_bytes for pool in residency.arenas.scratch) == 0
    assert bench.engine.counters.wasted == RECORDS


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, scratch_bytes=24 * RECORD_BYTES),
        replace(CONFIG, migrations_max=1),
        replace(CONFIG, scratch_bytes=24 * RECORD_BYTES, migrations_max=3, link_bytes_per_s=2e6 * RECORD_BYTES, prefetch_link_share=0.01),
    ],
    ids=["scratch", "copier", "all"],
)
def test_nobody_starves_under_pressure_from_many(config: EngineConfig, seed: int) -> None:
    """One session asks after three or more calls of the greedy ones, in random order on a fake clock; it still gets copies and hits."""
    bench, random = Bench(config), np.random.default_rng(seed)
    modest, *greedy = (bench.opened(tokens=64) for _ in range(4))
    for _ in range(60):
        bench.clock.advance(1e-3)
        for name in random.permutation(greedy).tolist() + random.permutation(greedy).tolist()[: int(random.integers(4))]:
            bench.run(bench.attend(name))
        bench.run(bench.attend(modest))
    owned = {session["session"]: session["layers"] for session in bench.engine.status()["tiering"]["sessions"]}
    hits = [sum(layers["hits"]) for layers in owned.values()]
    copies = [sum(layers["prefetched"]) for layers in owned.values()]
    assert len(owned) == 4 and min(copies) > 0 and min(hits) > 60, (hits, copies)


def test_the_status_accounts_for_every_original_by_session_and_layer() -> None:
    bench = Bench(replace(CONFIG, scratch_bytes=40 * RECORD_BYTES))
    name = bench.opened(tokens=64)
    (child,) = bench.run(Fork(name, worker="w"))
    for who in (name, child, name):
        bench.run(bench.attend(who))
    bench.clock.advance(1.0)
    status, counters = bench.engine.status(), bench.engine.counters
    sessions = status["tiering"]["sessions"]
    assert status["tiering"]["policy"] == "predictive" and status["tiering"]["sessions_left_out"] == 0
    for field in ("hits", "misses", "late", "prefetched", "wasted", "demand_bytes", "prefetch_bytes", "wasted_bytes"):
        assert sum(sum(session["layers"][field]) for session in sessions) == getattr(counters, field), field
        assert all(session["layers"][field][1] == 0 for session in sessions), "layer 1 was not called"
    assert counters.prefetched == RECORDS and (counters.hits, counters.misses) == (32, 16), "a fork finds its parent's copies"
    assert status["tiering"]["link_share"] == pytest.approx((counters.demand_bytes + counters.prefetch_bytes) / CONFIG.link_bytes_per_s)
    assert name not in str(status["tiering"]), "names are secrets"
    bench.run(CloseSession(child, worker="w"))
    assert [session["session"] for session in bench.engine.status()["tiering"]["sessions"]] == [1]


def test_copies_wait_for_their_share_of_the_link() -> None:
    """Three records may be saved up, and a millisecond earns three more, if calls read nothing meanwhile."""
    bench = Bench(replace(CONFIG, link_bytes_per_s=30e3 * RECORD_BYTES, prefetch_link_share=0.1))
    name = bench.opened(tokens=64)
    bench.run(bench.attend(name), bench.attend(name))
    assert bench.engine.counters.prefetched == 3
    bench.clock.advance(0.1)
    bench.run(bench.attend(name))
    assert 3 < bench.engine.counters.prefetched <= 9


@pytest.mark.parametrize("limit", [1, 6, 7, 12, 40])
def test_rows_of_a_batch_take_turns(limit: int) -> None:
    """Two layers of one session, called together, want sixteen copies each."""
    bench = Bench(replace(CONFIG, migrations_max=limit))
    name = bench.opened(tokens=64)
    bench.run(bench.append(name, 64, layer=1))
    q = bench.numbers(4, 1)
    bench.run(Attend([Row(name, 0, q), Row(name, 1, q)], worker="w"))
    (session,) = bench.engine.status()["tiering"]["sessions"]
    first, second = session["layers"]["prefetched"]
    assert first + second == min(limit, 2 * RECORDS) and first - second == (limit % 2 if limit < 2 * RECORDS else 0)


def test_a_copy_that_was_read_is_not_wasted_when_its_session_ends() -> None:
    bench = Bench()
    read, unread = bench.opened(tokens=64), bench.opened(tokens=64)
    for name in (read, unread, read):
        bench.run(bench.attend(name))
    bench.run(CloseSession(read, worker="w"))
    assert bench.engine.counters.wasted == 0
    bench.run(CloseSession(unread, worker="w"))
    assert (bench.engine.counters.wasted, bench.engine.counters.wasted_bytes) == (RECORDS, RECORDS * RECORD_BYTES)


def test_an_exact_head_is_not_late() -> None:
    bench, _ = slowed(arrives_while_waiting=False)
    name = bench.opened(tokens=64)
    bench.run(bench.attend(name))
    ((row,),) = bench.run(bench.attend(name, tolerance=EXACT))
    assert row.late_records == 0 and bench.engine.residency.num_in_flight == RECORDS


def test_a_fork_does_not_push_out_what_it_shares_with_its_parent() -> None:
    """Scratch is full of the parent's copies, of keys and of values; the fork has as many originals of its own, which it needs no more."""
    bench = Bench(replace(CONFIG, scratch_bytes=RECORDS * RECORD_BYTES))
    name = bench.opened(tokens=64)
    (child,) = bench.run(Fork(name, worker="w"))
    bench.run(bench.append(child, 64), bench.attend(name))
    shared = {copy.block for copy in bench.engine.residency.copies()}
    for _ in range(8):
        bench.run(bench.attend(child))
    assert {copy.block for copy in bench.engine.residency.copies()} == shared and bench.engine.counters.evicted == 0
    assert bench.engine.counters.hits == 8 * RECORDS, "the fork has found its parent's copies"


def test_a_session_gains_no_share_of_scratch_by_forks() -> None:
    bench = Bench(replace(CONFIG, scratch_bytes=RECORDS * RECORD_BYTES))
    name, stranger = bench.opened(tokens=64), bench.opened(tokens=64)
    forks = [bench.run(Fork(name, worker="w"))[0] for _ in range(3)]
    bench.run(*(bench.append(fork, 64) for fork in forks))
    for _ in range(4):
        for who in (name, *forks, stranger):
            bench.run(bench.attend(who))
    session = bench.engine.sessions.by_id[stranger]
    held = [copy for copy in bench.engine.residency.copies() if copy.block in session.full_ids(0)]
    assert len(held) == RECORDS // 2


def test_accounts_of_closed_sessions_go_though_nobody_asks_for_the_status() -> None:
    bench = Bench()
    for _ in range(20):
        name = bench.opened(tokens=64)
        bench.run(bench.attend(name))
        bench.run(CloseSession(name, worker="w"))
        assert len(bench.engine._cache.ledger) <= 2
