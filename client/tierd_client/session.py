"""A session for threads: one sequence's keys and values, all layers."""

import contextlib
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tierd_client import protocol
from tierd_client.certificate import Result
from tierd_client.errors import DaemonUnavailable, SessionNotFound
from tierd_client.state import SessionState, Terms
from tierd_client.tensors import AnyTensor, Tensor
from tierd_client.types import Tolerance

if TYPE_CHECKING:
    from tierd_client.tier import Tier


class Session(SessionState):
    """Opened by `Tier.open_session`. Close it, or let `with` do so; one that is forgotten is closed when it is collected.

    Tensors are torch tensors or numpy arrays of the geometry's dtype (numpy bfloat16: its bits, as uint16). Every method
    takes `timeout`, seconds, None for the connection's, and raises InvalidArgument, SessionNotFound once closed, CapacityExceeded,
    DeadlineExceeded or DaemonUnavailable. A call that the daemon refuses has changed nothing.
    """

    _tier: "Tier"

    def __init__(self, tier: "Tier", session_id: str, terms: Terms) -> None:
        super().__init__(tier, session_id, terms, tier._release)

    def append(self, *, layer: int, k: AnyTensor, v: AnyTensor, timeout: float | None = None) -> None:
        """Store `k` and `v`, [num_kv_heads, n, head_dim], behind what the layer holds. Sent in chunks, whatever n; stored as a whole."""
        self._tier._run(self._append_call(layer, k, v), timeout)

    def attend(
        self, *, layer: int, q: Tensor, tolerance: Tolerance | None = None, timeout: float | None = None
    ) -> Result[Tensor]:
        """Attention of the layer's newest token(s): `q` [num_q_heads, head_dim], or [num_q_heads, n, head_dim], causal over the newest n.

        `tolerance` None: the session's. Raises CertificateUnavailable where no honest answer can be given.
        """
        return self._tier._run(self._step_call(layer, q, None, None, tolerance), timeout)

    def step(
        self, *, layer: int, q: Tensor, k: AnyTensor, v: AnyTensor, tolerance: Tolerance | None = None, timeout: float | None = None
    ) -> Result[Tensor]:
        """`append`, then `attend`, in one message and as one: if the answer fails, nothing is stored. The message's size is limited."""
        return self._tier._run(self._step_call(layer, q, k, v, tolerance), timeout)

    def truncate(self, length: int, *, timeout: float | None = None) -> None:
        """Cut every layer that holds more than `length` tokens to `length`."""
        self._tier._run(self._truncate_call(length), timeout)

    def fork(self, *, timeout: float | None = None) -> "Session":
        """A session with the same contents and terms, which goes its own way from here; full blocks are shared in memory."""
        return Session(self._tier, self._tier._run(self._fork_call(), timeout), self._child_terms())

    def length(self, *, layer: int, timeout: float | None = None) -> int:
        """Tokens that the layer holds."""
        return self._tier._run(self._length_call(layer), timeout)

    def lengths(self, *, timeout: float | None = None) -> list[int]:
        """Tokens that each layer holds."""
        return self._tier._run(self._lengths_call(), timeout)

    def close(self, *, timeout: float | None = None) -> None:
        """Free what the session holds. Again, or once the daemon has let go of it: nothing. If it fails, the session is still open."""
        if not self.closed:
            with contextlib.suppress(DaemonUnavailable, SessionNotFound):
                self._tier._run(protocol.close_session(self._id), timeout)
            self._collected.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
