"""A future that remembers when its command was queued, taken and answered."""

import time
from concurrent.futures import Future
from typing import Any


class TimedFuture(Future[Any]):
    """What `Engine.submit` returns. Times are the machine's, whatever clock the engine goes by: they are for monitors only."""

    def __init__(self) -> None:
        super().__init__()
        self._queued_s = self._taken_s = self._done_s = time.perf_counter()

    @property
    def queue_s(self) -> float:
        """Seconds from submission to the engine taking the command. Valid once done."""
        return self._taken_s - self._queued_s

    @property
    def compute_s(self) -> float:
        """Seconds from then to the answer, the rest of the command's batch included. Valid once done."""
        return self._done_s - self._taken_s

    def set_running_or_notify_cancel(self) -> bool:
        self._taken_s = time.perf_counter()
        return super().set_running_or_notify_cancel()

    def set_result(self, result: Any) -> None:
        self._done_s = time.perf_counter()
        super().set_result(result)
