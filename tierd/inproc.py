"""The engine in the caller's own process, spoken to with the messages of the wire, or the arrays in them, but without a socket."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from tierd_proto.v1 import tierd_pb2 as pb

from tierd import commands
from tierd.config import load
from tierd.engine import Engine
from tierd.engine.timed import TimedFuture
from tierd.errors import TierdError
from tierd.interrupts import deferred
from tierd.service import Answers, AppendAssembly, ByteQuota, Converter, Operation, check_protocol, handshake_reply
from tierd.workers import Workers

# Longer than from one layer's call to the next, and from token to token: the model computes meanwhile, in the interpreter that the engine's
# thread would take from it. After the 1 ms of a daemon, where nobody else wants it, that was 150 us a layer on two cores of a Xeon.
LINGER_S = 10e-3


class InProcess:
    """An engine and its threads. `settings`: as the daemon's, by name; the environment counts too. Raises InvalidArgument,
    or Unavailable if the backend cannot start.

    Every method may be called from any thread.
    """

    def __init__(self, settings: dict[str, Any] | None = None) -> None:
        self._settings = load(settings or {})
        self._engine = Engine(self._settings.engine(), linger_s=LINGER_S)
        self._converter = Converter(self._settings.message_bytes_max, self._settings.timeout_s_max, dict)
        self._quota = ByteQuota(self._settings.append_bytes_max)
        self._workers = Workers(self._settings.workers_max)
        self._lock = threading.Lock()  # of the workers

    def start(self) -> None:
        self._engine.start()

    def close(self) -> None:
        """Answer what is under way for at most `grace_s`, then end the threads."""
        self._engine.stop(self._settings.grace_s)

    def handshake(self, request: pb.HandshakeRequest) -> pb.HandshakeReply:
        """A new worker; its lease begins at once. Raises InvalidArgument, CapacityExceeded, or Unavailable once the device is lost."""
        check_protocol(request)
        self._engine.check_device()
        with self._lock:
            worker = self._workers.greet()
            self._workers.begin(worker)
        return handshake_reply(self._settings, self._engine.epoch, self._engine.backend, worker)

    def submit(self, request: Any, worker: str, timeout_s: float | None) -> "Future[Any]":
        """The future reply to any unary request message; fails with a TierdError. An attend may be a list of rows instead, of `session_id`,
        `layer`, arrays `q`, `k` and `v` or None, and `tolerance`; its reply is an `Answers` then. Of the arrays copies are taken, as a
        message would: whoever gives up waiting may write to them."""
        return self._submit(lambda deadline: self._operation(request, worker, deadline), worker, timeout_s)

    def call(self, request: Any, worker: str, timeout_s: float) -> Any:
        """The reply to what `submit` takes, for a caller that will do nothing else meanwhile: its thread itself may do the work. To hand a
        call to the engine's thread and its answer back takes longer than a short call needs. Raises TierdError or TimeoutError."""
        operation, result = self._begin(lambda deadline: self._operation(request, worker, deadline), worker, timeout_s, wake=False)
        try:
            with deferred():
                self._engine.help()
            result.result(timeout_s)
            return operation.finish(result)
        except BaseException:
            if not result.cancel():  # it is under way, or done
                result.add_done_callback(lambda _: self._undo(operation, result))
            raise

    def append(self, requests: Iterable[pb.AppendRequest], worker: str, timeout_s: float | None) -> "Future[Any]":
        """The future reply to an append in chunks, which are read before this returns; fails with a TierdError."""
        assembly = AppendAssembly(self._quota)

        def assembled(deadline: float) -> Operation:
            for request in requests:
                self._engine.hear(worker)
                assembly.add(request)
            return assembly.operation(worker, deadline)

        reply = self._submit(assembled, worker, timeout_s)
        reply.add_done_callback(lambda _: assembly.release())
        return reply

    def close_worker(self, worker: str) -> None:
        """Close the worker's sessions; it may not call again. Returns when it is done. Raises Unavailable."""
        with self._lock:
            self._workers.check(worker)
            self._workers.leave(worker)
        try:
            self._engine.submit(commands.CloseWorker(worker=worker)).result()
        finally:
            with self._lock:
                self._workers.end(worker)

    def _operation(self, request: Any, worker: str, deadline: float) -> Operation:
        if isinstance(request, list):
            return self._converter.attend([_row(row) for row in request], worker, deadline, Answers.of)
        return self._converter.operation(request, worker, deadline)

    def _submit(self, make: Callable[[float], Operation], worker: str, timeout_s: float | None) -> "Future[Any]":
        reply: Future[Any] = Future()
        try:
            operation, result = self._begin(make, worker, timeout_s)
        except TierdError as error:
            reply.set_exception(error)
            return reply
        reply.add_done_callback(lambda _: result.cancel())  # does nothing unless the reply was cancelled first
        result.add_done_callback(lambda _: self._answer(operation, result, reply))
        return reply

    def _begin(
        self, make: Callable[[float], Operation], worker: str, timeout_s: float | None, wake: bool = True
    ) -> tuple[Operation, TimedFuture]:  # fmt: skip
        """An operation, once it waits for its turn. Raises TierdError."""
        with self._lock:
            self._workers.check(worker)
        operation = make(self._converter.deadline(timeout_s))
        return operation, self._engine.submit(operation.command, wake)

    def _answer(self, operation: Operation, result: TimedFuture, reply: "Future[Any]") -> None:
        if result.cancelled():
            return
        if reply.set_running_or_notify_cancel():
            try:
                reply.set_result(operation.finish(result))
            except Exception as error:
                reply.set_exception(error)
        else:
            self._undo(operation, result)

    def _undo(self, operation: Operation, result: TimedFuture) -> None:
        """Nobody will learn of the result, which is there."""
        if result.exception() is None and (undo := operation.undo(result.result())) is not None:
            with suppress(TierdError):  # if the engine takes nothing now, `close_worker` still does the same
                self._engine.submit(undo)


def _row(row: Any) -> commands.Row:
    k, v = (None if x is None else x.copy() for x in (row.k, row.v))
    told = row.tolerance
    return commands.Row(row.session_id, row.layer, row.q.copy(), k, v, commands.Tolerance(told.rtol, told.atol, told.relative_to))
