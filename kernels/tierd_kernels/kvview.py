"""What a call needs to know of the stored cache besides the bytes: units, norms and annotations, gathered with numpy."""

from dataclasses import dataclass

import numpy as np
from numba import prange
from numpy.typing import NDArray

from tierd_kernels.arrays import Bytes, Flags, Ints, Singles
from tierd_kernels.bound.annotations import Annotations
from tierd_kernels.floats import compiled
from tierd_kernels.layout import AMP, KEY_NORM_MAX, NUMPY_DTYPE, RAW_VALUES, SV, VALUE_NORM_MAX, Layout, Memory
from tierd_kernels.numerics import Array
from tierd_kernels.vector import prefetch

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
def gather_notes(lay: Ints, hot: Bytes, hot_offsets: Ints, notes_aHb: Singles, raw_Hb: Flags) -> None:
    """The records' annotations, and whether their values stay original. Records lie pages apart: all are asked for ahead."""
    for h in prange(lay[0]):
        for b in range(len(hot_offsets)):
            if b + NOTES_AHEAD < len(hot_offsets):
                prefetch(hot, hot_offsets[b + NOTES_AHEAD] + h * lay[5] + lay[14], lay[15] + 4 - lay[14])
            record = hot_offsets[b] + h * lay[5]
            notes = hot[record + lay[14] : record + lay[14] + 32].view(np.float32)
            for a in range(8):
                notes_aHb[a, h, b] = notes[a]
            raw_Hb[h, b] = (hot[record + lay[15]] & RAW_VALUES) != 0


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
        heads, full = layout.num_kv_heads, len(hot_offsets)
        notes, raw = np.empty((8, heads, full), np.float32), np.empty((heads, full), np.bool_)
        gather_notes(layout.as_array, memory.hot, hot_offsets, notes, raw)
        key_norm, value_norm = (notes[i].astype(np.float64) for i in (KEY_NORM_MAX, VALUE_NORM_MAX))
        tail = len(original_offsets) - full
        if tail:
            count = num_tokens - full * layout.block_size
            keys, values = read_block(layout, memory, int(original_offsets[-1]), count)
            tail_norm = np.linalg.norm(values, axis=2).max(axis=1)[:, None] * (1 + 2.0**-40)
            key_norm = np.concatenate([key_norm, np.linalg.norm(keys, axis=2).max(axis=1)[:, None] * (1 + 2.0**-40)], axis=1)
            value_norm = np.concatenate([value_norm, tail_norm], axis=1)
        top = value_norm.max(axis=1)
        unit = np.ldexp(1.0, np.where((top > 0) & np.isfinite(top), np.clip(np.frexp(top)[1], -1000, 1000), 0))
        value_norm = value_norm / unit[:, None]
        pad = np.zeros((heads, tail))
        spectral, amplitude = (notes[i] / unit[:, None] for i in (SV, AMP))
        # Raw values are read as they are: their arithmetic errors scale with their own norm, and the infinite annotation is unused.
        amplitude = np.maximum(np.concatenate([np.where(raw, 0.0, amplitude), pad], axis=1), value_norm)
        groups = -(-num_tokens // 1024)
        norms = []
        for known in group_norms:
            padded = np.full((heads, groups), np.inf)
            have = min(groups, len(known))
            padded[:, :have] = known[:have].T.astype(np.float64) / unit[:, None]
            norms.append(padded)
        # A product below FP32's smallest normal is off by 2^-150 at most, weight * scale times a code of 15; the kept weights sum to 1 or
        # more. Blocks that are read as they are have products weight * value alone.
        stored = full * layout.block_size
        underflow = (stored * 2.0**-145 + (num_tokens - stored) * 2.0**-149) * layout.head_dim**0.5 / unit
        return KVView(
            unit, key_norm.max(axis=1), raw, np.concatenate([spectral, pad], axis=1), amplitude, value_norm,
            norms[0], norms[1], underflow, num_tokens, layout.block_size,
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
    """One record of original keys or values as float64 [B, d]; `location` as in `Call.key_locations`."""
    arena, start = (memory.scratch, location) if location >= 0 else (memory.originals, ~location)
    raw = arena[start : start + layout.original_record_bytes].view(NUMPY_DTYPE[layout.dtype])
    return widen(raw.reshape(layout.block_size, layout.head_dim), layout.dtype)


def read_block(layout: Layout, memory: Memory, offset: int, count: int) -> tuple[Array, Array]:
    """The first `count` tokens of an original block as float64 keys and values, [Hkv, count, d] each."""
    size = layout.original_block_bytes
    raw = memory.originals[offset : offset + size].view(NUMPY_DTYPE[layout.dtype])
    both = raw.reshape(2, layout.num_kv_heads, layout.block_size, layout.head_dim)[:, :, :count]
    return widen(both[0], layout.dtype), widen(both[1], layout.dtype)
