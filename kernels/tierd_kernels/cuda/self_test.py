"""What the bounds assume of the device's arithmetic, tried when a daemon starts. Needs CuPy."""

import cupy as cp
import numpy as np

from tierd_kernels.cuda.launch import ANY, kernel
from tierd_kernels.cuda.sources import LANES
from tierd_kernels.errors import DeviceUnavailable

ROUNDS = 2000
# In units of 2^-24: CERTIFICATE.md, "An MMA" and "Scores".
MMA_MAX, EXP_MAX = 34.0, 2.0**1.5


def verify() -> None:
    """Raises DeviceUnavailable where MMAs or exponentials err more than every bound takes for granted."""
    worst = cp.full(3, np.nan, cp.float32)
    kernel(ANY, "self_test")((1,), (LANES,), (worst, np.int32(ROUNDS)))
    mma, exp, integer = worst.get().tolist()
    if not (mma <= MMA_MAX and exp <= EXP_MAX and integer == 0.0):
        raise DeviceUnavailable(
            f"the device's arithmetic is not what bounds rest on: an MMA was off by {mma:.1f} units of its terms' sum (at most "
            f"{MMA_MAX:.0f} are allowed for), ex2.approx by {exp:.2f} (at most {EXP_MAX:.2f}), INT8 MMAs and "
            f"transpositions were {'not ' if integer else ''}exact; serve with --backend cpu"
        )
