"""What tiering does for one call while a device computes the next: nothing of it may show in an answer."""

import threading
from dataclasses import replace
from typing import Any

import pytest
from engine_calls import CONFIG, RECORD_BYTES, Bench
from tierd_kernels.copying import Copying

from tierd.commands import Attend, CloseSession, Row, Truncate
from tierd.engine import EngineConfig
from tierd.engine.wanted import PART_MIN

RECORDS = 16  # originals of 64 tokens at one layer
WAIT_S = 30.0  # only a failing test waits this long


class Device(Bench):
    """Kernels that let the engine's thread do something else while they run. `copies`: how many there were before and after that."""

    def __init__(self, config: EngineConfig = CONFIG) -> None:
        super().__init__(config)
        self.kernels.has_device, self.copies = True, list[tuple[int, int]]()
        attend = self.kernels.attend

        def watched(*arguments: Any) -> Any:
            *others, meanwhile = arguments

            def counted() -> None:
                before = self.engine.residency.num_copies
                meanwhile()
                self.copies.append((before, self.engine.residency.num_copies))

            return attend(*others, counted)

        self.kernels.attend = watched


def test_copies_for_a_call_begin_while_the_next_but_one_is_computed() -> None:
    """Behind the next, it is looked at."""
    bench, records = Device(), 4 * RECORDS
    assert records >= PART_MIN
    name = bench.opened(tokens=256)
    answers = bench.run(*(bench.attend(name) for _ in range(3)))
    assert bench.copies == [(0, 0), (0, 0), (0, records)]
    assert all(row.late_records == 0 for (row,) in answers), "no copy was on its way when a call's kernels started"
    assert (bench.engine.counters.misses, bench.engine.counters.hits) == (3 * records, 0)
    bench.run(bench.attend(name))
    assert (bench.engine.counters.misses, bench.engine.counters.hits, bench.engine.counters.late) == (3 * records, records, 0)


def test_a_copy_that_arrives_while_kernels_run_that_did_not_know_of_it_is_late() -> None:
    bench = Device(replace(CONFIG, prefetch_wait_us_max=0.0))
    name = bench.opened(tokens=64)
    migrator, poll = bench.engine._migrator, bench.engine._migrator.poll
    migrator.poll = list
    bench.run(bench.attend(name))
    bench.kernels.during = lambda: setattr(migrator, "poll", poll)
    ((row,),) = bench.run(bench.attend(name))
    assert row.late_records == RECORDS and bench.engine.residency.num_in_flight == 0
    ((row,),) = bench.run(bench.attend(name))
    assert row.late_records == 0 and bench.engine.counters.hits == RECORDS


def test_an_original_that_a_call_reads_may_lose_its_copy_meanwhile() -> None:
    """Scratch holds one layer's records. Calls of two sessions push out one another's copies while the other's kernels run."""
    bench = Device(replace(CONFIG, scratch_bytes=RECORDS * RECORD_BYTES))
    bench.engine._thread = threading.current_thread()  # which leaves what is learnt to the next call, always
    one, two = bench.opened(tokens=64), bench.opened(tokens=64)
    for _ in range(8):
        for outcome in bench.run(*(bench.attend(name) for name in (one, two, two, one))):
            assert not isinstance(outcome, Exception), outcome
    bench.engine._thread = None
    bench.run()
    counters = bench.engine.counters
    assert counters.evicted > 0 and counters.hits > 0 and counters.hits + counters.misses == 32 * RECORDS
    assert counters.prefetched == counters.evicted + bench.engine.residency.num_copies and counters.events["fault"] == 0


@pytest.mark.parametrize("cut", [True, False], ids=["truncate", "close"])
def test_what_a_call_taught_is_learnt_before_its_blocks_go(cut: bool) -> None:
    bench = Device()
    name = bench.opened(tokens=64)
    ending = Truncate(name, 8, worker="w") if cut else CloseSession(name, worker="w")
    bench.run(bench.attend(name), bench.attend(name), ending)
    counters = bench.engine.counters
    assert counters.misses + counters.hits == 2 * RECORDS and counters.prefetched == RECORDS == counters.wasted
    assert bench.engine.residency.num_copies == 0 and counters.events["fault"] == 0


def test_what_a_call_taught_is_learnt_before_its_lease_runs_out() -> None:
    bench = Device(replace(CONFIG, lease_s=10.0))
    name = bench.opened(tokens=64)
    bench.engine._thread = threading.current_thread()  # one that goes on with the next call
    bench.run(bench.attend(name))
    counters = bench.engine.counters
    assert counters.misses == 0, "nothing is learnt yet"
    bench.clock.advance(11.0)
    bench.run()
    assert counters.events["lease_expired"] == 1 and counters.misses == RECORDS == counters.prefetched and counters.events["fault"] == 0


def test_a_fault_in_tiering_costs_no_answer() -> None:
    bench = Device()
    name = bench.opened(tokens=64)

    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    bench.engine._cache._policy.choose = broken
    for outcome in bench.run(bench.attend(name), bench.attend(name)):
        assert len(outcome) == 1
    assert bench.engine.counters.events["fault"] == 2


def test_an_engine_that_gets_no_further_call_does_it_by_itself() -> None:
    bench, copied = Device(), threading.Event()
    name = bench.opened(tokens=64)
    begin = bench.kernels.begin_copies

    def told(*arguments: Any) -> Copying:
        copied.set()
        return begin(*arguments)

    bench.kernels.begin_copies = told
    bench.engine.start()
    assert len(bench.engine.submit(Attend([Row(name, 0, bench.numbers(4, 1))], worker="w")).result(WAIT_S)) == 1
    assert copied.wait(WAIT_S)
    bench.engine.stop(WAIT_S)
    bench.engine.check_integrity()
    assert bench.engine.counters.prefetched == RECORDS == bench.engine.residency.num_copies
