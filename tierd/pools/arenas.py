"""The three memories of a backend and the accounts of what is used of them."""

from tierd_kernels.layout import ALIGNMENT, Memory

from tierd.pools.ranges import RangeAllocator


class Arenas:
    """The hot, scratch and originals pools over the memory that a backend reserved; they are as large as its arrays, for life.

    Scratch is two pools, of keys (kind 0) and of values (1), which gets what the keys' share leaves.
    """

    def __init__(self, memory: Memory, scratch_key_share: float = 0.5) -> None:
        assert 0.0 <= scratch_key_share <= 1.0
        self.memory = memory
        total_bytes = memory.scratch.nbytes // ALIGNMENT * ALIGNMENT
        key_bytes = int(total_bytes * scratch_key_share) // ALIGNMENT * ALIGNMENT
        self.hot = RangeAllocator(memory.hot.nbytes, ALIGNMENT, "hot")
        self.scratch = (
            RangeAllocator(key_bytes, ALIGNMENT, "scratch_keys"),
            RangeAllocator(total_bytes - key_bytes, ALIGNMENT, "scratch_values", start=key_bytes),
        )
        self.originals = RangeAllocator(memory.originals.nbytes, ALIGNMENT, "originals")

    @property
    def pools(self) -> tuple[RangeAllocator, ...]:
        return self.hot, *self.scratch, self.originals

    def check(self) -> None:
        """Assert that every pool's accounts agree."""
        for pool in self.pools:
            pool.check()
