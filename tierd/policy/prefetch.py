"""Which original records are worth a copy in scratch."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# A dense head reads every block, needed or not; of those only blocks that spend this share of the budget are worth keeping.
DENSE_SHARE_MIN = 0.01


class Record(NamedTuple):
    """The keys (kind 0) or values (kind 1) of one KV head of the `block`-th full block of a call."""

    kind: int
    block: int
    head: int


@dataclass(frozen=True)
class PrefetchSnapshot:
    """One finished call of m full blocks. Arrays [2, m, Hkv], kind first.

    `read_from_host`: records read from the host and without a copy under way; `contributions`: share of the error budget;
    `dense_heads` [Hkv]: heads computed densely.
    """

    read_from_host: NDArray[np.bool_]
    contributions: NDArray[np.float32]
    dense_heads: NDArray[np.bool_]


def choose_prefetches(snapshot: PrefetchSnapshot, limit: int) -> list[Record]:
    """At most `limit` records, those with the largest contributions first."""
    share = np.where(np.isfinite(snapshot.contributions), snapshot.contributions, 0.0)
    wanted = snapshot.read_from_host & (~snapshot.dense_heads | (share >= DENSE_SHARE_MIN))
    records = np.argwhere(wanted)
    order = np.argsort(-share[wanted], kind="stable")[:limit]
    return [Record(*map(int, record)) for record in records[order]]
