"""A connection for threads."""

import logging
import threading
import weakref
from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from tierd_client import protocol
from tierd_client.certificate import Result
from tierd_client.errors import TierdError
from tierd_client.protocol import Call, T
from tierd_client.session import Session
from tierd_client.state import CONNECT_TIMEOUT_S, TierState, check_timeout, terms_of
from tierd_client.target import INPROC, TIMEOUT_S_MAX, resolve
from tierd_client.tensors import AnyTensor, Tensor
from tierd_client.transports import Transport
from tierd_client.types import Geometry, PolicyChoice, Tolerance

log = logging.getLogger(__name__)
StepRow = tuple[Session, int, Tensor, AnyTensor | None, AnyTensor | None]


def connect(
    target: str | None = None, *, timeout: float = CONNECT_TIMEOUT_S, settings: Mapping[str, Any] | None = None
) -> "Tier":
    """A connection to the daemon at `target`: "unix:///path", "host:port", or "inproc://", which runs an engine in this process.

    `target` None: the daemon's default, $XDG_RUNTIME_DIR/tierd.sock. `timeout`: of connecting, and of calls that name none, seconds.
    `settings`: of the engine of "inproc://", by the names of `tierd config`. Raises InvalidArgument, DaemonUnavailable,
    CapacityExceeded (too many workers) or DeadlineExceeded. Not for use across a fork of the process.
    """
    timeout_s, chosen = check_timeout(timeout, TIMEOUT_S_MAX), resolve(target, settings)
    transport: Transport
    if chosen == INPROC:
        from tierd_client.transports.inproc import InprocTransport

        transport = InprocTransport(settings)
    else:
        from tierd_client.transports.grpc_sync import GrpcTransport

        transport = GrpcTransport(chosen, timeout_s)
    try:
        return Tier(chosen, transport, timeout_s)
    except TierdError:
        transport.close()
        raise


class Tier(TierState):
    """Made by `connect`. Any thread may call; `close`, or `with`, ends it and every session of it.

    `target`; `epoch`, which changes when the daemon restarts; `backend`; `limits`. Once the daemon has gone, every call raises
    DaemonUnavailable: connect again.
    """

    def __init__(self, target: str, transport: Transport, timeout_s: float) -> None:
        super().__init__(target, transport.welcome, timeout_s)
        self._transport = transport
        collected: SimpleQueue[str | None] = SimpleQueue()
        self._release = collected.put  # safe in a collector's callback, which a call over the wire is not
        self._collected = weakref.finalize(self, collected.put, None)
        threading.Thread(target=_release_all, args=(collected, transport), name="tierd-release", daemon=True).start()

    def open_session(
        self, geometry: Geometry, *, tolerance: Tolerance, max_tokens: int, policy: PolicyChoice = "budget", timeout: float | None = None
    ) -> Session:
        """A new, empty session. `max_tokens` bounds each layer and reserves nothing; `policy`: a name, Budget(...) or Coverage(...)."""
        terms = terms_of(geometry, tolerance, policy, max_tokens)
        return Session(self, self._run(terms.call(), timeout), terms)

    def step_many(self, rows: Sequence[StepRow[Tensor]], *, timeout: float | None = None) -> list[Result[Tensor]]:
        """`step` for many sessions in one message; n may differ by row, k and v None attend only. All succeed, or nothing is stored.

        Each row is (session, layer, q, k, v); results are in the order of the rows, at the tolerance of their sessions.
        """
        return self._run(self._rows_call(rows), timeout)

    def status(self, *, timeout: float | None = None) -> dict[str, Any]:
        """The daemon's numbers: sessions, pools, counters."""
        return self._run(protocol.status(), timeout)

    def close(self) -> None:
        """End the connection; the daemon has closed its sessions when this returns. Again, or in a fork of the process: nothing."""
        if not self._forked and self._collected.detach() is not None:
            self._transport.close()
            self._release(None)

    def _run(self, call: Call[T], timeout: float | None) -> T:
        timeout_s = self._timeout_of(call, timeout)
        return call.read(self._transport.call(call.request, timeout_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _release_all(collected: "SimpleQueue[str | None]", transport: Transport) -> None:
    """Close sessions that were collected, and with None the connection. Must not refer to the Tier, which may be collected too."""
    while (session_id := collected.get()) is not None:
        try:
            transport.call(protocol.close_session(session_id).request, CONNECT_TIMEOUT_S)
        except TierdError as error:
            log.debug("a collected session was not closed: %s", error)
    transport.close()
