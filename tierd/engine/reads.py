"""The original records that one call read, as a list: few are read of the many there are.

Legend: m full blocks of the call, Hkv KV heads, n records; kind 0 keys, 1 values.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tierd_kernels.in_scratch import InScratch

from tierd.residency import BlockTable, Ids

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Reads(NamedTuple):
    """Records by `kind`, `block` (its index among the call's), and KV `head`, int64 [n] each; keys first, in rising order.

    Of 131,072 tokens and 8 KV heads there are 131,072 records, and each step over all of them took 0.1 to 0.5 ms.
    """

    kind: Ints
    block: Ints
    head: Ints

    @staticmethod
    def of(key_reads: Mask, value_reads: Mask) -> "Reads":
        """From masks [m, Hkv]."""
        if not (key_reads.any() or value_reads.any()):
            return NOTHING
        # Of flat masks: numpy finds the elements of two dimensions ten times as slowly.
        keys, values = np.flatnonzero(key_reads), np.flatnonzero(value_reads)
        block, head = np.divmod(np.concatenate([keys, values]), key_reads.shape[1])
        return Reads(np.repeat([0, 1], [len(keys), len(values)]), block, head)

    def where(self, chosen: Mask) -> "Reads":
        """Those that are `chosen` [n]."""
        return Reads(self.kind[chosen], self.block[chosen], self.head[chosen])

    def from_host(self, in_scratch: InScratch | None, exact_heads: Mask) -> Mask:
        """Which were read from the host, bool [n]: without a copy, or of an exact head [Hkv], which never looks at scratch. `in_scratch`:
        what kernels were told; None: nothing lies there."""
        if in_scratch is None or not len(self.kind):
            return np.ones(len(self.kind), np.bool_)
        return ~in_scratch.holds(self.kind, self.block, self.head, len(exact_heads)) | exact_heads[self.head]

    def corrupt(self, table: BlockTable, ids: Ids) -> list[tuple[int, int, int]]:
        """(kind, block id, head) of those whose originals fail their checksum. `ids` [m]."""
        return table.corrupt_records(self.kind, ids[self.block], self.head)


NOTHING = Reads(*(np.empty(0, np.int64) for _ in range(3)))
