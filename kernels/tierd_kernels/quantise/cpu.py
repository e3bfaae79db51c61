"""Quantisation of many blocks into the hot arena, compiled. Same codes, scales and offsets as `reference`, bit for bit.

All arithmetic is float64 in the order written, so the annotations differ from the reference's by float64 noise at most,
which the room factors cover. Legend: B tokens of a block, d channels, x[c, t] channel-major copies, so that the inner
loops vectorise.
"""

import math

import numba
import numpy as np
from numpy.typing import NDArray

from tierd_kernels.floats import (
    bf16_bits_above,
    compiled,
    f16_value,
    f32_above,
    widen,
)
from tierd_kernels.layout import (
    ALIGNMENT,
    AMP,
    C1,
    DTYPE_CODE,
    KERNEL_FIELDS,
    KEY_NORM_MAX,
    RAW_KEYS,
    RAW_VALUES,
    RK,
    SK,
    SV,
    VALUE_NORM_MAX,
    H,
    Layout,
    Memory,
)
from tierd_kernels.quantise.codes import Bytes, clear, field16, load, quantise_keys, quantise_values
from tierd_kernels.quantise.norms import Array, add_gram, row_norms_above, spectral_norm_above
from tierd_kernels.quantise.reference import SUM_ROOM

(HEADS, DIM, TOKENS, GROUP, GROUPS, RECORD, ORIGINAL, VALUE_CODES, KEY_SCALE, KEY_OFFSET, VALUE_SCALE, VALUE_OFFSET) = (
    range(12)
)
(VALUE_ERROR, VALUE_NORM, ANNOTATIONS, FLAGS, _ITEMSIZE, DTYPE) = range(12, 18)
assert len(KERNEL_FIELDS) == DTYPE and set(DTYPE_CODE.values()) == {0, 1, 2}


