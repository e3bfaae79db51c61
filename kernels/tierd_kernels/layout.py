"""Where every field of a stored block lies.

A *hot record* holds one block of one KV head in quantised form; a hot block is the records of all KV heads, one after the
other. An original record holds the keys, or the values, of one block and KV head as `[block_size, head_dim]` in the model's
own type; an original block is the key records of all heads followed by the value records of all heads.

Fields of a hot record, in this order (B block size, d head dimension, G value groups):

    key_codes      int8    [B / 16, d / 2, 16, 2]  token tile, channel pair, token, channel: what one integer dot product takes
    key_scale      f16     [d]
    key_offset     f16     [d]
    value_error    bf16    [B]               eta_t, rounded up
    value_norm     bf16    [B]               nu_t, rounded up
    annotations    f32     [8]               h, rK, sK, sV, amp, C1, max_t ||V_t||, max_t ||K_t||
    flags          u32     [1]               bit 0: keys stay original, bit 1: values stay original
    (from here on only the value pass reads; starts a cache line)
    value_scale    f16     [G, B]
    value_offset   f16     [G, B]
    value_codes    uint8   [B, d / 2]        channel c < d/2 in the low nibble of byte c, channel c + d/2 in the high one
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
NUMPY_DTYPE = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}
BLOCK_SIZES = (16, 32, 64)
VALUE_GROUPS = (16, 32)
HEAD_DIMS = (64, 80, 96, 128, 256)
ALIGNMENT = 64
KEY_TILE = 16

# Indices into a record's eight annotations.
H, RK, SK, SV, AMP, C1, VALUE_NORM_MAX, KEY_NORM_MAX = range(8)
RAW_KEYS, RAW_VALUES = 1, 2


class Memory(NamedTuple):
    """The three byte arenas, each a 1-D uint8 array: quantised blocks, cached copies of originals, and the originals."""

    hot: NDArray[np.uint8]
    scratch: NDArray[np.uint8]
    originals: NDArray[np.uint8]


def align(offset: int) -> int:
    """The next multiple of `ALIGNMENT` bytes at or above `offset`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Layout:
    """Storage shape of one layer: `dtype` is the originals' type, sizes are in elements, offsets and `*_bytes` in bytes.

    Raises ValueError for a size that no kernel takes, naming those that are allowed.
    """

    num_kv_heads: int
    head_dim: int
    block_size: int
    value_group: int
    dtype: str

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("dtype", self.dtype, tuple(ITEMSIZE)),
            ("head_dim", self.head_dim, HEAD_DIMS),
            ("block_size", self.block_size, BLOCK_SIZES),
            ("value_group", self.value_group, VALUE_GROUPS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(str, allowed))}")
        if self.num_kv_heads < 1:
            raise ValueError(f"num_kv_heads is {self.num_kv_heads}; it must be at least 1")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Layouts are what most is looked up by: fifteen times a call."""
        return hash((self.num_kv_heads, self.head_dim, self.block_size, self.value_group, self.dtype))

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def num_value_groups(self) -> int:
        return -(-self.head_dim // self.value_group)

    def own_locations(self, original_offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [2, m, Hkv], keys and values: ~offset of each record of the original blocks at byte offsets [m]."""
        records = np.arange(2 * self.num_kv_heads, dtype=np.int64).reshape(2, 1, -1) * self.original_record_bytes
        return ~(original_offsets[:, None] + records)

    @property
    def key_scale_at(self) -> int:
        return self.block_size * self.head_dim

    @property
    def key_offset_at(self) -> int:
        return self.key_scale_at + 2 * self.head_dim

    @property
    def value_error_at(self) -> int:
        return self.key_offset_at + 2 * self.head_dim

    @property
    def value_norm_at(self) -> int:
        return self.value_error_at + 2 * self.block_size

    @property
    def annotations_at(self) -> int:
        return self.value_norm_at + 2 * self.block_size

    @property
    def flags_at(self) -> int:
        return self.annotations_at + 32

    @property
    def value_scale_at(self) -> int:
        return align(self.flags_at + 4)

    @property
    def value_offset_at(self) -> int:
        return self.value_scale_at + 2 * self.block_size * self.num_value_groups

    @property
    def value_codes_at(self) -> int:
        return self.value_offset_at + 2 * self.block_size * self.num_value_groups

    @property
    def hot_record_bytes(self) -> int:
        return align(self.value_codes_at + self.block_size * self.head_dim // 2)

    @property
    def hot_block_bytes(self) -> int:
        return self.num_kv_heads * self.hot_record_bytes

    @property
    def original_record_bytes(self) -> int:
        return self.block_size * self.head_dim * self.itemsize

    @property
    def original_block_bytes(self) -> int:
        return 2 * self.num_kv_heads * self.original_record_bytes

    @cached_property
    def as_array(self) -> NDArray[np.int64]:
        """The numbers a compiled kernel needs, in the order of `KERNEL_FIELDS`, int64."""
        return np.array([int(getattr(self, name)) for name in KERNEL_FIELDS] + [DTYPE_CODE[self.dtype]], dtype=np.int64)


KERNEL_FIELDS = (
    "num_kv_heads",
    "head_dim",
    "block_size",
    "value_group",
    "num_value_groups",
    "hot_record_bytes",
    "original_record_bytes",
    "value_codes_at",
    "key_scale_at",
    "key_offset_at",
    "value_scale_at",
    "value_offset_at",
    "value_error_at",
    "value_norm_at",
    "annotations_at",
    "flags_at",
    "itemsize",
)
DTYPE_CODE = {"float16": 0, "bfloat16": 1, "float32": 2}
