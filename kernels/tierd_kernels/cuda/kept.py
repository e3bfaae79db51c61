"""What is kept of arrays that calls hand over again and again: offsets of blocks and norms of groups. They change with every sixteenth
token of a layer, or less often; with each call they were 140 KB on the link at 131,072 tokens. Needs CuPy."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.cuda.staging import ALIGNMENT, Region, Staging


class OfArray:
    """What `work` makes of an array, worked out once. From then on the array is read-only: a change would not be noticed here."""

    def __init__(self, work: Callable[[NDArray[Any]], int]) -> None:
        self._work = work
        self._known: dict[int, tuple[Any, int]] = {}

    def __call__(self, array: NDArray[Any]) -> int:
        key = id(array)
        found = self._known.get(key)
        if found is None:
            array.flags.writeable = False
            known = self._known
            # It goes with the array, before another can have its identity.
            found = known[key] = weakref.ref(array, lambda _: known.pop(key, None)), self._work(array)
        return found[1]

    def forget(self) -> None:
        """All of it."""
        self._known.clear()


class Largest:
    """The largest number that `look_up` finds of an array's elements. What it found of an array is known of one that begins with it in the
    same memory, as offsets of blocks do when one more is full: only what is new is looked up. Elements of such memory do not change."""

    def __init__(self, look_up: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        self._look_up = look_up
        self._known: dict[int, tuple[Any, int, int]] = {}  # by the identity of what owns the memory: it, how many elements, the largest

    def __call__(self, array: NDArray[Any]) -> int:
        owner = array.base
        if not isinstance(owner, np.ndarray) or not _begins_with(owner, array):
            return int(self._look_up(array).max())
        known, key = self._known, id(owner)
        found = known.get(key)
        if found is None or found[1] >= len(array):
            largest = int(self._look_up(array).max())
        else:
            largest = max(found[2], int(self._look_up(array[found[1] :]).max()))
        if found is None or found[1] < len(array):  # it goes with its owner, before another can have its identity
            known[key] = weakref.ref(owner, lambda _: known.pop(key, None)), len(array), largest
        return largest


def _begins_with(owner: NDArray[Any], array: NDArray[Any]) -> bool:
    mine, theirs = (x.__array_interface__["data"][0] for x in (owner, array))
    return mine == theirs and owner.ndim == array.ndim == 1 and (owner.dtype, owner.strides) == (array.dtype, array.strides)


class Pile:
    """Arrays behind one another in a range of `nbytes` in pinned memory, which its twin on the device follows."""

    def __init__(self, nbytes: int) -> None:
        self.staging = Staging(nbytes)
        self.clear()

    def clear(self) -> None:
        """The next array comes first again."""
        self._region, self._uploaded = Region(len(self.staging.host)), 0

    def put(self, array: NDArray[Any]) -> int:
        """The array's address on the device, C-contiguous, once `upload` was enqueued. Raises ValueError where it does not fit."""
        start = self._region.take(array.nbytes)
        self.staging.view(start, array.shape, array.dtype)[...] = array
        return self.staging.at + start

    def upload(self, stream: Any) -> None:
        """Enqueues the copy of what is new; mostly nothing is."""
        if self._uploaded < self._region.used:
            self.staging.upload(stream, self._uploaded, self._region.used)
            self._uploaded = self._region.used


def most_bytes(arrays: list[NDArray[Any]]) -> int:
    """What they take in an empty pile, at most."""
    return sum([array.nbytes for array in arrays]) + ALIGNMENT * len(arrays)


class Kept:
    """Copies on the device of arrays that do not change while they live; of `nbytes` together, with those that have gone since.

    A copy lies behind the one made before it. Where there is no room behind that all are forgotten, and made again when calls ask for them:
    of a session of 131,072 tokens and 32 layers, which has 4.3 MB and 128 KB more with a layer's every eighth token, 128 MiB are full after
    240 tokens. To look for what was used least recently, and for room between what was not, could save one call's copies in 30.

    Copies are made on the stream that steps share, so that what an enqueued step reads is not overwritten before it has run."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self._pile = nbytes, Pile(nbytes)
        self._at = OfArray(self._pile.put)

    def at(self, arrays: list[NDArray[Any]]) -> list[int]:
        """Addresses at which a step finds these, once `upload` was enqueued. All of a step's at once: the next ones may take their place;
        earlier uploads must have been carried out. Raises ValueError where these alone do not fit."""
        try:
            return [self._at(x) for x in arrays]
        except ValueError:
            self._at.forget()
            self._pile.clear()
            return [self._at(x) for x in arrays]

    def upload(self, stream: Any) -> None:
        """Of what is new."""
        self._pile.upload(stream)
