"""The commands about sessions: opening, filling, cutting, sharing and closing them."""

from collections.abc import Iterable

from tierd.commands import Append, CloseSession, CloseWorker, Fork, Lengths, OpenSession, Truncate
from tierd.config import EngineConfig
from tierd.engine.batch import Kernels
from tierd.engine.validate import check_append, check_length
from tierd.errors import CapacityExceeded, InvalidArgument, SessionNotFound
from tierd.ids import new_session_id
from tierd.leases import Leases
from tierd.residency import Residency
from tierd.session import Session


class Sessions:
    """All open sessions, by name. Owned by whoever has the engine's turn; every method succeeds or changes nothing."""

    def __init__(self, config: EngineConfig, residency: Residency, kernels: Kernels, leases: Leases) -> None:
        self._config = config
        self._residency = residency
        self._kernels = kernels
        self._leases = leases
        self.by_id: dict[str, Session] = {}

    def find(self, session_id: str, worker: str) -> Session:
        """The session, if it is open and the worker's own. Raises SessionNotFound."""
        session = self.by_id.get(session_id)
        if session is None or session.worker != worker:
            raise SessionNotFound(
                f"this worker has no open session {session_id!r}: it was closed, expired, or is of another daemon"
            )
        return session

    def open(self, command: OpenSession) -> str:
        """A new empty session. The first of a layout may wait for a compiler, and all other commands with it: kernels run on this thread.
        Raises CapacityExceeded or InvalidArgument."""
        self._check_room()
        if not 1 <= command.max_tokens <= self._config.max_tokens:
            raise InvalidArgument(f"max_tokens is {command.max_tokens}; allowed: 1 to {self._config.max_tokens}")
        self._kernels.prepare(command.geometry.layout())
        session = Session(
            new_session_id(), command.worker, command.geometry, command.tolerance, command.policy, command.max_tokens,
            self._residency, self._kernels,
        )  # fmt: skip
        return self._add(session)

    def append(self, command: Append) -> int:
        """Returns the layer's length. Raises InvalidArgument or CapacityExceeded."""
        session = self.find(command.session_id, command.worker)
        check_append(session, command)
        session.append(command.layer, command.k, command.v)
        return session.lengths[command.layer]

    def truncate(self, command: Truncate) -> list[int]:
        session = self.find(command.session_id, command.worker)
        check_length(command.length, session.lengths)
        session.truncate(command.length)
        return session.lengths

    def fork(self, command: Fork) -> str:
        session = self.find(command.session_id, command.worker)
        self._check_room()
        return self._add(session.fork(new_session_id()))

    def lengths(self, command: Lengths) -> list[int]:
        return self.find(command.session_id, command.worker).lengths

    def close(self, command: CloseSession) -> None:
        self._drop(self.find(command.session_id, command.worker))

    def close_worker(self, command: CloseWorker) -> int:
        """Returns how many sessions the worker had."""
        return self.close_all(self._leases.sessions_of(command.worker))

    def close_all(self, session_ids: Iterable[str]) -> int:
        """Close these sessions, whoever owns them; returns their number."""
        doomed = [self.by_id[session_id] for session_id in session_ids]
        for session in doomed:
            self._drop(session)
        return len(doomed)

    def _check_room(self) -> None:
        if len(self.by_id) >= self._config.sessions_max:
            raise CapacityExceeded(
                f"{len(self.by_id)} sessions are open, 0 free: sessions_max is {self._config.sessions_max}"
            )

    def _add(self, session: Session) -> str:
        self.by_id[session.session_id] = session
        self._leases.bind(session.worker, session.session_id)
        return session.session_id

    def _drop(self, session: Session) -> None:
        del self.by_id[session.session_id]
        self._leases.unbind(session.worker, session.session_id)
        session.close()
