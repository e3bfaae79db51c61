"""What a worker remembers of a session: the originals, by layer, as it sent them."""

from typing import Any

import numpy as np
import oracle
from numpy.typing import NDArray
from tierd_client import Geometry

Raw = NDArray[Any]


class Mirror:
    """`keys`, `values`: of each layer, [Hkv, n, d] raw; their arrays are replaced, never written, so forks share them."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        empty = np.zeros((geometry.num_kv_heads, 0, geometry.head_dim), {"bfloat16": "uint16"}.get(geometry.dtype, geometry.dtype))
        self.keys: list[Raw] = [empty] * geometry.num_layers
        self.values: list[Raw] = [empty] * geometry.num_layers

    @property
    def lengths(self) -> list[int]:
        return [keys.shape[1] for keys in self.keys]

    def append(self, layer: int, k: Raw, v: Raw) -> None:
        self.keys[layer] = np.concatenate([self.keys[layer], k], axis=1)
        self.values[layer] = np.concatenate([self.values[layer], v], axis=1)

    def truncate(self, length: int) -> None:
        self.keys = [keys[:, :length] for keys in self.keys]
        self.values = [values[:, :length] for values in self.values]

    def fork(self) -> "Mirror":
        child = Mirror(self.geometry)
        child.keys, child.values = list(self.keys), list(self.values)
        return child

    def key(self, layer: int, token: int) -> NDArray[np.float32]:
        """The keys of one token, [Hkv, d]; zeros where nothing is stored."""
        stored = self.keys[layer]
        return oracle.exact_numbers(stored[:, token % stored.shape[1]] if stored.shape[1] else np.zeros_like(stored, shape=(
            stored.shape[0], stored.shape[2],
        ))).astype(np.float32)  # fmt: skip
