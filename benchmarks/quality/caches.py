"""Other caches for transformers and ours, behind one interface, and what they hold and take while they are used."""

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from running import Attend
from tierd_client import Tier
from tierd_client.hf import TierdCache
from transformers import DynamicCache
from transformers.cache_utils import QuantizedCache
from variants import BY_NAME, attending

OURS = ("rtol2", "rtol5")
BITS = (4, 2)


@dataclass(frozen=True)
class Peer:
    """`missing`: why it cannot run here; empty where it can. `alone`: where processes share a GPU it answers wrongly."""

    name: str
    attend: Attend
    missing: str = ""
    alone: bool = False


def peers(model: Any, tier: Tier) -> list[Peer]:
    """All of them, dense first; last those whose library compiles when it is first used, for a minute on an H100's host."""
    config = model.config.get_text_config(decoder=True)
    quanto = "" if importlib.util.find_spec("optimum.quanto") else "optimum-quanto is not installed"
    offloading = "" if model.device.type == "cuda" else "offloading needs a GPU"
    plain, offloaded = partial(DynamicCache, config=config), partial(DynamicCache, config=config, offloading=True)
    found = [
        Peer("dense", partial(transformers_cache, model, plain)),
        # In seven processes on an H100 18 of 60 prompts of 8,192 tokens were lost and 38 of 16,384; alone, on H100s, none.
        Peer("offloaded", partial(transformers_cache, model, offloaded), offloading, alone=True),
        *(Peer(name, partial(attending, BY_NAME[name], model, tier)) for name in OURS),
    ]
    for bits in BITS:
        make = partial(QuantizedCache, "quanto", config, nbits=bits)
        found.append(Peer(f"QuantizedCache int{bits}", partial(transformers_cache, model, make), quanto))
    return found


@contextmanager
def transformers_cache(model: Any, make: Callable[[], Any], max_tokens: int, pads: Sequence[int]) -> Iterator[Any]:
    """A cache of transformers under the model's own attention, for rows without padding."""
    assert not any(pads)
    model.set_attn_implementation("sdpa")
    yield make()


class Meter:
    """Times each token, and measures the cache after the last. `tick` is to be called after the prefill and after each token."""

    def __init__(self, attend: Attend, device: torch.device) -> None:
        self._attend, self._cuda = attend, device.type == "cuda"
        self._at: list[float] = []
        self._cache: Any = None
        self._beside = 0
        self.seconds: list[float] = []
        self.held: list[dict[str, int]] = []

    @contextmanager
    def attend(self, max_tokens: int, pads: Sequence[int]) -> Iterator[Any]:
        self._at = []
        with self._attend(max_tokens, pads) as self._cache:
            yield self._cache
            self.seconds += np.diff(self._at).tolist()
            held = held_bytes(self._cache)
            if self._cuda:
                held["peak"] = torch.cuda.max_memory_allocated() - self._beside + held.get("hot", 0)
            self.held.append(held)
        self._cache = None

    def tick(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            if not self._at:
                self._beside = torch.cuda.memory_allocated() - held_bytes(self._cache).get("cuda", 0)
                torch.cuda.reset_peak_memory_stats()  # the prefill is the same in all, and takes more than any token
        self._at.append(time.perf_counter())

    def largest(self) -> dict[str, int]:
        """Bytes by kind, as `held_bytes` names them, of the example with the most. "peak", on a GPU: the most at any moment of decoding
        beyond what lies beside the cache after the prefill (the model, and 32 MiB that cuBLAS takes in a process's first example); of
        PyTorch's memory, and of ours besides that what "hot" counts."""
        return {kind: max(one.get(kind, 0) for one in self.held) for kind in self.held[0]}


def held_bytes(cache: Any) -> dict[str, int]:
    """Bytes that a cache holds by the kind of device, "cpu" or "cuda". Of a TierdCache "hot" (quantised blocks and copies of originals, on
    the device of the model) and "originals" (on the host)."""
    if isinstance(cache, TierdCache):
        used = {name: pool["used_bytes"] for name, pool in cache._store.options.tier.status()["pools"].items()}
        return {"hot": used["hot"] + used["scratch_keys"] + used["scratch_values"], "originals": used["originals"]}
    held: dict[str, int] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in plain_tensors(value):
                held[tensor.device.type] = held.get(tensor.device.type, 0) + tensor.nbytes
    return held


def plain_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors that a tensor, also one that wraps others, is made of; nothing for anything else."""
    if not isinstance(value, torch.Tensor):
        return
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(value, name))
    else:
        yield value
