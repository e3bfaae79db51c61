"""Messages <-> commands, the same for every transport. Nothing here waits: a transport submits the command and awaits it."""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tierd_kernels.layout import HEAD_DIMS
from tierd_kernels.policy import Budget, Coverage
from tierd_proto import coding
from tierd_proto.v1 import tierd_pb2 as pb

from tierd import commands
from tierd.config import Settings
from tierd.engine.timed import TimedFuture
from tierd.errors import CapacityExceeded, InvalidArgument, TierdError, Unavailable

PROTOCOL = 1
REPLY_SLACK_BYTES = 1024  # names and lengths around the arrays of one row of a reply
TEXT_MAX = 1000  # characters of an error's text
RELATIVE_TO = {pb.VALUES: "values", pb.OUTPUT: "output"}


@dataclass
class Answers:
    """An attend's reply without a wire: rows with arrays in them, which are not to be written."""

    rows: list[commands.RowResult]
    queue_s: float = 0.0
    compute_s: float = 0.0

    @classmethod
    def of(cls, results: list[commands.RowResult]) -> "Answers":
        for result in results:
            result.certificate = {name: _shown(result.certificate[name], dtype) for name, dtype in coding.CERTIFICATE_COLUMNS.items()}
        return cls(results)


@dataclass(frozen=True)
class Operation:
    """A command for the engine, and how its result is said on the wire."""

    command: commands.Command
    reply: Callable[[Any], Any]

    def finish(self, future: TimedFuture) -> Any:
        """The reply message, once the command succeeded."""
        reply = self.reply(future.result())
        if isinstance(reply, pb.AttendReply | Answers):
            reply.queue_s, reply.compute_s = future.queue_s, future.compute_s
        return reply

    def undo(self, result: Any) -> commands.Command | None:
        """What takes back an effect that nobody learnt of, because the call was cancelled; None if nothing is left behind."""
        if isinstance(self.command, commands.OpenSession | commands.Fork):
            return commands.CloseSession(result, worker=self.command.worker)
        return None


@dataclass(frozen=True)
class Converter:
    """Turns requests of any kind into operations. Every method raises InvalidArgument for a request that cannot be meant."""

    message_bytes_max: int
    timeout_s_max: float
    transport_status: Callable[[], dict[str, Any]]

    def deadline(self, timeout_s: float | None) -> float:
        """When a call that may take `timeout_s` from now must be done, on the engine's clock. None, 0: the longest allowed."""
        if timeout_s is not None and not timeout_s >= 0.0:
            raise InvalidArgument(f"timeout is {timeout_s} s; it must be at least 0")
        return time.monotonic() + min(timeout_s or self.timeout_s_max, self.timeout_s_max)

    def operation(self, request: Any, worker: str, deadline: float) -> Operation:
        """What `request`, any unary request message, asks of the engine."""
        who: dict[str, Any] = {"worker": worker, "deadline": deadline}
        match request:
            case pb.AttendRequest():
                rows = [_row(row, f"row {index}") for index, row in enumerate(request.rows)]
                return self.attend(rows, worker, deadline, _attend_reply)
            case pb.OpenSessionRequest():
                return Operation(_open_session(request, who), lambda name: pb.OpenSessionReply(session_id=name))
            case pb.CloseSessionRequest():
                return Operation(commands.CloseSession(request.session_id, **who), lambda _: pb.CloseSessionReply())
            case pb.TruncateRequest():
                truncate = commands.Truncate(request.session_id, request.length, **who)
                return Operation(truncate, lambda _: pb.TruncateReply())
            case pb.ForkRequest():
                return Operation(commands.Fork(request.session_id, **who), lambda name: pb.ForkReply(session_id=name))
            case pb.LengthsRequest():
                lengths = commands.Lengths(request.session_id, **who)
                return Operation(lengths, lambda result: pb.LengthsReply(lengths=result))
            case pb.StatusRequest():
                return Operation(commands.Status(**who), self._status_reply)
        raise AssertionError(f"no command for {type(request).__name__}")

    def _status_reply(self, status: dict[str, Any]) -> pb.StatusReply:
        return pb.StatusReply(json=json.dumps(status | self.transport_status()))

    def attend(
        self, rows: list[commands.Row], worker: str, deadline: float, reply: Callable[[list[commands.RowResult]], Any]
    ) -> Operation:  # fmt: skip
        """The attend of `rows`, whose results `reply` turns into what is answered."""
        if not rows:
            raise InvalidArgument("an attend request without rows; at least one is needed")
        reply_bytes = sum(
            row.q.nbytes + math.prod(row.q.shape[:2]) * coding.CERTIFICATE_ROW_BYTES + REPLY_SLACK_BYTES for row in rows
        )
        if reply_bytes > self.message_bytes_max:
            raise InvalidArgument(
                f"the reply would take {reply_bytes} bytes; allowed: {self.message_bytes_max}. Attend fewer tokens at once"
            )
        return Operation(commands.Attend(rows, worker=worker, deadline=deadline), reply)


