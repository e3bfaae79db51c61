"""Paired ways to attend over the same model: what a quality figure of one is held against is the same prompt under another.

Every variant computes a forward over an empty cache with the model's own dense attention; they differ in what later tokens attend to.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import rows
import torch
from naive import BLOCK, GROUP, naive_cache
from tierd_client import Coverage, Tier, Tolerance, connect
from tierd_client.hf import TierdCache
from tierd_client.types import Budget, Policy
from tierd_kernels import registry
from tierd_kernels.layout import Layout
from transformers import DynamicCache
from watched import Answer, WatchedCache

PACKAGES = ("transformers", "scipy")  # whose versions the results name
Kind = Literal["dense", "naive", "coverage", "budget"]
# The paper's policy has thresholds of its own and no budget: none that could be missed is asked for.
NO_BUDGET = 1e6


@dataclass(frozen=True)
class Variant:
    """`rtol`: of the budget, in Vbar (kind "budget" and "coverage")."""

    name: str
    kind: Kind
    rtol: float = 0.0

    @property
    def certified(self) -> bool:
        """Whether its answers come with certificates."""
        return self.kind in ("coverage", "budget")

    @property
    def policy(self) -> Policy:
        return Coverage() if self.kind == "coverage" else Budget()


DENSE = Variant("dense", "dense")
ALL = (
    DENSE,
    Variant("naive", "naive"),
    Variant("coverage", "coverage", NO_BUDGET),
    *(Variant(f"rtol{percent}", "budget", percent / 100) for percent in (1, 2, 5, 10)),
    Variant("exact", "budget", 0.0),
)
BY_NAME = {variant.name: variant for variant in ALL}


def named(names: list[str]) -> list[Variant]:
    """The variants of these names, dense always first. Raises ValueError for an unknown name."""
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise ValueError(f"variant {unknown[0]!r} does not exist; allowed: {', '.join(BY_NAME)}")
    return [variant for variant in ALL if variant.name in {DENSE.name, *names}]


def layout_of(config: Any, dtype: torch.dtype) -> Layout:
    """How tierd stores one layer of a model with this text configuration."""
    heads = config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Layout(heads, head_dim, BLOCK, GROUP, str(dtype).removeprefix("torch."))


def softmax_scale(model: Any) -> float:
    """What the model's attention multiplies scores with."""
    return float(next(module.scaling for module in model.modules() if hasattr(module, "scaling")))


def connection(model: Any, max_tokens: int, rows: int = 1) -> Tier:
    """tierd in this process, with pools for `rows` sequences of `max_tokens`: on the GPU if the model is there, else on the CPU."""
    config = model.config.get_text_config(decoder=True)
    layout, backend = layout_of(config, model.dtype), "cuda" if model.device.type == "cuda" else "cpu"
    blocks = (rows + 1) * config.num_hidden_layers * (-(-max_tokens // layout.block_size) + 2)  # one sequence more: old one not yet freed
    settings = {
        "backend": backend,
        "hot_bytes": max(4 << 20, blocks * registry.load(backend).hot_block_bytes(layout)),
        "originals_bytes": max(4 << 20, blocks * layout.original_block_bytes),
        "scratch_bytes": 0 if backend == "cpu" else 64 << 20,
    }
    return connect("inproc://", timeout=600.0, settings=settings)


@contextmanager
def attending(
    variant: Variant, model: Any, tier: Tier, max_tokens: int, pads: Sequence[int] = (0,), see: Callable[[Answer], None] | None = None
) -> Iterator[Any]:
    """An empty cache for forwards of `model`, which attends as `variant` says until the end of the block, then as before.

    `pads`: positions of padding that lead each row. `see` is shown every certified answer; there must be one row then.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("tierd" if variant.certified else rows.NAME)
    config = model.config.get_text_config(decoder=True)
    try:
        if variant.kind == "dense":
            yield DynamicCache(config=config)
        elif variant.kind == "naive":
            yield naive_cache(config.num_hidden_layers, pads)
        else:
            terms: dict[str, Any] = {"tolerance": Tolerance(rtol=variant.rtol), "policy": variant.policy, "max_tokens": max_tokens}
            with TierdCache(tier, config, **terms) if see is None else WatchedCache(tier, config, see, **terms) as cache:
                yield cache
    finally:
        model.set_attn_implementation(before)
