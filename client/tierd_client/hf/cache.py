"""The cache object that a user passes to a model of transformers."""

from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from tierd_client.errors import InvalidArgument
from tierd_client.hf.refusals import check_config
from tierd_client.hf.store import Options, Store
from tierd_client.hf.summary import Summary
from tierd_client.tier import Tier
from tierd_client.types import PolicyChoice, Tolerance, as_policy, as_tolerance, check_count


class TierdCache(Cache):
    """Keys and values of one batch, kept by the daemon behind `tier`, for `model.generate(..., past_key_values=cache)`.

    The model must attend by "tierd" (`model.set_attn_implementation("tierd")`). Sessions, one a row, open in the first forward
    and end with `close`, the `with` block or the connection; sessions that are collected release themselves. `max_tokens`
    bounds the real tokens of each row.

    Raises UnsupportedModel for a configuration that asks for more than causal attention over at most `max_tokens` tokens, or for heads
    of a size that the daemon does not serve, and InvalidArgument for a wrong tolerance, policy or limit. A forward that fails leaves
    the cache as it was before.
    """

    def __init__(
        self, tier: Tier, config: Any, *, tolerance: Tolerance, policy: PolicyChoice = "budget", max_tokens: int
    ) -> None:
        text_config = config.get_text_config(decoder=True)
        check_count("max_tokens", max_tokens, 1, tier.limits.max_tokens)
        check_config(text_config, max_tokens, tier.limits.head_dims)
        options = Options(tier, text_config, int(text_config.num_hidden_layers), as_tolerance(tolerance), as_policy(policy), max_tokens)
        self._start(Store(options))

    def _start(self, store: Store) -> None:
        super().__init__(layers=[TierdLayer(store) for _ in range(store.options.num_layers)])
        self._store = store

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Offer the new keys and values [batch, num_kv_heads, n, head_dim] to the attention call that follows, which stores them.

        Returns the very same tensors, without what is cached. Raises UnsupportedModel, InvalidArgument for another batch than the
        cached one, IncompleteForward if the forward before this one ended early.
        """
        self._store.hand_over(layer_idx, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions that all layers hold, padding included; during a forward, those before it."""
        return self._store.seen

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first forward."""
        return self._store.rows or -1

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row i what row `beam_idx[i]` is; a row is forked once for each copy beyond the first."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (numbers or a mask) in that order."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times. Raises InvalidArgument for less than once."""
        check_count("repeats", repeats, 1, 1 << 20)
        self._select(torch.arange(self._store.rows).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest positions: -n drops n, 0 none; a positive number is the length to keep, as in transformers 4."""
        batch = self._store.at_rest()
        if batch is None or tokens_to_remove == 0:
            return
        keep = tokens_to_remove if tokens_to_remove > 0 else max(0, batch.seen + tokens_to_remove)
        if keep < batch.seen:
            batch.crop(keep)

    def reset(self) -> None:
        """Empty the cache: sessions close, and the next forward opens new ones."""
        self._store.reset()

    def close(self) -> None:
        """Release all sessions. Any later use but this one raises InvalidArgument."""
        self._store.close()

    def summary(self) -> Summary:
        """What the certificates of all answers said, per layer and head."""
        return self._store.summary()

    def _select(self, rows: torch.Tensor) -> None:
        batch = self._store.at_rest()
        if batch is None:
            return
        try:
            parents = torch.arange(len(batch.sessions))[rows.cpu()].tolist()
        except IndexError:
            raise InvalidArgument(f"rows {rows.tolist()} of a cache of {len(batch.sessions)} rows do not exist") from None
        if not parents:
            raise InvalidArgument("no row would be left; use reset to empty the cache")
        batch.select(parents)

    def __enter__(self) -> "TierdCache":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> "TierdCache":
        """A cache of its own with the same contents, to continue one prompt in several ways."""
        twin = TierdCache.__new__(TierdCache)
        twin._start(self._store.copy())
        return twin


class TierdLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer, as transformers asks about it. All that changes a cache concerns all layers, and is the cache's own."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, store: Store) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._store = store

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: sessions open in the first attention call."""

    def get_seq_length(self) -> int:
        """Positions that all layers hold."""
        return self._store.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys that a forward of `query_length` positions attends to."""
        return self._store.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: `max_tokens` counts real tokens, not positions."""
        return -1

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise InvalidArgument("a layer of a TierdCache cannot be changed by itself; use the cache's own method")

    update = reorder_cache = reset = _refuse
    crop = batch_repeat_interleave = batch_select_indices = _refuse
