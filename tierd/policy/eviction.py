"""Which cached copies make room."""

from collections.abc import Iterable
from typing import Protocol


class Evictable(Protocol):
    """What the choice needs to know of a copy; `last_used` is the engine step that read it last."""

    @property
    def copy_id(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def last_used(self) -> int: ...
    @property
    def pinned(self) -> bool: ...


def choose_evictions(oldest_first: Iterable[Evictable], needed_bytes: int, step: int) -> list[int]:
    """Ids of the least recently used copies that together hold `needed_bytes`; none if there are not enough.

    Pinned copies stay, and so does what `step` itself used: a working set larger than the cache must not push itself out.
    """
    chosen: list[int] = []
    freed = 0
    for copy in oldest_first:
        if freed >= needed_bytes:
            break
        if not copy.pinned and copy.last_used < step:
            chosen.append(copy.copy_id)
            freed += copy.nbytes
    return chosen if freed >= needed_bytes else []
