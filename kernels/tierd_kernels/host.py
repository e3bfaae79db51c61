"""What backends whose kernels run on the host have in common: arenas, copies, nothing to prepare."""

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.copying import Copying
from tierd_kernels.errors import DeviceUnavailable
from tierd_kernels.layout import ALIGNMENT, Layout, Memory


def reserve(hot_bytes: int, scratch_bytes: int, originals_bytes: int) -> Memory:
    """Three arenas of zeros, of these sizes. Raises DeviceUnavailable if the host has no room for them."""
    try:
        return Memory(_aligned(hot_bytes), _aligned(scratch_bytes), _aligned(originals_bytes))
    except (MemoryError, ValueError) as error:  # ValueError: more than there are addresses
        raise DeviceUnavailable(
            f"the host cannot reserve pools of {hot_bytes} (hot), {scratch_bytes} (scratch) and {originals_bytes} (originals) bytes: "
            f"{error}; make them smaller"
        ) from error


def prepare(layout: Layout) -> None:
    """Nothing: kernels are compiled for a type of originals when they first run, and serve every layout of it."""


def hot_block_bytes(layout: Layout) -> int:
    """What one quantised block, all KV heads, takes in the hot arena."""
    return layout.hot_block_bytes


def begin_copies(memory: Memory, sources: NDArray[np.int64], targets: NDArray[np.int64], nbytes: int) -> Copying:
    """Copies n records of `nbytes` from `sources` in the originals to `targets` in scratch (byte offsets, int64 [n])."""
    arrived = np.empty((len(sources), nbytes), np.uint8)
    for i, (source, target) in enumerate(zip(sources.tolist(), targets.tolist(), strict=True)):
        memory.scratch[target : target + nbytes] = memory.originals[source : source + nbytes]
        arrived[i] = memory.scratch[target : target + nbytes]
    return Copying(lambda: True, arrived)


def _aligned(nbytes: int) -> NDArray[np.uint8]:
    """`nbytes` of zeros whose first byte is aligned in memory, so that an aligned offset is an aligned address."""
    raw = np.zeros(nbytes + ALIGNMENT, dtype=np.uint8)
    skip = -int(raw.ctypes.data) % ALIGNMENT
    return raw[skip : skip + nbytes]
