"""The engine in this process, on a thread of its own, without a wire."""

import asyncio
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from tierd_proto.v1 import tierd_pb2 as pb

from tierd_client import protocol
from tierd_client.errors import DaemonUnavailable, from_code, late
from tierd_client.protocol import Attend, Chunks, Request
from tierd_client.target import INPROC

T = TypeVar("T")


class _OwnEngine:
    """What both flavours share: an engine of this connection alone. Raises InvalidArgument for `settings` that the daemon would refuse."""

    def __init__(self, settings: Mapping[str, Any] | None) -> None:
        from tierd.inproc import InProcess  # the one place where the client knows the daemon

        self._engine = _told(lambda: InProcess(dict(settings or {})))
        self.welcome: pb.HandshakeReply = _told(lambda: self._engine.handshake(protocol.handshake()))
        self._engine.start()
        self._closing = threading.Lock()  # taken once, never given back

    def begin(self, request: Request, timeout_s: float) -> "Future[Any]":
        self._check()
        if isinstance(request, Chunks):
            return self._engine.append(request, self.welcome.worker, timeout_s)
        return self._engine.submit(_plain(request), self.welcome.worker, timeout_s)

    def call(self, request: Request, timeout_s: float) -> Any:
        if not isinstance(request, Chunks):
            self._check()
            return _told(lambda: self._engine.call(_plain(request), self.welcome.worker, timeout_s))
        reply = self.begin(request, timeout_s)
        try:
            return _told(lambda: reply.result(timeout_s))
        finally:
            reply.cancel()  # does nothing to one that is done

    def _check(self) -> None:
        if self._closing.locked():
            raise DaemonUnavailable(f"the connection to {INPROC} was closed here")

    def end(self) -> None:
        if self._closing.acquire(blocking=False):
            self._engine.close()


class InprocTransport:
    """For threads."""

    def __init__(self, settings: Mapping[str, Any] | None) -> None:
        self._own = _OwnEngine(settings)
        self.welcome = self._own.welcome

    def call(self, request: Request, timeout_s: float) -> Any:
        try:
            return self._own.call(request, timeout_s)
        except TimeoutError:
            raise late(timeout_s) from None

    def close(self) -> None:
        self._own.end()


class AsyncInprocTransport:
    """For one event loop. Collected unclosed, it ends its engine as the blocking one does."""

    def __init__(self, settings: Mapping[str, Any] | None) -> None:
        self._own = _OwnEngine(settings)
        self.welcome = self._own.welcome
        collected: SimpleQueue[None] = SimpleQueue()
        self._collected = weakref.finalize(self, collected.put, None)  # all that is safe in a collector's callback
        threading.Thread(target=_end_when_collected, args=(collected, self._own), name="tierd-release", daemon=True).start()

    async def call(self, request: Request, timeout_s: float) -> Any:
        reply = asyncio.wrap_future(self._own.begin(request, timeout_s))
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.wait([reply])
        except TimeoutError:
            raise late(timeout_s) from None
        finally:
            reply.cancel()  # does nothing to one that is done
        return _told(reply.result)

    async def close(self) -> None:
        await asyncio.to_thread(self._own.end)
        self._collected()


def _plain(request: Request) -> Any:
    """Without a message where none is needed."""
    return request.rows if isinstance(request, Attend) else request


def _end_when_collected(collected: "SimpleQueue[None]", own: _OwnEngine) -> None:
    collected.get()
    own.end()


def _told(ask: Callable[[], T]) -> T:
    """What `ask` returns; errors of the daemon, known by their code, become the client's."""
    try:
        return ask()
    except Exception as error:
        code = getattr(error, "code", None)
        if code is None:
            raise
        raise from_code(code, str(error), INPROC) from error
