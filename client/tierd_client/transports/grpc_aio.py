"""gRPC for one event loop: the Decode stream is read by a task."""

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from tierd_proto.v1 import tierd_pb2 as pb
from tierd_proto.v1.tierd_pb2_grpc import TierStub

from tierd_client import protocol
from tierd_client.errors import DaemonUnavailable, TierdError, late
from tierd_client.pairing import Pairing
from tierd_client.protocol import Attend, Request
from tierd_client.transports.grpc_shared import CHANNEL_OPTIONS, CLOSE_TIMEOUT_S, error_of, method_of

Reply = asyncio.Future[pb.AttendReply]


class AsyncGrpcTransport:
    """A connection to the daemon at `target`, once `begin` has returned."""

    welcome: pb.HandshakeReply

    def __init__(self, target: str) -> None:
        self._target = target
        self._channel = grpc.aio.insecure_channel(target, CHANNEL_OPTIONS)
        self._stub: Any = TierStub(self._channel)
        self._outbox: asyncio.Queue[pb.DecodeRequest | None] = asyncio.Queue()

    async def begin(self, timeout_s: float) -> None:
        """Shake hands and open the stream. Raises DaemonUnavailable, or what else the daemon refuses with."""
        try:
            self.welcome = await self._stub.Handshake(protocol.handshake(), timeout=timeout_s)
            self._metadata = ((protocol.WORKER_KEY, self.welcome.worker),)
            new_promise = asyncio.get_running_loop().create_future
            self._pairing: Pairing[Reply] = Pairing(self._target, self.welcome.limits.stream_requests_max, new_promise)
            self._reader = asyncio.create_task(self._read(), name="tierd-replies")
            await _wait(self._pairing.ready, timeout_s)
        except grpc.RpcError as error:
            await self._channel.close()
            raise error_of(error, self._target, timeout_s) from None
        except BaseException:
            await self._channel.close()
            raise

    async def call(self, request: Request, timeout_s: float) -> Any:
        self._pairing.check()
        if isinstance(request, Attend):
            return await self._decode(request.message(), timeout_s)
        method, message = method_of(self._stub, request)
        try:
            return await method(message, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error, self._target, timeout_s) from None

    async def _decode(self, attend: pb.AttendRequest, timeout_s: float) -> pb.AttendReply:
        request, reply = self._pairing.begin(attend, timeout_s)
        try:
            self._outbox.put_nowait(request)
            return await _wait(reply, timeout_s)
        finally:
            self._pairing.forget(request)

    async def close(self) -> None:
        self._pairing.lose(DaemonUnavailable("it was closed here"))
        self._outbox.put_nowait(None)  # the end of our half; the daemon ends its own when the sessions are closed
        await asyncio.wait([self._reader], timeout=CLOSE_TIMEOUT_S)
        await self._channel.close()

    async def _requests(self) -> AsyncIterator[pb.DecodeRequest]:
        # An iterator, not `stream.write`: a cancelled write would cancel the stream, and with it every session.
        while (request := await self._outbox.get()) is not None:
            yield request

    async def _read(self) -> None:
        why: TierdError = DaemonUnavailable(f"the daemon at {self._target} ended it")
        try:
            async for reply in self._stub.Decode(self._requests(), metadata=self._metadata):
                self._pairing.deliver(reply)
        except grpc.RpcError as error:
            why = error_of(error, self._target, math.inf)
        finally:
            self._pairing.lose(why)


async def _wait(reply: Reply, timeout_s: float) -> pb.AttendReply:
    try:
        async with asyncio.timeout(timeout_s):
            return await reply
    except TimeoutError:
        raise late(timeout_s) from None
