"""Requests of the Decode stream that wait for their replies. Nothing here waits or knows a transport."""

import itertools
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from tierd_proto.v1 import tierd_pb2 as pb

from tierd_client.errors import CapacityExceeded, DaemonUnavailable, TierdError, from_code

READY = 0  # id of the reply that says that the stream is open


class Promise(Protocol):
    """What concurrent.futures.Future and asyncio.Future have in common."""

    def done(self) -> bool: ...

    def set_result(self, result: Any, /) -> None: ...

    def set_exception(self, exception: BaseException, /) -> None: ...


P = TypeVar("P", bound=Promise)


class Pairing(Generic[P]):
    """Ids and promises of one stream. Threads may call everything at once: each step is one atomic operation on the dict, and no
    lock is held that a garbage collector's callback could want."""

    def __init__(self, target: str, in_flight_max: int, new_promise: Callable[[], P]) -> None:
        self._target, self._in_flight_max, self._new_promise = target, in_flight_max, new_promise
        self._ids = itertools.count(READY + 1)
        self._lost: DaemonUnavailable | None = None
        self.ready = new_promise()
        self._waiting: dict[int, P] = {READY: self.ready}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def check(self) -> None:
        """Raises DaemonUnavailable once the connection has ended."""
        if self._lost is not None:
            raise DaemonUnavailable(str(self._lost)) from self._lost.__cause__

    def begin(self, attend: pb.AttendRequest, timeout_s: float) -> tuple[pb.DecodeRequest, P]:
        """The message to send, and the promise of its AttendReply: it fails with a TierdError. Call `forget` in the end.

        Raises DaemonUnavailable once the connection has ended, CapacityExceeded when too much is in flight.
        """
        if len(self._waiting) >= self._in_flight_max:
            raise CapacityExceeded(
                f"{len(self._waiting)} attend and step calls are in flight on this connection; allowed: {self._in_flight_max}"
            )
        request = pb.DecodeRequest(id=next(self._ids), timeout_s=timeout_s, attend=attend)
        promise = self._waiting[request.id] = self._new_promise()
        if self._lost is not None:  # looked at after the insertion: `lose` either finds the promise or was seen here
            self.forget(request)
            self.check()
        return request, promise

    def forget(self, request: pb.DecodeRequest) -> None:
        """Nobody waits any longer; a reply that still comes is dropped."""
        self._waiting.pop(request.id, None)

    def deliver(self, reply: pb.DecodeReply) -> None:
        """Keep the promise that `reply` is about. One that nobody waits for is dropped."""
        promise = self._waiting.pop(reply.id, None)
        if promise is None or promise.done():
            return
        if reply.WhichOneof("result") == "error":
            promise.set_exception(from_code(reply.error.code, reply.error.message, self._target))
        else:
            promise.set_result(reply.attend)

    def lose(self, why: TierdError) -> None:
        """The connection ended: fail all that wait, and all to come. Only the first reason counts.

        A stream that was refused fails `ready` with `why` itself, so that `connect` can tell a full daemon from none.
        """
        if self._lost is None:
            self._lost = DaemonUnavailable(f"the connection to {self._target} has ended, and its sessions with it: {why}. Connect again")
            self._lost.__cause__ = why
        while self._waiting:
            number, promise = self._waiting.popitem()
            if not promise.done():
                promise.set_exception(why if number == READY else self._lost)
