"""Which sessions belong to which worker, and which workers have gone silent."""

from tierd.clock import Clock


class Leases:
    """A worker's lease is renewed by each of its commands, or part of one, and runs out `idle_s` seconds after the last (None: never).

    Sessions live exactly as long as their worker's lease, unless closed before.
    """

    def __init__(self, clock: Clock, idle_s: float | None) -> None:
        self._clock = clock
        self._idle_s = idle_s
        self._last_seen_s: dict[str, float] = {}
        self._sessions: dict[str, set[str]] = {}

    @property
    def num_workers(self) -> int:
        """Workers that hold at least one session."""
        return len(self._sessions)

    def touch(self, worker: str) -> None:
        """Renew the lease of `worker` if it holds one."""
        if worker in self._sessions:
            self._last_seen_s[worker] = self._clock.now()

    def bind(self, worker: str, session_id: str) -> None:
        """Record that `session_id` belongs to `worker`; its lease starts anew."""
        self._sessions.setdefault(worker, set()).add(session_id)
        self.touch(worker)

    def unbind(self, worker: str, session_id: str) -> None:
        """Forget a session; a worker without sessions is forgotten with it."""
        sessions = self._sessions[worker]
        sessions.remove(session_id)
        if not sessions:
            del self._sessions[worker], self._last_seen_s[worker]

    def sessions_of(self, worker: str) -> list[str]:
        return sorted(self._sessions.get(worker, ()))

    def expired(self) -> list[str]:
        """Workers whose lease has run out."""
        if self._idle_s is None:
            return []
        oldest_s = self._clock.now() - self._idle_s
        return sorted(worker for worker, seen_s in self._last_seen_s.items() if seen_s < oldest_s)
