"""Memory, speed and quality of other caches for transformers beside ours, in one run.

    python benchmarks/quality/peers.py --model CHECKPOINT --contexts 8192 --examples 20

Peers: the plain dense cache, transformers' QuantizedCache (optimum-quanto, 4 and 2 bits), its offloaded cache, naive INT8/INT4 and
tierd. A peer that cannot run here is listed with the reason. Prompts are answered one at a time, so that times are those of one sequence.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import commandline
import numpy as np
import tasks
import torch
from ledger import Ledger
from paired import compare
from running import Attend, complete
from tierd_client import Tier
from tierd_client.hf import TierdCache
from transformers import DynamicCache
from transformers.cache_utils import QuantizedCache
from variants import BY_NAME, DENSE, PACKAGES, attending, connection, layout_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results

OURS = ("naive", "rtol1", "rtol2", "rtol5", "rtol10")


@dataclass(frozen=True)
class Peer:
    """`missing`: why it cannot run here; empty where it can."""

    name: str
    attend: Attend
    missing: str = ""


def peers(model: Any, tier: Tier) -> list[Peer]:
    """All of them, dense first."""
    config = model.config.get_text_config(decoder=True)
    quanto = "" if importlib.util.find_spec("optimum.quanto") else "optimum-quanto is not installed"
    offloading = "" if model.device.type == "cuda" else "offloading needs a GPU"
    found = [Peer("dense", partial(transformers_cache, model, lambda: DynamicCache(config=config)))]
    for bits in (4, 2):
        make = partial(QuantizedCache, "quanto", config, nbits=bits)
        found.append(Peer(f"QuantizedCache int{bits}", partial(transformers_cache, model, make), quanto))
    offloaded = partial(DynamicCache, config=config, offloading=True)
    found.append(Peer("offloaded", partial(transformers_cache, model, offloaded), offloading))
    return found + [Peer(name, partial(attending, BY_NAME[name], model, tier)) for name in OURS]


@contextmanager
def transformers_cache(model: Any, make: Callable[[], Any], max_tokens: int, pads: Sequence[int]) -> Iterator[Any]:
    """A cache of transformers under the model's own attention, for rows without padding."""
    assert not any(pads)
    model.set_attn_implementation("sdpa")
    yield make()


class Meter:
    """Times each token, and measures the cache after the last. Called after the prefill and after each token."""

    def __init__(self, attend: Attend, device: torch.device) -> None:
        self._attend, self._device = attend, device
        self._at: list[float] = []
        self.seconds: list[float] = []
        self.held: list[dict[str, int]] = []

    @contextmanager
    def attend(self, max_tokens: int, pads: Sequence[int]) -> Iterator[Any]:
        self._at = []
        with self._attend(max_tokens, pads) as cache:
            yield cache
            self.seconds += np.diff(self._at).tolist()
            self.held.append(held_bytes(cache))

    def tick(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self._at.append(time.perf_counter())


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


def measure(checkpoint: checkpoints.Checkpoint, peer: Peer, tokens: int, names: Sequence[str], examples: int, seed: int) -> dict[str, Any]:
    """Scores by task, milliseconds a token, and the largest memory of a peer over `examples` examples of each task at `tokens` tokens."""
    meter = Meter(peer.attend, checkpoint.device)
    scores: dict[str, list[float]] = {}
    for task in names:
        for number in range(examples):
            example = tasks.example(task, tokens, checkpoint.count, seed + number)
            if peer.name == DENSE.name:  # once untimed: as the first on an H100 a fifth of its tokens took 36 ms, of those after it none
                complete(checkpoint, peer.attend, [example.prompt], tasks.new_tokens(task))
            (completion,), _ = complete(checkpoint, meter.attend, [example.prompt], tasks.new_tokens(task), meter.tick)
            scores.setdefault(task, []).append(tasks.score(example, completion))
    p20, p50, p80 = np.quantile(meter.seconds, (0.2, 0.5, 0.8)) * 1e3
    held = {kind: max(one.get(kind, 0) for one in meter.held) for kind in meter.held[0]}
    return {"scores": scores, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "held_bytes": held}


def rows_of(records: list[dict[str, Any]], checkpoint: checkpoints.Checkpoint) -> list[dict[str, Any]]:
    """One row a peer and context. `device_bytes`: what lies on the model's device, of naive what its format takes; `host_bytes`: the
    rest."""
    dense = {record["tokens"]: record for record in records if record["peer"] == "dense"}
    rows = []
    for record in records:
        row = {name: record[name] for name in ("peer", "tokens")}
        if "missing" in record:
            rows.append(row | {"missing": record["missing"]})
            continue
        ours, theirs = ([score for scores in one["scores"].values() for score in scores] for one in (record, dense[record["tokens"]]))
        held, device = record["held_bytes"], checkpoint.device.type
        on_device = held.get("hot", held.get(device, 0))
        if record["peer"] == "naive":
            layout = layout_of(checkpoint.model.config.get_text_config(decoder=True), checkpoint.model.dtype)
            on_device = checkpoint.model.config.num_hidden_layers * (record["tokens"] // layout.block_size) * layout.hot_block_bytes
        host = held.get("originals", 0 if device == "cpu" else held.get("cpu", 0))
        times = {name: record[name] for name in ("p20_ms", "p50_ms", "p80_ms")}
        rows.append(row | {"device_bytes": on_device, "host_bytes": host} | times | compare(theirs, ours).row())
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commandline.add_run(parser, "peers.jsonl")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192], help="tokens")
    parser.add_argument("--tasks", nargs="+", default=["niah", "niah_multiquery", "vt"], choices=tasks.NAMES)
    parser.add_argument("--examples", type=int, default=20, help="of each task and context")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    checkpoint = checkpoints.load(options.model, options.device, options.dtype)
    identity = {name: getattr(options, name) for name in ("contexts", "tasks", "examples", "seed")} | {"model": checkpoint.name}
    ledger = Ledger(options.ledger, identity | {"dtype": str(checkpoint.model.dtype)}, options.minutes)
    finished = True
    with connection(checkpoint.model, max(options.contexts) + max(map(tasks.new_tokens, options.tasks))) as tier:
        for tokens in options.contexts:
            for peer in peers(checkpoint.model, tier):
                finished &= ledger.part(f"{tokens}/{peer.name}", partial(_part, checkpoint, peer, tokens, options))
    rows = rows_of(ledger.records, checkpoint)
    headline = {f"{row['peer']}_{row['tokens']}_delta": row["delta"] for row in rows if "delta" in row}
    print(f"{'all' if finished else 'not all'} parts done; {write_results('quality_peers', headline, rows, PACKAGES).name}")
    return 0 if finished else 3


def _part(checkpoint: checkpoints.Checkpoint, peer: Peer, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    head = {"peer": peer.name, "tokens": tokens}
    if peer.missing:
        return head | {"missing": peer.missing}
    return head | measure(checkpoint, peer, tokens, options.tasks, options.examples, options.seed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
