"""Replays steps through a policy over a simulated link: which originals were at hand, which had to be waited for, what was copied in vain.

Time is simulated. A layer of a step computes for `COMPUTE_US`; then what it has to read from the host is exposed: a gather takes 9.2 us
and its bytes at 55 GB/s, which makes the 14 us that 64 blocks of 4 KB take on an H200. Copies ahead of need have half the link while layers
compute and none while one reads. `reactive` is the paper's: its copies are what the step fetched anyway, at hand from the next call on and
free of further cost.

That is what policies foresee: what they choose begins at once. The engine lets a few copies wait (`tierd/engine/wanted.py`), which spares
its host more than it exposes; a replay that `waits` does as the engine. One by `recency` makes room for whatever a policy wants, in place
of what was read least recently, and hears of every call's reads, which the engine's policies do not.
"""

from collections import deque
from dataclasses import dataclass
from typing import cast

import numpy as np
from decode_steps import Steps, chosen, each
from numpy.typing import NDArray
from tierd_kernels.select.candidates import largest, near

from tierd.config import EngineConfig
from tierd.engine.scratch import Asker
from tierd.engine.wanted import Part, Wanted, Wish, that_count, together
from tierd.notes import NOTE, Looks
from tierd.policy import FIRST_STEP, NONE, Shelf, Snapshot, named
from tierd.residency import BlockTable

LINK_BYTES_PER_US = 55e3
GATHER_US = 14.0 - 64 * 4096 / LINK_BYTES_PER_US
COMPUTE_US = 40.0  # a layer's share of a decode step of an 8B model in FP16 at 4.3 TB/s is more: this is the hard case
SHARE = 0.5
CANDIDATES_MAX = EngineConfig.prefetch_candidates_max


@dataclass
class Outcome:
    """Totals over a replay. Bytes and microseconds. `asked`: what the steps say was needed; `needed`: what was read, which
    a preference for what is at hand changes."""

    asked: int = 0
    needed: int = 0
    hits: int = 0
    late: int = 0
    copied: int = 0
    wasted: int = 0
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    exposed_us: float = 0.0

    def row(self, steps: Steps) -> dict[str, float]:
        """Per step, and as shares."""
        count = len(steps.shares)
        return {
            "hit_rate": self.hits / max(1, self.needed),
            "late": self.late,
            "host_bytes_per_step": (self.demand_bytes + self.prefetch_bytes) / count,
            "exposed_us_per_step": self.exposed_us / count,
            "exposed_us_per_call": self.exposed_us / (count * steps.layers),
            "wasted_share": self.wasted / max(1, self.copied),
            "wasted_bytes": self.wasted * steps.record_bytes,
            "prefetch_bytes": self.prefetch_bytes,
        }


