"""Whose copies may start when the copier has little room."""

from collections import Counter
from collections.abc import Collection


class Turns:
    """Divides `limit` copies under way between the sessions that want some.

    A session may have its part of the limit under way, at least one. Who was refused for lack of room waits in order: room is kept for
    those ahead, so a session that asks rarely is not passed by others for ever.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._under_way: Counter[str] = Counter()
        self._refused: dict[str, None] = {}  # a set in order

    def room(self, owner: str, active: Collection[str]) -> int:
        """How many copies `owner` may start now. `active`: sessions between which the limit is divided, `owner` is one anyway."""
        for gone in [name for name in self._refused if name not in active and name != owner]:
            del self._refused[gone]
        ahead = 0
        for name in self._refused:
            if name == owner:
                break
            ahead += 1
        part = max(1, self._limit // len({owner, *active}))
        return max(0, min(part - self._under_way[owner], self._limit - self._under_way.total() - ahead))

    def start(self, owner: str, count: int = 1) -> None:
        """So many of its copies have begun."""
        self._under_way[owner] += count
        self._refused.pop(owner, None)

    def refuse(self, owner: str) -> None:
        """It wanted a copy when there was no room, and takes its place behind those who wait."""
        self._refused.setdefault(owner)

    def end(self, owner: str, count: int = 1) -> None:
        """So many of its copies are done, whatever came of them."""
        assert self._under_way[owner] >= count
        self._under_way[owner] -= count
        if not self._under_way[owner]:
            del self._under_way[owner]
