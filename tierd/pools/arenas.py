"""The three memories of the CPU backend, reserved once."""

import numpy as np
from numpy.typing import NDArray
from tierd_kernels.layout import ALIGNMENT, Memory

from tierd.pools.ranges import RangeAllocator


class Arenas:
    """Storage and accounts of the hot, scratch and originals pools. Sizes in bytes, fixed for life."""

    def __init__(self, hot_bytes: int, scratch_bytes: int, originals_bytes: int) -> None:
        self.memory = Memory(_reserve(hot_bytes), _reserve(scratch_bytes), _reserve(originals_bytes))
        self.hot = RangeAllocator(hot_bytes, ALIGNMENT, "hot")
        self.scratch = RangeAllocator(scratch_bytes, ALIGNMENT, "scratch")
        self.originals = RangeAllocator(originals_bytes, ALIGNMENT, "originals")

    @property
    def pools(self) -> tuple[RangeAllocator, RangeAllocator, RangeAllocator]:
        return self.hot, self.scratch, self.originals

    def check(self) -> None:
        """Assert that every pool's accounts agree."""
        for pool in self.pools:
            pool.check()


def _reserve(nbytes: int) -> NDArray[np.uint8]:
    """`nbytes` of zeros whose first byte is aligned in memory, so that an aligned offset is an aligned address."""
    raw = np.zeros(nbytes + ALIGNMENT, dtype=np.uint8)
    skip = -int(raw.ctypes.data) % ALIGNMENT
    return raw[skip : skip + nbytes]
