"""The promise through the public client: every reply of a daemon process is held against the oracle."""

from typing import Any

import numpy as np
import pytest
import torch
from daemon_process import DaemonProcess
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check_reply
from tierd_client import Geometry, Tier, Tolerance, connect

DTYPES = ("float16", "bfloat16", "float32")


def raw(tensor: torch.Tensor) -> Any:
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def check(geometry: Geometry, rtol: float, relative_to: Any, tensors: list[torch.Tensor], result: Any) -> None:
    k, v, q = tensors
    certificate, output = vars(result.certificate), result.output
    if q.ndim == 2:
        q, output = q[:, None], output[:, None]
        certificate = {name: column[:, None] for name, column in certificate.items()}
    keys, values, queries, returned = (raw(x.contiguous()) for x in (k, v, q, output))
    scale = geometry.head_dim**-0.5 if geometry.softmax_scale is None else geometry.softmax_scale
    check_reply(
        keys, values, queries, returned, certificate, rtol, 0.0, relative_to, softmax_scale=scale, block_size=geometry.block_size
    )  # fmt: skip


@pytest.fixture(scope="module")
def tier(client_daemon: DaemonProcess) -> Any:
    with connect(client_daemon.target, timeout=120) as tier:
        yield tier


@given(
    dtype=st.sampled_from(DTYPES),
    head_dim=st.sampled_from((64, 80)),
    heads=st.sampled_from(((1, 1), (4, 2), (3, 1))),
    block_size=st.sampled_from((16, 32)),
    tokens=st.integers(1, 200),
    n=st.integers(0, 3),  # 0: a 2-D q
    rtol=st.sampled_from((0.0, 0.02, 0.2)),
    relative_to=st.sampled_from(("values", "output")),
    policy=st.sampled_from(("budget", "coverage")),
    scale=st.sampled_from((None, 0.3, -0.1)),
    sharpness=st.sampled_from((1.0, 8.0)),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=25)
def test_every_reply_keeps_the_promise(
    tier: Tier, dtype: str, head_dim: int, heads: tuple[int, int], block_size: int, tokens: int, n: int, rtol: float,
    relative_to: Any, policy: Any, scale: float | None, sharpness: float, seed: int,
) -> None:  # fmt: skip
    num_q_heads, num_kv_heads = heads
    geometry = Geometry(1, num_q_heads, num_kv_heads, head_dim, dtype, scale, block_size)
    random = torch.Generator().manual_seed(seed)

    def draw(heads: int, count: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(heads, count, head_dim, generator=random)).to(getattr(torch, dtype))

    new = max(n, 1)
    k, v = draw(num_kv_heads, tokens + new), draw(num_kv_heads, tokens + new)
    q = draw(num_q_heads, new, sharpness)
    q = q if n else q[:, 0]
    with tier.open_session(geometry, tolerance=Tolerance(rtol, relative_to=relative_to), policy=policy, max_tokens=300) as session:
        session.append(layer=0, k=k[:, :tokens], v=v[:, :tokens])
        stepped = session.step(layer=0, q=q, k=k[:, tokens:], v=v[:, tokens:])
        check(geometry, rtol, relative_to, [k, v, q], stepped)
        check(geometry, rtol, relative_to, [k, v, q], session.attend(layer=0, q=q))
        child = session.fork()
        session.truncate(tokens)
        (cut,) = tier.step_many([(session, 0, q[..., :1, :] if n else q, None, None)])
        check(geometry, rtol, relative_to, [k[:, :tokens], v[:, :tokens], q[..., :1, :] if n else q], cut)
        check(geometry, rtol, relative_to, [k, v, q], child.attend(layer=0, q=q))
        child.close()
    assert stepped.output.dtype == q.dtype and stepped.output.shape == q.shape
