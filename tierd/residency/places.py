"""Where kernels read the original records of one layer of one session, kept from call to call.

Legend: m full blocks, Hkv KV heads, kind 0 keys and 1 values.
"""

import numpy as np
from numpy.typing import NDArray

from tierd.residency.blocks import BlockTable, Ids

NONE = np.empty(0, dtype=np.int64)


class Places:
    """Of 8192 blocks of 8 KV heads, gathering all places for each call took 0.5 ms. Mostly no record lies in scratch, and then there is
    nothing to say; else only what has changed since the last call is written."""

    def __init__(self) -> None:
        self._offsets = NONE  # of the blocks that the array was made for
        self._at = np.empty((2, 0, 0), dtype=np.int64)
        self._held = NONE

    def of(self, table: BlockTable, ids: Ids) -> NDArray[np.int64] | None:
        """int64 [2, m, Hkv] of these full blocks, as `BlockTable.location`; None: no record of theirs lies in scratch. The next call writes
        into the same array."""
        held = np.flatnonzero(table.resident[ids])
        if not len(held):
            return None
        offsets = table.original_offset[ids]
        known = min(len(self._offsets), len(offsets))
        if not np.array_equal(self._offsets[:known], offsets[:known]):  # cut, and grown again: ids and offsets are used anew
            self._offsets, self._held, known = NONE, NONE, 0
        if len(offsets) > len(self._offsets):
            self._grow(table, offsets, known)
        self._at[:, self._held] = table.layout.own_locations(self._offsets[self._held])
        self._at[:, held] = table.location[:, ids[held]]
        self._held = held
        return self._at[:, : len(ids)]

    def _grow(self, table: BlockTable, offsets: NDArray[np.int64], known: int) -> None:
        """`offsets`: those that are `known`, and more."""
        if self._at.shape[1] < len(offsets):
            longer = np.empty((2, max(64, 2 * self._at.shape[1], len(offsets)), table.layout.num_kv_heads), dtype=np.int64)
            if known:
                longer[:, :known] = self._at[:, :known]
            self._at = longer
        self._at[:, known : len(offsets)] = table.layout.own_locations(offsets[known:])
        self._offsets = offsets
