"""The three memories of a backend and the accounts of what is used of them."""

from tierd_kernels.layout import ALIGNMENT, Memory

from tierd.pools.ranges import RangeAllocator


class Arenas:
    """The hot, scratch and originals pools over the memory that a backend reserved; they are as large as its arrays, for life."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.hot = RangeAllocator(memory.hot.nbytes, ALIGNMENT, "hot")
        self.scratch = RangeAllocator(memory.scratch.nbytes, ALIGNMENT, "scratch")
        self.originals = RangeAllocator(memory.originals.nbytes, ALIGNMENT, "originals")

    @property
    def pools(self) -> tuple[RangeAllocator, RangeAllocator, RangeAllocator]:
        return self.hot, self.scratch, self.originals

    def check(self) -> None:
        """Assert that every pool's accounts agree."""
        for pool in self.pools:
            pool.check()
