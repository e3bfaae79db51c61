"""What the engine's thread does for copies, in microseconds a copy, where nothing is copied: room for each is made by another that goes."""

import time

import numpy as np
from numpy.typing import NDArray
from tierd_kernels.host import hot_block_bytes
from tierd_kernels.layout import Layout, Memory

from tierd.engine.counters import Counters
from tierd.engine.scratch import NO_COPIES, Asker, Scratch
from tierd.pools import Arenas
from tierd.residency import BlockTable, Ids, Residency
from tierd.warm import warm_policy

LAYOUT = Layout(num_kv_heads=8, head_dim=128, block_size=16, value_group=16, dtype="float16")
BLOCKS, LAYERS = 8192, 4  # 131,072 tokens
SHARE = 8  # of the originals one in so many has room in scratch


class Cost:
    """A residency whose scratch is full of copies of keys that were worth something once."""

    def __init__(self, seed: int) -> None:
        count = BLOCKS * LAYERS
        sizes = count * hot_block_bytes(LAYOUT), count * LAYOUT.original_block_bytes // SHARE, count * LAYOUT.original_block_bytes
        self.residency = Residency(Arenas(Memory(*(np.zeros(nbytes, np.uint8) for nbytes in sizes))), hot_block_bytes)  # nobody writes them
        self.table: BlockTable = self.residency.table(LAYOUT)
        self.scratch, self.rng, self.round = Scratch(self.residency, Counters(), lambda asker, count: None), np.random.default_rng(seed), 0
        ids = self.table.add_tails(count)
        self.table.give_hot(ids)
        while not self.residency.arenas.scratch[0].free_bytes < LAYOUT.original_record_bytes:
            self.finish(self.begin(8192))

    def begin(self, count: int) -> Ids:
        """Of records drawn at random; returns the copies' ids."""
        self.round += 1
        heads, drawn = LAYOUT.num_kv_heads, NO_COPIES
        while len(drawn) < count:  # few are looked at: the caches are left as they are
            drawn = np.unique(np.concatenate([drawn, self.rng.integers(0, BLOCKS * LAYERS * heads, 2 * count)]))
            drawn = drawn[self.table.copy_id[0, drawn // heads, drawn % heads] < 0]
        block, head = np.divmod(self.rng.permutation(drawn)[:count], heads)
        worths = self.round + np.sort(self.rng.random(count))[::-1]
        return self.timed_begin(block, head, worths)

    def timed_begin(self, block: Ids, head: Ids, worths: NDArray[np.float64]) -> Ids:
        askers = np.full(len(block), Asker("session", "family", LAYERS, 0, LAYOUT.original_record_bytes), object)
        began_s = time.perf_counter()
        ids = self.scratch.place(askers, self.table, block, head, worths, len(block), 1.0, ["family"]).ids
        self.begin_us = 1e6 * (time.perf_counter() - began_s) / max(1, len(ids))
        return ids

    def finish(self, ids: Ids) -> None:
        """As the engine does when the copier is done."""
        digests = np.zeros(len(ids), np.uint64)
        began_s = time.perf_counter()
        self.scratch.askers(ids)
        self.scratch.arrive(self.residency.finish_copies(ids, digests).settled)
        self.finish_us = 1e6 * (time.perf_counter() - began_s) / max(1, len(ids))


def copies_us(count: int, rounds: int = 40, seed: int = 0) -> dict[str, float]:
    """Medians for `count` copies at once: to begin one, another's eviction included, and to take in one that is done."""
    warm_policy()
    cost, begin, finish = Cost(seed), [], []
    for _ in range(rounds):
        ids = cost.begin(count)
        cost.finish(ids)
        begin.append(cost.begin_us)
        finish.append(cost.finish_us)
    cost.residency.check_integrity()
    return {"begin_copy_us": float(np.median(begin)), "finish_copy_us": float(np.median(finish))}
