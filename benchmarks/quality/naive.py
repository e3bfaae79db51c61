"""Naive quantisation: attention over what the hot tier holds, without certificate or fallback.

The numbers are those of tierd's own INT8 keys and INT4 values, decoded from its records; a trailing, unfilled block is original there
and here. As with the other caches, a forward over an empty cache attends to the originals.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tierd_kernels.host import reserve
from tierd_kernels.layout import KEY_TILE, RAW_KEYS, RAW_VALUES, Layout
from tierd_kernels.quantise.cpu import quantise_blocks
from transformers.cache_utils import Cache, DynamicLayer

BLOCK, GROUP = 16, 16  # as tierd_client.Geometry has them


def stored(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the hot tier makes of `k`, `v` [heads, tokens, d] of a type that it stores, tokens a multiple of 16: float32, on the
    device of `k`. The codes are made on the CPU."""
    heads, tokens, d = k.shape
    layout = Layout(heads, d, BLOCK, GROUP, str(k.dtype).removeprefix("torch."))
    blocks = tokens // BLOCK
    memory = reserve(blocks * layout.hot_block_bytes, 64, blocks * layout.original_block_bytes)
    both = torch.stack([x.cpu().view(heads, blocks, BLOCK, d).transpose(0, 1) for x in (k, v)], dim=1).contiguous()
    memory.originals[:] = both.view(torch.uint8).numpy().reshape(-1)
    at = np.arange(blocks, dtype=np.int64)
    quantise_blocks(layout, memory, at * layout.original_block_bytes, at * layout.hot_block_bytes)
    records = torch.from_numpy(memory.hot).view(blocks * heads, layout.hot_record_bytes).to(k.device)
    originals = torch.stack([x.view(heads, blocks, BLOCK, d).transpose(0, 1).reshape(blocks * heads, BLOCK, d) for x in (k, v)])
    decoded = decode_records(records, layout, originals.float())
    keys, values = (x.view(blocks, heads, BLOCK, d).transpose(0, 1).reshape(k.shape) for x in decoded)
    return keys, values


def decode_records(records: torch.Tensor, layout: Layout, originals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values float32 [n, block, d] of hot records uint8 [n, hot_record_bytes], on their device; halves that could not be
    quantised are taken from `originals` float32 [2, n, block, d]. Code times scale plus offset in float64, then rounded."""
    n, tokens, d, groups = len(records), layout.block_size, layout.head_dim, layout.num_value_groups

    def field(at: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        return records[:, at : at + size].contiguous().view(dtype).view(n, *shape)

    codes = field(0, torch.int8, tokens // KEY_TILE, d // 2, KEY_TILE, 2).transpose(2, 3).reshape(n, tokens, d).double()
    scale, offset = (field(at, torch.float16, 1, d).double() for at in (layout.key_scale_at, layout.key_offset_at))
    keys = codes * scale + offset
    nibbles = field(layout.value_codes_at, torch.uint8, tokens, d // 2)
    codes = torch.cat((nibbles & 15, nibbles >> 4), dim=2).view(n, tokens, groups, d // groups).double()
    by_group = (field(at, torch.float16, groups, tokens) for at in (layout.value_scale_at, layout.value_offset_at))
    scale, offset = (x.transpose(1, 2)[..., None].double() for x in by_group)
    values = (codes * scale + offset).view(n, tokens, d)
    flags = field(layout.flags_at, torch.int32, 1, 1)
    pairs = zip((RAW_KEYS, RAW_VALUES), originals, (keys, values), strict=True)
    keys, values = (torch.where((flags & raw).bool(), original, decoded.float()) for raw, original, decoded in pairs)
    return keys, values


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
                self.keys[row, :, start:stop], self.values[row, :, start:stop] = stored(*(x[row, :, start:stop] for x in self._originals))
                self._decoded[row] = stop
        return new if before is None else (self.keys, self.values)


def naive_cache(num_layers: int, pads: Sequence[int]) -> Cache:
    """An empty cache for rows that `pads` positions of padding lead, for a model that attends by `rows`."""
    return Cache(layers=[NaiveLayer(pads) for _ in range(num_layers)])
