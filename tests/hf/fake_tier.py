"""A tier without a daemon: it keeps keys and values as they are and attends in float64, so that a test sees the cache's own mistakes.

Its certificates say "exact". It can fail on demand, and counts what it was asked.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from tierd_client.certificate import Certificate, Result
from tierd_client.errors import CapacityExceeded, InvalidArgument, SessionNotFound, TierdError
from tierd_client.types import Geometry, Limits, PolicyChoice, Tolerance

Row = tuple["FakeSession", int, torch.Tensor, torch.Tensor, torch.Tensor]


class FakeTier:
    """`open`: sessions not closed. `calls`: how often each method ran. `fail_at[method]`: {number of the call, from 0: error}."""

    def __init__(self, message_bytes_max: int = 64 << 20, max_sessions: int = 1000) -> None:
        self.limits = Limits(
            message_bytes_max=message_bytes_max, max_tokens=1 << 20, stream_requests_max=64, timeout_s_max=60.0,
            head_dims=(64, 80, 96, 128, 256),
        )  # fmt: skip
        self.max_sessions = max_sessions
        self.open: set[FakeSession] = set()
        self.calls: Counter[str] = Counter()
        self.fail_at: dict[str, dict[int, BaseException]] = {}
        self.tokens_per_message: list[list[int]] = []

    def count(self, method: str) -> None:
        number, error = self.calls[method], None
        self.calls[method] += 1
        error = self.fail_at.get(method, {}).get(number)
        if error is not None:
            raise error

    def open_session(self, geometry: Geometry, *, tolerance: Tolerance, policy: PolicyChoice, max_tokens: int) -> "FakeSession":
        self.count("open_session")
        return FakeSession(self, geometry, max_tokens)

    def step_many(self, rows: Sequence[Row]) -> list[Result[torch.Tensor]]:
        self.count("step_many")
        self.tokens_per_message.append([q.shape[1] for _, _, q, _, _ in rows])
        for session, layer, _, k, v in rows:
            session.check(layer, k, v)
        for session, layer, _, k, v in rows:
            session.store(layer, k, v)
        return [session.attend(layer, q) for session, layer, q, _, _ in rows]


class FakeSession:
    """Keys and values of one sequence, [num_kv_heads, length, head_dim] per layer."""

    def __init__(self, tier: FakeTier, geometry: Geometry, max_tokens: int) -> None:
        if len(tier.open) >= tier.max_sessions:
            raise CapacityExceeded(f"{tier.max_sessions} sessions are open")
        self.tier, self.geometry, self.max_tokens = tier, geometry, max_tokens
        empty = torch.empty(geometry.num_kv_heads, 0, geometry.head_dim, dtype=getattr(torch, geometry.dtype))
        self.keys, self.values = [empty] * geometry.num_layers, [empty] * geometry.num_layers
        tier.open.add(self)

    def append(self, *, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self.tier.count("append")
        self.check(layer, k, v)
        self.store(layer, k, v)

    def truncate(self, length: int) -> None:
        self._check_open()
        self.tier.count("truncate")
        self.keys = [keys[:, :length] for keys in self.keys]
        self.values = [values[:, :length] for values in self.values]

    def fork(self) -> "FakeSession":
        self._check_open()
        self.tier.count("fork")
        child = FakeSession(self.tier, self.geometry, self.max_tokens)
        child.keys, child.values = list(self.keys), list(self.values)
        return child

    def close(self) -> None:
        self.tier.count("close")
        self.tier.open.discard(self)

    def length(self, *, layer: int) -> int:
        return self.keys[layer].shape[1]

    def check(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self._check_open()
        shape = (self.geometry.num_kv_heads, k.shape[1], self.geometry.head_dim)
        if k.shape != shape or v.shape != shape or k.dtype != self.keys[layer].dtype or v.dtype != k.dtype:
            raise InvalidArgument(f"k {list(k.shape)} and v {list(v.shape)} of {k.dtype} do not fit {self.geometry}")
        if self.length(layer=layer) + k.shape[1] > self.max_tokens:
            raise InvalidArgument(f"layer {layer} would pass max_tokens, {self.max_tokens}")

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self.keys[layer] = torch.cat([self.keys[layer], k], dim=1)
        self.values[layer] = torch.cat([self.values[layer], v], dim=1)

    def attend(self, layer: int, q: torch.Tensor) -> Result[torch.Tensor]:
        g = self.geometry
        scale = g.head_dim**-0.5 if g.softmax_scale is None else g.softmax_scale
        group = g.num_q_heads // g.num_kv_heads
        k, v = (x[layer].double().repeat_interleave(group, dim=0) for x in (self.keys, self.values))
        n, length = q.shape[1], k.shape[1]
        scores = q.double() @ k.transpose(1, 2) * scale
        hidden = torch.arange(length) > torch.arange(length - n, length)[:, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        return Result((weights @ v).to(q.dtype), exact_certificate(g.num_q_heads, n))

    def _check_open(self) -> None:
        if self not in self.tier.open:
            raise SessionNotFound("the session is closed")


class Lost(TierdError):
    """What a test makes a call fail with."""

    code = "lost"


def exact_certificate(heads: int, n: int) -> Certificate:
    numbers, counts, flags = np.zeros((heads, n)), np.zeros((heads, n), np.int64), np.ones((heads, n), np.bool_)
    return Certificate(
        bound=numbers, budget=numbers, key_error=numbers, value_error=numbers, skip_error=numbers, arith_error=numbers,
        candidate_bound=numbers, rung=counts + 4, exact=flags, value_norm=numbers, output_norm=numbers, rank_certified=flags,
        promoted_key_blocks=counts, promoted_value_blocks=counts, skipped_blocks=counts, host_bytes=counts, paper_key_bound=numbers,
    )
