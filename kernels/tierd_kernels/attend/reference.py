"""The value pass in float64."""

import numpy as np

from tierd_kernels.bound.reference import GROUP_TOKENS
from tierd_kernels.numerics import Array


def attend(weights_Rt: Array, factor_Rb: Array, values_Rtd: Array, block_size: int) -> Array:
    """Sums of factor * weight * value per group of 1024 tokens, [R, groups, d]. `values_Rtd` are those that each row uses."""
    tokens = weights_Rt.shape[1]
    w = weights_Rt * np.repeat(factor_Rb, block_size, axis=1)[:, :tokens]
    used = np.where(w[..., None] > 0, w[..., None] * values_Rtd, 0.0)
    return np.asarray(np.add.reduceat(used, np.arange(0, tokens, GROUP_TOKENS), axis=1))
