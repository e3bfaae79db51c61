"""Turns of the engine on the thread of whoever asks, while a device computes; and the engine's own thread beside them."""

import threading
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import pytest
from engine_calls import CONFIG, GEOMETRY, LOOSE, Bench, decode_on_threads
from tierd_kernels.copying import Copying
from tierd_kernels.policy import Budget

from tierd.commands import Attend, Command, OpenSession, Row, Status
from tierd.engine.loop import HELPED_TOKENS_MAX

WAIT_S = 30.0  # only a failing test waits this long
ENGINES = "tierd-engine"


class Helped(Bench):
    """An engine with its thread, over a device or what counts as one, that has answered a call. `threads`: names of those that launched."""

    def __init__(self, has_device: bool = True, **more: Any) -> None:
        super().__init__(replace(CONFIG, prefetch_wait_us_max=0.0), **more)
        self.name, self.threads = self.opened(tokens=100), list[str]()
        self.kernels.has_device = has_device
        self.kernels.during = lambda: self.threads.append(threading.current_thread().name)
        self.engine.start()
        self.engine.submit(self.attend(self.name)).result(WAIT_S)
        with self.engine._turn:
            pass  # its thread's is over

    def __enter__(self) -> "Helped":
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.stop(WAIT_S)
        self.engine.check_integrity()
        assert not any(thread.name == ENGINES for thread in threading.enumerate())

    def asked(self, command: Command) -> Any:
        """Its future, after help."""
        future = self.engine.submit(command, wake=False)
        self.engine.help()
        return future


def test_a_short_call_is_answered_on_the_thread_that_asks() -> None:
    with Helped(linger_s=10 * WAIT_S) as bench:  # or the engine's thread may have the turn
        for _ in range(3):
            (row,) = bench.asked(bench.attend(bench.name)).result(timeout=0)
            assert row.output.shape == (4, 1, 64)
        assert bench.threads == [ENGINES] + [threading.current_thread().name] * 3
        bench.engine.help()  # nothing waits
        assert len(bench.threads) == 4


def test_what_waits_together_is_one_launch() -> None:
    with Helped() as bench:
        other = bench.engine.submit(OpenSession(GEOMETRY, LOOSE, Budget(), 100, worker="w")).result(WAIT_S)
        bench.engine.submit(bench.append(other, 10)).result(WAIT_S)
        futures = [bench.engine.submit(bench.attend(name), wake=False) for name in (bench.name, other)]
        bench.engine.help()
        assert all(future.done() for future in futures) and bench.kernels.launches == [1, 2]


def test_without_a_device_the_engines_thread_computes() -> None:
    with Helped(has_device=False) as bench:
        assert len(bench.asked(bench.attend(bench.name)).result(WAIT_S)) == 1
        assert bench.threads == [ENGINES] * 2


@pytest.mark.parametrize("n", [HELPED_TOKENS_MAX, HELPED_TOKENS_MAX + 1])
def test_a_long_call_is_left_to_the_engines_thread(n: int) -> None:
    with Helped() as bench:
        call = Attend([Row(bench.name, 0, bench.numbers(4, n))], worker="w")
        assert bench.asked(call).result(WAIT_S)[0].output.shape == (4, n, 64)
        assert bench.threads[1] == (ENGINES if n > HELPED_TOKENS_MAX else threading.current_thread().name)


def test_anything_but_calls_is_left_to_the_engines_thread() -> None:
    with Helped() as bench:
        call = bench.engine.submit(bench.attend(bench.name), wake=False)
        opening = bench.asked(OpenSession(GEOMETRY, LOOSE, Budget(), 100, worker="w"))
        assert opening.result(WAIT_S) != bench.name and len(call.result(WAIT_S)) == 1
        assert bench.threads == [ENGINES] * 2


def test_a_request_for_the_status_wakes_the_engines_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierd.engine.loop.IDLE_TICK_S", 10 * WAIT_S)  # it does not wake by itself
    with Helped() as bench:
        while not bench.engine._dozes:
            pass
        assert bench.asked(Status(worker="w")).result(WAIT_S)["sessions"] == 1


def test_who_helps_does_not_wait_for_a_turn_under_way() -> None:
    with Helped() as bench:
        entered, let_go, during = threading.Event(), threading.Event(), bench.kernels.during

        def held() -> None:
            entered.set()
            assert let_go.wait(WAIT_S)
            during()

        bench.kernels.during = held
        first = bench.engine.submit(bench.attend(bench.name))
        assert entered.wait(WAIT_S)
        second = bench.asked(bench.attend(bench.name))
        assert not first.done() and not second.done(), "the engine's thread is in its launch"
        let_go.set()
        assert len(first.result(WAIT_S)) == len(second.result(WAIT_S)) == 1
        assert bench.threads == [ENGINES] * 3


def test_what_a_helped_call_taught_is_learnt_though_no_other_follows() -> None:
    with Helped() as bench:
        bench.engine.submit(bench.attend(bench.name)).result(WAIT_S)
        copied, begin = threading.Event(), bench.kernels.begin_copies
        other = bench.engine.submit(OpenSession(GEOMETRY, LOOSE, Budget(), 100, worker="w")).result(WAIT_S)
        bench.engine.submit(bench.append(other, 64)).result(WAIT_S)

        def told(*arguments: Any) -> Copying:
            copied.set()
            return begin(*arguments)

        bench.kernels.begin_copies = told
        assert bench.asked(bench.attend(other)).done()
        assert copied.wait(WAIT_S)


def test_the_engines_thread_leaves_what_a_call_taught_to_the_next_one_for_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    linger_s = 10 * WAIT_S
    with Helped(linger_s=linger_s) as bench:
        engine, learnt, begin = bench.engine, list[str](), bench.kernels.begin_copies
        waits, wait = SimpleQueue[float](), engine._wake.wait

        def told(*arguments: Any) -> Copying:
            learnt.append(threading.current_thread().name)
            return begin(*arguments)

        def waited(timeout_s: float) -> bool:
            waits.put(timeout_s)
            return wait(timeout_s)

        bench.kernels.begin_copies = told
        monkeypatch.setattr(engine._wake, "wait", waited)
        assert bench.asked(bench.attend(bench.name)).done()
        for _ in range(2):  # woken for nothing, a while after the call
            engine._turned_s -= 1.0
            with engine._wake:
                engine._wake.notify()
            assert waits.get(timeout=WAIT_S) == linger_s
        engine.stop(WAIT_S)
        assert learnt and ENGINES not in learnt


def test_a_call_that_nobody_woke_for_is_answered_by_the_end() -> None:
    bench = Helped()
    left = bench.engine.submit(bench.attend(bench.name), wake=False)
    bench.engine.stop(WAIT_S)
    assert len(left.result(timeout=0)) == 1


def test_many_threads_that_help_get_their_own_answers() -> None:
    with Helped() as bench:
        decode_on_threads(bench.asked, 4, WAIT_S)
        assert sum(bench.kernels.launches) == 121
