"""A stored cache for kernel tests: arenas filled by the quantiser, poisoned where nothing was written."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from stored import GROUP, Cache
from tierd_kernels import ladder
from tierd_kernels.kvview import narrow
from tierd_kernels.layout import NUMPY_DTYPE, Layout, Memory


def raw(x: NDArray[np.float64], dtype: str) -> NDArray[Any]:
    """float64 to raw originals, kept finite."""
    limit = {"float16": 6e4, "bfloat16": 3e38, "float32": 3e38}[dtype]
    return narrow(np.clip(x, -limit, limit), dtype)


def store(layout: Layout, keys: NDArray[Any], values: NDArray[Any]) -> Cache:
    """Writes raw originals [Hkv, N, d] into arenas of 0xFF bytes (NaN as a float) and quantises the full blocks."""
    B, tokens = layout.block_size, keys.shape[1]
    blocks, full = -(-tokens // B), tokens // B
    memory = Memory(
        np.full(max(full, 1) * layout.hot_block_bytes, 0xFF, np.uint8),
        np.full(64, 0xFF, np.uint8),
        np.full(blocks * layout.original_block_bytes, 0xFF, np.uint8),
    )
    originals = np.arange(blocks, dtype=np.int64) * layout.original_block_bytes
    for b, at in enumerate(originals):
        view = memory.originals[at : at + layout.original_block_bytes].view(NUMPY_DTYPE[layout.dtype])
        view = view.reshape(2, layout.num_kv_heads, B, layout.head_dim)
        count = min(B, tokens - b * B)
        view[0, :, :count] = keys[:, b * B : b * B + count]
        view[1, :, :count] = values[:, b * B : b * B + count]
    hot = np.arange(full, dtype=np.int64) * layout.hot_block_bytes
    ladder.quantise_blocks(layout, memory, originals[:full], hot)
    complete = tokens // GROUP * (GROUP // B)
    groups = ladder.group_norms(layout, memory, *(x[:complete].reshape(-1, GROUP // B) for x in (originals, hot)))
    return Cache(layout, memory, keys, values, hot, originals, list(groups))
