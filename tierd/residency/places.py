"""Where kernels read the original records of one layer of one session, kept from call to call.

Legend: m full blocks, Hkv KV heads, kind 0 keys and 1 values.
"""

import numpy as np
from numpy.typing import NDArray

from tierd.residency.blocks import BlockTable, Ids
from tierd.residency.counting import refresh

NONE: Ids = np.empty(0, dtype=np.int64)


class Places:
    """Of 8192 blocks of 8 KV heads, gathering all places for each call took 0.5 ms. Mostly no record lies in scratch, and then there is
    nothing to say; else only what has changed since the last call is written.

    `held` [h]: of the blocks last asked for, those (ids) with a record in scratch."""

    def __init__(self) -> None:
        self.held = NONE
        self._at = np.empty((2, 0, 0), dtype=np.int64)
        self._known = 0  # so many blocks are as the table had them at `_seen`
        self._seen = -1

    def of(self, table: BlockTable, ids: Ids) -> NDArray[np.int64] | None:
        """int64 [2, m, Hkv] of these full blocks, as `BlockTable.location`; None: no record of theirs lies in scratch. The next call writes
        into the same array. `ids`: those of the last call, cut anywhere, and blocks behind them that were added to the table since, or
        were not full then."""
        if not self._known and not table.resident[ids].any():
            self.held = NONE
            return None
        self._grow(table, len(ids))
        held = np.empty(len(ids), np.int64)
        count = refresh(ids, self._known, self._seen, table.stamp, table.resident, table.location, self._at, held)
        self._known, self._seen, self.held = len(ids), table.now, held[:count]
        return self._at[:, : len(ids)] if count else None

    def _grow(self, table: BlockTable, count: int) -> None:
        if self._at.shape[1] >= count:
            return
        longer = np.empty((2, max(64, 2 * self._at.shape[1], count), table.layout.num_kv_heads), dtype=np.int64)
        if self._known:
            longer[:, : self._known] = self._at[:, : self._known]
        self._at = longer
