"""What a call needs to know of the stored cache besides the bytes: units, norms and annotations, gathered in one launch."""

import math
from dataclasses import dataclass

import numpy as np
from numba import prange
from numpy.typing import NDArray

from tierd_kernels.arrays import Bytes, Doubles, Flags, Ints, Singles
from tierd_kernels.bound.annotations import Annotations
from tierd_kernels.bound.reference import GROUP_TOKENS
from tierd_kernels.floats import compiled
from tierd_kernels.layout import AMP, KEY_NORM_MAX, NUMPY_DTYPE, RAW_VALUES, SV, VALUE_NORM_MAX, Layout, Memory
from tierd_kernels.numerics import Array
from tierd_kernels.vector import CACHE_LINE, LANES, copy_line, prefetch

NOTES_AHEAD = 16


def widen(x: NDArray[np.generic], dtype: str) -> Array:
    """Originals in their raw array type as float64, exactly."""
    if dtype == "bfloat16":
        return (np.ascontiguousarray(x).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def narrow(x: Array, dtype: str) -> NDArray[np.generic]:
    """float64 rounded to nearest in the originals' type (BF16 through FP32: both roundings are within its unit, and the
    ladder measures the error that was really made); overflow gives infinity."""
    with np.errstate(over="ignore"):
        if dtype != "bfloat16":
            return np.asarray(x.astype(NUMPY_DTYPE[dtype]))
        bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


@compiled(parallel=True)
def gather_notes(
    lay: Ints, hot: Bytes, hot_offsets: Ints, tail_kH: Doubles, group_norms_kGH: Singles, unit_H: Doubles, key_norm_H: Doubles,
    raw_Hb: Flags, blocks_kHb: Doubles, groups_kHG: Doubles
) -> None:  # fmt: skip
    """Fills a `KVView` from the records' annotations; `blocks_kHb` holds spectral norms, amplitudes and largest norms, `groups_kHG` SV and
    SR. `tail_kH` are the trailing block's largest norms of keys and values, zero without one. Records lie pages apart: all are asked for
    ahead."""
    full = len(hot_offsets)
    for h in prange(lay[0]):
        notes = np.empty(LANES, np.float32)
        bits = notes.view(np.uint32)
        spectral_b, amplitude_b, norm_b = blocks_kHb[0, h], blocks_kHb[1, h], blocks_kHb[2, h]
        key_norm, top = tail_kH[0, h], tail_kH[1, h]
        for b in range(full):
            if b + NOTES_AHEAD < full:
                prefetch(hot, hot_offsets[b + NOTES_AHEAD] + h * lay[5] + lay[14], CACHE_LINE)
            copy_line(hot, hot_offsets[b] + h * lay[5] + lay[14], notes)
            raw_Hb[h, b] = (bits[8] & RAW_VALUES) != 0
            spectral_b[b], norm_b[b] = notes[SV], notes[VALUE_NORM_MAX]
            # Raw values are read as they are: their arithmetic errors scale with their own norm, and the infinite annotation is unused.
            amplitude_b[b] = 0.0 if raw_Hb[h, b] else notes[AMP]
            key_norm, top = max(key_norm, np.float64(notes[KEY_NORM_MAX])), max(top, np.float64(notes[VALUE_NORM_MAX]))
        for b in range(full, len(norm_b)):
            spectral_b[b], amplitude_b[b], norm_b[b] = 0.0, 0.0, tail_kH[1, h]
        unit = 1.0
        if 0.0 < top < np.inf:
            unit = math.ldexp(1.0, min(max(math.frexp(top)[1], -1000), 1000))
        for b in range(len(norm_b)):
            norm_b[b] /= unit
            spectral_b[b] /= unit
            amplitude_b[b] = max(amplitude_b[b] / unit, norm_b[b])
        for k in range(2):
            for group in range(groups_kHG.shape[2]):
                known = group < group_norms_kGH.shape[1]
                groups_kHG[k, h, group] = group_norms_kGH[k, group, h] / unit if known else np.inf
        unit_H[h], key_norm_H[h] = unit, key_norm


@dataclass(frozen=True)
class KVView:
    """Per KV head H and block b: `unit_H`, a power of two at least as large as any ||V_t||, in which all value norms are counted;
    `key_norm_max_H`, at least any ||K_t||; `raw_values_Hb`, full blocks whose values were never quantised."""

    unit_H: Array
    key_norm_max_H: Array
    raw_values_Hb: NDArray[np.bool_]
    value_spectral_Hb: Array
    amplitude_Hb: Array
    value_norm_max_Hb: Array
    group_value_HG: Array
    group_error_HG: Array
    underflow_H: Array
    num_tokens: int
    block_size: int

    @staticmethod
    def of(
        layout: Layout,
        memory: Memory,
        hot_offsets: NDArray[np.int64],
        original_offsets: NDArray[np.int64],
        num_tokens: int,
        group_norms: tuple[NDArray[np.float32], NDArray[np.float32]],
    ) -> "KVView":
        heads, full, blocks = layout.num_kv_heads, len(hot_offsets), len(original_offsets)
        tail = np.zeros((2, heads))
        if blocks > full:
            both = read_block(layout, memory, int(original_offsets[-1]), num_tokens - full * layout.block_size)
            tail[:] = [np.linalg.norm(x, axis=2).max(axis=1) * (1 + 2.0**-40) for x in both]
        (unit, key_norm), raw = np.empty((2, heads)), np.empty((heads, full), np.bool_)
        per_block, per_group = np.empty((3, heads, blocks)), np.empty((2, heads, -(-num_tokens // GROUP_TOKENS)))
        known = np.stack([norms[: per_group.shape[2]] for norms in group_norms])
        gather_notes(layout.as_array, memory.hot, hot_offsets, tail, known, unit, key_norm, raw, per_block, per_group)
        # A product below FP32's smallest normal is off by 2^-150 at most, weight * scale times a code of 15; the kept weights sum to 1 or
        # more. Blocks that are read as they are have products weight * value alone.
        stored = full * layout.block_size
        underflow = (stored * 2.0**-145 + (num_tokens - stored) * 2.0**-149) * layout.head_dim**0.5 / unit
        (spectral, amplitude, norm_max), (values, errors) = per_block, per_group
        return KVView(
            unit, key_norm, raw, spectral, amplitude, norm_max, values, errors, underflow, num_tokens, layout.block_size
        )  # fmt: skip

    def value_error_max(self, layout: Layout, memory: Memory, hot_offsets: NDArray[np.int64]) -> Array:
        """The largest eta_t of each block, [H, b]; zero where values are original: in raw blocks, whose annotation is infinite, and in
        the trailing one."""
        records = hot_offsets[None, :] + np.arange(layout.num_kv_heads)[:, None] * layout.hot_record_bytes
        at = (records + layout.value_error_at)[..., None] // 2 + np.arange(layout.block_size)
        eta = widen(memory.hot.view(np.uint16)[at].max(axis=2), "bfloat16") / self.unit_H[:, None]
        eta[self.raw_values_Hb] = 0.0
        return np.pad(eta, ((0, 0), (0, self.value_norm_max_Hb.shape[1] - len(hot_offsets))))

    def annotations(self, rows: int) -> Annotations:
        """What the bound takes, for `rows` rows to a KV head."""
        return Annotations(
            np.repeat(np.arange(len(self.unit_H)), rows), self.value_spectral_Hb, self.amplitude_Hb, self.value_norm_max_Hb,
            self.group_value_HG, self.group_error_HG, self.underflow_H, self.num_tokens, self.block_size,
        )  # fmt: skip


def read_record(layout: Layout, memory: Memory, location: int) -> Array:
    """One record of original keys or values as float64 [B, d]; `location` as of `Call.locations`."""
    arena, start = (memory.scratch, location) if location >= 0 else (memory.originals, ~location)
    raw = arena[start : start + layout.original_record_bytes].view(NUMPY_DTYPE[layout.dtype])
    return widen(raw.reshape(layout.block_size, layout.head_dim), layout.dtype)


def read_block(layout: Layout, memory: Memory, offset: int, count: int) -> tuple[Array, Array]:
    """The first `count` tokens of an original block as float64 keys and values, [Hkv, count, d] each."""
    size = layout.original_block_bytes
    raw = memory.originals[offset : offset + size].view(NUMPY_DTYPE[layout.dtype])
    both = raw.reshape(2, layout.num_kv_heads, layout.block_size, layout.head_dim)[:, :, :count]
    return widen(both[0], layout.dtype), widen(both[1], layout.dtype)
