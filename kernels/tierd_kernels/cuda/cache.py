"""One layer's cache on the device, as the kernels want it, and the buffers of a step over it.

Originals lie in pinned host memory, which kernels read by themselves; quantised blocks in device memory. Both are in pieces, in the
order that `blocks` gives, as a pool leaves them.
"""

from typing import Any

import cupy as cp
import numpy as np
from numpy.typing import NDArray

from tierd_kernels.cuda.launch import CALL, FIELDS, Kernels
from tierd_kernels.cuda.record import TILE
from tierd_kernels.cuda.sources import PARTIALS, ROW_TILE, SPLITS_MAX, STATISTIC_FLOATS, TILE_WEIGHT_FLOATS
from tierd_kernels.layout import NUMPY_DTYPE, Layout
from tierd_kernels.quantise.reference import SPECTRAL_ROOM

GROUP_TOKENS = 1024
UNIT_MAX = 120
Raw = NDArray[Any]


def pinned(shape: tuple[int, ...], dtype: Any) -> tuple[Raw, Any]:
    """Zeros in pinned host memory, and what keeps that alive; the device sees the same addresses."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = cp.cuda.alloc_pinned_memory(size)
    array: Raw = np.frombuffer(memory, dtype, int(np.prod(shape))).reshape(shape)
    array[...] = 0
    return array, memory


def widen(raw: Any) -> Any:
    """Originals on the device as float64."""
    return (raw.astype(cp.uint32) << 16).view(cp.float32).astype(cp.float64) if raw.dtype == cp.uint16 else raw.astype(cp.float64)


def spectral_above(x: Any) -> Any:
    """Upper bounds of the spectral norms of x [..., n, d], float64, as `quantise/reference.py::spectral_norm_above`."""
    gram = cp.swapaxes(x, -1, -2) @ x
    trace = cp.trace(gram, axis1=-2, axis2=-1)
    share = gram / cp.where(trace > 0, trace, 1)[..., None, None]
    squared = share @ share
    fourth = squared @ squared
    total = cp.minimum(1.0, cp.sum(fourth * fourth, axis=(-2, -1)) ** 0.125)
    return cp.where(trace < cp.inf, cp.sqrt(trace * total) * SPECTRAL_ROOM, cp.inf)


class LayerCache:
    """Keys and values of one layer. `k`, `v` are raw originals [Hkv, tokens, d] on the host.

    Raises ValueError where they do not fit the layout.
    """

    def __init__(self, layout: Layout, k: Raw, v: Raw, blocks: NDArray[np.int64] | None = None) -> None:
        heads, B, d = layout.num_kv_heads, layout.block_size, layout.head_dim
        if k.shape != v.shape or k.shape[::2] != (heads, d) or k.dtype != NUMPY_DTYPE[layout.dtype] or not k.shape[1]:
            raise ValueError(f"k is {k.dtype}{k.shape}, v {v.shape}; expected {layout.dtype} [{heads}, tokens, {d}]")
        self.layout, self.kernels, self.tokens = layout, Kernels(layout), k.shape[1]
        self.full, count = self.tokens // B, -(-self.tokens // B)
        order = np.arange(count) if blocks is None else blocks
        self.originals, self._memory = pinned((count, 2, heads, B, d), k.dtype)
        for part, x in enumerate((k, v)):
            whole = np.zeros((heads, count * B, d), k.dtype)
            whole[:, : self.tokens] = x
            self.originals[order, part] = whole.reshape(heads, count, B, d).transpose(1, 0, 2, 3)
        self.original_at = cp.asarray(order * layout.original_block_bytes, cp.int64)
        self.hot_at = cp.asarray(order[: self.full].argsort().argsort() * heads * self.kernels.record.nbytes, cp.int64)
        self.hot = cp.full(max(self.full, 1) * heads * self.kernels.record.nbytes, 0xEE, cp.uint8)
        norms = cp.zeros((max(self.full, 1), heads), cp.float32)
        if self.full:
            at = self.original_at[: self.full]
            self.kernels.quantise(self.originals.ctypes.data, self.hot.data.ptr, at, self.hot_at, norms, cp.cuda.get_current_stream())
        largest = np.sqrt((widen(cp.asarray(v)) ** 2).sum(axis=2).max(axis=1)).get()
        exponent = np.frexp(np.where((largest > 0) & np.isfinite(largest), largest, 1.0))[1]
        self.unit = cp.asarray(np.clip(exponent, -UNIT_MAX, UNIT_MAX), cp.int32)
        groups = self.tokens // GROUP_TOKENS
        self.group_values = cp.full((max(groups, 1), heads), cp.inf, cp.float32)
        self.group_errors = self.group_values.copy()
        if groups:
            values = widen(cp.asarray(v[:, : groups * GROUP_TOKENS])).reshape(heads, groups, GROUP_TOKENS, d)
            errors = values - self.decoded_values()[:, : groups * GROUP_TOKENS].reshape(values.shape)
            for out, x in ((self.group_values, values), (self.group_errors, errors)):
                out[:] = (spectral_above(x).T * (1 + 2.0**-22)).astype(cp.float32)

    def decoded_values(self) -> Any:
        """V_hat of the full blocks, float64 [Hkv, full * B, d] on the device, as the value pass sees it."""
        lay, record = self.layout, self.kernels.record
        heads, d, tiles, groups = lay.num_kv_heads, lay.head_dim, lay.block_size // TILE, lay.num_value_groups
        rows = (self.hot_at // record.nbytes)[:, None] + cp.arange(heads)
        parts = self.hot.reshape(-1, record.nbytes)[rows, record.score_bytes :].reshape(self.full, heads, tiles, record.value_bytes)
        words = cp.ascontiguousarray(parts[..., : record.value_scales_at]).view(cp.uint32).reshape(self.full, heads, tiles, d // 16, 8, 4)
        pairs = cp.ascontiguousarray(parts[..., record.value_scales_at :]).view(cp.float16)
        pairs = pairs.reshape(self.full, heads, tiles, groups, 4, 2, 2, 2).astype(cp.float64)  # c, scale or offset, upper tokens, odd
        pairs = pairs[:, :, :, cp.arange(d // 16) * 16 // lay.value_group]
        out = cp.empty((self.full, heads, tiles, TILE, d // 16, 16))
        for odd, upper, channels in np.ndindex(2, 2, 2):
            codes = (words >> (16 * odd + 4 * upper + 8 * channels) & 15).astype(cp.float64)  # ..., m, r, c
            scale, offset = (pairs[..., x, upper, odd][..., None, :] for x in (0, 1))
            exact = codes * scale + offset
            out[..., 8 * upper + odd : 8 * upper + odd + 7 : 2, :, 8 * channels : 8 * channels + 8] = cp.moveaxis(
                exact.astype(cp.float16), -1, -3
            )
        return out.reshape(self.full, heads, lay.block_size, d).transpose(1, 0, 2, 3).reshape(heads, -1, d)


class Step:
    """Rung 0 over some caches of one layout, at once: their newest n query tokens each. Buffers are poisoned with NaN.

    `queries` raw [Hq, n, d] on the host. `run` launches; `output(i)` raw [Hq, n, d] and `fields(i)`, float32 [len(FIELDS), Hq, n].
    Raises ValueError for a query that does not fit, or a context of more splits than the last kernel takes.
    """

    def __init__(
        self, caches: list[LayerCache], queries: list[Raw], softmax_scale: float, rtol: float, atol: float = 0.0,
        relative_to: str = "values", split_blocks: int | None = None,
    ) -> None:  # fmt: skip
        layout, kernels = caches[0].layout, caches[0].kernels
        self.kernels, heads, d = kernels, layout.num_kv_heads, layout.head_dim
        self.group = queries[0].shape[0] // heads
        processors = cp.cuda.Device().attributes["MultiProcessorCount"]
        tiles = [heads * -(-self.group * q.shape[1] // ROW_TILE) for q in queries]
        calls, self._keep, splits = np.zeros(len(caches), CALL), [], []
        for i, (cache, q) in enumerate(zip(caches, queries, strict=True)):
            n = q.shape[1]
            if q.shape != (self.group * heads, n, d) or not 1 <= n <= cache.tokens or q.dtype != cache.originals.dtype:
                raise ValueError(f"q is {q.dtype}{q.shape}; expected {layout.dtype} [{self.group * heads}, n <= {cache.tokens}, {d}]")
            per = split_blocks or kernels.split_blocks(cache.full, sum(tiles), processors)
            splits.append(-(-cache.full // per))
            if splits[-1] >= SPLITS_MAX:
                raise ValueError(f"{cache.full} blocks in splits of {per}; at most {SPLITS_MAX - 1} splits")
            weights = layout.block_size // TILE * TILE_WEIGHT_FLOATS
            shapes = {
                "weights": (tiles[i], cache.full + 1, weights), "statistics": (tiles[i], cache.full + 1, STATISTIC_FLOATS),
                "partials": (tiles[i], splits[-1] + 1, PARTIALS * ROW_TILE), "sums": (tiles[i], splits[-1] + 1, ROW_TILE * d),
                "fields": (len(FIELDS), self.group * heads, n),
            }  # fmt: skip
            arrays = {name: cp.full(shape, cp.nan, cp.float32) for name, shape in shapes.items()}
            arrays |= {"q": cp.asarray(q), "output": cp.full(q.shape, 0x7FC0 if q.dtype == np.uint16 else cp.nan, q.dtype)}
            arrays |= {"pool": cache.hot, "hot": cache.hot_at, "original": cache.original_at, "unit": cache.unit}
            arrays |= {"group_values": cache.group_values, "group_errors": cache.group_errors}
            self._keep.append(arrays)
            for name, array in arrays.items():
                calls[name][i] = array.data.ptr
            calls["originals"][i] = cache.originals.ctypes.data
            for name, number in {"n": n, "tokens": cache.tokens, "full": cache.full, "splits": splits[-1], "per": per}.items():
                calls[name][i] = number
        calls["scale"], calls["rtol"], calls["atol"] = softmax_scale, rtol, atol
        calls["relative_to_output"] = relative_to == "output"
        self.calls, self.count = cp.asarray(calls.view(np.uint8)), len(caches)
        self.grid = (max(splits) + 1, max(tiles), self.group * max(q.shape[1] for q in queries))

    def run(self, stream: Any = None) -> None:
        """Launches the three kernels."""
        self.kernels.attend(self.calls, self.count, self.grid, self.group, stream or cp.cuda.get_current_stream())

    def output(self, i: int = 0) -> Any:
        return self._keep[i]["output"]

    def fields(self, i: int = 0) -> dict[str, Any]:
        return dict(zip(FIELDS, self._keep[i]["fields"], strict=True))
