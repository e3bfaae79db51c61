"""Which original records a call read, from what its kernels marked: one compiled pass, since numpy took 2 ms for 131,072 tokens and 8 KV
heads where most blocks had been skipped, which is marked too."""

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.cuda.sources import ROW_TILE
from tierd_kernels.floats import compiled
from tierd_kernels.in_scratch import NOTHING, holds

OF_KIND = (1 << ROW_TILE) - 1  # bits of a mark that say for which rows of the tile the keys were read; behind them, the values


@compiled()
def count_reads(
    marks: NDArray[np.uint32], heads: int, words: NDArray[np.int64], reads: NDArray[np.bool_], cold: NDArray[np.int64]
) -> None:
    """Sets in `reads` [2, full, Hkv] the records that marks uint32 [Hkv * tiles, full] name, and adds to `cold` [Hkv * tiles * ROW_TILE]
    those that a row read from the host: which have no copy, by the `words` of `InScratch`; NOTHING where none has."""
    tiles = len(marks) // heads
    for tile in range(len(marks)):
        head = tile // tiles
        for block in range(marks.shape[1]):
            mark = marks[tile, block] & np.uint32(OF_KIND | OF_KIND << ROW_TILE)
            if not mark:
                continue
            for kind in range(2):
                rows = mark >> np.uint32(ROW_TILE * kind) & np.uint32(OF_KIND)
                if not rows:
                    continue
                reads[kind, block, head] = True
                if len(words) and holds(words, (2 * block + kind) * heads + head):
                    continue
                for row in range(ROW_TILE):
                    cold[tile * ROW_TILE + row] += np.int64(rows >> np.uint32(row) & np.uint32(1))


def prepare() -> None:
    """Compiles it, or loads it."""
    count_reads(np.zeros((1, 0), np.uint32), 1, NOTHING, np.zeros((2, 0, 1), np.bool_), np.zeros(ROW_TILE, np.int64))