class AppendAssembly:
    """Chunks of one append, put together. `quota` gives room when the first chunk tells the shape, and has it back on `release`."""

    def __init__(self, quota: "ByteQuota") -> None:
        self._quota = quota
        self._header: pb.AppendHeader | None = None
        self._kv: list[NDArray[Any]] = []
        self._filled = 0
        self._reserved_bytes = 0

    def add(self, request: pb.AppendRequest) -> None:
        """Take one chunk. Raises InvalidArgument, or CapacityExceeded when too much is being received already."""
        k, v = _tensor(request.k, "k"), _tensor(request.v, "v")
        if request.HasField("header"):
            if self._header is not None:
                raise InvalidArgument("a second header in one append; only the first message carries one")
            self._begin(request.header, k)
        if self._header is None:
            raise InvalidArgument("the first message of an append must carry the header")
        end = self._filled + k.shape[1]
        for name, part, whole in zip("kv", (k, v), self._kv, strict=True):
            if part.dtype != whole.dtype or part.shape != (whole.shape[0], k.shape[1], whole.shape[2]):
                raise InvalidArgument(f"{name}: {part.dtype} {list(part.shape)} does not fit k of the first chunk, {whole.dtype}")
            if end > whole.shape[1]:
                raise InvalidArgument(f"{end} tokens arrived; the header announced {whole.shape[1]}")
            whole[:, self._filled : end] = part
        self._filled = end

    def _begin(self, header: pb.AppendHeader, k: NDArray[Any]) -> None:
        shape = (k.shape[0], header.num_tokens, k.shape[2])
        if header.num_tokens < 1:
            raise InvalidArgument(f"num_tokens is {header.num_tokens}; it must be at least 1")
        nbytes = 2 * math.prod(shape) * k.itemsize
        self._quota.take(nbytes)
        self._reserved_bytes, self._header = nbytes, header
        self._kv = [np.empty(shape, k.dtype), np.empty(shape, k.dtype)]

    def operation(self, worker: str, deadline: float | None) -> Operation:
        """The append, once all chunks are here."""
        if self._header is None:
            raise InvalidArgument("an append without chunks")
        if self._filled != self._kv[0].shape[1]:
            raise InvalidArgument(f"{self._filled} tokens arrived; the header announced {self._kv[0].shape[1]}")
        k, v = self._kv
        command = commands.Append(self._header.session_id, self._header.layer, k, v, worker=worker, deadline=deadline)
        return Operation(command, lambda _: pb.AppendReply())

    def release(self) -> None:
        """Give the storage back to the quota; call it whatever happened."""
        self._quota.give(self._reserved_bytes)
        self._reserved_bytes, self._kv = 0, []


