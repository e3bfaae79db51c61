"""Who may call: workers that shook hands, and of those the ones whose stream is open."""

import secrets
from collections import OrderedDict

from tierd.errors import CapacityExceeded, InvalidArgument, Unavailable

HANDSHAKES_MAX = 1024  # without a stream yet; the oldest is forgotten first
UNKNOWN = "this daemon does not know the worker (it may have restarted): connect again"


class Workers:
    """Names of workers. A name is a secret: whoever knows it may use the worker's sessions. One thread.

    greet -> greeted -> begin -> streaming -> leave -> leaving -> end -> forgotten
    """

    def __init__(self, workers_max: int) -> None:
        self._workers_max = workers_max
        self._greeted: OrderedDict[str, None] = OrderedDict()
        self._streaming: set[str] = set()
        self._leaving: set[str] = set()

    @property
    def num_connected(self) -> int:
        """Workers with a stream, or with sessions that are still being closed."""
        return len(self._streaming) + len(self._leaving)

    def greet(self) -> str:
        """A new name. It is forgotten unless its stream opens."""
        worker = f"w-{secrets.token_hex(16)}"
        self._greeted[worker] = None
        if len(self._greeted) > HANDSHAKES_MAX:
            self._greeted.popitem(last=False)
        return worker

    def begin(self, worker: str) -> None:
        """The worker's stream opens. Raises Unavailable, InvalidArgument or CapacityExceeded."""
        if worker in self._streaming:
            raise InvalidArgument("this worker has a stream already; one per worker is allowed")
        if worker not in self._greeted:
            raise Unavailable(UNKNOWN)
        if self.num_connected >= self._workers_max:
            raise CapacityExceeded(f"{self.num_connected} workers are connected, 0 free: workers_max is {self._workers_max}")
        del self._greeted[worker]
        self._streaming.add(worker)

    def leave(self, worker: str) -> None:
        """The worker's stream has ended: it may not call any more. Its place is free only after `end`."""
        self._streaming.remove(worker)
        self._leaving.add(worker)

    def end(self, worker: str) -> None:
        """The worker's sessions are closed."""
        self._leaving.remove(worker)

    def check(self, worker: str) -> None:
        """Raises unless `worker` has a stream, which is what its sessions live by."""
        if worker in self._greeted:
            raise InvalidArgument("open the Decode stream first: its end is what releases the worker's sessions")
        if worker not in self._streaming:
            raise Unavailable(UNKNOWN)
