"""Where every field of a quantised block lies in the device pool; `common.cuh` has the same offsets.

A record holds one block of one KV head, in the order in which the kernels read it: first what the score pass needs, then what the
value pass needs. Of the former the first three fields are read of several blocks together. Codes lie in the order of MMA fragments
(r = lane / 4, c = lane % 4), so that a lane's operands are one aligned load. B block size, d head dimension, G value groups, d' = d padded
to 32:

    key_scale      f16   [d']
    key_offset     f16   [d']
    notes          f32   [16]                         h, rK, sK, sV, amp, C1, max ||V_t||, max ||K_t||, ||key_offset||; as u32: 1 where
                                                      keys, and where values, stay original
    key_codes      int8  [B / 16, d' / 32, lane, 16]  bytes (token r, channels 8c..8c+3), (r + 8, same), (r, 8c+4..), (r + 8, 8c+4..)
    norms          u32   [B]                          nu_t, bf16, in the low half, eta_t, bf16, in the high one
    for each sixteen tokens:
    value_codes    u32   [d / 16, lane]               nibbles (r, 2c), (r, 2c + 8), (r + 8, 2c), (r + 8, 2c + 8): channel of sixteen, token;
                                                      the same of tokens 2c + 1, 2c + 9 in the upper half
    value_scales   f16   [G, c, 8]                    scales of tokens 2c, 2c + 1, 2c + 8, 2c + 9, then their offsets
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.layout import Layout
from tierd_kernels.quantise.reference import QuantisedBlock

TILE, LANES, NOTES = 16, 32, 16
OFFSET_NORM, KEYS_RAW, VALUES_RAW = 8, 9, 10


@dataclass(frozen=True)
class Record:
    """Offsets and sizes in bytes."""

    layout: Layout

    @property
    def key_dim(self) -> int:
        return -(-self.layout.head_dim // 32) * 32

    @property
    def notes_at(self) -> int:
        return 4 * self.key_dim

    @property
    def key_codes_at(self) -> int:
        return self.notes_at + 4 * NOTES

    @property
    def norms_at(self) -> int:
        return self.key_codes_at + self.layout.block_size * self.key_dim

    @property
    def score_bytes(self) -> int:
        return self.norms_at + 4 * self.layout.block_size

    @property
    def value_scales_at(self) -> int:
        """Relative to the tile's value part."""
        return 8 * self.layout.head_dim

    @property
    def value_bytes(self) -> int:
        """Of sixteen tokens."""
        return self.value_scales_at + 64 * self.layout.num_value_groups

    @property
    def nbytes(self) -> int:
        return self.score_bytes + self.layout.block_size // TILE * self.value_bytes


def encode(block: QuantisedBlock, layout: Layout) -> NDArray[np.uint8]:
    """The device record of a block as the reference quantised it, uint8 [nbytes]; OFFSET_NORM is left zero. For tests: the kernel
    writes the same bytes but for annotations."""
    record = Record(layout)
    B, d, groups = layout.block_size, layout.head_dim, layout.num_value_groups
    codes = np.zeros((B, record.key_dim), np.int8)
    codes[:, :d] = block.key_codes_Bd
    # tile, upper eight tokens, r, step, c, half, i -> tile, step, r, c, half, upper, i
    fragments = codes.reshape(B // TILE, 2, 8, record.key_dim // 32, 4, 2, 4).transpose(0, 3, 2, 4, 5, 1, 6)
    scales = np.zeros((2, record.key_dim), np.float16)
    scales[:, :d] = block.key_scale_d, block.key_offset_d
    norms = block.value_norm_B.astype(np.uint32) | block.value_error_B.astype(np.uint32) << 16
    notes = np.zeros(NOTES, np.float32)
    notes[:8] = block.annotations
    notes[KEYS_RAW : VALUES_RAW + 1].view(np.uint32)[:] = block.raw_keys, block.raw_values
    # tile, upper tokens, c, odd, m, upper channels, r -> tile, m, r, c, odd, upper channels, upper tokens
    nibbles = block.value_codes_Bd.reshape(B // TILE, 2, 4, 2, d // 16, 2, 8).transpose(0, 4, 6, 2, 3, 5, 1).astype(np.uint32)
    shifts = np.array([[[0, 4], [8, 12]], [[16, 20], [24, 28]]], np.uint32)
    words = np.bitwise_or.reduce((nibbles << shifts).reshape(*nibbles.shape[:4], 8), axis=-1)
    pairs = np.stack([block.value_scale_BG, block.value_offset_BG]).reshape(2, B // TILE, 2, 4, 2, groups)
    pairs = pairs.transpose(1, 5, 3, 0, 2, 4)
    fields = [scales, notes, fragments, norms, *(x[tile] for tile in range(B // TILE) for x in (words, pairs))]
    return np.frombuffer(b"".join(np.ascontiguousarray(x).tobytes() for x in fields), np.uint8)
