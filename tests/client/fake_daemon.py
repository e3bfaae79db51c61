"""A daemon on a real socket whose every answer the test writes: late, out of order, broken, or never."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from types import TracebackType
from typing import Any, Self

import grpc
from tierd_proto import coding
from tierd_proto.v1 import tierd_pb2 as pb
from tierd_proto.v1.tierd_pb2_grpc import TierServicer, add_TierServicer_to_server

LIMITS = pb.Limits(message_bytes_max=64 << 10, max_tokens=1000, stream_requests_max=4, timeout_s_max=60.0, head_dims=[64])


class FakeDaemon(TierServicer):
    """`requests`: what arrived on the stream. `say` puts a reply on it; `end` ends it. `unary`: by method, what answers, or
    (status, details, code) to abort with. `chunks`: those of the last append."""

    def __init__(self, path: str) -> None:
        self.target = f"unix://{path}"
        self.welcome = pb.HandshakeReply(protocol=1, worker="w", epoch="e1", limits=LIMITS, backend="fake")
        self.unary: dict[str, Any] = {
            "OpenSession": pb.OpenSessionReply(session_id="s1"),
            "CloseSession": pb.CloseSessionReply(),
            "Append": pb.AppendReply(),
        }
        self.refusal: tuple[grpc.StatusCode, str, str] | None = None
        self.requests: SimpleQueue[pb.DecodeRequest] = SimpleQueue()
        self.calls: SimpleQueue[Any] = SimpleQueue()
        self.half_closed: SimpleQueue[None] = SimpleQueue()  # one entry when the client has ended its half of the stream
        self.may_end = Event()  # cleared: the daemon keeps its own half open
        self.may_end.set()
        self.chunks: list[pb.AppendRequest] = []
        self._replies: SimpleQueue[pb.DecodeReply | None] = SimpleQueue()
        self._pool = ThreadPoolExecutor(16)
        self._server = grpc.server(self._pool)
        add_TierServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self._server.add_insecure_port(self.target)
        self._server.start()

    def say(self, reply: pb.DecodeReply) -> None:
        self._replies.put(reply)

    def end(self) -> None:
        self._replies.put(None)

    def stop(self) -> None:
        self.may_end.set()
        self.end()
        self._server.stop(0).wait()
        self._pool.shutdown()

    def Handshake(self, request: pb.HandshakeRequest, context: Any) -> pb.HandshakeReply:
        return self.welcome

    def Decode(self, requests: Iterator[pb.DecodeRequest], context: Any) -> Iterator[pb.DecodeReply]:
        if self.refusal is not None:
            _abort(context, *self.refusal)
        self._pool.submit(self._read, requests)
        yield pb.DecodeReply()
        yield from iter(self._replies.get, None)

    def _read(self, requests: Iterator[pb.DecodeRequest]) -> None:
        try:
            for request in requests:
                self.requests.put(request)
        except grpc.RpcError:
            return  # the stream was cut
        self.half_closed.put(None)
        self.may_end.wait()
        self.end()

    def Append(self, requests: Iterator[pb.AppendRequest], context: Any) -> Any:
        self.chunks = list(requests)
        return self._answer("Append", self.chunks, context)

    def OpenSession(self, request: Any, context: Any) -> Any:
        return self._answer("OpenSession", request, context)

    def CloseSession(self, request: Any, context: Any) -> Any:
        return self._answer("CloseSession", request, context)

    def Lengths(self, request: Any, context: Any) -> Any:
        return self._answer("Lengths", request, context)

    def _answer(self, name: str, request: Any, context: Any) -> Any:
        self.calls.put(request)
        answer = self.unary[name]
        if isinstance(answer, tuple):
            _abort(context, *answer)
        return answer() if callable(answer) else answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def _abort(context: Any, status: grpc.StatusCode, details: str, code: str) -> None:
    if code:
        context.set_trailing_metadata((("tierd-error", code),))
    context.abort(status, details)


def answer(request: pb.DecodeRequest) -> pb.DecodeReply:
    """An answer that gives every row its own q back as output, and a certificate of zeros."""
    rows = []
    for row in request.attend.rows:
        size = row.q.shape[0] * row.q.shape[1]
        columns = {name: bytes(size * dtype.itemsize) for name, dtype in coding.CERTIFICATE_COLUMNS.items()}
        rows.append(pb.RowResult(output=row.q, certificate=pb.Certificate(**columns)))
    return pb.DecodeReply(id=request.id, attend=pb.AttendReply(rows=rows))
