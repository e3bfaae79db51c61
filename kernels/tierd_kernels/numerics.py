"""Rounding units and the two functions that every bound uses. All float64."""

import numpy as np
from numpy.typing import NDArray

U32 = 2.0**-24  # unit roundoff of FP32
U64 = 2.0**-53
SAFETY = 1.0 + 2.0**-10  # covers the rounding of the bound's own evaluation, which is float64 over float32 statistics
Array = NDArray[np.float64]


def gamma(n: int, u: float = U32) -> float:
    """n u / (1 - n u): the relative error of n roundings in a row (Higham, Accuracy and Stability, lemma 3.1)."""
    return n * u / (1.0 - n * u)


def phi(x: Array) -> Array:
    """(e^x - 1) / x for x >= 0, 1 at 0; infinite where e^x overflows."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        beyond = np.where(np.isinf(x), np.inf, np.expm1(x) / np.where(x == 0, 1.0, x))
        return np.where(x < 1e-8, 1.0 + x, beyond)


def psi(x: Array) -> Array:
    """(e^x - 1 - x) / x^2 for x >= 0, 1/2 at 0, infinite where e^x overflows. Below 1e-3 the series, whose remainder is under x^4 / 100."""
    series = 0.5 + x / 6.0 + x * x / 24.0 + x * x * x / 100.0
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        beyond = (np.expm1(x) - x) / np.where(x == 0, 1.0, x * x)
        return np.where(x < 1e-3, series, np.where(np.isinf(x), np.inf, beyond))
