"""What was used last, by a key."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Recent(Generic[Item]):
    """At most `limit` items: the one that was used least recently is forgotten where there are too many."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: OrderedDict[Hashable, Item] = OrderedDict()

    def find(self, key: Hashable) -> Item | None:
        """The item of that key, which is used now."""
        found = self._items.get(key)
        if found is not None:
            self._items.move_to_end(key)
        return found

    def add(self, key: Hashable, item: Item) -> Item:
        """That item, of a key that has none yet."""
        if len(self._items) >= self._limit:
            self._items.popitem(last=False)
        self._items[key] = item
        return item
