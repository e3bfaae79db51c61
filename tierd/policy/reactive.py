"""The two policies to compare with: no cache at all, and the paper's (arXiv 2605.20868): fetch on demand, least recently used goes."""

import numpy as np

from tierd.policy.snapshot import NONE, NOTHING, Choice, Snapshot


class Nothing:
    """Copies nothing."""

    name = "none"
    wants_candidates = False

    def looks_at(self, turn: int, misses: int) -> bool:
        return False

    def choose(self, snapshot: Snapshot) -> Choice:
        return NOTHING

    def rescale(self, now: float) -> float:
        return 1.0


class Reactive:
    """Every original that a call needed gets a copy; its worth is when it was needed last."""

    name = "reactive"
    wants_candidates = False

    def looks_at(self, turn: int, misses: int) -> bool:
        return True

    def choose(self, snapshot: Snapshot) -> Choice:
        found = []
        for kind, reads in enumerate((snapshot.key_reads, snapshot.value_reads)):
            block, head = np.divmod(np.flatnonzero(reads), reads.shape[1])
            useful = ~snapshot.exact_heads[head]
            ids, head = snapshot.ids[block[useful]], head[useful]
            snapshot.notes["worth"][kind, ids, head] = snapshot.now
            missing = snapshot.notes["copy_id"][kind, ids, head] == NONE
            found.append(np.stack([np.full(int(missing.sum()), kind), ids[missing], head[missing]], axis=1))
        records = np.concatenate(found)
        return Choice(records, np.full(len(records), snapshot.now))

    def rescale(self, now: float) -> float:
        return 1.0
