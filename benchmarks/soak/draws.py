"""What workers of the soak ask for: shapes, terms, tensors. Everything comes from the generator that is handed in.

Legend: Hq query heads, Hkv KV heads, n tokens, d head dimension.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tierd_client import Budget, Coverage, Geometry, Tolerance

Raw = NDArray[Any]
Generator = np.random.Generator
DTYPES = ("float16", "bfloat16", "float32")
HEAD_DIMS = (64, 80, 96, 128)
BLOCK_SIZES = (16, 32, 64)
VALUE_GROUPS = (16, 32)
RTOLS = (0.0, 0.01, 0.02, 0.05)
# Around a block's size, beyond one, and beyond the 1,024 tokens of a group of which norms are kept.
TOKENS = (1, 5, 15, 16, 17, 64, 130, 300, 500, 700, 1100)
NEW_TOKENS = (1, 1, 1, 2, 8, 17)
QUERY_TOKENS = (1, 1, 2, 3, 5)
MAX_TOKENS = 2048


def palette(seed: int) -> list[Geometry]:
    """One geometry for each type and size of a head: few enough that a GPU has compiled all of them before the soak begins."""
    rng = np.random.default_rng(seed)
    return [_geometry(rng, dtype, head_dim) for dtype in DTYPES for head_dim in HEAD_DIMS]


def _geometry(rng: Generator, dtype: str, head_dim: int) -> Geometry:
    layers, kv_heads, group = (int(rng.choice(some)) for some in ((1, 2), (1, 2, 4), (1, 2, 4)))
    block_size, value_group = int(rng.choice(BLOCK_SIZES)), int(rng.choice(VALUE_GROUPS))
    return Geometry(layers, kv_heads * group, kv_heads, head_dim, dtype, block_size=block_size, value_group=value_group)


def tolerance(rng: Generator) -> Tolerance:
    """Relative to the output in one of four."""
    return Tolerance(float(rng.choice(RTOLS)), relative_to="output" if rng.random() < 0.25 else "values")


def policy(rng: Generator) -> Budget | Coverage:
    """Either policy, as it comes or stricter or looser."""
    if rng.random() < 0.6:
        return Budget(skip_share=float(rng.choice((0.0, 0.1, 0.5))), require_rank=rng.random() < 0.2)
    return Coverage(tau_cov=float(rng.choice((0.9, 0.995))), boundary_check=rng.random() < 0.5)


@dataclass(frozen=True)
class Flavour:
    """What a session's numbers are like. `key_gain`, `value_gain`: of all; `outlier_gain`: of its first key channels besides; `focus`: how
    much of a stored key is in a query, so how few tokens hold its attention."""

    key_gain: float
    value_gain: float
    outlier_gain: float
    focus: float


def flavour(rng: Generator) -> Flavour:
    """Products of float16 numbers stay far below its largest."""
    gains = (0.3, 1.0, 2.0), (0.01, 1.0, 50.0), (1.0, 1.0, 20.0), (0.0, 0.3, 1.0)
    return Flavour(*(float(rng.choice(some)) for some in gains))


def keys_values(rng: Generator, geometry: Geometry, like: Flavour, n: int) -> tuple[Raw, Raw]:
    """K and V [Hkv, n, d] of the geometry's type."""
    shape = geometry.num_kv_heads, n, geometry.head_dim
    k = like.key_gain * rng.standard_normal(shape, np.float32)
    k[:, :, :2] *= like.outlier_gain
    return as_raw(k, geometry.dtype), as_raw(like.value_gain * rng.standard_normal(shape, np.float32), geometry.dtype)


def queries(rng: Generator, geometry: Geometry, like: Flavour, key: NDArray[np.float32], n: int) -> Raw:
    """Q [Hq, n, d], drawn towards `key` [Hkv, d], one that is stored."""
    q = rng.standard_normal((geometry.num_q_heads, n, geometry.head_dim), np.float32)
    q += like.focus * np.repeat(key, geometry.num_q_heads // geometry.num_kv_heads, axis=0)[:, None]
    return as_raw(q, geometry.dtype)


def as_raw(x: NDArray[np.float32], dtype: str) -> Raw:
    """`x` in a type of the wire; bfloat16, cut off, as its bits."""
    return (x.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else x.astype(dtype)
