"""Time as the engine sees it: seconds on a monotonic clock, replaceable so that tests never wait."""

import time
from typing import Protocol


class Clock(Protocol):
    """Where deadlines and leases read the time."""

    def now(self) -> float:
        """Seconds since an arbitrary start; never runs backwards."""
        ...


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that moves only when told to."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds`, which must not be negative."""
        assert seconds >= 0.0
        self._now_s += seconds
