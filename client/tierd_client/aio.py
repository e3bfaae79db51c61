"""The same connection, awaitable: for one event loop. Methods are described in `tierd_client.tier` and `tierd_client.session`."""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from tierd_client import protocol
from tierd_client.certificate import Result
from tierd_client.errors import DaemonUnavailable, SessionNotFound, TierdError
from tierd_client.protocol import Call, T
from tierd_client.state import CONNECT_TIMEOUT_S, SessionState, Terms, TierState, check_timeout, terms_of
from tierd_client.target import INPROC, TIMEOUT_S_MAX, resolve
from tierd_client.tensors import AnyTensor, Tensor
from tierd_client.transports import AsyncTransport
from tierd_client.types import Geometry, PolicyChoice, Tolerance

log = logging.getLogger(__name__)


class Closing(Protocol):
    """What can be left with `async with`."""

    async def close(self) -> None: ...


C = TypeVar("C", bound=Closing)


class Opening(Generic[C]):
    """`await` it for what it opens, or enter it with `async with`, which closes that at the end."""

    def __init__(self, coroutine: Coroutine[Any, Any, C]) -> None:
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, C]:
        return self._coroutine.__await__()

    async def __aenter__(self) -> C:
        self._opened = await self._coroutine
        return self._opened

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._opened.close()


def connect(
    target: str | None = None, *, timeout: float = CONNECT_TIMEOUT_S, settings: Mapping[str, Any] | None = None
) -> Opening["Tier"]:
    """As `tierd_client.connect`: `tier = await connect(...)`, or `async with connect(...) as tier:`."""
    return Opening(_connect(target, timeout, settings))


async def _connect(target: str | None, timeout: float, settings: Mapping[str, Any] | None) -> "Tier":
    timeout_s, chosen = check_timeout(timeout, TIMEOUT_S_MAX), resolve(target, settings)
    transport = await _transport(chosen, timeout_s, settings)
    try:
        return Tier(chosen, transport, timeout_s)
    except TierdError:
        await transport.close()
        raise


async def _transport(target: str, timeout_s: float, settings: Mapping[str, Any] | None) -> AsyncTransport:
    if target == INPROC:
        from tierd_client.transports.inproc import AsyncInprocTransport

        return AsyncInprocTransport(settings)
    from tierd_client.transports.grpc_aio import AsyncGrpcTransport

    transport = AsyncGrpcTransport(target)
    await transport.begin(timeout_s)
    return transport


class Tier(TierState):
    """As `tierd_client.Tier`, for the event loop that it was made on."""

    def __init__(self, target: str, transport: AsyncTransport, timeout_s: float) -> None:
        super().__init__(target, transport.welcome, timeout_s)
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._releasing: set[asyncio.Task[None]] = set()
        self._closed = False

    def open_session(
        self, geometry: Geometry, *, tolerance: Tolerance, max_tokens: int, policy: PolicyChoice = "budget", timeout: float | None = None
    ) -> Opening["Session"]:
        return Opening(self._open(terms_of(geometry, tolerance, policy, max_tokens), timeout))

    async def step_many(self, rows: Sequence["StepRow[Tensor]"], *, timeout: float | None = None) -> list[Result[Tensor]]:
        return await self._run(self._rows_call(rows), timeout)

    async def status(self, *, timeout: float | None = None) -> dict[str, Any]:
        return await self._run(protocol.status(), timeout)

    async def close(self) -> None:
        if not self._closed and not self._forked:
            self._closed = True
            await self._transport.close()

    async def _open(self, terms: Terms, timeout: float | None) -> "Session":
        return Session(self, await self._run(terms.call(), timeout), terms)

    async def _run(self, call: Call[T], timeout: float | None) -> T:
        timeout_s = self._timeout_of(call, timeout)
        return call.read(await self._transport.call(call.request, timeout_s))

    def _release(self, session_id: str) -> None:
        """Called by the collector, on any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._begin_release, session_id)

    def _begin_release(self, session_id: str) -> None:
        task = self._loop.create_task(self._close_collected(session_id))
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)

    async def _close_collected(self, session_id: str) -> None:
        try:
            await self._run(protocol.close_session(session_id), None)
        except TierdError as error:
            log.debug("a collected session was not closed: %s", error)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()


class Session(SessionState):
    """As `tierd_client.Session`."""

    _tier: Tier

    def __init__(self, tier: Tier, session_id: str, terms: Terms) -> None:
        super().__init__(tier, session_id, terms, tier._release)

    async def append(self, *, layer: int, k: AnyTensor, v: AnyTensor, timeout: float | None = None) -> None:
        await self._tier._run(self._append_call(layer, k, v), timeout)

    async def attend(
        self, *, layer: int, q: Tensor, tolerance: Tolerance | None = None, timeout: float | None = None
    ) -> Result[Tensor]:
        return await self._tier._run(self._step_call(layer, q, None, None, tolerance), timeout)

    async def step(
        self, *, layer: int, q: Tensor, k: AnyTensor, v: AnyTensor, tolerance: Tolerance | None = None, timeout: float | None = None
    ) -> Result[Tensor]:
        return await self._tier._run(self._step_call(layer, q, k, v, tolerance), timeout)

    async def truncate(self, length: int, *, timeout: float | None = None) -> None:
        await self._tier._run(self._truncate_call(length), timeout)

    def fork(self, *, timeout: float | None = None) -> Opening["Session"]:
        return Opening(self._fork(timeout))

    async def _fork(self, timeout: float | None) -> "Session":
        return Session(self._tier, await self._tier._run(self._fork_call(), timeout), self._child_terms())

    async def length(self, *, layer: int, timeout: float | None = None) -> int:
        return await self._tier._run(self._length_call(layer), timeout)

    async def lengths(self, *, timeout: float | None = None) -> list[int]:
        return await self._tier._run(self._lengths_call(), timeout)

    async def close(self, *, timeout: float | None = None) -> None:
        if not self.closed:
            with contextlib.suppress(DaemonUnavailable, SessionNotFound):
                await self._tier._run(protocol.close_session(self._id), timeout)
            self._collected.detach()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()


StepRow = tuple[Session, int, Tensor, AnyTensor | None, AnyTensor | None]
