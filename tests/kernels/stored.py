"""Where a stored cache lies, for tests of any backend."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tierd_kernels.call import Call
from tierd_kernels.layout import Layout, Memory
from tierd_kernels.policy import Policy

GROUP = 1024


@dataclass
class Cache:
    """`keys`, `values` [Hkv, N, d] raw originals; offsets as `Call` wants them."""

    layout: Layout
    memory: Memory
    keys: NDArray[Any]
    values: NDArray[Any]
    hot: NDArray[np.int64]
    originals: NDArray[np.int64]
    groups: list[NDArray[np.float32]]

    @property
    def num_tokens(self) -> int:
        return int(self.keys.shape[1])

    def call(self, q: NDArray[Any], rtol: float, policy: Policy, **more: Any) -> Call:
        norms = {"group_value_norms": self.groups[0], "group_error_norms": self.groups[1]}
        scale = more.pop("softmax_scale", self.layout.head_dim**-0.5)
        return Call(
            q=q, num_tokens=self.num_tokens, softmax_scale=scale, hot_offsets=self.hot, original_offsets=self.originals,
            in_scratch=None, rtol=rtol, atol=more.pop("atol", 0.0),
            policy=policy, **norms, **more,
        )  # fmt: skip