class ByteQuota:
    """Bytes of requests that may be held at once. Any thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes, self._used_bytes = limit_bytes, 0
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def take(self, nbytes: int) -> None:
        """Raises CapacityExceeded, and takes nothing, if fewer are free."""
        with self._lock:
            free_bytes = self._limit_bytes - self._used_bytes
            if nbytes > free_bytes:
                raise CapacityExceeded(
                    f"a request of {nbytes} bytes; of {self._limit_bytes} bytes for requests under way {self._used_bytes} are used, "
                    f"{free_bytes} free"
                )
            self._used_bytes += nbytes

    def give(self, nbytes: int) -> None:
        with self._lock:
            self._used_bytes -= nbytes
            assert self._used_bytes >= 0

    @contextmanager
    def held(self, nbytes: int) -> Iterator[None]:
        """Takes for the time of a `with` block."""
        self.take(nbytes)
        try:
            yield
        finally:
            self.give(nbytes)


def handshake_reply(settings: Settings, epoch: str, backend: str, worker: str) -> pb.HandshakeReply:
    """What a new worker is told."""
    limits = pb.Limits(
        message_bytes_max=settings.message_bytes_max,
        max_tokens=settings.max_tokens,
        stream_requests_max=settings.stream_requests_max,
        timeout_s_max=settings.timeout_s_max,
        head_dims=HEAD_DIMS,
    )
    return pb.HandshakeReply(protocol=PROTOCOL, worker=worker, epoch=epoch, limits=limits, backend=backend)


def check_protocol(request: pb.HandshakeRequest) -> None:
    """Refuse a client that speaks another protocol."""
    if request.protocol != PROTOCOL:
        raise InvalidArgument(f"the client speaks protocol {request.protocol}; this daemon speaks {PROTOCOL}")


def describe(error: BaseException) -> pb.Error:
    """`error` as a worker may be told: faults of our own are "unavailable", with their type; long texts are cut."""
    code = error.code if isinstance(error, TierdError) else Unavailable.code
    text = str(error) if isinstance(error, TierdError) else f"a fault in the daemon, {type(error).__name__}: {error}"
    # Texts quote what the request said, and gRPC drops a call whose status is longer than some 8 KiB.
    return pb.Error(code=code, message=text if len(text) <= TEXT_MAX else f"{text[:TEXT_MAX]}...")


def _shown(column: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Read-only: the engine looks at it still."""
    column = column.astype(dtype, copy=False)
    column.flags.writeable = False
    return column


def _tensor(tensor: pb.Tensor, name: str) -> NDArray[Any]:
    try:
        return coding.decode_tensor(tensor, name, ndim=3)
    except coding.CodingError as error:
        raise InvalidArgument(str(error)) from None


def _row(row: pb.Row, name: str) -> commands.Row:
    if row.HasField("k") != row.HasField("v"):
        raise InvalidArgument(f"{name}: k and v come together or not at all")
    k, v = (_tensor(row.k, f"{name} k"), _tensor(row.v, f"{name} v")) if row.HasField("k") else (None, None)
    tolerance = _tolerance(row.tolerance) if row.HasField("tolerance") else None
    return commands.Row(row.session_id, row.layer, _tensor(row.q, f"{name} q"), k, v, tolerance)


def _tolerance(message: pb.Tolerance) -> commands.Tolerance:
    if message.relative_to not in RELATIVE_TO:
        raise InvalidArgument(f"relative_to is {message.relative_to}; allowed: {', '.join(RELATIVE_TO.values())}")
    return commands.Tolerance(message.rtol, message.atol, RELATIVE_TO[message.relative_to])


def _open_session(request: pb.OpenSessionRequest, who: dict[str, Any]) -> commands.OpenSession:
    geometry = request.geometry
    if geometry.dtype not in coding.DTYPE_NAMES:
        raise InvalidArgument(f"dtype is {geometry.dtype}; allowed: {', '.join(coding.DTYPES)}")
    return commands.OpenSession(
        commands.Geometry(
            num_layers=geometry.num_layers,
            num_q_heads=geometry.num_q_heads,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            dtype=coding.DTYPE_NAMES[geometry.dtype],
            softmax_scale=geometry.softmax_scale if geometry.HasField("softmax_scale") else None,
            block_size=geometry.block_size,
            value_group=geometry.value_group,
        ),
        _tolerance(request.tolerance),
        _policy(request),
        request.max_tokens,
        **who,
    )


def _policy(request: pb.OpenSessionRequest) -> Budget | Coverage:
    try:
        match request.WhichOneof("policy"):
            case "budget":
                return Budget(skip_share=request.budget.skip_share, require_rank=request.budget.require_rank)
            case "coverage":
                fields = {field.name: getattr(request.coverage, field.name) for field in pb.CoveragePolicy.DESCRIPTOR.fields}
                return Coverage(**fields)
            case _:
                raise InvalidArgument("no policy; allowed: budget, coverage")
    except ValueError as error:
        raise InvalidArgument(f"policy: {error}") from None


def _attend_reply(results: list[commands.RowResult]) -> pb.AttendReply:
    rows = [
        pb.RowResult(
            output=coding.encode_tensor(result.output),
            certificate=coding.encode_certificate(result.certificate),
            late_records=result.late_records,
            prefetch_wait_s=result.prefetch_wait_s,
        )
        for result in results
    ]
    return pb.AttendReply(rows=rows)
