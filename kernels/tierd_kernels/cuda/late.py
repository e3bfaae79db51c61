"""What a step tells besides its answers, read when it is asked for: its candidates. Needs CuPy's events only."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.select.candidates import Candidates


class Place(NamedTuple):
    """Views of pinned memory where a part's candidates arrive, [2, Hkv, c]."""

    blocks: NDArray[np.int32]
    scores: NDArray[np.float32]


class Late:
    """Candidates of one step's parts. The next step uses their memory again: it calls `collect` first, so that whoever asks later still
    finds what was there. `arrived`: an event behind the kernel that writes them."""

    def __init__(self, arrived: Any, places: list[Place]) -> None:
        self._arrived, self._places = arrived, places
        self._found: list[Candidates] | None = None

    def collect(self) -> None:
        """Waits for the device, the first time. May raise what CuPy raises where the device failed."""
        if self._found is None:
            self._arrived.synchronize()
            self._found = [Candidates(place.blocks.copy(), place.scores.copy()) for place in self._places]
            self._places = []

    def of(self, part: int) -> Candidates:
        """Those of the step's part of that number."""
        self.collect()
        assert self._found is not None
        return self._found[part]
