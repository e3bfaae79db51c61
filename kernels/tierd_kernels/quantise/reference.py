"""Quantisation of one block in float64, as plainly as it can be said. Compiled backends are compared with this file.

Legend of suffixes: B tokens of the block, d channels, G value groups.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.floats import AWAY as UP
from tierd_kernels.floats import NEAREST, as_float64, bf16_bits_above, f16_bits, f16_bits_below, f32_above
from tierd_kernels.layout import (
    AMP,
    C1,
    KEY_NORM_MAX,
    KEY_TILE,
    RAW_KEYS,
    RAW_VALUES,
    RK,
    SK,
    SV,
    VALUE_NORM_MAX,
    H,
    Layout,
)

Array = NDArray[np.float64]
F16_SMALLEST_NORMAL = 2.0**-14
KEY_CODE_MAX, VALUE_CODE_MAX = 127, 15
# Relative room for the float64 rounding of a sum of up to 256 squares (3e-14) and of the residuals in it.
SUM_ROOM = 1.0 + 1e-12
# A Gram matrix of n <= 256 rows over 1024 terms and its two squarings lose at most a few n * 1024 * 2**-53 (3e-11) of
# its largest eigenvalue, since that is at least trace / n.
SPECTRAL_ROOM = 1.0 + 1e-9


@dataclass(frozen=True)
class QuantisedBlock:
    """One block of one KV head. Annotations are as stored, rounded up; infinite means not certifiable."""

    key_codes_Bd: NDArray[np.int8]
    key_scale_d: NDArray[np.float16]
    key_offset_d: NDArray[np.float16]
    value_codes_Bd: NDArray[np.uint8]
    value_scale_BG: NDArray[np.float16]
    value_offset_BG: NDArray[np.float16]
    value_error_B: NDArray[np.uint16]  # eta_t, bfloat16 bits
    value_norm_B: NDArray[np.uint16]  # nu_t, bfloat16 bits
    annotations: NDArray[np.float32]  # in the order of the layout's indices
    flags: int

    @property
    def raw_keys(self) -> bool:
        return bool(self.flags & RAW_KEYS)

    @property
    def raw_values(self) -> bool:
        return bool(self.flags & RAW_VALUES)


def dequantise_keys(block: QuantisedBlock) -> Array:
    """code * scale + offset, [B, d]: exact in float64, all terms being multiples of 2**-24 below 2**24."""
    return block.key_codes_Bd.astype(np.float64) * block.key_scale_d.astype(np.float64) + block.key_offset_d.astype(
        np.float64
    )


def dequantise_values(block: QuantisedBlock, layout: Layout) -> Array:
    """code * scale + offset, [B, d], exact in float64."""
    group_d = np.arange(layout.head_dim) // layout.value_group
    scale_Bd = block.value_scale_BG.astype(np.float64)[:, group_d]
    offset_Bd = block.value_offset_BG.astype(np.float64)[:, group_d]
    return block.value_codes_Bd.astype(np.float64) * scale_Bd + offset_Bd


def spectral_norm_above(matrix: Array) -> float:
    """An upper bound of the largest singular value of [n, m]: the lesser of the Frobenius and the Schatten-16 norm."""
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    trace = float(np.trace(gram))
    if trace == 0.0 or not np.isfinite(trace):
        return trace if trace == 0.0 else np.inf
    squared = (gram / trace) @ (gram / trace)
    fourth = squared @ squared
    share = min(1.0, float(np.sum(fourth * fourth)) ** 0.125)
    return float(np.sqrt(trace * share)) * SPECTRAL_ROOM


def row_norms_above(matrix: Array) -> Array:
    """Upper bounds of the row norms of [n, m], [n]."""
    norms: Array = np.sqrt(np.sum(matrix * matrix, axis=1)) * SUM_ROOM
    return norms


def _f16(bits: list[int]) -> NDArray[np.float16]:
    return np.array(bits, dtype=np.uint16).view(np.float16)


def _scales(needed: Array) -> NDArray[np.float16]:
    """The least normal float16 scales that are at least `needed`, [n]: codes then stay within their range."""
    return _f16([f16_bits(max(float(x), F16_SMALLEST_NORMAL), UP) for x in needed])


def _quantise_keys(k_Bd: Array) -> tuple[NDArray[np.int8], NDArray[np.float16], NDArray[np.float16], bool]:
    """Codes, scale, offset, and whether they are usable. The offset is the middle of the channel's range."""
    least, most = k_Bd.min(axis=0), k_Bd.max(axis=0)
    offset_d = _f16([f16_bits(float(x) + 0.0, NEAREST) for x in 0.5 * (least + most)])
    middle = offset_d.astype(np.float64)
    scale_d = _scales(np.maximum(most - middle, middle - least) / KEY_CODE_MAX)
    usable = bool(np.isfinite(k_Bd).all() and np.isfinite(offset_d).all() and np.isfinite(scale_d).all())
    if not usable:
        return np.zeros(k_Bd.shape, np.int8), np.full_like(scale_d, F16_SMALLEST_NORMAL), np.zeros_like(offset_d), False
    codes_Bd = np.rint((k_Bd - middle) / scale_d.astype(np.float64))
    assert np.abs(codes_Bd).max() <= KEY_CODE_MAX
    return codes_Bd.astype(np.int8), scale_d, offset_d, True


