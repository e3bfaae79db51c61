"""Counts by block, of many records at once."""

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])
compiled: Callable[[Function], Function] = numba.njit(cache=True)


@compiled
def add(counts: NDArray[np.int32], blocks: NDArray[np.int64], amount: int) -> None:
    """Adds to the counts of these blocks, as often as each is named: numpy's own way takes ten times as long, 20 us for 256."""
    for block in blocks:
        counts[block] += amount


def prepare() -> None:
    """Compiles it, or loads it."""
    add(np.zeros(1, np.int32), np.zeros(1, np.int64), 0)
