"""The model's own dense attention, row by row: what every variant does with a forward over an empty cache, and "dense" with all others.

A batch is padded on the left. Attending to each row without its padding makes a row's numbers the same whatever it shares a batch with,
and those of a prefill the same in every variant, for the client computes it this way, too.
"""

from typing import Any

import torch
from tierd_client.hf.local import attend_locally
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

NAME = "rows"


def attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    scaling: float | None = None, **_: Any
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention [rows, n, heads, d] of the newest n positions, `query` [rows, heads, n, d]; zeros at padding. `mask`
    [rows, positions], nonzero at tokens, or None. Computed in the type of the keys."""
    rows, n, length = query.shape[0], query.shape[2], key.shape[2]
    output = torch.zeros_like(query).transpose(1, 2).contiguous()
    for row in range(rows):
        pad = 0 if mask is None else int((mask[row] == 0).sum())
        new = min(n, length - pad)
        q, k, v = query[row : row + 1, :, n - new :].to(key.dtype), key[row : row + 1, :, pad:], value[row : row + 1, :, pad:]
        output[row, n - new :] = _one_row(module, q, k, v, scaling).to(query.dtype)
    return output, None


def _one_row(module: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None) -> torch.Tensor:
    n, length = q.shape[2], k.shape[2]
    if n == length:
        return attend_locally(module, q[0], k[0], v[0], scaling)
    seen = torch.ones(n, length, dtype=torch.bool, device=q.device).tril(length - n)
    output, _ = sdpa_attention_forward(module, q, k, v, seen[None, None] if n > 1 else None, scaling=scaling, is_causal=False)
    return output[0]


def _mask(*, attention_mask: torch.Tensor | None, **_: Any) -> torch.Tensor | None:
    """As the model was given it."""
    return attention_mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)