def _quantise_values(
    v_Bd: Array, group: int
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16], bool]:
    """Codes, scale, offset, and whether they are usable. The offset lies at or below the group's least value."""
    starts = np.arange(0, v_Bd.shape[1], group)
    least_BG, most_BG = np.minimum.reduceat(v_Bd, starts, axis=1), np.maximum.reduceat(v_Bd, starts, axis=1)
    offset_BG = _f16([f16_bits_below(float(x) + 0.0) for x in least_BG.ravel()]).reshape(least_BG.shape)
    needed_BG = (most_BG - offset_BG.astype(np.float64)) / VALUE_CODE_MAX
    scale_BG = _scales(needed_BG.ravel()).reshape(needed_BG.shape)
    usable = bool(np.isfinite(v_Bd).all() and np.isfinite(offset_BG).all() and np.isfinite(scale_BG).all())
    if not usable:
        return (
            np.zeros(v_Bd.shape, np.uint8),
            np.full_like(scale_BG, F16_SMALLEST_NORMAL),
            np.zeros_like(offset_BG),
            False,
        )
    group_d = np.arange(v_Bd.shape[1]) // group
    codes_Bd = np.rint((v_Bd - offset_BG.astype(np.float64)[:, group_d]) / scale_BG.astype(np.float64)[:, group_d])
    assert codes_Bd.min() >= 0 and codes_Bd.max() <= VALUE_CODE_MAX
    return codes_Bd.astype(np.uint8), scale_BG, offset_BG, True


def quantise_block(k: NDArray[Any], v: NDArray[Any], layout: Layout) -> QuantisedBlock:
    """Quantise k and v, raw originals [B, d], and measure every annotation from the stored codes, scales and offsets.

    Raises ValueError where the shapes are not the layout's.
    """
    expected = (layout.block_size, layout.head_dim)
    if k.shape != expected or v.shape != expected:
        raise ValueError(f"k is {k.shape} and v is {v.shape}; both must be [block_size, head_dim] = {expected}")
    k_Bd, v_Bd = as_float64(k), as_float64(v)
    with np.errstate(all="ignore"):
        key_codes, key_scale, key_offset, keys_usable = _quantise_keys(k_Bd)
        value_codes, value_scale, value_offset, values_usable = _quantise_values(v_Bd, layout.value_group)
        norms_B, key_norms_B = row_norms_above(v_Bd), row_norms_above(k_Bd)
    flags = (0 if keys_usable else RAW_KEYS) | (0 if values_usable else RAW_VALUES)
    block = QuantisedBlock(
        key_codes,
        key_scale,
        key_offset,
        value_codes,
        value_scale,
        value_offset,
        np.full(layout.block_size, bf16_bits_above(np.inf), np.uint16),
        np.array([bf16_bits_above(float(x)) for x in norms_B], np.uint16),
        np.full(8, np.inf, np.float32),
        flags,
    )
    measured = np.full(8, np.inf)
    if keys_usable:
        residual_Bd = (k_Bd - dequantise_keys(block)) / key_scale.astype(np.float64)
        measured[H] = np.abs(residual_Bd).max() * SUM_ROOM
        measured[RK] = row_norms_above(residual_Bd).max()
        measured[SK] = spectral_norm_above(residual_Bd)
        measured[C1] = np.abs(key_codes.astype(np.int64)).sum(axis=1).max()
    if values_usable:
        error_Bd = v_Bd - dequantise_values(block, layout)
        block.value_error_B[:] = [bf16_bits_above(float(x)) for x in row_norms_above(error_Bd)]
        measured[SV] = spectral_norm_above(error_Bd)
        group_d = np.arange(layout.head_dim) // layout.value_group
        largest_BG = VALUE_CODE_MAX * value_scale.astype(np.float64) + np.abs(value_offset.astype(np.float64))
        measured[AMP] = row_norms_above(largest_BG[:, group_d]).max()
    measured[VALUE_NORM_MAX], measured[KEY_NORM_MAX] = norms_B.max(), key_norms_B.max()
    block.annotations[:] = [f32_above(float(x)) for x in measured]
    return block


