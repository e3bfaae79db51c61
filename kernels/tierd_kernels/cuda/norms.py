"""Spectral bounds of a group of blocks, in double on the device. Needs CuPy."""

from typing import Any

import cupy as cp
import numpy as np

from tierd_kernels.cuda.record import TILE, VALUES_RAW, Record
from tierd_kernels.layout import Layout
from tierd_kernels.quantise.reference import SPECTRAL_ROOM


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


def decoded_values(layout: Layout, hot: Any, hot_at: Any) -> tuple[Any, Any]:
    """V_hat of n full blocks, float64 [Hkv, n, B, d] on the device, as the value pass sees it, and which are raw, bool [Hkv, n]."""
    record = Record(layout)
    heads, d, tiles, groups, count = layout.num_kv_heads, layout.head_dim, layout.block_size // TILE, layout.num_value_groups, len(hot_at)
    bytes_at = hot_at[:, None, None] + (cp.arange(heads) * record.nbytes)[:, None] + cp.arange(record.nbytes)
    records = hot[bytes_at]
    raw = cp.ascontiguousarray(records[..., record.notes_at + 4 * VALUES_RAW :][..., :4]).view(cp.uint32)[..., 0]
    parts = records[..., record.score_bytes :].reshape(count, heads, tiles, record.value_bytes)
    words = cp.ascontiguousarray(parts[..., : record.value_scales_at]).view(cp.uint32).reshape(count, heads, tiles, d // 16, 8, 4)
    pairs = cp.ascontiguousarray(parts[..., record.value_scales_at :]).view(cp.float16)
    pairs = pairs.reshape(count, heads, tiles, groups, 4, 2, 2, 2).astype(cp.float64)  # c, scale or offset, upper tokens, odd
    pairs = pairs[:, :, :, cp.arange(d // 16) * 16 // layout.value_group]
    out = cp.empty((count, heads, tiles, TILE, d // 16, 16))
    for odd, upper, channels in np.ndindex(2, 2, 2):
        codes = (words >> (16 * odd + 4 * upper + 8 * channels) & 15).astype(cp.float64)  # ..., m, r, c
        scale, offset = (pairs[..., x, upper, odd][..., None, :] for x in (0, 1))
        exact = codes * scale + offset
        out[..., 8 * upper + odd : 8 * upper + odd + 7 : 2, :, 8 * channels : 8 * channels + 8] = cp.moveaxis(
            exact.astype(cp.float16), -1, -3
        )
    values = out.reshape(count, heads, layout.block_size, d).transpose(1, 0, 2, 3)
    return values, (raw != 0).T


def group_bounds(layout: Layout, originals: Any, hot: Any, hot_at: Any) -> tuple[Any, Any]:
    """(SV, SR), float32 [Hkv] on the device, of a group: raw original values [n, Hkv, B, d] and the blocks' offsets in hot."""
    values = cp.swapaxes(widen(originals), 0, 1)
    decoded, raw = decoded_values(layout, hot, hot_at)
    errors = cp.where(raw[..., None, None], 0.0, values - decoded)
    shape = (layout.num_kv_heads, -1, layout.head_dim)
    above = (spectral_above(x.reshape(shape)) * (1 + 2.0**-22) for x in (values, errors))
    sv, sr = (x.astype(cp.float32) for x in above)
    return sv, sr
