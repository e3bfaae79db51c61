"""What decode steps needed of the originals, layer by layer: recorded ones, and regimes made up to be hard to foresee.

Legend: T steps, m blocks, Hkv KV heads, kind 0 keys and 1 values.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

TARGET = 0.9  # what promotion brings a bound down to, as a share of the budget
ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
RECORD_BYTES = 4096  # 16 tokens of 128 channels in FP16


@dataclass(frozen=True)
class Steps:
    """`shares` float32 and `needed` bool [T, layers, 2, m, Hkv]: each block's share of the budget before promotion, and which originals
    the answers read. `blocks` [T]: how many blocks are full at a step; the others are not there yet."""

    name: str
    shares: NDArray[np.float32]
    needed: NDArray[np.bool_]
    blocks: NDArray[np.int64]
    record_bytes: int = RECORD_BYTES
    block_size: int = 16

    @property
    def layers(self) -> int:
        return self.shares.shape[1]

    @property
    def records(self) -> int:
        """Originals of all layers at the end."""
        return int(np.prod(self.shares.shape[1:3]) * self.blocks[-1] * self.shares.shape[4])


def recorded(folder: Path) -> Steps:
    """A trace of `benchmarks/quality/traces.py`. Raises ValueError for a folder that holds none."""
    if not (folder / "trace.json").is_file():
        raise ValueError(f"{folder} holds no trace.json; benchmarks/quality/traces.py records traces")
    block_size = int(json.loads((folder / "trace.json").read_text())["block_size"])
    shares, needed, shapes = [], [], []
    for file in sorted(folder.glob("layer-*.safetensors")):
        with safe_open(file, framework="numpy") as layer:  # keys may be bfloat16, which numpy lacks: only their shape is looked at
            shares.append(layer.get_tensor("contributions"))
            needed.append(layer.get_tensor("needed"))
            keys = layer.get_slice("keys")
            shapes.append((keys.get_shape(), ITEM_BYTES[keys.get_dtype()]))
    (_, tokens, width), item_bytes = shapes[0]
    steps = len(shares[0])
    blocks = (tokens - steps + 1 + np.arange(steps)) // block_size
    made = np.stack(shares, axis=1).astype(np.float32), np.stack(needed, axis=1).astype(bool)
    return Steps(f"recorded: {folder.name}", *made, blocks, block_size * width * item_bytes, block_size)


def fewest(shares: NDArray[np.float32], counted: NDArray[np.float32], left: NDArray[np.float32] | float) -> NDArray[np.bool_]:
    """The fewest blocks, by what they are `counted` for, without which each head's shares [..., 2, m, Hkv], keys and values together, sum
    to `left` [..., 1, Hkv] at most."""
    both, ranks = (np.concatenate([x[..., 0, :, :], x[..., 1, :, :]], axis=-2) for x in (shares, counted))
    order = np.argsort(-ranks, axis=-2, kind="stable")
    ordered = np.take_along_axis(both, order, axis=-2)
    remaining = np.flip(np.cumsum(np.flip(ordered, -2), axis=-2), -2)  # before this one is promoted
    taken = np.zeros(both.shape, bool)
    np.put_along_axis(taken, order, (remaining > left) & (ordered > 0), axis=-2)
    return np.stack(np.split(taken, 2, axis=-2), axis=-3)


def promoted(shares: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The selection of the kernels in its plainest form: the largest shares first, until TARGET is left."""
    return fewest(shares, shares, TARGET)


def chosen(shares: NDArray[np.float32], needed: NDArray[np.bool_], favoured: NDArray[np.bool_], times: int) -> NDArray[np.bool_]:
    """What a call reads [2, m, Hkv] where records with a copy, `favoured`, count `times` their shares: the fewest that leave of each head's
    shares no more than `needed` do. Without a preference that is `needed` itself, as it was recorded. (Chosen anew by shares alone, what
    predictive's calls wait for is 1 to 2 % less on recorded traces.)"""
    if times == 1 or not favoured.any():
        return needed
    left = np.where(needed, 0, shares).reshape(-1, shares.shape[-1]).sum(axis=0) * (1 + 1e-6)
    return fewest(shares, np.where(favoured, times * shares, shares), left)


def drifting(seed: int, steps: int = 256, layers: int = 4, m: int = 1024, heads: int = 4) -> Steps:
    """Needles whose weight swells and fades over some tens of steps while their places move on."""
    rng = np.random.default_rng(seed)
    return _made("drifting needles", _needles(rng, steps, layers, m, heads, lambda t, needle: np.full(t.shape, needle)))


