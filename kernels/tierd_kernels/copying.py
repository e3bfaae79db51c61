"""Copies from the originals to scratch that a backend has begun."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Copying(NamedTuple):
    """`done()`: whether they have ended; it does not wait, and raises DeviceLost. `arrived` uint8 [n, nbytes]: what lies at their targets,
    once they have; the next copies arrive in the same place."""

    done: Callable[[], bool]
    arrived: NDArray[np.uint8]
