"""The daemon on the wire: gRPC handlers that queue commands and await them, and the daemon's start and stop."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from tierd_proto.v1 import tierd_pb2 as pb
from tierd_proto.v1 import tierd_pb2_grpc

from tierd import commands
from tierd.calls import Calls
from tierd.config import Settings
from tierd.engine import STATUS_WAITING_MAX, Engine
from tierd.errors import CapacityExceeded, InvalidArgument, TierdError
from tierd.listen import CannotListen, listen
from tierd.metrics import SCRAPE_TIMEOUT_S, Metrics, MetricsEndpoint
from tierd.parsing import Parsing, parsed
from tierd.service import AppendAssembly, ByteQuota, Converter, check_protocol, describe, handshake_reply
from tierd.streams import Context, DecodeStream
from tierd.workers import Workers

log = logging.getLogger(__name__)
WORKER_KEY = "tierd-worker"
ERROR_KEY = "tierd-error"
TIER = pb.DESCRIPTOR.services_by_name["Tier"]
SERVICE = TIER.full_name
CANCEL_GRACE_S = 0.25  # for replies already written to reach their readers
STATUS_CODES = {
    "invalid_argument": grpc.StatusCode.INVALID_ARGUMENT,
    "session_not_found": grpc.StatusCode.NOT_FOUND,
    "capacity_exceeded": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "certificate_unavailable": grpc.StatusCode.DATA_LOSS,
    "unavailable": grpc.StatusCode.UNAVAILABLE,
    "deadline_exceeded": grpc.StatusCode.DEADLINE_EXCEEDED,
}


class Daemon:
    """An engine behind a gRPC server. All methods run on one event loop; `engine` is started and stopped here."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._settings = settings
        self._engine = engine
        self._metrics = Metrics(self._scrape)
        self._quota = ByteQuota(settings.append_bytes_max)
        self._workers = Workers(settings.workers_max)
        converter = Converter(settings.message_bytes_max, settings.timeout_s_max, self._transport_status)
        self._calls = Calls(engine, converter, self._metrics)
        self._closing: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._health = health.aio.HealthServicer()
        self._endpoint: MetricsEndpoint | None = None
        self._server = grpc.aio.server(
            interceptors=[Parsing(TIER)],
            options=[
                ("grpc.max_send_message_length", settings.message_bytes_max),
                ("grpc.max_receive_message_length", settings.message_bytes_max),
                ("grpc.so_reuseport", 0),  # or a second daemon would share the port unnoticed
            ],
            # Streams, as many watchers of health, calls, which are refused by name before, and whoever asks for the status.
            maximum_concurrent_rpcs=2 * settings.workers_max + _calls_max(settings) + STATUS_WAITING_MAX,
        )
        tier = Tier(settings, engine, converter, self._calls, self._metrics, self._quota, self._workers, self._close_worker)
        tierd_pb2_grpc.add_TierServicer_to_server(tier, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    @property
    def metrics_port(self) -> int | None:
        return self._endpoint.port if self._endpoint else None

    def bind(self) -> str:
        """Take the addresses; returns the target that clients connect to, and wait at until `start`. Raises CannotListen."""
        if self._settings.metrics_port is not None:
            try:
                self._endpoint = MetricsEndpoint(self._metrics, self._settings.metrics_port)
            except OSError as error:
                raise CannotListen(f"cannot serve metrics on 127.0.0.1:{self._settings.metrics_port}: {error}") from error
        try:
            target = listen(self._settings.listen, self._server.add_insecure_port)
        except CannotListen:
            if self._endpoint:
                self._endpoint.close()
            raise
        return target

    async def start(self) -> None:
        """Serve."""
        self._engine.start()
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        self._watch = asyncio.create_task(self._report_loss())
        await self._server.start()

    async def stop(self) -> None:
        """Refuse new calls, let those under way finish for `grace_s`, end the streams, then everything else."""
        self._calls.refuse()
        if self._watch:
            self._watch.cancel()
        await self._health.enter_graceful_shutdown()
        try:
            await asyncio.wait_for(self._calls.idle(), self._settings.grace_s)
        except TimeoutError:
            log.warning("%d calls did not finish within %s s", self._calls.num_under_way, self._settings.grace_s)
            await asyncio.to_thread(self._engine.stop, 0.0)
        await self._server.stop(CANCEL_GRACE_S)
        await asyncio.to_thread(self._engine.stop, CANCEL_GRACE_S)
        await asyncio.gather(*self._closing)
        if self._endpoint:
            await asyncio.to_thread(self._endpoint.close)

    async def _report_loss(self) -> None:
        """Says NOT_SERVING once the device is lost. The process stays, so that the status can be asked for and workers can leave."""
        await asyncio.shield(asyncio.wrap_future(self._engine.lost))  # the future is the engine's: cancelling this must not end it
        for service in ("", SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)

    async def _close_worker(self, worker: str) -> None:
        """The worker's stream is over: close its sessions, then give its place to another. Goes on if the caller is cancelled."""
        self._workers.leave(worker)
        # A task of its own: gRPC cancels a handler again while it cleans up, and that would take the command out of the queue.
        task = asyncio.create_task(self._close_sessions(worker))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        await asyncio.shield(task)

    async def _close_sessions(self, worker: str) -> None:
        try:
            closed = await asyncio.wrap_future(self._engine.submit(commands.CloseWorker(worker=worker)))
            log.info("a worker left; %d sessions closed", closed)
        except TierdError as error:
            log.info("a worker left: %s", error)
        finally:
            self._workers.end(worker)

    def _scrape(self) -> dict[str, Any]:
        status: dict[str, Any] = self._engine.submit(commands.Status(worker="")).result(SCRAPE_TIMEOUT_S)
        return status | self._transport_status()

    def _transport_status(self) -> dict[str, Any]:
        return {
            "workers_connected": self._workers.num_connected,
            "calls_under_way": self._calls.num_under_way,
            "request_bytes": self._quota.used_bytes,
        }


class Tier:
    """The handlers of the service `Tier`. A call that fails aborts with the error's status, text and, in `ERROR_KEY`, code."""

    def __init__(
        self, settings: Settings, engine: Engine, converter: Converter, calls: Calls, metrics: Metrics, quota: ByteQuota,
        workers: Workers, close_worker: Any,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._engine = engine
        self._converter = converter
        self._calls = calls
        self._metrics = metrics
        self._quota = quota
        self._workers = workers
        self._close_worker = close_worker
        self._num_calls = 0

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        """Counts a call that is neither a stream nor Status. Raises CapacityExceeded or, while stopping, Unavailable."""
        calls_max = _calls_max(self._settings)
        if self._num_calls >= calls_max:
            raise CapacityExceeded(f"{self._num_calls} calls are under way, 0 free; allowed: {calls_max}, twice queue_max")
        self._num_calls += 1
        try:
            with self._calls.admitted():
                yield
        finally:
            self._num_calls -= 1

    async def Handshake(self, request: pb.HandshakeRequest, context: Context) -> pb.HandshakeReply:
        try:
            with self._admitted():
                check_protocol(parsed(request))
                self._engine.check_device()  # or the worker would learn of it by its first call
                return handshake_reply(self._settings, self._engine.epoch, self._engine.backend, self._workers.greet())
        except Exception as error:
            await self._abort(context, error)

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusReply:
        """Needs no worker, and is answered while the daemon stops."""
        try:
            reply: pb.StatusReply = await self._calls.answer(parsed(request), "", context.time_remaining())
            return reply
        except Exception as error:
            await self._abort(context, error)

    async def _unary(self, request: Any, context: Context) -> Any:
        try:
            with self._admitted(), self._quota.held(parsed(request).ByteSize()):
                worker = _worker_of(context)
                self._workers.check(worker)
                return await self._calls.answer(request, worker, context.time_remaining())
        except Exception as error:
            await self._abort(context, error)

    OpenSession = CloseSession = Attend = Truncate = Fork = Lengths = _unary

    async def Append(self, requests: AsyncIterator[pb.AppendRequest], context: Context) -> pb.AppendReply:
        assembly = AppendAssembly(self._quota)
        try:
            with self._admitted():
                worker = _worker_of(context)
                self._workers.check(worker)
                deadline = self._converter.deadline(context.time_remaining())
                async for request in requests:
                    self._engine.hear(worker)
                    assembly.add(parsed(request))
                reply: pb.AppendReply = await self._calls.perform(assembly.operation(worker, deadline))
                return reply
        except Exception as error:
            await self._abort(context, error)
        finally:
            assembly.release()

    async def Decode(self, _: Any, context: Context) -> None:
        try:
            worker = _worker_of(context)
            with self._calls.admitted():
                self._workers.begin(worker)
        except Exception as error:
            await self._abort(context, error)
        try:
            stream = DecodeStream(
                self._calls, self._metrics, self._quota, self._settings.stream_requests_max, context, worker
            )
            await stream.serve()
        finally:
            await self._close_worker(worker)

    async def _abort(self, context: Context, error: Exception) -> NoReturn:
        if not isinstance(error, TierdError):
            log.error("a call failed", exc_info=error)
        message = describe(error)
        self._metrics.count_error(message.code)
        context.set_trailing_metadata(((ERROR_KEY, message.code),))
        await context.abort(STATUS_CODES[message.code], message.message)
        raise AssertionError("abort returned")


def _calls_max(settings: Settings) -> int:
    """Unary calls and appends under way: those that the engine has taken, and as many that wait for it."""
    return 2 * settings.queue_max


def _worker_of(context: Context) -> str:
    """Who calls. Raises InvalidArgument."""
    for key, value in context.invocation_metadata() or ():
        if key == WORKER_KEY:
            return str(value)
    raise InvalidArgument(f"the metadata key {WORKER_KEY} is missing; it carries the name that Handshake gave")