@compiled()
def quantise_record(p: NDArray[np.int64], keys: Bytes, values: Bytes, record: Bytes) -> None:
    """One block of one KV head into its hot record; `p` is the layout's array."""
    dim, tokens = p[DIM], p[TOKENS]
    record[:] = 0
    annotations = record[p[ANNOTATIONS] : p[ANNOTATIONS] + 32].view(np.float32)
    annotations[:] = np.inf
    norms = np.empty(tokens)
    x = np.empty((dim, tokens))
    flags = 0

    codes = record[: dim * tokens]
    scales, offsets = field16(record, p[KEY_SCALE], dim), field16(record, p[KEY_OFFSET], dim)
    usable, code_sum = load(keys, p[DTYPE], x), 0
    row_norms_above(x, norms)
    annotations[KEY_NORM_MAX] = f32_above(norms.max())
    if usable:
        usable, code_sum = quantise_keys(x, codes.view(np.int8), scales, offsets)
    if usable:
        largest = 0.0
        for c in range(dim):
            for t in range(tokens):
                largest = max(largest, abs(x[c, t]))
        row_norms_above(x, norms)
        gram = np.zeros((tokens, tokens))
        add_gram(x, gram)
        annotations[H] = f32_above(largest * SUM_ROOM)
        annotations[RK] = f32_above(norms.max())
        annotations[SK] = f32_above(spectral_norm_above(gram))
        annotations[C1] = code_sum
    else:
        flags |= RAW_KEYS
        clear(codes, scales, offsets)

    count = tokens * p[GROUPS]
    codes = record[p[VALUE_CODES] : p[VALUE_CODES] + tokens * dim // 2]
    scales, offsets = field16(record, p[VALUE_SCALE], count), field16(record, p[VALUE_OFFSET], count)
    errors_out, norms_out = field16(record, p[VALUE_ERROR], tokens), field16(record, p[VALUE_NORM], tokens)
    errors_out[:] = bf16_bits_above(math.inf)
    usable, amplitude = load(values, p[DTYPE], x), math.inf
    row_norms_above(x, norms)
    annotations[VALUE_NORM_MAX] = f32_above(norms.max())
    for t in range(tokens):
        norms_out[t] = bf16_bits_above(norms[t])
    if usable:
        usable, amplitude = quantise_values(x, p[GROUP], codes, scales, offsets)
    if usable:
        row_norms_above(x, norms)
        for t in range(tokens):
            errors_out[t] = bf16_bits_above(norms[t])
        gram = np.zeros((tokens, tokens))
        add_gram(x, gram)
        annotations[SV] = f32_above(spectral_norm_above(gram))
        annotations[AMP] = f32_above(amplitude)
    else:
        flags |= RAW_VALUES
        clear(codes, scales, offsets)
    record[p[FLAGS] : p[FLAGS] + 4].view(np.uint32)[0] = flags


@compiled(parallel=True)
def _quantise_blocks(
    p: NDArray[np.int64],
    hot: Bytes,
    originals: Bytes,
    original_offsets: NDArray[np.int64],
    hot_offsets: NDArray[np.int64],
) -> None:
    heads, size, record = p[HEADS], p[ORIGINAL], p[RECORD]
    for i in numba.prange(hot_offsets.size * heads):
        block, head = i // heads, i % heads
        key_at = original_offsets[block] + head * size
        value_at = key_at + heads * size
        at = hot_offsets[block] + head * record
        quantise_record(p, originals[key_at : key_at + size], originals[value_at : value_at + size], hot[at : at + record])


@compiled()
def load_errors(p: NDArray[np.int64], record: Bytes, x: Array) -> None:
    """x [B, d] of original values becomes V - V_hat, or zero where the block's values stay original."""
    if record[p[FLAGS]] & RAW_VALUES:
        x[:] = 0.0
        return
    groups, half = p[GROUPS], p[DIM] // 2
    scales, offsets = (
        field16(record, p[VALUE_SCALE], p[TOKENS] * groups),
        field16(record, p[VALUE_OFFSET], p[TOKENS] * groups),
    )
    for t in range(p[TOKENS]):
        for c in range(p[DIM]):
            byte = record[p[VALUE_CODES] + t * half + c % half]
            code = float(byte & 15) if c < half else float(byte >> 4)
            at = c // p[GROUP] * p[TOKENS] + t
            x[t, c] -= code * f16_value(scales[at]) + f16_value(offsets[at])


@compiled(parallel=True)
def _group_norms(
    p: NDArray[np.int64],
    hot: Bytes,
    originals: Bytes,
    original_offsets: NDArray[np.int64],
    hot_offsets: NDArray[np.int64],
    out: NDArray[np.float32],
) -> None:
    heads, size, dim = p[HEADS], p[ORIGINAL], p[DIM]
    for i in numba.prange(hot_offsets.shape[0] * heads):
        group, head = i // heads, i % heads
        x = np.empty((p[TOKENS], dim))
        flat = np.empty(p[TOKENS] * dim, np.float32)
        values, errors = np.zeros((dim, dim)), np.zeros((dim, dim))
        for block in range(hot_offsets.shape[1]):
            at = original_offsets[group, block] + (heads + head) * size
            widen(originals[at : at + size], p[DTYPE], flat)
            for t in range(p[TOKENS]):
                for c in range(dim):
                    x[t, c] = flat[t * dim + c]
            add_gram(x, values)
            at = hot_offsets[group, block] + head * p[RECORD]
            load_errors(p, hot[at : at + p[RECORD]], x)
            add_gram(x, errors)
        out[0, group, head] = f32_above(spectral_norm_above(values))
        out[1, group, head] = f32_above(spectral_norm_above(errors))


def _check(name: str, offsets: NDArray[np.int64], size: int, arena: Bytes) -> None:
    """ValueError unless every offset is aligned and leaves room for `size` bytes in the arena."""
    if offsets.dtype != np.int64 or offsets.ndim != 1:
        raise ValueError(f"{name} is {offsets.dtype}{list(offsets.shape)}; it must be int64[n]")
    wrong = (offsets < 0) | (offsets > arena.size - size) | (offsets % ALIGNMENT != 0)
    if wrong.any():
        raise ValueError(
            f"{name} has {offsets[wrong][0]}; allowed: multiples of {ALIGNMENT} from 0 to {arena.size - size}"
        )


def _check_blocks(
    layout: Layout, memory: Memory, original_offsets: NDArray[np.int64], hot_offsets: NDArray[np.int64]
) -> None:
    if original_offsets.shape != hot_offsets.shape:
        raise ValueError(
            f"{original_offsets.size} original blocks but {hot_offsets.size} hot blocks; they must be as many"
        )
    _check("original_offsets", original_offsets, layout.original_block_bytes, memory.originals)
    _check("hot_offsets", hot_offsets, layout.hot_block_bytes, memory.hot)


def quantise_blocks(
    layout: Layout, memory: Memory, original_offsets: NDArray[np.int64], hot_offsets: NDArray[np.int64]
) -> None:
    """Write the hot blocks of n full original blocks; offsets int64[n] in bytes. Hot blocks must not overlap.

    Raises ValueError for offsets outside the arenas.
    """
    _check_blocks(layout, memory, original_offsets, hot_offsets)
    _quantise_blocks(layout.as_array, memory.hot, memory.originals, original_offsets, hot_offsets)


def group_norms(
    layout: Layout, memory: Memory, original_offsets: NDArray[np.int64], hot_offsets: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """SV and SR, float32[G, num_kv_heads] each: spectral bounds of the values of G groups of full blocks and of what their quantised
    form is off by. Offsets int64[G, blocks of a group], any order, of at most 1024 tokens.

    Blocks whose values stay original are left out of SR. Raises ValueError for offsets outside the arenas or too many
    blocks.
    """
    _check_blocks(layout, memory, original_offsets.ravel(), hot_offsets.ravel())
    if hot_offsets.ndim != 2 or hot_offsets.shape != original_offsets.shape or hot_offsets.shape[1] * layout.block_size > 1024:
        raise ValueError(
            f"groups of {original_offsets.shape} and {hot_offsets.shape} blocks of {layout.block_size}; allowed: both [groups, blocks], of "
            f"at most 1024 tokens"
        )
    norms = np.empty((2, len(hot_offsets), layout.num_kv_heads), np.float32)
    _group_norms(layout.as_array, memory.hot, memory.originals, original_offsets, hot_offsets, norms)
    return norms[0], norms[1]
