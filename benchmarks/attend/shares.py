"""The tolerance at which what a step reads of the originals is a wanted share."""

from collections.abc import Callable
from functools import cache

import numpy as np
from scipy.optimize import brentq

CLOSE, TRIES = 0.1, 8  # of the wanted share; measurements, besides those of the ends
RTOL_MIN, RTOL_MAX = 0.02, 0.05


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