class Replay:
    """One session over `slots` (of keys, of values) of scratch. Block ids are `layer * m + block`. `waits`: copies begin when the engine
    would have them begin, and not at once; `recency`: the one goes that was read least recently."""

    def __init__(self, steps: Steps, policy: str, slots: tuple[int, int], waits: bool = False, recency: bool = False) -> None:
        self._steps, self._policy, self._slots, self._recency = steps, named(policy), slots, recency
        self._waits, self._wanted, self._table = waits, Wanted(), cast(BlockTable, None)  # which a wish only hands on
        _, layers, _, m, heads = steps.shares.shape
        shape = (2, layers * m, heads)
        self._notes = np.zeros(shape, NOTE)
        self._copy_id = self._notes["copy_id"]
        self._copy_id[:] = NONE
        self._resident, self._used = np.zeros(shape, bool), np.zeros(shape, bool)
        self._shelf = Shelf(*slots)
        self._places: dict[int, tuple[int, int, int]] = {}
        self._under_way: deque[tuple[int, float]] = deque()  # (copy id, microseconds of link still needed)
        self._now = FIRST_STEP
        self._looks = [Looks() for _ in range(layers)]
        self._free_ids = list(range(sum(slots)))
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """All of it. What is left at the end unread counts as wasted."""
        for t, layer in each(self._steps):
            self._link(COMPUTE_US * SHARE)
            self._call(t, layer)
        self.outcome.wasted += sum(not self._used[place] for place in self._places.values())
        return self.outcome

    def _call(self, t: int, layer: int) -> None:
        self._wanted.serve(self._wanted.due(), lambda wish, taken: sum(self._slots), self._begin)
        m, blocks = self._steps.shares.shape[3], int(self._steps.blocks[t])
        ids = np.arange(layer * m, layer * m + blocks)
        shares, asked = (x[t, layer, :, :blocks] for x in (self._steps.shares, self._steps.needed))
        at_hand = self._resident[:, ids]
        needed = chosen(shares, asked, at_hand, self._policy.preference)
        missed = needed & ~at_hand
        self._used[:, ids] |= needed & at_hand
        out, count = self.outcome, int(missed.sum())
        out.asked += int(asked.sum())
        out.needed += int(needed.sum())
        out.hits += int((needed & at_hand).sum())
        out.late += int((missed & (self._copy_id[:, ids] >= 0)).sum())
        if count:
            out.demand_bytes += count * self._steps.record_bytes
            out.exposed_us += GATHER_US + count * self._steps.record_bytes / LINK_BYTES_PER_US
            self._wanted.missed(count)
        self._now += 1.0 / self._steps.layers
        factor = self._policy.rescale(self._now)
        if factor != 1.0:
            self._notes["worth"] *= factor
            self._shelf.rescale(factor)
            self._wanted.rescale(factor)
        if self._recency:
            read = self._copy_id[:, ids][needed & at_hand]
            self._shelf.gain(read, np.full(len(read), self._now))
        looks = self._looks[layer]
        if not self._policy.looks_at(t + layer, looks.settled, int(needed.sum()), that_count(count) if self._waits else count):
            return
        candidates, scores = largest(near(shares, needed, np.where(at_hand, float(self._policy.preference), 1.0)), CANDIDATES_MAX)
        exact = np.zeros(needed.shape[2], bool)
        reads = np.array(np.nonzero(needed))
        choice = self._policy.choose(Snapshot(ids, reads, exact, candidates, scores, self._notes, self._now, looks.last))
        looks.add(self._now, choice.settled)
        if not self._recency:
            self._shelf.gain(choice.held, choice.held_worths)
        wish = Wish(Asker("session", "session", self._steps.layers, layer, 1), self._table, choice)
        if self._waits:
            self._wanted.add(wish)
        else:
            self._begin([(wish, slice(None))])

    def _begin(self, parts: list[Part]) -> None:
        """Begins copies of what is wanted, as far as there is room; of some there are copies by now."""
        (records, worths, _), displace = together(parts), parts[0][0].choice.displace
        if self._recency:
            worths, displace = np.full(len(worths), self._now), 1.0
        without = self._copy_id[*records.T] == NONE
        for kind in range(2):
            which = without & (records[:, 0] == kind)
            self._copy(kind, records[which], worths[which], displace)

    def _copy(self, kind: int, records: NDArray[np.int64], worths: NDArray[np.float64], displace: float) -> None:
        """Begins copies of these, the best first, as far as there is room for them in place of what is worth less."""
        free = self._slots[kind] - self._shelf.used_bytes(kind, "session")
        room = self._shelf.choose(kind, "session", 1, displace * worths, free, ["session"])
        for copy_id in room.evictions.tolist():
            self._drop(copy_id)
        begun = records[: room.placed]
        left_out = self._wanted.leave_out("session", kind) if room.placed < len(records) else []
        self._notes["waits"][*np.concatenate([records, *left_out]).T] = 0
        ids = np.array([self._free_ids.pop() for _ in begun], np.int64)
        self._shelf.put(np.full(len(ids), kind), ids, "session", 1, worths[: len(begun)])
        for copy_id, (_, block, head) in zip(ids.tolist(), begun.tolist(), strict=True):
            self._places[copy_id] = kind, block, head
            self._copy_id[kind, block, head] = copy_id
            self._used[kind, block, head] = False
            self.outcome.copied += 1
            if self._policy.name == "reactive":
                self._arrive(copy_id)  # it is what the call has just read
            else:
                self.outcome.prefetch_bytes += self._steps.record_bytes
                self._under_way.append((copy_id, self._steps.record_bytes / LINK_BYTES_PER_US))

    def _link(self, free_us: float) -> None:
        """Copies go on for so much link time."""
        while self._under_way and free_us > 0:
            copy_id, left_us = self._under_way.popleft()
            if left_us > free_us:
                self._under_way.appendleft((copy_id, left_us - free_us))
                return
            free_us -= left_us
            self._arrive(copy_id)

    def _arrive(self, copy_id: int) -> None:
        place = self._places[copy_id]
        self._resident[place] = True
        self._shelf.arrive(np.array([copy_id]))

    def _drop(self, copy_id: int) -> None:
        place = self._places.pop(copy_id)
        self._shelf.drop(np.array([copy_id]))
        self._free_ids.append(copy_id)
        self.outcome.wasted += not self._used[place]
        self._copy_id[place], self._resident[place] = NONE, False
