"""A model whose naive INT4 values fail, and whose dense output is the same number for number.

Trained models have value channels far larger than the rest. Ours has not, so it is given them: row c of the value projection is
multiplied by a power of two and column c of the output projection, which reads that channel, is divided by it. A power of two changes
exponents alone, so every product and every sum downstream is the same as before.

What it does to a cache: INT4 values share one scale and one offset among 16 consecutive channels of a token. The scale must span the
large channel, so it grows by the factor, and the other fifteen, all near each other now, fall on one or two of the sixteen codes. Their
error, half a step, is up to factor / 30 of the large channel's former size each: from a factor of 32 on as large as they are. INT8 keys
are untouched: each key channel has a scale of its own. One channel in each group takes the whole value apart, one channel alone an
eighth of a head of 128.

A certificate bounds the error in the norm of the values as they are stored, where the large channels count most: the larger the factor, the
smaller the tolerance that recovers the output. At 256, 5 % of Vbar is more than the other channels hold, and 2 % is still enough. Results
are reported for every tolerance.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

FACTOR = 128.0  # naive answers half of the examples; at 64 all needles are still found, at 256 none
CHANNELS = tuple(range(0, 128, 16))  # one in each of INT4's groups of a head of 128


@torch.no_grad()
def rescale_value_channels(model: Any, factor: float = FACTOR, channels: Sequence[int] = CHANNELS) -> None:
    """Multiply these value channels of every KV head and layer of a Llama-architecture model by `factor`, and undo it behind attention.

    In place. In float32 and BF16 the dense logits stay the same bit for bit as long as nothing leaves the type's range; FP16 weights are
    refused where an output weight becomes subnormal. Raises ValueError: `factor` no power of two, a channel outside the head, an output
    weight that would lose bits, a value projection with a bias or packed with the other two.
    """
    if not (factor > 0 and math.isfinite(factor) and math.frexp(factor)[0] == 0.5):
        raise ValueError(f"factor is {factor}; only a power of two leaves every other bit as it is")
    head_dim = model.config.head_dim
    if not channels or len(set(channels)) != len(channels) or not all(0 <= channel < head_dim for channel in channels):
        raise ValueError(f"channels are {list(channels)}; allowed are different ones of 0..{head_dim - 1}, at least one")
    attentions = [layer.self_attn for layer in model.model.layers]
    for number, attention in enumerate(attentions):
        _check(attention, factor, number)
    for attention in attentions:
        for weight, by in ((attention.v_proj.weight.T, factor), (attention.o_proj.weight, 1.0 / factor)):
            by_head = weight.view(weight.shape[0], -1, head_dim) if weight.is_contiguous() else weight.unflatten(1, (-1, head_dim))
            by_head[..., list(channels)] *= by


def _check(attention: Any, factor: float, number: int) -> None:
    if not hasattr(attention, "v_proj") or attention.v_proj.bias is not None:
        raise ValueError(f"layer {number} has no value projection of its own without a bias: not of Llama's architecture")
    scaled = (attention.v_proj.weight * factor, attention.o_proj.weight / factor)
    if not torch.equal(scaled[0] / factor, attention.v_proj.weight) or not torch.equal(scaled[1] * factor, attention.o_proj.weight):
        raise ValueError(f"a factor of {factor} takes weights of layer {number} out of {attention.o_proj.weight.dtype}'s range")
