"""Calls as data: what to send, and how to read what comes back. Nothing here waits or knows a transport."""

import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tierd_proto import coding
from tierd_proto.v1 import tierd_pb2 as pb

from tierd_client.certificate import Certificate, Result
from tierd_client.errors import DaemonUnavailable, InvalidArgument
from tierd_client.tensors import Raw, like
from tierd_client.types import Budget, Geometry, Limits, Policy, Tolerance

PROTOCOL = 1
WORKER_KEY = "tierd-worker"  # request metadata
ERROR_KEY = "tierd-error"  # trailing metadata of a failed unary call
CHUNK_BYTES = 4 << 20  # of an append; more tokens a message gain nothing, and hold up other calls
OVERHEAD_BYTES = 1024  # names, shapes and lengths around the arrays of one message
T = TypeVar("T")


@dataclass(frozen=True)
class Chunks:
    """An append as a stream of messages. `k`, `v`: raw [num_kv_heads, n, head_dim]; `tokens`: of each message but the last."""

    header: pb.AppendHeader
    k: Raw
    v: Raw
    tokens: int

    def __iter__(self) -> Iterator[pb.AppendRequest]:
        for start in range(0, self.k.shape[1], self.tokens):
            k, v = (coding.encode_tensor(x[:, start : start + self.tokens]) for x in (self.k, self.v))
            yield pb.AppendRequest(header=None if start else self.header, k=k, v=v)


@dataclass(frozen=True)
class Row:
    """Of an attend: `q`, `k`, `v` raw, the last two None to attend only; and the caller's `own` q, which the output will be like."""

    session_id: str
    layer: int
    q: Raw
    k: Raw | None
    v: Raw | None
    tolerance: Tolerance
    own: Any

    @property
    def nbytes(self) -> int:
        """Of its message, or a little more."""
        return OVERHEAD_BYTES + sum([x.nbytes for x in (self.q, self.k, self.v) if x is not None])

    def message(self) -> pb.Row:
        k, v = (None if x is None else coding.encode_tensor(x) for x in (self.k, self.v))
        tolerance, q = tolerance_message(self.tolerance), coding.encode_tensor(self.q)
        return pb.Row(session_id=self.session_id, layer=self.layer, q=q, k=k, v=v, tolerance=tolerance)

    def read(self, reply: Any) -> Result[Any]:
        """What it says, a message or, without a wire, the same of arrays."""
        output, certificate, shape = reply.output, reply.certificate, tuple(self.own.shape[:-1])
        if isinstance(reply, pb.RowResult):
            output, certificate = coding.decode_tensor(output, "output", ndim=3), coding.decode_certificate(certificate, shape)
        elif len(shape) == 1:
            certificate = {name: column[:, 0] for name, column in certificate.items()}
        if output.shape != self.q.shape or output.dtype != self.q.dtype:
            raise coding.CodingError(f"output is {output.dtype}{output.shape}; q was {self.q.dtype}{self.q.shape}")
        return Result(like(output, self.own), Certificate(**certificate), reply.late_records, reply.prefetch_wait_s)


@dataclass(frozen=True)
class Attend:
    """An attend. Only a wire needs it as a message: to make one of 32 heads and one of its answer, and to read both, takes 200 us a call
    on two cores of a Xeon."""

    rows: list[Row]

    @property
    def nbytes(self) -> int:
        """Of its message, or a little more."""
        return sum([row.nbytes for row in self.rows])

    def message(self) -> pb.AttendRequest:
        return pb.AttendRequest(rows=[row.message() for row in self.rows])


Unary = (
    pb.OpenSessionRequest
    | pb.CloseSessionRequest
    | pb.TruncateRequest
    | pb.ForkRequest
    | pb.LengthsRequest
    | pb.StatusRequest
)
Request = Unary | Attend | Chunks


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request, and `read`, which turns the reply's message into the caller's result."""

    request: Request
    read: Callable[[Any], T]

    def check_size(self, message_bytes_max: int) -> None:
        """Raises InvalidArgument for a message that the daemon would not take (it would end the whole connection)."""
        if isinstance(self.request, Chunks):
            return
        size = self.request.nbytes if isinstance(self.request, Attend) else self.request.ByteSize() + OVERHEAD_BYTES
        if size > message_bytes_max:
            raise InvalidArgument(
                f"the call takes a message of {size} bytes; allowed: {message_bytes_max}. "
                "Append the keys and values first (an append is split), and attend fewer tokens or rows at once"
            )


def handshake() -> pb.HandshakeRequest:
    """Who we are, in words for the daemon's log."""
    return pb.HandshakeRequest(
        protocol=PROTOCOL, client=f"tierd_client on Python {platform.python_version()}, process {os.getpid()}"
    )


