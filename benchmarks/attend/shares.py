"""What a step reads of the originals, and the tolerance at which that is a wanted share."""

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from tierd_kernels.cuda.marks import OF_KIND
from tierd_kernels.cuda.sources import ROW_TILE

CLOSE, TRIES = 0.1, 8  # of the wanted share; measurements, besides those of the ends
RTOL_MIN, RTOL_MAX = 0.02, 0.05


def read_share(marks: NDArray[np.uint32] | None, heads: int) -> float:
    """Of the original records of `heads` KV heads, keys and values alike, the share that some query row of theirs promotes: each of them is
    read once. marks: uint32 [heads * tiles, full blocks], as an answer has them, None where nothing was promoted."""
    if marks is None:
        return 0.0
    of_head = np.bitwise_or.reduce(marks.reshape(heads, -1, marks.shape[1]), axis=1)
    return float(np.mean([of_head & OF_KIND > 0, of_head & OF_KIND << ROW_TILE > 0]))


def tolerance(share_at: Callable[[float], float], wanted: float) -> float:
    """The relative tolerance at which `share_at` is nearest to `wanted` of those tried: none further once one is within CLOSE of it. No
    tolerance is measured twice. Raises ValueError where none between RTOL_MIN and RTOL_MAX has that share."""

    @cache
    def excess(x: float) -> float:
        ratio = max(share_at(10.0**x) / wanted, 0.01)
        found[x] = abs(float(np.log(ratio)))
        return 0.0 if abs(ratio - 1.0) <= CLOSE else float(np.log(ratio))

    found: dict[float, float] = {}
    ends = float(np.log10(RTOL_MIN)), float(np.log10(RTOL_MAX))
    many, few = map(excess, ends)
    if many < 0.0 or few > 0.0:
        raise ValueError(f"the share read is not {wanted} at any tolerance from {RTOL_MIN} to {RTOL_MAX}")
    brentq(excess, *ends, xtol=1e-5, maxiter=TRIES, disp=False)
    return float(10.0 ** min(found, key=found.__getitem__))
