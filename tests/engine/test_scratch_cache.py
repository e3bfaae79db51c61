"""The scratch cache: promoted originals are read from it, and every hit, miss and eviction is counted."""

from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
import pytest
from engine_calls import CONFIG, EXACT, GEOMETRY, LOOSE, RECORD_BYTES, Bench
from oracle import check_reply
from scratch_copies import original_at
from tierd_kernels.call import Call
from tierd_kernels.copying import Copying
from tierd_kernels.policy import Budget

from tierd.commands import Append, Attend, CloseSession, Fork, Geometry, OpenSession, Row, Tolerance, Truncate
from tierd.engine import Engine, EngineConfig
from tierd.engine.caching import ACTIVE_STEPS
from tierd.errors import CapacityExceeded
from tierd.migrator import Migrator
from tierd.policy import Choice, Predictive, Snapshot
from tierd.policy.predictive import EVERY
from tierd.residency import CopyState, ScratchCopy

RECORDS = 16  # originals of 64 tokens at one layer: four blocks, keys and values of two heads


def counts(bench: Bench) -> tuple[int, int, int, int]:
    """(hits, misses, prefetched, evicted) since the last call."""
    counters = bench.engine.counters
    now = counters.hits, counters.misses, counters.prefetched, counters.evicted
    counters.hits = counters.misses = counters.prefetched = counters.evicted = 0
    return now


def scratch_used(bench: Bench) -> int:
    return sum(pool.used_bytes for pool in bench.engine.residency.arenas.scratch)


def room_for(records: int, **more: Any) -> EngineConfig:
    return replace(CONFIG, scratch_bytes=records * RECORD_BYTES, **more)


def test_what_was_read_from_the_host_is_read_from_scratch_next() -> None:
    bench = Bench()
    name = bench.opened(tokens=70)
    bench.run(bench.attend(name))
    assert counts(bench) == (0, RECORDS, RECORDS, 0)
    bench.run(bench.attend(name))
    assert counts(bench) == (RECORDS, 0, 0, 0)
    assert scratch_used(bench) == RECORDS * RECORD_BYTES


