"""The forward pass of training: what LlamaForCausalLM computes, on its own parameters, laid out so that one compilation serves all lengths.

Everything but attention works on tokens [N, ...] with N constant, whatever the rows' length; attention is one call of PyTorch's.
Activations are in `dtype` (BF16 on a GPU), parameters in float32, cast where they are used. A test compares with transformers.
Shapes: N tokens = B rows of T; C hidden; H query heads, G KV heads, D = 128.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
CUDA_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)  # the first is what the second is compared with


def normed(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation in float32."""
    x = x_NC.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(x_NC.dtype) * weight_C.to(x_NC.dtype)


def rotated(x_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """Rotary position embedding, halves of the head paired as Llama pairs them."""
    first, second = x_NHD.chunk(2, dim=-1)
    return x_NHD * cos_ND[:, None] + torch.cat((-second, first), dim=-1) * sin_ND[:, None]


def before_attention(
    x_NC: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, cos_ND: Tensor, sin_ND: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [N, H, D], keys and values [N, G, D] of one layer."""
    h = normed(x_NC, norm, eps)
    q_NHD, k_NGD, v_NGD = (F.linear(h, w.to(h.dtype)).view(len(h), -1, cos_ND.shape[-1]) for w in (q, k, v))
    return rotated(q_NHD, cos_ND, sin_ND), rotated(k_NGD, cos_ND, sin_ND), v_NGD


def after_attention(x_NC: Tensor, attended: Tensor, o: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float) -> Tensor:
    """The residual stream after one layer; `attended` [N, H * D]."""
    x = x_NC + F.linear(attended, o.to(x_NC.dtype))
    h = normed(x, norm, eps)
    return x + F.linear(F.silu(F.linear(h, gate.to(h.dtype))) * F.linear(h, up.to(h.dtype)), down.to(h.dtype))


def losses(x_NC: Tensor, norm: Tensor, embedding: Tensor, targets_N: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Cross entropy in nats [N] and whether the likeliest byte is the right one [N]."""
    logits = F.linear(normed(x_NC, norm, eps), embedding.to(x_NC.dtype)).float()
    return F.cross_entropy(logits, targets_N, reduction="none"), logits.argmax(-1) == targets_N


class Network:
    """The forward pass over a LlamaForCausalLM's parameters. `compiled`: through torch.compile, three functions in all."""

    def __init__(self, model: Any, dtype: torch.dtype, compiled: bool) -> None:
        self._model, self._dtype, self._eps = model, dtype, model.config.rms_norm_eps
        wrap: Callable[[Any], Any] = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self._before, self._after, self._losses = wrap(before_attention), wrap(after_attention), wrap(losses)
        self._angles: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, ids_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Loss in nats and correctness of every prediction, both [B, T]."""
        rows, length = ids_BT.shape
        base = self._model.model
        cos, sin = self._positions(rows, length, ids_BT.device)
        x = F.embedding(ids_BT.flatten(), base.embed_tokens.weight).to(self._dtype)  # the gradient of a common byte sums in float32
        for layer in base.layers:
            a, m = layer.self_attn, layer.mlp
            weights = a.q_proj.weight, a.k_proj.weight, a.v_proj.weight
            q, k, v = self._before(x, layer.input_layernorm.weight, *weights, cos, sin, self._eps)
            attended = causal(q, k, v, rows)
            x = self._after(
                x, attended, a.o_proj.weight, layer.post_attention_layernorm.weight,
                m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight, self._eps,
            )  # fmt: skip
        loss, right = self._losses(x, base.norm.weight, base.embed_tokens.weight, targets_BT.flatten(), self._eps)
        return loss.view(rows, length), right.view(rows, length)

    def _positions(self, rows: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every token's angles [N, D]; computed in float32."""
        if (rows, length) not in self._angles:
            inverse = self._model.model.rotary_emb.inv_freq.to(device, torch.float32)
            angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * inverse
            both = torch.cat((angles, angles), dim=-1).repeat(rows, 1)
            self._angles[rows, length] = both.cos().to(self._dtype), both.sin().to(self._dtype)
        return self._angles[rows, length]


def causal(q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, rows: int) -> Tensor:
    """Causal attention within each of `rows` equally long rows: [N, H * D]."""
    q, k, v = (t.view(rows, -1, *t.shape[1:]).transpose(1, 2) for t in (q_NHD, k_NGD, v_NGD))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).reshape(len(q_NHD), -1)


@contextmanager
def attention_of(backends: list[SDPBackend]) -> Iterator[None]:
    """Attention by these backends only, the first that can; an empty list leaves the choice to PyTorch."""
    if not backends:
        yield
        return
    with sdpa_kernel(backends, set_priority=True):
        yield


def fastest_backends(config: Any, lengths: list[int], tokens: int) -> tuple[list[SDPBackend], dict[str, Any]]:
    """The fused attentions that work on this GPU for rows of all `lengths`, the faster first, and their ms (or why one does not).

    cuDNN decodes up to 1.4 times as fast as flash on Hopper; which one wins with gradients depends on versions, so both are measured,
    forwards and backwards over `tokens`. One whose gradients differ from flash attention's by more than 2 % is not taken.
    Raises RuntimeError if none works.
    """
    report: dict[str, Any] = {}
    times: dict[SDPBackend, float] = {}
    truth: list[Tensor] = []
    for backend in CUDA_BACKENDS:
        try:
            made = [_timed(backend, config, length, tokens // length) for length in lengths]
        except RuntimeError as error:
            report[backend.name] = str(error).splitlines()[0]
            continue
        report[backend.name] = {length: round(ms, 3) for length, (ms, _) in zip(lengths, made, strict=True)}
        truth = truth or [gradient for _, gradient in made]
        apart = max(float((a - b).norm() / b.norm()) for (_, a), b in zip(made, truth, strict=True))
        report[f"{backend.name} differs by"] = round(apart, 5)
        if apart < 0.02:
            times[backend] = sum(ms for ms, _ in made)
    if not times:
        raise RuntimeError(f"no fused attention works on this GPU: {report}")
    return sorted(times, key=lambda backend: times[backend]), report


def _timed(backend: SDPBackend, config: Any, length: int, rows: int) -> tuple[float, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    made = (torch.randn(rows * length, count, config.head_dim, device="cuda", generator=generator) for count in heads)
    q, k, v = (t.bfloat16().requires_grad_() for t in made)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    with attention_of([backend]):
        for repetition in range(4):  # the first builds plans
            if repetition == 1:
                start.record()
            (gradient,) = torch.autograd.grad(causal(q, k, v, rows).float().square().sum(), q)
        end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 3, gradient.float()
