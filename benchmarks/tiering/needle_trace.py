"""Decode traces that make promotion happen: queries over keys and values of random numbers.

`clusters`, the default, is like what the trained model of `benchmarks/quality/` asks for; `needles` is harder, and no model's: hundreds of
needs come and go within a few steps. Originals that a KV head reads in a call at a tolerance of 5 %, and the share of them that it read in
the step before, in one of the eight before, in any before (`needs.py`; the model reads text, and its busiest layer is told of):

                                keys: mean, p95   again in 1, in 8, ever   values: mean, p95   again in 1, in 8, ever
    model, 4,096 tokens             5.9    16        0.49  0.80  0.94           4.5    13        0.47  0.78  0.93
    model, 8,192                    8.6    25        0.53  0.76  0.92           6.5    19        0.51  0.77  0.92
    model, 16,384                    13    33        0.54  0.76  0.88           9.5    25        0.53  0.75  0.88
    clusters, 131,072                54    85        0.56  0.85  0.95            26    43        0.50  0.79  0.92
    needles, 131,072                190   780        0.73  0.83  0.86            66   289        0.71  0.81  0.83

From 16,384 to 131,072 tokens the model's 13 and 9.5 would become 44 and 29, if they went on growing by half with each doubling, as they
did. (The mean of its five layers grew by a fifth, to 5.1 and 4.1.) Half of the calls over needles read 17 keys of a head or less.

Legend: H query heads, K KV heads, N tokens stored first, T steps, d head dimension.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tierd_client import Geometry

MEMBERS = 550  # tokens of a KV head's cluster, which has nearly all of its attention
LIFT = 10.0  # their mean score over the others' mean
SPREAD = {"always": 2.0, "slow": 1.8, "fast": 0.9}  # of their scores: parts that stay, that turn over SLOW_STEPS, that are of one step
SLOW_STEPS = 4.0
SHARED = 0.9  # of each part, by variance, between the query heads of a KV head
COMMON = 8.0  # length of what the keys of a cluster have in common; a key of random numbers is sqrt(d) long
ALIVE = 3.0  # needles that a KV head looks at, on average
CERTAIN = 1.25  # a needle's score at its height, over what balances all other tokens
WIDTH = 8  # steps: the standard deviation of a needle's rise and fall


@dataclass(frozen=True)
class Shape:
    """`tokens` stored before the first step."""

    layers: int
    tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int
    steps: int

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.layers, self.q_heads, self.kv_heads, self.head_dim, "float16")

    @property
    def originals_bytes(self) -> int:
        """Of all layers, once all steps are stored."""
        return self.layers * 2 * self.kv_heads * (self.tokens + self.steps + 16) * self.head_dim * 2


class Trace:
    """`k`, `v` float16 [K, N + T, d] on the GPU if there is one, the same for all layers; `q` float16 [T, layers, H, 1, d]. `stress`: of
    needles."""

    def __init__(self, shape: Shape, seed: int, stress: bool = False) -> None:
        self.shape, self.stress = shape, stress
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device=device).manual_seed(seed)
        size = shape.kv_heads, shape.tokens + shape.steps, shape.head_dim
        self.k, self.v = (torch.randn(size, device=device, generator=generator).half() for _ in "kv")
        rng = np.random.default_rng(seed)
        topics = None if stress else self._plant(rng)
        self.k_raw, self.v_raw = (x.cpu().numpy() for x in (self.k, self.v))
        self.q = self._needles(rng) if topics is None else self._clusters(rng, topics)

    def new(self, step: int) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """Keys and values [K, 1, d] that a step appends to each layer."""
        at = slice(self.shape.tokens + step, self.shape.tokens + step + 1)
        return self.k_raw[:, at], self.v_raw[:, at]

    def truth(self, step: int, layer: int) -> NDArray[np.float64]:
        """Attention of that step in float64, [H, d]."""
        s, length = self.shape, self.shape.tokens + step + 1
        q = torch.from_numpy(self.q[step, layer]).to(self.k.device).double().view(s.kv_heads, -1, s.head_dim)
        found = []
        for head in range(s.kv_heads):  # one at a time: 128K tokens of one head take 128 MB
            scores = q[head] @ self.k[head, :length].double().T * s.head_dim**-0.5
            found.append(scores.softmax(-1) @ self.v[head, :length].double())
        return torch.cat(found).cpu().numpy()

    def _plant(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """Gives the keys of each KV head's cluster their common part; returns its direction, [K, d]."""
        s = self.shape
        topics = rng.standard_normal((s.kv_heads, s.head_dim))
        topics /= np.linalg.norm(topics, axis=1, keepdims=True)
        for head in range(s.kv_heads):
            members = torch.from_numpy(rng.choice(s.tokens, min(MEMBERS, s.tokens // 16), replace=False)).to(self.k.device)
            self.k[head, members] += torch.from_numpy(COMMON * topics[head]).to(self.k)
        return topics

    def _clusters(self, rng: np.random.Generator, topics: NDArray[np.float64]) -> NDArray[np.float16]:
        """Each query looks at its KV head's cluster, and at some members more than at others: a moving part of it is random."""
        s = self.shape
        group, keep = s.q_heads // s.kv_heads, math.exp(-1.0 / SLOW_STEPS)
        topics = np.repeat(topics, group, axis=0)

        def direction() -> NDArray[np.float64]:
            """Of each query head; across its topic, or the cluster would have all attention now and next to none then."""
            common = np.repeat(rng.standard_normal((s.layers, s.kv_heads, s.head_dim)), group, axis=1)
            mixed = math.sqrt(SHARED) * common + math.sqrt(1.0 - SHARED) * rng.standard_normal(common.shape)
            return mixed - np.sum(mixed * topics, axis=-1, keepdims=True) * topics

        always, slow = direction(), direction()
        towards = LIFT * math.sqrt(s.head_dim) / COMMON * topics
        q = np.empty((s.steps, *always.shape), np.float16)
        for step in range(s.steps):
            slow = keep * slow + math.sqrt(1.0 - keep**2) * direction()
            q[step] = towards + SPREAD["always"] * always + SPREAD["slow"] * slow + SPREAD["fast"] * direction()
        return q[:, :, :, None]

    def _needles(self, rng: np.random.Generator) -> NDArray[np.float16]:
        s = self.shape
        height = CERTAIN * math.log(s.tokens) / math.sqrt(s.head_dim)
        q = rng.standard_normal((s.steps, s.layers, s.q_heads, s.head_dim)) * 0.1
        t = np.arange(s.steps)
        group = s.q_heads // s.kv_heads
        for layer, head in np.ndindex(s.layers, s.kv_heads):
            for _ in range(round(ALIVE * (s.steps + 4 * WIDTH) / (2.5 * WIDTH))):
                key = self.k_raw[head, rng.integers(s.tokens)].astype(np.float64)
                swell = height * np.exp(-0.5 * ((t - rng.uniform(-2 * WIDTH, s.steps + 2 * WIDTH)) / WIDTH) ** 2)
                own = swell[:, None] * rng.lognormal(0.0, 0.1, (s.steps, group))
                q[:, layer, head * group : (head + 1) * group] += own[:, :, None] * key
        return q[:, :, :, None].astype(np.float16)
