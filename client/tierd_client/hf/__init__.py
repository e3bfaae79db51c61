"""transformers over tierd. Importing this registers attention and mask functions named "tierd".

    model.set_attn_implementation("tierd")
    with TierdCache(tier, model.config, tolerance=Tolerance(rtol=0.05), max_tokens=8192) as cache:
        model.generate(**inputs, past_key_values=cache)
        print(cache.summary())
"""

from transformers import AttentionInterface, AttentionMaskInterface

from tierd_client.hf.attention import tierd_attention
from tierd_client.hf.cache import TierdCache
from tierd_client.hf.errors import IncompleteForward, UnsupportedModel
from tierd_client.hf.masks import tierd_mask
from tierd_client.hf.refusals import NAME
from tierd_client.hf.summary import Summary

__all__ = ["IncompleteForward", "Summary", "TierdCache", "UnsupportedModel"]

AttentionInterface.register(NAME, tierd_attention)
AttentionMaskInterface.register(NAME, tierd_mask)
