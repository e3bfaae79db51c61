"""A row without a past: the model's own kernel, in every type, and never one that writes down all scores."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tierd_client.hf import local
from tierd_client.hf.local import attend_locally

MODULE: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True)


@pytest.mark.parametrize(("device", "dtype", "heads"), [("cuda", torch.float32, 4), ("cuda", torch.bfloat16, 2), ("cpu", torch.float32, 2)])
def test_groups_are_taken_apart_only_where_no_kernel_of_linear_memory_takes_them(device: str, dtype: torch.dtype, heads: int) -> None:
    q: Any = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(4, 8, 16))
    k = torch.randn(2, 8, 16)
    found = local._per_query_head(k, q)
    assert found.shape == (heads, 8, 16)
    assert all(torch.equal(found[head], k[head * 2 // heads]) for head in range(heads))


def test_taken_apart_or_not_every_query_head_meets_its_own_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(n, 9, 16, generator=generator) for n in (4, 2, 2))
    grouped = attend_locally(MODULE, q, k, v, 0.25)
    monkeypatch.setattr(local, "_per_query_head", lambda x, q: x.repeat_interleave(q.shape[0] // x.shape[0], dim=0))
    apart = attend_locally(SimpleNamespace(is_causal=True), q, k, v, 0.25)  # type: ignore[arg-type]
    scores = (q @ k.repeat_interleave(2, dim=0).mT) * 0.25
    unseen = torch.ones(9, 9, dtype=torch.bool).triu(1)
    truth = (scores.masked_fill(unseen, -torch.inf).softmax(dim=2) @ v.repeat_interleave(2, dim=0)).transpose(0, 1)
    torch.testing.assert_close(grouped, truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(apart, truth, rtol=1e-5, atol=1e-5)
