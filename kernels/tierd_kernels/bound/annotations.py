"""What the bound takes besides statistics, and what it gives."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.numerics import Array


@dataclass(frozen=True)
class Annotations:
    """What the bound needs of the blocks of KV head H besides statistics; norms are divided by the head's unit.

    `head_R` int64: the KV head of each row. `value_spectral_Hb` sV, `amplitude_Hb` the norm that arithmetic errors of a block's
    values scale with, `value_norm_max_Hb` the largest ||V_t||, `group_value_HG` SV and `group_error_HG` SR, infinite where not
    known. `underflow_H` is what the value pass may lose to FP32 products below the smallest normal, whatever their weights.
    """

    head_R: NDArray[np.int64]
    value_spectral_Hb: Array
    amplitude_Hb: Array
    value_norm_max_Hb: Array
    group_value_HG: Array
    group_error_HG: Array
    underflow_H: Array
    num_tokens: int
    block_size: int


@dataclass(frozen=True)
class Bound:
    """The bound and its parts, each float64[R] in units of the values; `key_Rb` and `value_Rb` are the blocks' own shares."""

    total: Array
    key: Array
    value: Array
    skip: Array
    arithmetic: Array
    value_norm: Array
    key_Rb: Array
    value_Rb: Array