def limits_of(reply: pb.HandshakeReply) -> Limits:
    """The daemon's limits, as it said them. Raises DaemonUnavailable when it speaks another protocol."""
    if reply.protocol != PROTOCOL:
        raise DaemonUnavailable(f"the daemon speaks protocol {reply.protocol}; this client speaks {PROTOCOL}")
    limits = reply.limits
    return Limits(
        limits.message_bytes_max, limits.max_tokens, limits.stream_requests_max, limits.timeout_s_max, tuple(limits.head_dims)
    )


def open_session(geometry: Geometry, tolerance: Tolerance, policy: Policy, max_tokens: int) -> Call[str]:
    """-> the session's name."""
    request = pb.OpenSessionRequest(
        geometry=pb.Geometry(
            num_layers=geometry.num_layers,
            num_q_heads=geometry.num_q_heads,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            dtype=pb.DType.Name(coding.DTYPES[geometry.dtype]),
            softmax_scale=geometry.softmax_scale,
            block_size=geometry.block_size,
            value_group=geometry.value_group,
        ),
        tolerance=tolerance_message(tolerance),
        max_tokens=max_tokens,
    )
    if isinstance(policy, Budget):
        request.budget.CopyFrom(pb.BudgetPolicy(**vars(policy)))
    else:
        request.coverage.CopyFrom(pb.CoveragePolicy(**vars(policy)))
    return Call(request, lambda reply: str(reply.session_id))


def tolerance_message(tolerance: Tolerance) -> pb.Tolerance:
    return pb.Tolerance(rtol=tolerance.rtol, atol=tolerance.atol, relative_to=tolerance.relative_to.upper())


def append(session_id: str, layer: int, k: Raw, v: Raw, message_bytes_max: int) -> Call[None]:
    """`k`, `v`: raw [num_kv_heads, n, head_dim]; split so that no message passes the limit or CHUNK_BYTES."""
    token_bytes = 2 * k.itemsize * k.shape[0] * k.shape[2]
    tokens = (min(message_bytes_max, CHUNK_BYTES) - OVERHEAD_BYTES) // token_bytes
    if tokens < 1:
        raise InvalidArgument(f"one token of k and v takes {token_bytes} bytes; a message of {message_bytes_max} cannot hold it")
    header = pb.AppendHeader(session_id=session_id, layer=layer, num_tokens=k.shape[1])
    return Call(Chunks(header, k, v, tokens), _nothing)


def attend(rows: list[Row]) -> Call[list[Result[Any]]]:
    """All rows in one message; results in their order. The call fails as a whole."""

    def read(reply: Any) -> list[Result[Any]]:
        try:
            return [row.read(result) for row, result in zip(rows, reply.rows, strict=True)]
        except ValueError as error:  # of coding, or of zip
            raise DaemonUnavailable(f"the daemon's answer cannot be read: {error}") from error

    return Call(Attend(rows), read)


def attend_one(row: Row) -> Call[Result[Any]]:
    call = attend([row])
    return Call(call.request, lambda reply: call.read(reply)[0])


def close_session(session_id: str) -> Call[None]:
    return Call(pb.CloseSessionRequest(session_id=session_id), _nothing)


def truncate(session_id: str, length: int) -> Call[None]:
    return Call(pb.TruncateRequest(session_id=session_id, length=length), _nothing)


def fork(session_id: str) -> Call[str]:
    """-> the new session's name."""
    return Call(pb.ForkRequest(session_id=session_id), lambda reply: str(reply.session_id))


def lengths(session_id: str) -> Call[list[int]]:
    """-> tokens stored, one number a layer."""
    return Call(pb.LengthsRequest(session_id=session_id), lambda reply: list(reply.lengths))


def status() -> Call[dict[str, Any]]:
    """-> the daemon's numbers."""
    return Call(pb.StatusRequest(), lambda reply: dict(json.loads(reply.json)))


def _nothing(reply: object) -> None:
    """For replies that say only that it is done."""
