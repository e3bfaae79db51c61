"""What both flavours of gRPC share: options, names of methods, and errors."""

from typing import Any

import grpc
from tierd_proto.v1 import tierd_pb2 as pb

from tierd_client.errors import DaemonUnavailable, TierdError, from_code, late
from tierd_client.protocol import ERROR_KEY, Chunks, Request

CLOSE_TIMEOUT_S = 5.0  # how long a close waits for the daemon to let go
CHANNEL_OPTIONS: list[tuple[str, int]] = [
    # The daemon's limit, told at the handshake, holds instead of gRPC's 4 MiB: calls are checked before they are sent.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A loopback daemon is never behind a proxy, whatever the environment says.
    ("grpc.enable_http_proxy", 0),
    # Shared subchannels share their back-off: after a restart a new `connect` would fail without trying.
    ("grpc.use_local_subchannel_pool", 1),
]
_METHODS: dict[type, str] = {
    pb.OpenSessionRequest: "OpenSession",
    pb.CloseSessionRequest: "CloseSession",
    pb.TruncateRequest: "Truncate",
    pb.ForkRequest: "Fork",
    pb.LengthsRequest: "Lengths",
    pb.StatusRequest: "Status",
    Chunks: "Append",
}


def method_of(stub: Any, request: Request) -> tuple[Any, Any]:
    """What to call for `request`, and with what."""
    return getattr(stub, _METHODS[type(request)]), iter(request) if isinstance(request, Chunks) else request


def error_of(error: grpc.RpcError, target: str, timeout_s: float) -> TierdError:
    """What a failed RPC means: the daemon's own word where it gave one, else what gRPC made of it."""
    metadata: Any = error.trailing_metadata()  # pairs, whatever its stub says
    for key, value in metadata or ():
        if key == ERROR_KEY:
            return from_code(str(value), error.details() or "", target)
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return late(timeout_s)
    if error.code() == grpc.StatusCode.UNAVAILABLE:
        return DaemonUnavailable(f"nothing serves at {target} (any more): {error.details()}")
    return DaemonUnavailable(f"{target} answered {error.code().name}: {error.details()}")
