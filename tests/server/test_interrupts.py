"""Signals wait for the end of what must not be left half done."""

import signal
import threading
from collections.abc import Iterator

import pytest

from tierd.interrupts import DEFERRED, deferred

OWN = set(DEFERRED) - {signal.SIGALRM}  # which the tests' own limit of time uses


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Ctrl-C's as at a terminal: a process in the background may have been started without."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in OWN}
    yield
    assert {number: signal.getsignal(number) for number in OWN} == before, "handlers are left behind"
    signal.signal(signal.SIGINT, found)


def test_ctrl_c_comes_when_all_is_done() -> None:
    done = []

    def interrupted() -> None:
        with deferred():
            signal.raise_signal(signal.SIGINT)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [1]


def test_a_handler_of_the_process_runs_at_the_end_as_often_as_its_signal_came() -> None:
    told, before = list[int](), signal.signal(signal.SIGUSR1, lambda number, frame: told.append(number))
    try:
        with deferred():
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR1)
            assert told == []
        assert told == [signal.SIGUSR1] * 2
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_what_fails_within_fails_and_nothing_is_left_behind() -> None:
    with pytest.raises(ValueError, match="within"), deferred():
        raise ValueError("within")


def test_on_another_thread_nothing_waits() -> None:
    """Python runs handlers on the main thread: there is nothing to keep from it."""
    inside, leave, told = threading.Event(), threading.Event(), list[int]()

    def held() -> None:
        with deferred():
            inside.set()
            assert leave.wait(30.0)

    thread, before = threading.Thread(target=held), signal.signal(signal.SIGUSR1, lambda number, frame: told.append(number))
    try:
        thread.start()
        assert inside.wait(30.0)
        signal.raise_signal(signal.SIGUSR1)
        assert told == [signal.SIGUSR1]
    finally:
        leave.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)
