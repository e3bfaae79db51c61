"""The default policy: what is needed, and what comes near it, gains worth; worth fades; what is worth enough gets a copy.

Legend: see `snapshot.py`. Worths are kept multiplied by `weight(now)`, which grows as others fade, so that nothing needs to be touched to
grow old and two worths of different times compare as they are (the trick of VSIDS: Moskewicz et al., "Chaff", DAC 2001).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

from tierd.policy.snapshot import NONE, NOTHING, Choice, Snapshot

Function = TypeVar("Function", bound=Callable[..., Any])
compiled: Callable[[Function], Function] = numba.njit(cache=True)
RESCALE_AT = 512.0  # powers of two: worths and their sums stay far from the largest double
SAME = 1.5  # steps: a share seen no longer ago was the previous step's


@dataclass
class Predictive:
    """A need adds 1 to a record's worth; coming near one adds up to `near`; worth halves every `half_life` steps.

    Near: the share expected of the next step (this step's, and once more what it has grown since the previous one) over the share from
    which its head promoted (1, the whole budget, where it did not promote). Below `floor` of that a candidate is left alone. Whoever has
    no copy gets one from `admit` on, but only in place of copies of less than `displace` of its own worth.

    The values are the best of 36 on the regimes of `benchmarks/bench_tiering.py`: with a half-life of 8 old topics stay too long, and
    exposed time is up to twice that of LRU; with `displace` 1, up to 60 % of the copies push out one another.
    """

    half_life: float = 2.0
    near: float = 0.6
    floor: float = 0.3
    admit: float = 0.25
    displace: float = 0.5
    name: str = "predictive"
    wants_candidates: bool = True
    since: float = 0.0  # when the weight was 1

    def choose(self, snapshot: Snapshot) -> Choice:
        s = snapshot
        limit = s.blocks.size
        records, worths = np.empty((limit, 3), np.int64), np.empty(limit)
        count = _weigh(
            s.ids, s.key_reads, s.value_reads, s.exact_heads, s.blocks, s.scores, s.copy_id, s.worth, s.share, s.seen, s.now,
            self._weight(s.now), self.near, self.floor, self.admit, records, worths,
        )  # fmt: skip
        if not count:
            return NOTHING
        order = np.argsort(-worths[:count], kind="stable") if count > 1 else slice(count)
        return Choice(records[order], worths[order] * self.displace)

    def rescale(self, now: float) -> float:
        if now - self.since < RESCALE_AT * self.half_life:
            return 1.0
        self.since += RESCALE_AT * self.half_life
        return float(2.0**-RESCALE_AT)

    def _weight(self, now: float) -> float:
        return float(2.0 ** ((now - self.since) / self.half_life))


@compiled
def _weigh(
    ids: NDArray[np.int64], key_reads: NDArray[np.bool_], value_reads: NDArray[np.bool_], exact_heads: NDArray[np.bool_],
    all_blocks: NDArray[np.int32], all_scores: NDArray[np.float32], copy_id: NDArray[np.int64], worth: NDArray[np.float64],
    share: NDArray[np.float32], seen: NDArray[np.float64], now: float, weight: float, near: float, floor: float, admit: float,
    records: NDArray[np.int64], worths: NDArray[np.float64],
) -> int:  # fmt: skip
    """Fills `records` [., 3] and `worths` with what deserves a copy; returns how many."""
    kinds, heads, limit = all_blocks.shape
    count = 0
    for kind in range(kinds):
        reads = key_reads if kind == 0 else value_reads
        for head in range(heads):
            blocks, scores = all_blocks[kind, head], all_scores[kind, head]
            threshold = np.float32(1.0)
            if not exact_heads[head]:
                for j in range(limit):
                    if blocks[j] < 0:
                        break
                    if scores[j] < threshold and reads[blocks[j], head]:
                        threshold = scores[j]
            for j in range(limit):
                block = blocks[j]
                if block < 0:
                    break
                needed = reads[block, head] and not exact_heads[head]
                if not needed and scores[j] < 0.5 * floor * threshold:
                    continue  # even if it has grown from nothing
                at = ids[block]
                expected = scores[j]
                if seen[kind, at, head] > 0.0 and now - seen[kind, at, head] < SAME and expected > share[kind, at, head]:
                    expected += expected - share[kind, at, head]
                share[kind, at, head], seen[kind, at, head] = scores[j], now
                closeness = min(expected / threshold, 1.0)
                if not needed and closeness < floor:
                    continue
                worth[kind, at, head] += weight * (1.0 if needed else near * closeness)
                if copy_id[kind, at, head] == NONE and worth[kind, at, head] >= admit * weight:
                    records[count, 0], records[count, 1], records[count, 2] = kind, at, head
                    worths[count] = worth[kind, at, head]
                    count += 1
    return count
