"""Naive quantisation: attention over what the hot tier holds, without certificate or fallback.

The numbers are those of tierd's own INT8 keys and INT4 values, decoded from its records; a trailing, unfilled block is original there
and here. As with the other caches, a forward over an empty cache attends to the originals.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tierd_kernels.host import reserve
from tierd_kernels.layout import KEY_TILE, RAW_KEYS, RAW_VALUES, Layout
from tierd_kernels.quantise.cpu import quantise_blocks
from transformers.cache_utils import Cache, DynamicLayer

BLOCK, GROUP = 16, 16  # as tierd_client.Geometry has them


def stored(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the hot tier makes of `k`, `v` [heads, tokens, d] of a type that it stores, tokens a multiple of 16: float32, on the CPU."""
    heads, tokens, d = k.shape
    layout = Layout(heads, d, BLOCK, GROUP, str(k.dtype).removeprefix("torch."))
    blocks = tokens // BLOCK
    memory = reserve(blocks * layout.hot_block_bytes, 64, blocks * layout.original_block_bytes)
    both = torch.stack([x.cpu().view(heads, blocks, BLOCK, d).transpose(0, 1) for x in (k, v)], dim=1).contiguous()
    memory.originals[:] = both.view(torch.uint8).numpy().reshape(-1)
    at = np.arange(blocks, dtype=np.int64)
    quantise_blocks(layout, memory, at * layout.original_block_bytes, at * layout.hot_block_bytes)
    records = memory.hot.reshape(blocks * heads, layout.hot_record_bytes)
    originals = both.float().view(blocks, 2, heads, BLOCK, d).transpose(0, 1).reshape(2, blocks * heads, BLOCK, d).numpy()
    decoded = decode_records(records, layout, originals)
    keys, values = (torch.from_numpy(x).view(blocks, heads, BLOCK, d).transpose(0, 1).reshape(k.shape) for x in decoded)
    return keys, values


def decode_records(
    records: NDArray[np.uint8], layout: Layout, originals: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Keys and values [n, block, d] of hot records uint8 [n, hot_record_bytes]; halves that could not be quantised are taken from
    `originals` [2, n, block, d]. Code times scale plus offset in float64, then rounded to float32."""
    n, tokens, d, groups = len(records), layout.block_size, layout.head_dim, layout.num_value_groups

    def field(at: int, dtype: Any, *shape: int) -> NDArray[np.float64]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw: NDArray[Any] = np.ascontiguousarray(records[:, at : at + size]).view(dtype)
        return raw.reshape(n, *shape).astype(np.float64)

    codes = field(0, np.int8, tokens // KEY_TILE, d // 2, KEY_TILE, 2).transpose(0, 1, 3, 2, 4).reshape(n, tokens, d)
    keys = codes * field(layout.key_scale_at, np.float16, 1, d) + field(layout.key_offset_at, np.float16, 1, d)
    nibbles = field(layout.value_codes_at, np.uint8, tokens, d // 2).astype(np.uint8)
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=2)
    group_d = np.arange(d) // layout.value_group
    scale, offset = (
        field(at, np.float16, groups, tokens).transpose(0, 2, 1)[:, :, group_d] for at in (layout.value_scale_at, layout.value_offset_at)
    )
    values = codes * scale + offset
    flags = field(layout.flags_at, np.uint32, 1, 1).astype(np.uint32)
    keys, values = np.where(flags & RAW_KEYS, originals[0], keys), np.where(flags & RAW_VALUES, originals[1], values)
    return keys.astype(np.float32), values.astype(np.float32)


class NaiveLayer(DynamicLayer):
    """`keys`, `values` float32 [rows, heads, positions, d]: full blocks as they decode, originals behind them. A row's blocks begin
    after its padding, of which `pads` has the length."""

    def __init__(self, pads: Sequence[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._decoded = list(pads)  # positions up to which each row is
        self._originals: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores [rows, heads, n, d]; returns what attention is to use."""
        new, before = (key_states, value_states), self._originals
        if before is None:
            self.lazy_initialization(key_states.float(), value_states.float())
            self._originals = new
        else:
            self._originals = (torch.cat((before[0], new[0]), dim=2), torch.cat((before[1], new[1]), dim=2))
        assert self.keys is not None and self.values is not None
        self.keys, self.values = torch.cat((self.keys, new[0].float()), dim=2), torch.cat((self.values, new[1].float()), dim=2)
        for row, start in enumerate(self._decoded):
            stop = start + (self.keys.shape[2] - start) // BLOCK * BLOCK
            if stop > start:
                self.keys[row, :, start:stop], self.values[row, :, start:stop] = (
                    x.to(key_states.device) for x in stored(*(x[row, :, start:stop] for x in self._originals))
                )
                self._decoded[row] = stop
        return new if before is None else (self.keys, self.values)


def naive_cache(num_layers: int, pads: Sequence[int]) -> Cache:
    """An empty cache for rows that `pads` positions of padding lead, for a model that attends by `rows`."""
    return Cache(layers=[NaiveLayer(pads) for _ in range(num_layers)])
