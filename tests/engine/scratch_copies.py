"""Copies begun without an engine, and where originals lie."""

import numpy as np
from numpy.typing import NDArray

from tierd.residency import BlockTable, Residency

Ints = NDArray[np.int64]


def copies_begun(residency: Residency, table: BlockTable, kind: int, blocks: Ints, heads: Ints) -> Ints:
    """Of records of one kind, as many as scratch has room for, the first ones; returns their ids."""
    targets = residency.reserve(table, kind, len(blocks))
    n = len(targets)
    return residency.begin_copies(table, np.full(n, kind), blocks[:n], heads[:n], targets)


def original_at(table: BlockTable, kind: int | Ints, block: int | Ints, head: int | Ints) -> Ints:
    """Byte offsets in the originals of these records, of the shape that indices have together."""
    layout = table.layout
    return np.asarray(table.original_offset[block] + (kind * layout.num_kv_heads + head) * layout.original_record_bytes)
