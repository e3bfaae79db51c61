"""The two policies to compare with: no cache at all, and the paper's (arXiv 2605.20868): fetch on demand, least recently used goes."""

import numpy as np

from tierd.policy.snapshot import NONE, NOTHING, Choice, Snapshot


class Nothing:
    """Copies nothing."""

    name = "none"
    wants_candidates = False
    preference = 1

    def looks_at(self, turn: int, settled: int, needs: int, misses: int) -> bool:
        return False

    def choose(self, snapshot: Snapshot) -> Choice:
        return NOTHING

    def rescale(self, now: float) -> float:
        return 1.0


class Reactive:
    """Every original that a call needed gets a copy; its worth is when it was needed last."""

    name = "reactive"
    wants_candidates = False
    preference = 1

    def looks_at(self, turn: int, settled: int, needs: int, misses: int) -> bool:
        return True

    def choose(self, snapshot: Snapshot) -> Choice:
        kind, block, head = snapshot.reads
        useful = ~snapshot.exact_heads[head]
        kind, ids, head = kind[useful], snapshot.ids[block[useful]], head[useful]
        snapshot.notes["worth"][kind, ids, head] = snapshot.now
        copies = snapshot.notes["copy_id"][kind, ids, head]
        records, held = np.stack([kind, ids, head], axis=1)[copies == NONE], copies[copies >= 0]
        worths, held_worths = (np.full(len(x), snapshot.now) for x in (records, held))
        return Choice(records, worths, 1.0, held, held_worths)

    def rescale(self, now: float) -> float:
        return 1.0
