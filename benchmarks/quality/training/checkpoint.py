"""The state of a training run as files that are small enough to travel: shards of safetensors, none over 16 MB.

Weights and AdamW's moments are kept in float32, Muon's momentum (one number a weight) in BF16: 45 MB in three shards for seven million
parameters.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.optimisers import Optimisers

SHARD_BYTES_MAX = 15_900_000
Tensors = dict[str, Tensor]


@dataclass
class Position:
    """How far a run is: steps done, batches used, tokens seen, share of the whole training's time gone (0..1)."""

    seed: int
    step: int = 0
    batch: int = 0
    tokens: int = 0
    progress: float = 0.0


def capture(model: Any, optimisers: Optimisers) -> Tensors:
    """Copies of everything that a later run needs, on the CPU."""
    tensors = {f"weight/{name}": weight.detach() for name, weight in model.named_parameters()}
    for name, weight in model.named_parameters():
        for key, value in _state(optimisers, weight).items():
            tensors[f"{key}/{name}"] = value.to(torch.bfloat16) if key == "momentum_buffer" else value
    return {name: value.to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def restore(model: Any, optimisers: Optimisers, tensors: Tensors) -> None:
    """Put captured state back. Raises ValueError if it is of another model."""
    weights = dict(model.named_parameters())
    found = {name.removeprefix("weight/") for name in tensors if name.startswith("weight/")}
    if found != set(weights):
        raise ValueError(f"the checkpoint is of another model: {sorted(found ^ set(weights))[:4]} are in one of the two only")
    optimisers.muon.state.clear()
    optimisers.adam.state.clear()
    for name, value in tensors.items():
        key, _, of = name.partition("/")
        if weights[of].shape != value.shape and value.ndim:
            raise ValueError(f"{name} has shape {tuple(value.shape)} in the checkpoint, {tuple(weights[of].shape)} in the model")
        if key == "weight":
            weights[of].data.copy_(value)
        else:
            _state(optimisers, weights[of])[key] = value.to(weights[of].device, torch.float32, copy=True)


def write(folder: Path, tensors: Tensors, position: Position) -> None:
    """Write shards and `position.json`, each file complete or not there at all. Raises ValueError if a number is not finite."""
    if broken := [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]:
        raise ValueError(f"{len(broken)} tensors are not finite, {broken[0]} among them: the checkpoint is not written")
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors)
    for number, shard in enumerate(shards):
        save_file(shard, folder / "shard.partial")
        os.replace(folder / "shard.partial", folder / f"state-{number}.safetensors")
    (folder / "position.partial").write_text(json.dumps({**asdict(position), "shards": len(shards)}))
    os.replace(folder / "position.partial", folder / "position.json")


def read(folder: Path) -> tuple[Tensors, Position]:
    """What `write` left. Raises FileNotFoundError if the folder has no complete checkpoint."""
    if not (folder / "position.json").is_file():
        raise FileNotFoundError(f"{folder} holds no position.json: a run's output folder is what is resumed")
    position = json.loads((folder / "position.json").read_text())
    tensors: Tensors = {}
    for number in range(position.pop("shards")):
        with safe_open(folder / f"state-{number}.safetensors", "pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (no mapping)
    return tensors, Position(**position)


def _state(optimisers: Optimisers, weight: Tensor) -> dict[str, Any]:
    of = optimisers.muon if any(weight is p for group in optimisers.muon.param_groups for p in group["params"]) else optimisers.adam
    state: dict[str, Any] = of.state[weight]
    return state


def _shards(tensors: Tensors) -> list[Tensors]:
    shards: list[Tensors] = [{}]
    room = SHARD_BYTES_MAX
    for name, value in tensors.items():
        room -= (size := value.numel() * value.element_size())
        if room < 0:
            shards.append({})
            room = SHARD_BYTES_MAX - size
        shards[-1][name] = value
    return shards
