"""Signals that wait until a thread is done."""

import _signal  # type: ignore[import-not-found]
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DEFERRED = signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2


@contextmanager
def deferred() -> Iterator[None]:
    """The process' handlers of DEFERRED signals that come meanwhile run at the end. Python runs them on the main thread, between any two
    instructions, and Ctrl-C's raises there, which would leave half done what is done within. On other threads there is nothing to do.

    By the functions that `signal` wraps: its own make enumerations of numbers, which takes 26 us a turn on two cores of a Xeon, not 5."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, Any]] = []
    handlers: dict[int, Any] = {number: handler for number in DEFERRED if callable(handler := _signal.getsignal(number))}
    for number in handlers:
        _signal.signal(number, lambda *signalled: arrived.append(signalled))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            _signal.signal(number, handler)
        for signalled, frame in arrived:
            handlers[signalled](signalled, frame)
