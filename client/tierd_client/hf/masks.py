"""Which tokens of a batch are real: the mask function of "tierd", and what a mask says of new and of cached tokens."""

from collections.abc import Callable
from typing import Any

import torch

from tierd_client.hf.errors import UnsupportedModel, unsupported
from tierd_client.hf.refusals import Mask, check_mask_kind, check_pattern


def tierd_mask(
    *, kv_length: int, kv_offset: int, mask_function: Callable[..., Any], attention_mask: torch.Tensor | None, **_: Any
) -> Mask:
    """The 2-D mask as the model was given it, or None: the attention function reads padding off it, the pattern is always causal.

    For any other pattern, the error that a layer raises which is given this mask: some models make masks that no layer of theirs uses.
    """
    try:
        check_pattern(mask_function, kv_offset + kv_length)
    except UnsupportedModel as refusal:
        return refusal
    return attention_mask


def real_tokens(mask: Mask, held: torch.Tensor, batch: int, new: int) -> torch.Tensor:
    """Bool [batch, new], on the CPU: which of the `new` positions are tokens.

    `held` [batch, seen] says so of the cached ones. Raises UnsupportedModel for a mask that does not cover the cached and the new
    positions, or that now says something else of a cached one.
    """
    mask = check_mask_kind(mask)
    seen = held.shape[1]
    if mask is None:
        if not bool(held.all()):
            raise unsupported("changed mask", f"cached positions hold padding and no mask was given for the {seen + new} positions")
        return torch.ones(batch, new, dtype=torch.bool)
    if mask.shape not in {(batch, seen + new), (1, seen + new)}:
        raise unsupported(
            "attention mask",
            f"its shape is {list(mask.shape)}; expected [{batch}, {seen + new}]: {seen} cached and {new} new positions",
        )
    full = mask.detach().to("cpu", torch.bool).expand(batch, -1)
    if not torch.equal(full[:, :seen], held):
        raise unsupported("changed mask", "positions are cached under another mask; they cannot be hidden or shown later")
    return full[:, seen:]
