"""Dense attention in float64."""

import numpy as np

from tierd_kernels.numerics import Array


def dense(q_Rd: Array, k_td: Array, v_td: Array, scale: float, visible_R: np.ndarray) -> Array:
    """softmax(scale q k^T) v over the first visible_R[r] tokens of row r; [R, d]."""
    out = np.empty((len(q_Rd), v_td.shape[1]))
    for r, n in enumerate(visible_R):
        s = scale * (k_td[:n] @ q_Rd[r])
        w = np.exp(s - s.max())
        out[r] = w @ v_td[:n] / w.sum()
    return out
