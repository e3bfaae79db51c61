"""Attention of one row among its own new tokens: what a forward over an empty cache needs, and all that a client computes itself."""

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def attend_locally(module: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """Causal attention of one row, unpadded, by the model's own kernel: [n, num_q_heads, head_dim] from `q` [num_q_heads, n, head_dim]
    and `k`, `v` [num_kv_heads, n, head_dim]."""
    k, v = (_per_query_head(x, q) for x in (k, v))
    output, _ = sdpa_attention_forward(module, q[None], k[None], v[None], None, scaling=scaling, is_causal=True)
    return output[0]


def _per_query_head(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """`x` with a head for each query head where SDPA needs it.

    Of its kernels on a GPU those that take grouped heads take 16 bits only, and the one that takes float32 in linear memory takes no
    groups (PyTorch's `sdp_utils.cpp`, the constraints of each). With groups, float32 falls back to one that writes down every score: at
    32,768 tokens and four heads 17 GB, and its softmax as much again.
    """
    if not (q.device.type == "cuda" and q.dtype == torch.float32):
        return x
    return x.repeat_interleave(q.shape[0] // x.shape[0], dim=0)