def switching(seed: int, steps: int = 256, layers: int = 4, m: int = 1024, heads: int = 4) -> Steps:
    """Four topics, each with blocks of its own; attention goes from one to another every 24 steps or so and comes back."""
    rng = np.random.default_rng(seed)
    shares = _floor(rng, steps, layers, m, heads)
    topics = rng.integers(0, m, (4, layers, 2, 24, heads))
    until, topic = 0, 0
    for t in range(steps):
        if t >= until:
            until, topic = t + int(rng.integers(12, 36)), int(rng.integers(4))
        weight = rng.gamma(4.0, 0.03, topics.shape[1:]).astype(np.float32)
        np.put_along_axis(shares[t], topics[topic], np.maximum(np.take_along_axis(shares[t], topics[topic], 2), weight), 2)
    return _made("topic switches", shares)


def passages(seed: int, steps: int = 256, layers: int = 4, m: int = 1024, heads: int = 4) -> Steps:
    """Attention reads: a passage of sixteen blocks moves on through the text and at times jumps; layers and heads look at most of it."""
    rng = np.random.default_rng(seed)
    shares = _floor(rng, steps, layers, m, heads)
    start = 0.0
    for t in range(steps):
        start = float(rng.uniform(0, m - 32)) if rng.random() < 0.03 else min(start + 0.25, m - 32)
        passage = slice(int(start), int(start) + 16)
        shape = shares[t, :, :, passage].shape
        shares[t, :, :, passage] += (rng.gamma(2.0, 0.03, shape) * (rng.random(shape) < 0.7)).astype(np.float32)
    return _made("moving passages", shares)


def popular(seed: int, steps: int = 256, layers: int = 4, m: int = 1024, heads: int = 4) -> Steps:
    """No story: every step draws anew, and blocks differ in how often they are drawn, by Zipf's law."""
    rng = np.random.default_rng(seed)
    shares = _floor(rng, steps, layers, m, heads)
    chance = np.minimum(1.0, 4.0 / rng.permuted(np.broadcast_to(np.arange(1.0, m + 1)[:, None], (layers, 2, m, heads)), axis=2))
    drawn = rng.random(shares.shape) < chance
    return _made("popular blocks", shares + np.where(drawn, rng.gamma(4.0, 0.02, shares.shape), 0.0).astype(np.float32))


def crowded(seed: int, steps: int = 256, layers: int = 4, m: int = 1024, heads: int = 4) -> Steps:
    """More is needed than is named: attention goes to 200 blocks of each head at once, to some more than to others, and slowly others."""
    rng = np.random.default_rng(seed)
    shares = _floor(rng, steps, layers, m, heads)
    members = np.argsort(rng.random((layers, 2, m, heads)), axis=2)[:, :, :200]
    wander, keep = rng.standard_normal(members.shape), math.exp(-1.0 / 8.0)
    for t in range(steps):
        wander = keep * wander + math.sqrt(1.0 - keep**2) * rng.standard_normal(members.shape)
        weight = np.exp(1.5 * wander)
        weight *= 1.2 / weight.sum(axis=2, keepdims=True)
        np.put_along_axis(shares[t], members, weight.astype(np.float32), 2)
    return _made("crowded heads", shares)


REGIMES: dict[str, Callable[[int], Steps]] = {"drifting": drifting, "switching": switching}
HELD_OUT: dict[str, Callable[[int], Steps]] = {"passages": passages, "popular": popular, "crowded": crowded}  # no policy was fitted to them


def _floor(rng: np.random.Generator, steps: int, layers: int, m: int, heads: int) -> NDArray[np.float32]:
    """What all other blocks have together: half the budget, each a little different at every step."""
    floor = rng.gamma(0.5, 1.0, (layers, 2, m, heads))
    floor *= 0.25 / floor.sum(axis=2, keepdims=True)
    return np.stack([floor * rng.lognormal(0.0, 0.2, floor.shape) for _ in range(steps)]).astype(np.float32)


def _needles(
    rng: np.random.Generator, steps: int, layers: int, m: int, heads: int, place: Callable[[NDArray[np.int64], int], NDArray[np.int64]]
) -> NDArray[np.float32]:
    shares = _floor(rng, steps, layers, m, heads)
    t = np.arange(steps)
    for layer, kind, head in np.ndindex(layers, 2, heads):
        for _ in range(3 * steps // 8):
            centre, width, height = rng.uniform(-20, steps + 20), rng.uniform(4, 16), rng.uniform(0.05, 0.5)
            swell = height * np.exp(-0.5 * ((t - centre) / width) ** 2) * rng.lognormal(0.0, 0.15, steps)
            shares[t, layer, kind, place(t, int(rng.integers(m))), head] += swell.astype(np.float32)
    return shares


def _made(name: str, shares: NDArray[np.float32]) -> Steps:
    return Steps(name, shares, promoted(shares), np.full(len(shares), shares.shape[3]))


def each(steps: Steps) -> Iterator[tuple[int, int]]:
    """(step, layer) in the order of decoding."""
    return ((t, layer) for t in range(len(steps.shares)) for layer in range(steps.layers))
