"""What kernels are told of the copies of one layer of one session, kept from call to call.

Legend: m full blocks, Hkv KV heads.
"""

import numpy as np
from tierd_kernels.in_scratch import InScratch, empty_words

from tierd.residency.blocks import BlockTable, Ids
from tierd.residency.counting import changed, renew

NO_PLACES = np.empty(0, np.uint32)


class Places:
    """Gathering what is said of 8192 blocks of 8 KV heads anew for each call took 0.5 ms. Mostly no record lies in scratch, and then there
    is nothing to say; else only blocks whose copies have changed since the last call are looked at."""

    def __init__(self) -> None:
        self._said: InScratch | None = None
        self._known = 0  # so many blocks are as the table had them at `_seen`
        self._seen = -1

    def of(self, table: BlockTable, ids: Ids) -> InScratch | None:
        """Which records of these full blocks have a copy; None: none. Never written again. `ids`: those of the last call, cut anywhere, and
        blocks behind them that were added to the table since, or were not full then."""
        # New blocks have no copies, but may stand where others stood that have: of a session that shares them, which was cut and has grown.
        stands = table.moved if self._said is None else table.now
        if stands > self._seen or (self._said is not None and len(ids) != self._known):
            self._said = self._renewed(table, ids)
        self._known, self._seen = len(ids), table.now
        return self._said

    def _renewed(self, table: BlockTable, ids: Ids) -> InScratch | None:
        which, said = np.empty(len(ids), np.int64), self._said
        known = min(self._known, len(ids))
        number, copies = changed(ids, known, self._seen, table.stamp, table.resident, which)
        if said is None and not copies:
            return None
        if said is not None and not number and known == self._known:
            return said
        heads = table.layout.num_kv_heads
        old, old_places = (empty_words(2 * known * heads), NO_PLACES) if said is None else said
        words, places = empty_words(2 * len(ids) * heads), np.empty(len(old_places) + copies, np.uint32)
        count = renew(ids, known, which[:number], table.location, old, old_places, words, places)
        return InScratch(words, places[:count]) if count else None
