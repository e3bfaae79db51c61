"""gRPC for threads: unary calls on the caller's thread, the Decode stream read by a thread of its own."""

import math
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import grpc
from tierd_proto.v1 import tierd_pb2 as pb
from tierd_proto.v1.tierd_pb2_grpc import TierStub

from tierd_client import protocol
from tierd_client.errors import DaemonUnavailable, TierdError, late
from tierd_client.pairing import Pairing
from tierd_client.protocol import Attend, Request
from tierd_client.transports.grpc_shared import CHANNEL_OPTIONS, CLOSE_TIMEOUT_S, error_of, method_of

Reply = Future[pb.AttendReply]


class GrpcTransport:
    """A connection to the daemon at `target`. Raises DaemonUnavailable, or what else the daemon refuses with."""

    def __init__(self, target: str, timeout_s: float) -> None:
        self._target = target
        self._channel = grpc.insecure_channel(target, CHANNEL_OPTIONS)
        self._stub: Any = TierStub(self._channel)
        try:
            self.welcome: pb.HandshakeReply = self._stub.Handshake(protocol.handshake(), timeout=timeout_s)
            self._begin(timeout_s)
        except grpc.RpcError as error:
            self._channel.close()
            raise error_of(error, target, timeout_s) from None
        except BaseException:
            self._channel.close()
            raise

    def _begin(self, timeout_s: float) -> None:
        self._metadata = ((protocol.WORKER_KEY, self.welcome.worker),)
        self._pairing: Pairing[Reply] = Pairing(self._target, self.welcome.limits.stream_requests_max, Future)
        self._outbox: SimpleQueue[pb.DecodeRequest | None] = SimpleQueue()
        stream = self._stub.Decode(iter(self._outbox.get, None), metadata=self._metadata)
        self._reader = threading.Thread(target=_read, args=(stream, self._pairing, self._target), name="tierd-replies", daemon=True)
        self._reader.start()
        _wait(self._pairing.ready, timeout_s)

    def call(self, request: Request, timeout_s: float) -> Any:
        self._pairing.check()
        if isinstance(request, Attend):
            return self._decode(request.message(), timeout_s)
        method, message = method_of(self._stub, request)
        try:
            return method(message, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error, self._target, timeout_s) from None
        except ValueError as error:  # the channel was closed by another thread
            self._pairing.check()
            raise error

    def _decode(self, attend: pb.AttendRequest, timeout_s: float) -> pb.AttendReply:
        request, reply = self._pairing.begin(attend, timeout_s)
        try:
            self._outbox.put(request)
            return _wait(reply, timeout_s)
        finally:
            self._pairing.forget(request)

    def close(self) -> None:
        self._pairing.lose(DaemonUnavailable("it was closed here"))
        self._outbox.put(None)  # the end of our half; the daemon ends its own when the sessions are closed
        self._reader.join(CLOSE_TIMEOUT_S)
        self._channel.close()


def _wait(reply: Reply, timeout_s: float) -> pb.AttendReply:
    try:
        return reply.result(timeout_s)
    except TimeoutError:
        raise late(timeout_s) from None


def _read(stream: Iterable[pb.DecodeReply], pairing: Pairing[Reply], target: str) -> None:
    """Deliver replies until the stream ends. Holds no reference to the transport, which may be collected meanwhile."""
    why: TierdError = DaemonUnavailable(f"the daemon at {target} ended it")
    try:
        for reply in stream:
            pairing.deliver(reply)
    except grpc.RpcError as error:
        why = error_of(error, target, math.inf)
    finally:
        pairing.lose(why)
