"""What a connection and a session know, whichever flavour they are of: arguments are checked and become calls here, and nothing waits."""

import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tierd_proto.v1 import tierd_pb2 as pb

from tierd_client import protocol
from tierd_client.certificate import Result
from tierd_client.errors import DaemonUnavailable, InvalidArgument, SessionNotFound
from tierd_client.protocol import Call, Row
from tierd_client.tensors import all_raw, check_pair, queries, to_raw
from tierd_client.types import INT64_MAX, Geometry, Policy, PolicyChoice, Tolerance, as_policy, as_tolerance, check_count, check_number

CONNECT_TIMEOUT_S = 60.0  # of `connect`, and of calls that name none; the daemon's first call may have to compile its kernels


class Terms(NamedTuple):
    """What a session was opened with."""

    geometry: Geometry
    tolerance: Tolerance
    policy: Policy
    max_tokens: int

    def call(self) -> Call[str]:
        """-> the name of a session on these terms."""
        return protocol.open_session(*self)


def terms_of(geometry: object, tolerance: object, policy: PolicyChoice, max_tokens: object) -> Terms:
    """The arguments of `open_session`, checked. Raises InvalidArgument."""
    if not isinstance(geometry, Geometry):
        raise InvalidArgument(f"geometry is {geometry!r}; it must be a Geometry")
    count = check_count("max_tokens", max_tokens, 1, INT64_MAX)
    return Terms(geometry, as_tolerance(tolerance), as_policy(policy), count)


def check_timeout(timeout: float, high: float) -> float:
    """`timeout` in seconds. Raises InvalidArgument unless it is a number above 0 and at most `high`."""
    check_number("timeout", timeout, f"more than 0 and at most {high:g} seconds", 0.0, high)
    if timeout == 0.0:
        raise InvalidArgument(f"timeout is {timeout}; allowed: more than 0 and at most {high:g} seconds")
    return float(timeout)


class SessionState:
    """The part of a session that both flavours share. `release` is called with the session's name when it is collected unclosed."""

    def __init__(self, tier: "TierState", session_id: str, terms: Terms, release: Callable[[str], object]) -> None:
        self._tier, self._id, self._terms = tier, session_id, terms
        self._tolerance = terms.tolerance
        self._collected = weakref.finalize(self, release, session_id)
        self._collected.atexit = False  # the end of the process ends the connection, and that the session

    @property
    def geometry(self) -> Geometry:
        return self._terms.geometry

    @property
    def policy(self) -> Policy:
        return self._terms.policy

    @property
    def max_tokens(self) -> int:
        """The most tokens that one layer may hold."""
        return self._terms.max_tokens

    @property
    def tolerance(self) -> Tolerance:
        """Of calls that name none; assign another to change it from the next call on."""
        return self._tolerance

    @tolerance.setter
    def tolerance(self, value: Tolerance) -> None:
        self._tolerance = as_tolerance(value)

    @property
    def closed(self) -> bool:
        return not self._collected.alive

    def _open_id(self) -> str:
        if self.closed:
            raise SessionNotFound("this session is closed")
        return self._id

    def _layer(self, layer: object) -> int:
        return check_count("layer", layer, 0, self.geometry.num_layers - 1)

    def _pair(self, k: object, v: object) -> tuple[Any, Any]:
        raw_k, raw_v = to_raw("k", k, self.geometry.dtype), to_raw("v", v, self.geometry.dtype)
        check_pair(raw_k, raw_v, self.geometry.num_kv_heads, self.geometry.head_dim)
        return raw_k, raw_v

    def _row(self, layer: object, q: object, k: object = None, v: object = None, tolerance: Tolerance | None = None) -> Row:
        geometry = self.geometry
        if (k is None) != (v is None):
            raise InvalidArgument("k and v come together, or neither")
        if k is None:
            raw_q, raw_k, raw_v = to_raw("q", q, geometry.dtype), None, None
        else:
            raw_q, raw_k, raw_v = all_raw({"q": q, "k": k, "v": v}, geometry.dtype)
            check_pair(raw_k, raw_v, geometry.num_kv_heads, geometry.head_dim)
        asked = queries(raw_q, geometry.num_q_heads, geometry.head_dim)
        chosen = self._tolerance if tolerance is None else as_tolerance(tolerance)
        return Row(self._open_id(), self._layer(layer), asked, raw_k, raw_v, chosen, q)

    def _step_call(self, layer: int, q: object, k: object, v: object, tolerance: Tolerance | None) -> Call[Result[Any]]:
        return protocol.attend_one(self._row(layer, q, k, v, tolerance))

    def _append_call(self, layer: int, k: object, v: object) -> Call[None]:
        return protocol.append(self._open_id(), self._layer(layer), *self._pair(k, v), self._tier.limits.message_bytes_max)

    def _truncate_call(self, length: int) -> Call[None]:
        return protocol.truncate(self._open_id(), check_count("length", length, 0, INT64_MAX))

    def _length_call(self, layer: int) -> Call[int]:
        number, call = self._layer(layer), self._lengths_call()
        return Call(call.request, lambda reply: call.read(reply)[number])

    def _lengths_call(self) -> Call[list[int]]:
        return protocol.lengths(self._open_id())

    def _fork_call(self) -> Call[str]:
        return protocol.fork(self._open_id())

    def _child_terms(self) -> Terms:
        return self._terms._replace(tolerance=self._tolerance)


class TierState:
    """The part of a connection that both flavours share: what the handshake said. `timeout_s`: of calls that name none.

    Raises DaemonUnavailable when the daemon speaks another protocol.
    """

    def __init__(self, target: str, welcome: pb.HandshakeReply, timeout_s: float) -> None:
        self.target = target
        self.limits = protocol.limits_of(welcome)
        self.epoch: str = welcome.epoch
        self.backend: str = welcome.backend
        self._timeout_s = min(timeout_s, self.limits.timeout_s_max)
        self._process = os.getpid()

    @property
    def _forked(self) -> bool:
        return os.getpid() != self._process

    def _timeout_of(self, call: Call[Any], timeout: float | None) -> float:
        """How long `call` may take, seconds. Raises InvalidArgument for a bad timeout or a message over the limit, DaemonUnavailable in
        a fork of the process."""
        if self._forked:
            raise DaemonUnavailable(f"the connection to {self.target} belongs to process {self._process}; connect again after a fork")
        call.check_size(self.limits.message_bytes_max)
        return self._timeout_s if timeout is None else check_timeout(timeout, self.limits.timeout_s_max)

    def _rows_call(self, rows: Sequence[tuple[Any, int, Any, Any, Any]]) -> Call[list[Result[Any]]]:
        if not isinstance(rows, Sequence):
            raise InvalidArgument(f"rows is a {type(rows).__name__}; it must be a sequence of (session, layer, q, k, v)")
        checked = []
        for number, row in enumerate(rows):
            if not isinstance(row, tuple | list) or len(row) != 5 or not isinstance(row[0], SessionState):
                raise InvalidArgument(f"row {number} is not (session, layer, q, k, v)")
            session, layer, q, k, v = row
            if session._tier is not self:
                raise InvalidArgument(f"the session of row {number} belongs to another connection")
            try:
                checked.append(session._row(layer, q, k, v))
            except InvalidArgument as error:
                raise InvalidArgument(f"row {number}: {error}") from None
        return protocol.attend(checked)