def test_a_call_that_wants_no_copies_does_not_bother_the_migrator(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    tail, cached = bench.opened(tokens=10), bench.opened(tokens=64)
    bench.run(bench.attend(cached))
    counts(bench)
    monkeypatch.delattr(Migrator, "submit")
    assert len(bench.run(bench.attend(tail), bench.attend(cached))) == 2
    assert counts(bench) == (RECORDS, 0, 0, 0)


def test_kernels_are_told_which_calls_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fourth of a layer, in turns with its neighbour, later every sixteenth, since none needs anything; and any that misses much: the
    same that the policy is shown."""
    bench, shown, last = Bench(), list[int](), [inf, inf]
    name = bench.opened()
    choose, attend = Predictive.choose, bench.kernels.attend
    told: list[bool] = []

    def chosen(self: Predictive, snapshot: Snapshot) -> Choice:
        shown.append(number)
        assert snapshot.last == last[number % 2]
        last[number % 2] = snapshot.now
        return choose(self, snapshot)

    monkeypatch.setattr(Predictive, "choose", chosen)

    def attended(layout: Any, memory: Any, calls: list[Call], *args: Any) -> Any:
        told.append(calls[0].is_looked_at(0, 0))
        assert calls[0].is_looked_at(64, 3) and calls[0].is_looked_at(64, 2) == told[-1]
        return attend(layout, memory, calls, *args)

    monkeypatch.setattr(bench.kernels, "attend", attended)
    for layer in (0, 1):
        bench.run(bench.append(name, 10, layer))  # no full block: nothing is read
    for number in range(96):
        bench.run(Attend([Row(name, number % 2, bench.numbers(4, 1))], worker="w"))
    assert shown == [i for i in range(96) if told[i]]
    for layer in (0, 1):
        of_layer = [i // 2 for i in shown if i % 2 == layer]
        assert of_layer == [each - 1 - layer for each in (EVERY, 2 * EVERY, 4 * EVERY, 8 * EVERY, 12 * EVERY)]
    bench.run(bench.append(name, 64, 0))
    for number in range(96, 106, 2):
        bench.run(Attend([Row(name, number % 2, bench.numbers(4, 1))], worker="w"))
    assert shown[-2:] == [96, 102], "what has no copy is looked at, and its layer soon again"


@pytest.mark.parametrize(("policy", "preference"), [("predictive", Predictive().preference), ("reactive", 1), ("none", 1)])
def test_kernels_are_told_what_a_copy_counts(policy: Any, preference: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, told = Bench(replace(CONFIG, tiering_policy=policy)), list[int]()
    attend = bench.kernels.attend

    def attended(layout: Any, memory: Any, calls: list[Call], *args: Any) -> Any:
        told.extend(call.preference for call in calls)
        return attend(layout, memory, calls, *args)

    monkeypatch.setattr(bench.kernels, "attend", attended)
    bench.run(bench.attend(bench.opened(tokens=64)))
    assert told == [preference]


def test_only_promoted_records_are_fetched() -> None:
    bench = Bench(promote_every=2)
    name = bench.opened(tokens=64)
    bench.run(bench.attend(name))
    assert counts(bench) == (0, RECORDS // 2, RECORDS // 2, 0)


def test_an_exact_head_reads_originals_whatever_scratch_holds() -> None:
    bench = Bench(promote_every=2)
    name = bench.opened(tokens=64)
    bench.run(bench.attend(name))
    counts(bench)
    bench.run(bench.attend(name, tolerance=EXACT))
    assert counts(bench) == (0, RECORDS, 0, 0), "and teaches nothing"


def test_copies_between_two_launches_are_limited() -> None:
    bench = Bench(replace(CONFIG, migrations_max=5))
    name = bench.opened(tokens=64)
    expected = [(0, 16, 5, 0), (5, 11, 5, 0), (10, 6, 5, 0), (15, 1, 1, 0), (16, 0, 0, 0)]
    for each in expected:
        bench.run(bench.attend(name))
        assert counts(bench) == each


@pytest.mark.parametrize("config", [
        replace(CONFIG, migrations_max=0), room_for(0), replace(CONFIG, prefetch_link_share=0.0), replace(CONFIG, tiering_policy="none"),
    ])
def test_the_cache_can_be_off(config: EngineConfig) -> None:
    bench = Bench(config)
    name = bench.opened(tokens=64)
    for _ in range(2):
        bench.run(bench.attend(name))
        assert counts(bench) == (0, RECORDS, 0, 0)


def test_scratch_may_be_larger_than_all_originals() -> None:
    bench = Bench(replace(CONFIG, scratch_bytes=2 * CONFIG.originals_bytes))
    name = bench.opened(tokens=64)
    assert [(bench.run(bench.attend(name)), counts(bench))[1] for _ in range(2)] == [(0, RECORDS, RECORDS, 0), (RECORDS, 0, 0, 0)]


def test_a_working_set_that_does_not_fit_stays_and_does_not_churn() -> None:
    bench = Bench(room_for(10))
    name = bench.opened(tokens=64)
    bench.run(bench.attend(name))
    assert counts(bench) == (0, 16, 10, 0)
    for _ in range(2):
        bench.run(bench.attend(name))
        assert counts(bench) == (10, 6, 0, 0)


def test_a_newcomer_gets_its_fair_share_of_each_kind_and_no_more_goes_than_needed() -> None:
    bench = Bench(room_for(40))
    old, kept, new = (bench.opened(tokens=64) for _ in range(3))
    for name in (kept, old, kept):
        bench.run(bench.attend(name))
    assert counts(bench) == (16, 32, 32, 0)
    bench.run(bench.attend(new))
    # Of 20 places of a kind 4 were free, and a third of them are six whole records.
    assert counts(bench) == (0, 16, 12, 4)
    assert scratch_used(bench) == 40 * RECORD_BYTES
    bench.run(bench.attend(kept))
    hits, misses, _, _ = counts(bench)
    assert hits >= 12 and hits + misses == RECORDS


def test_an_idle_session_loses_its_share_and_an_active_one_does_not() -> None:
    bench = Bench(room_for(16))
    idle, busy = bench.opened(tokens=64), bench.opened(tokens=64)
    bench.run(bench.attend(idle))
    bench.run(bench.attend(busy))
    assert counts(bench) == (0, 32, 24, 8), "half of it is for the second"
    for _ in range(int(ACTIVE_STEPS) * GEOMETRY.num_layers * 2):
        bench.run(bench.attend(busy))
    assert counts(bench)[2:] == (8, 8)
    bench.run(bench.attend(busy))
    assert counts(bench) == (16, 0, 0, 0)


def test_sessions_that_share_blocks_share_copies() -> None:
    bench = Bench()
    name = bench.opened(tokens=70)
    (child,) = bench.run(Fork(name, worker="w"))
    bench.run(bench.attend(name, child))
    assert counts(bench) == (0, 2 * RECORDS, RECORDS, 0)
    bench.run(bench.attend(child), CloseSession(name, worker="w"))
    assert counts(bench) == (RECORDS, 0, 0, 0)
    bench.run(CloseSession(child, worker="w"))
    assert scratch_used(bench) == 0


@pytest.mark.parametrize("drop", ["close", "cut"])
def test_a_block_that_goes_while_it_is_being_copied_takes_its_copies_along(drop: str) -> None:
    bench = Bench()
    name = bench.opened(tokens=64)
    gone = CloseSession(name, worker="w") if drop == "close" else Truncate(name, 60, worker="w")
    bench.run(bench.attend(name), gone)  # one turn: the copies are still under way when the command runs
    assert counts(bench) == (0, RECORDS, RECORDS, 0)
    assert bench.engine.residency.num_copies == (0 if drop == "close" else 12)
    if drop == "cut":
        bench.run(bench.append(name, 4))
        bench.run(bench.attend(name))
        assert counts(bench) == (12, 4, 4, 0)


def test_a_copy_that_arrives_changed_is_made_once_more_and_then_never_again() -> None:
    bench = Bench()
    name = bench.opened(tokens=64)
    residency, begin = bench.engine.residency, bench.kernels.begin_copies

    def spoiled(*arguments: Any) -> Copying:
        copying, sources = begin(*arguments), arguments[1]
        copying.arrived[sources == original_at(residency.tables[GEOMETRY.layout()], 0, 0, 0), 0] ^= 1
        return copying

    bench.kernels.begin_copies = spoiled
    bench.run(bench.attend(name))
    assert bench.engine.counters.events["corrupt_copy"] == 1
    assert next(residency.copies()).state is CopyState.IN_FLIGHT and residency.num_copies == RECORDS
    bench.run()
    assert bench.engine.counters.events["corrupt_copy"] == 2 and residency.num_copies == RECORDS - 1
    counts(bench)
    assert len(bench.run(bench.attend(name), bench.attend(name))) == 2
    assert counts(bench) == (2 * (RECORDS - 1), 2, 0, 0), "it is read from the host and not copied again"


@pytest.mark.parametrize("failures", [1, 2])
def test_a_copy_that_fails_is_made_once_more_and_is_never_seen_before_it_is_there(failures: int) -> None:
    bench = Bench()
    name = bench.opened(tokens=64)
    bench.kernels.copy_faults = [RuntimeError("broken")] * failures
    for _ in range(3):
        bench.run(bench.attend(name))
    events = bench.engine.counters.events
    assert events["failed_copy"] == failures * RECORDS and bench.engine.status()["tiering"]["retry_bytes"] == RECORDS * RECORD_BYTES
    assert bench.engine.residency.num_copies == (RECORDS if failures == 1 else 0)
    assert counts(bench) == ((2 * RECORDS, RECORDS, RECORDS, 0) if failures == 1 else (0, 3 * RECORDS, RECORDS, 0))


def test_copies_stay_where_they_are_while_a_call_reads_them() -> None:
    bench = Bench()
    name = bench.opened(tokens=64)
    bench.run(bench.attend(name))
    seen: list[bool] = []
    bench.kernels.during = lambda: seen.extend(copy.pinned for copy in bench.engine.residency.copies())
    bench.kernels.faults = [RuntimeError("broken")]
    bench.run(bench.attend(name), bench.attend(name))
    assert seen == [True] * 2 * RECORDS
    assert not any(copy.pinned for copy in bench.engine.residency.copies()), "a failed launch lets go too"


def test_one_large_record_pushes_out_several_small_ones() -> None:
    wide = Geometry(1, 4, 2, 128, "float32", block_size=32)
    bench = Bench(room_for(16))
    small, large = bench.opened(tokens=64), bench.opened(tokens=32, geometry=wide)
    bench.run(bench.attend(small))
    counts(bench)
    bench.run(bench.attend(large, geometry=wide))
    hits, misses, prefetched, evicted = counts(bench)
    assert (hits, misses, prefetched, evicted) == (0, 4, 2, 8), "one of keys and one of values are its share"
    for pool in bench.engine.residency.arenas.scratch:
        with pytest.raises(CapacityExceeded):
            pool.allocate(1)


class RealBench:
    """The engine over the CPU kernels, with a query whose budget some heads meet only by promoting blocks."""

    def __init__(self, canary_share: float) -> None:
        self.engine = Engine(replace(CONFIG, canary_share=canary_share))
        rng = np.random.default_rng(7)
        self.k, self.v = (rng.standard_normal((2, 320, 64)).astype(np.float32) for _ in "kv")
        self.q = rng.standard_normal((4, 1, 64)).astype(np.float32)
        self.name = self.run(OpenSession(GEOMETRY, LOOSE, Budget(), 400, worker="w"))
        self.run(Append(self.name, 0, self.k, self.v, worker="w"))

    def run(self, command: Any) -> Any:
        future = self.engine.submit(command)
        self.engine.run_once()
        self.engine.check_integrity()
        return future.result(timeout=0)

    def attend(self) -> Any:
        (row,) = self.run(Attend([Row(self.name, 0, self.q, tolerance=Tolerance(0.01))], worker="w"))
        return row

    def corrupt_copies(self, kind: int) -> list[ScratchCopy]:
        """Negates every number of each resident copy of keys (0) or values (1)."""
        copies = [x for x in self.engine.residency.copies() if x.kind == kind and x.state is CopyState.RESIDENT]
        for copy in copies:
            self.engine.residency.arenas.memory.scratch[copy.target + 3 : copy.target + copy.nbytes : 4] ^= 0x80
        return copies


@pytest.mark.parametrize("kind", [0, 1])
def test_a_promoted_block_is_read_from_scratch(kind: int) -> None:
    bench = RealBench(canary_share=0.0)
    before = bench.attend()
    check_reply(bench.k, bench.v, bench.q, before.output, before.certificate, 0.01, 0.0, softmax_scale=GEOMETRY.scale)
    assert bench.engine.counters.misses and bench.engine.counters.prefetched
    again, hits = bench.attend(), bench.engine.counters.hits
    assert hits and again.certificate["host_bytes"].sum() < before.certificate["host_bytes"].sum()
    np.testing.assert_array_equal(again.output, before.output)
    assert bench.corrupt_copies(kind)
    assert not np.array_equal(bench.attend().output, before.output), "the copies are not read"


def test_a_canary_finds_corrupt_copies_of_keys() -> None:
    bench = RealBench(canary_share=1.0)
    before = bench.attend()
    blocks = {copy.block for copy in bench.corrupt_copies(0)}
    row = bench.attend()
    check_reply(bench.k, bench.v, bench.q, row.output, row.certificate, 0.01, 0.0, softmax_scale=GEOMETRY.scale)
    assert row.certificate["exact"].all() and bench.engine.counters.events["canary_repaired"] == len(blocks) > 0
    np.testing.assert_array_equal(bench.attend().output, before.output)
