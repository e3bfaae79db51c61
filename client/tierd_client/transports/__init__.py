"""How calls reach a daemon. A transport shakes hands when it is made; afterwards it turns requests into replies, until it is closed."""

from typing import Any, Protocol

from tierd_proto.v1 import tierd_pb2 as pb

from tierd_client.protocol import Request


class Transport(Protocol):
    """For threads. All methods may be called by several at once."""

    welcome: pb.HandshakeReply

    def call(self, request: Request, timeout_s: float) -> Any:
        """The reply's message. Raises TierdError."""

    def close(self) -> None:
        """End the connection, and wait until the daemon has let go of its sessions. Again: nothing."""


class AsyncTransport(Protocol):
    """For one event loop."""

    welcome: pb.HandshakeReply

    async def call(self, request: Request, timeout_s: float) -> Any:
        """The reply's message. Raises TierdError."""

    async def close(self) -> None:
        """End the connection, and wait until the daemon has let go of its sessions. Again: nothing."""
