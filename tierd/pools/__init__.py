"""Memory that is reserved at start and never grows."""

from tierd.pools.arenas import Arenas
from tierd.pools.ranges import RangeAllocator

__all__ = ["Arenas", "RangeAllocator"]
