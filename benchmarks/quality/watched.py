"""A cache that shows every answer it gets, together with all that the answer was computed from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tierd_client import Certificate, Result, Tier
from tierd_client.hf import TierdCache


@dataclass(frozen=True, eq=False)
class Answer:
    """One layer's answer to n query tokens: `q`, `output` [heads, n, d] and `k`, `v` [kv_heads, tokens, d] on the model's device, whose
    newest n tokens are those of q; the certificate's arrays are [heads, n]."""

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    output: torch.Tensor
    certificate: Certificate


class WatchedCache(TierdCache):
    """A TierdCache of one sequence that calls `see` with each Answer, and keeps keys and values [kv_heads, tokens, d] per layer.

    Only for forwards that add tokens: cropping and reordering would leave `keys` and `values` behind. Raises ValueError for more
    than one row.
    """

    def __init__(self, tier: Tier, config: Any, see: Callable[[Answer], None], **terms: Any) -> None:
        watching: Any = _Watching(tier, self._answered)
        super().__init__(watching, config, **terms)
        self._see = see
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self._answered_to: dict[int, int] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As TierdCache, for one row."""
        if len(key_states) != 1:
            raise ValueError(f"a forward of {len(key_states)} rows; one sequence can be watched at a time")
        k, v = key_states[0].detach(), value_states[0].detach()
        if layer_idx in self.keys:
            self._answered_to[layer_idx] = self.keys[layer_idx].shape[1]
            k, v = torch.cat((self.keys[layer_idx], k), dim=1), torch.cat((self.values[layer_idx], v), dim=1)
        self.keys[layer_idx], self.values[layer_idx] = k, v
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _answered(self, layer: int, q: torch.Tensor, result: Result[torch.Tensor]) -> None:
        seen = self._answered_to[layer] = self._answered_to[layer] + q.shape[1]
        k, v = self.keys[layer][:, :seen], self.values[layer][:, :seen]
        self._see(Answer(layer, q, k, v, result.output, result.certificate))


class _Watching:
    """A Tier whose answers are shown. A long forward is answered in several messages, each for the tokens that follow the last."""

    def __init__(self, tier: Tier, answered: Callable[[int, torch.Tensor, Result[torch.Tensor]], None]) -> None:
        self._tier, self._answered = tier, answered

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tier, name)

    def step_many(self, rows: Sequence[Any], **options: Any) -> list[Result[torch.Tensor]]:
        results = self._tier.step_many(rows, **options)
        for (_, layer, q, _, _), result in zip(rows, results, strict=True):
            self._answered(layer, q, result)
        return results
