"""The attention function that transformers calls under the name "tierd"."""

from typing import Any

import torch

from tierd_client.hf.errors import unsupported
from tierd_client.hf.handover import HandOver, take
from tierd_client.hf.refusals import Mask, check_call


def tierd_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Mask,
    scaling: float | None = None,
    dropout: float = 0.0,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` [batch, num_q_heads, n, head_dim] to what the TierdCache of this forward holds and to `key`, `value`.

    Returns [batch, n, num_q_heads, head_dim] and no weights. Raises UnsupportedModel for anything that is not causal attention
    over keys that went through a TierdCache in this forward, and whatever the daemon reports.
    """
    handover = take()
    if handover is None:
        raise unsupported(
            "attention without a TierdCache",
            "pass past_key_values=TierdCache(...) and use_cache=True; cross-attention and keys that layers share cannot be cached",
        )
    try:
        _check(handover, query, key, value)
        check_call(module, dropout, handover.store.options.max_tokens, arguments)
        output = handover.store.attend(handover, module, query, attention_mask, scaling)
    except BaseException as error:
        handover.store.fail(error)
        raise
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        output = _NoGradient.apply(output, query, key, value)  # type: ignore[no-untyped-call]
    return output, None


def _check(handover: HandOver, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    if not handover.intact(key, value):
        raise unsupported(
            "keys rewritten between cache and attention",
            f"layer {handover.layer} attends to other tensors than those that it gave to the cache",
        )
    rows, heads, n, head_dim = query.shape
    if (rows, n, head_dim) != (key.shape[0], key.shape[2], key.shape[3]) or heads % key.shape[1]:
        raise unsupported(
            "queries of another shape than keys",
            f"layer {handover.layer} has queries {list(query.shape)} and keys {list(key.shape)}, both [batch, heads, tokens, head_dim]",
        )


class _NoGradient(torch.autograd.Function):
    """Passes an answer on as one that no gradient leads through: dropping it silently would train a wrong model."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise unsupported("gradients", "attention over a TierdCache has none; run the model under torch.no_grad()")
