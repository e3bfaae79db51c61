"""What certified attention cannot answer for, read off the configuration and the arguments of each call.

Nothing here knows names of models: a model is refused for what it asks of its attention.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tierd_proto.coding import DTYPES
from transformers import masking_utils
from transformers.utils import output_capturing

from tierd_client.hf.errors import UnsupportedModel, unsupported

NAME = "tierd"
Mask = torch.Tensor | UnsupportedModel | None
"""What the mask function gives to layers: 2-D, none, or why layers with this mask are refused."""

SLIDING = "sliding window"
FEATURES = {
    "softcap": "soft-capping",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "position bias",
    "head_mask": "head mask",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
    "output_attentions": "output_attentions",
    "cu_seq_lens_q": "packed sequences",
    "cu_seq_lens_k": "packed sequences",
    "max_length_q": "packed sequences",
    "max_length_k": "packed sequences",
    "seq_idx": "packed sequences",
}
"""Arguments of an attention call that change its result, and what they stand for."""

HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
"""Arguments of an attention call that attention does not read."""

# The library builds its sliding mask from closures; their code tells one from any other pattern.
_ALL_OF = masking_utils.and_masks().__code__
_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_collector: Any = output_capturing._active_collector
"""The outputs, by name, that the forward under way collects for its caller."""


def check_config(config: Any, max_tokens: int, head_dims: Sequence[int]) -> None:
    """Raises UnsupportedModel for a text configuration whose attention is more than causal and full within `max_tokens`, or whose heads
    have none of the sizes `head_dims`."""
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise unsupported("cross-attention", "only decoders that attend to their own tokens can be cached")
    if not getattr(config, "is_causal", True):
        raise unsupported("bidirectional attention", "the configuration says is_causal=False; only causal attention can be cached")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise unsupported("soft-capping", f"the configuration says attn_logit_softcapping={config.attn_logit_softcapping}")
    if getattr(config, "layer_types", None) is not None:
        kinds = set(config.layer_types)
    elif getattr(config, "sliding_window", None) is not None:
        kinds = {"sliding_attention"}
    elif getattr(config, "attention_chunk_size", None) is not None:
        kinds = {"chunked_attention"}
    else:
        kinds = {"full_attention"}
    for kind in sorted(kinds - {"full_attention", "sliding_attention"}):
        raise unsupported(kind, "layers of this type cannot be cached; allowed: full_attention, sliding_attention")
    if "sliding_attention" in kinds:
        check_window(config.sliding_window, max_tokens)
    hidden_size, num_heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    head_dim = getattr(config, "head_dim", None) or (hidden_size // num_heads if hidden_size and num_heads else None)
    if head_dim is not None:  # else its keys will tell, in the first forward
        check_head_dim(head_dim, head_dims)


def check_head_dim(head_dim: int, head_dims: Sequence[int]) -> None:
    """Raises UnsupportedModel unless `head_dim` is one of the sizes `head_dims` that the daemon serves."""
    if head_dim not in head_dims:
        raise unsupported("head_dim", f"the model's heads have {head_dim} channels; allowed: {', '.join(map(str, head_dims))}")


def check_dtype(dtype: str) -> None:
    """Raises UnsupportedModel unless keys and values of `dtype` can be stored."""
    if dtype not in DTYPES:
        raise unsupported("dtype", f"the model computes in {dtype}; allowed: {', '.join(DTYPES)}")


def check_window(window: int | None, max_tokens: int) -> None:
    """Raises UnsupportedModel for a sliding window that a cache of `max_tokens` tokens could outgrow."""
    if window is not None and window < max_tokens:
        raise unsupported(SLIDING, f"it spans {window} tokens and max_tokens is {max_tokens}; allowed: max_tokens of at most {window}")


def check_implementation(config: Any) -> None:
    """Raises UnsupportedModel unless the model computes attention where this package can see it."""
    name = config._attn_implementation
    if name != NAME:
        raise unsupported(
            "attention implementation",
            f"the model computes attention by {name!r}; call model.set_attn_implementation({NAME!r}) "
            "(a model that keeps another one then cannot be cached)",
        )


def check_pattern(mask_function: Callable[..., Any], kv_length: int) -> None:
    """Raises UnsupportedModel unless the pattern is causal, or a sliding window that `kv_length` tokens do not fill."""
    if mask_function is masking_utils.causal_mask_function:
        return
    if getattr(mask_function, "__code__", None) is not _ALL_OF:
        raise unsupported("mask pattern", "only causal attention can be cached; this model's mask is another one")
    for part in _closure(mask_function)["mask_functions"]:
        if part is masking_utils.causal_mask_function:
            continue
        if getattr(part, "__code__", None) is not _WINDOW:
            raise unsupported("mask pattern", "only causal attention can be cached; this model's mask restricts it further")
        window = _closure(part)["sliding_window"]
        if window < kv_length:
            raise unsupported(SLIDING, f"it spans {window} positions and this forward needs {kv_length}")


def check_call(module: Any, dropout: float, max_tokens: int, arguments: dict[str, Any]) -> None:
    """Raises UnsupportedModel for arguments of one attention call, or a module, that ask for more than causal attention."""
    if dropout:
        raise unsupported("attention dropout", f"it is {dropout}; call model.eval()")
    is_causal = arguments.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise unsupported("bidirectional attention", "this layer's attention is not causal")
    # Some models drop the argument on its way here: what the forward collects tells.
    if getattr(getattr(module, "config", None), "output_attentions", False) or "attentions" in (_collector.get() or ()):
        raise unsupported("output_attentions", "attention weights are never formed")
    for name, value in arguments.items():
        if name == "sliding_window":
            check_window(value, max_tokens)
        elif name in FEATURES and value is not None and value is not False:
            raise unsupported(FEATURES[name], f"the model passes {name} to its attention")
        elif name not in HARMLESS and name != "is_causal" and value is not None and value is not False:
            raise unsupported(f"argument {name}", "what it asks of attention is not known, so the answer could be wrong")


def check_mask_kind(mask: Mask) -> torch.Tensor | None:
    """`mask` if it is None or says of each token whether it is one, [batch, tokens]. Raises UnsupportedModel otherwise."""
    if mask is None:
        return None
    if isinstance(mask, UnsupportedModel):
        raise mask
    if not isinstance(mask, torch.Tensor):
        raise unsupported("attention mask", f"it is a {type(mask).__name__}; allowed: a 2-D tensor of zeros and ones")
    if mask.ndim != 2:
        raise unsupported(f"{mask.ndim}-D attention mask", "allowed: a 2-D mask of zeros and ones, [batch, tokens]")
    if mask.is_floating_point():
        raise unsupported("attention mask", f"it is of type {mask.dtype}, to be added to scores; allowed: zeros and ones, bool or integer")
    return mask


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
