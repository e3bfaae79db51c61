"""Hashes of records that lie anywhere in memory."""

import numpy as np
import xxhash
from numpy.typing import NDArray

from tierd.compiling import compiled

LINE = 64  # bytes of the processor's caches
TOGETHER_BYTES = 1 << 16  # of records that are fetched together: they fit a core's second cache

Ints = NDArray[np.int64]


def digests(memory: NDArray[np.uint8], starts: Ints, nbytes: int) -> NDArray[np.uint64]:
    """xxh3 (64 bit) of the records of `nbytes` that begin there, of the shape of `starts` (byte offsets)."""
    return np.array(hashes(memory, starts.ravel(), nbytes), np.uint64).reshape(starts.shape)


def hashes(memory: NDArray[np.uint8], starts: Ints, nbytes: int) -> list[int]:
    """The same, of `starts` [n].

    A record of 4 KB that is in no cache takes 0.95 us, most of it waiting for memory, line after line. Sixteen are fetched side by side
    first: 0.6 us each. Fewer are not: where a call reads a few originals now and then, what fetches them is in no cache either, and one
    record took 27 us with it and 15 without, eight 28 and 22, sixteen 32 and 29.
    """
    raw, found = memory.data, list[int]()
    together = max(1, TOGETHER_BYTES // nbytes)
    for first in range(0, len(starts), together):
        some = starts[first : first + together]
        if len(some) == together:
            _fetch(memory, some, nbytes)
        # Through a memoryview: slicing the array takes longer than to hash 4 KB.
        found += [xxhash.xxh3_64_intdigest(raw[at : at + nbytes]) for at in some.tolist()]
    return found


@compiled
def _fetch(memory: NDArray[np.uint8], starts: Ints, nbytes: int) -> int:
    """Reads a byte of every line of the records, which then are in the caches; its sum, so that it is not left out."""
    total = 0
    for at in range(0, nbytes, LINE):
        for start in starts:
            total += memory[start + at]
    return total


def prepare() -> None:
    """Compiles what fetches, or loads it."""
    digests(np.zeros(1, np.uint8), np.zeros(1, np.int64), 1)
