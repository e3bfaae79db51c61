"""The engine on its own thread. Events order what must be ordered; nothing waits for time to pass."""

import threading
from dataclasses import replace

import pytest
from engine_calls import CONFIG, GEOMETRY, LOOSE, Bench, decode_on_threads
from tierd_kernels.policy import Budget

from tierd.commands import OpenSession, Status
from tierd.errors import CertificateUnavailable, Unavailable

WAIT_S = 30.0  # only a failing test waits this long


class HeldBench(Bench):
    """Kernels that stay in their first launch until `let_go` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.name = self.opened(tokens=40)
        self.entered, self.let_go = threading.Event(), threading.Event()
        self.kernels.during = self._hold
        self.engine.start()

    def _hold(self) -> None:
        self.entered.set()
        assert self.let_go.wait(WAIT_S)


def test_the_engines_thread_limits_the_kernels_and_no_other() -> None:
    bench, callers = Bench(replace(CONFIG, threads=1)), []
    bench.kernels.limit_threads = lambda count: callers.append((threading.current_thread().name, count))
    bench.engine.run_once()
    assert not callers
    bench.engine.start()
    bench.engine.submit(Status(worker="w")).result(WAIT_S)
    bench.engine.stop(WAIT_S)
    assert callers == [("tierd-engine", 1)]


def no_threads_left() -> bool:
    return not any(thread.name == "tierd-engine" for thread in threading.enumerate())


def test_workers_on_many_threads_get_their_own_answers() -> None:
    bench = Bench()
    bench.engine.start()
    decode_on_threads(bench.engine.submit, 4, WAIT_S)
    bench.engine.stop(WAIT_S)
    assert no_threads_left() and sum(bench.kernels.launches) == 120
    bench.engine.check_integrity()
    assert [pool.used_bytes for pool in bench.engine.residency.arenas.pools] == [0, 0, 0, 0]


def test_calls_that_arrive_during_a_launch_share_the_next() -> None:
    bench = HeldBench()
    others = [bench.engine.submit(OpenSession(GEOMETRY, LOOSE, Budget(), 100, worker="w")).result(WAIT_S) for _ in range(3)]
    for name in others:
        bench.engine.submit(bench.append(name, 20)).result(WAIT_S)
    first = bench.engine.submit(bench.attend(bench.name))
    assert bench.entered.wait(WAIT_S)
    rest = [bench.engine.submit(bench.attend(name)) for name in others]
    bench.let_go.set()
    for future in (first, *rest):
        assert len(future.result(WAIT_S)) == 1
    assert bench.kernels.launches == [1, 3]
    bench.engine.stop(WAIT_S)


def test_a_stop_with_grace_answers_what_waits() -> None:
    bench = HeldBench()
    running = bench.engine.submit(bench.attend(bench.name))
    assert bench.entered.wait(WAIT_S)
    waiting = bench.engine.submit(Status(worker="w"))
    stopper = threading.Thread(target=bench.engine.stop, args=(WAIT_S,))
    stopper.start()
    bench.let_go.set()
    stopper.join(WAIT_S)
    assert len(running.result(timeout=0)) == 1 and waiting.result(timeout=0)["sessions"] == 1
    assert no_threads_left()
    with pytest.raises(Unavailable):
        bench.engine.submit(Status(worker="w"))


def test_a_stop_without_grace_finishes_the_call_in_flight_and_fails_the_rest() -> None:
    bench = HeldBench()
    running = bench.engine.submit(bench.attend(bench.name))
    assert bench.entered.wait(WAIT_S)
    waiting, cancelled = (bench.engine.submit(bench.append(bench.name, 1)) for _ in range(2))
    assert cancelled.cancel()
    stopper = threading.Thread(target=bench.engine.stop, args=(0.0,))
    stopper.start()
    with pytest.raises(Unavailable, match="stopped before this call's turn came"):
        waiting.result(WAIT_S)
    assert not running.done()
    bench.let_go.set()
    stopper.join(WAIT_S)
    assert len(running.result(timeout=0)) == 1 and no_threads_left()
    assert bench.engine.sessions.by_id[bench.name].lengths == [40, 0]
    bench.engine.check_integrity()


def test_a_fault_ends_one_call_and_not_the_engine() -> None:
    bench = Bench()
    name = bench.opened(tokens=20)
    bench.engine.start()
    bench.kernels.faults = [RuntimeError("broken")]
    with pytest.raises(CertificateUnavailable, match="RuntimeError: broken"):
        bench.engine.submit(bench.attend(name)).result(WAIT_S)
    assert len(bench.engine.submit(bench.attend(name)).result(WAIT_S)) == 1
    bench.engine.stop(WAIT_S)
    assert bench.engine.counters.events["fault"] == 1