def group_norms(values_Td: Array, errors_Td: Array) -> tuple[float, float]:
    """SV and SR: upper bounds of the spectral norms of a group's values and value errors [T, d], at float32 precision.

    Rows of blocks whose values stay original have no error: pass zeros.
    """
    return f32_above(spectral_norm_above(values_Td)), f32_above(spectral_norm_above(errors_Td))


def encode(block: QuantisedBlock, layout: Layout) -> NDArray[np.uint8]:
    """The hot record, uint8[hot_record_bytes]; padding is zero."""
    half = layout.head_dim // 2
    tiles = block.key_codes_Bd.reshape(-1, KEY_TILE, layout.head_dim // 2, 2).transpose(0, 2, 1, 3)
    nibbles = block.value_codes_Bd[:, :half] | (block.value_codes_Bd[:, half:] << 4)
    flags = np.array([block.flags], np.uint32)
    read_with_keys = (tiles, block.key_scale_d, block.key_offset_d, block.value_error_B, block.value_norm_B, block.annotations, flags)
    read_with_values = (block.value_scale_BG.T, block.value_offset_BG.T, nibbles)
    first, second = (b"".join(np.ascontiguousarray(x).tobytes() for x in part) for part in (read_with_keys, read_with_values))
    packed = first.ljust(layout.value_scale_at, b"\0") + second
    return np.frombuffer(packed.ljust(layout.hot_record_bytes, b"\0"), np.uint8)


def decode(record: NDArray[np.uint8], layout: Layout) -> QuantisedBlock:
    """The block in a hot record, uint8[hot_record_bytes]; arrays are copies."""
    tokens, channels, groups = layout.block_size, layout.head_dim, layout.num_value_groups

    def field(at: int, dtype: type[Any], *shape: int) -> NDArray[Any]:
        return np.frombuffer(record.tobytes(), dtype, int(np.prod(shape)), at).reshape(shape).copy()

    nibbles = field(layout.value_codes_at, np.uint8, tokens, channels // 2)
    tiles = field(0, np.int8, tokens // KEY_TILE, channels // 2, KEY_TILE, 2)
    return QuantisedBlock(
        tiles.transpose(0, 2, 1, 3).reshape(tokens, channels),
        field(layout.key_scale_at, np.float16, channels),
        field(layout.key_offset_at, np.float16, channels),
        np.concatenate([nibbles & 15, nibbles >> 4], axis=1),
        field(layout.value_scale_at, np.float16, groups, tokens).T,
        field(layout.value_offset_at, np.float16, groups, tokens).T,
        field(layout.value_error_at, np.uint16, tokens),
        field(layout.value_norm_at, np.uint16, tokens),
        field(layout.annotations_at, np.float32, 8),
        int(field(layout.flags_at, np.uint32, 1)[0]),
    )
