"""A decode trace that makes promotion happen: queries look for needles that swell and fade, over keys and values of random numbers.

Legend: H query heads, K KV heads, N tokens stored first, T steps, d head dimension.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tierd_client import Geometry

ALIVE = 3.0  # needles that a KV head looks at, on average
CERTAIN = 1.25  # a needle's score at its height, over what balances all other tokens


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
    """`k`, `v` float16 [K, N + T, d] on the GPU if there is one, the same for all layers; `q` float16 [T, layers, H, 1, d]."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape = shape
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device=device).manual_seed(seed)
        size = shape.kv_heads, shape.tokens + shape.steps, shape.head_dim
        self.k, self.v = (torch.randn(size, device=device, generator=generator).half() for _ in "kv")
        self.k_raw, self.v_raw = (x.cpu().numpy() for x in (self.k, self.v))
        self.q = self._queries(np.random.default_rng(seed))

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

    def _queries(self, rng: np.random.Generator) -> NDArray[np.float16]:
        s = self.shape
        height = CERTAIN * math.log(s.tokens) / math.sqrt(s.head_dim)
        q = rng.standard_normal((s.steps, s.layers, s.q_heads, s.head_dim)) * 0.1
        t, width = np.arange(s.steps), s.steps / 16
        group = s.q_heads // s.kv_heads
        for layer, head in np.ndindex(s.layers, s.kv_heads):
            for _ in range(round(ALIVE * (s.steps + 4 * width) / (2.5 * width))):
                key = self.k_raw[head, rng.integers(s.tokens)].astype(np.float64)
                swell = height * np.exp(-0.5 * ((t - rng.uniform(-2 * width, s.steps + 2 * width)) / width) ** 2)
                own = swell[:, None] * rng.lognormal(0.0, 0.1, (s.steps, group))
                q[:, layer, head * group : (head + 1) * group] += own[:, :, None] * key
        return q[:, :, :, None].astype(np.float16)
