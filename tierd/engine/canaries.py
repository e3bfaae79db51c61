"""Which quantised blocks a call scores from their originals too."""

import numpy as np
from numpy.typing import NDArray

NO_BLOCKS = np.empty(0, np.int64)
DRAWN_AT_ONCE = 1024
FAR = 1 << 50  # blocks: more than are ever asked for; so many times that fit int64


class Canaries:
    """Draws each full block of each call with probability `share`, whatever else is drawn. The blocks of all calls stand in one row, and
    what is drawn is how far it is from one canary to the next: a number of canaries for each call, and then which, took 28 us a call."""

    def __init__(self, share: float, seed: int) -> None:
        self._share, self._random = share, np.random.default_rng(seed)
        self._passed = 0  # blocks of the row
        self._ahead = self._after(-1) if share else NO_BLOCKS  # their places in the row, rising

    def draw(self, num_blocks: int) -> NDArray[np.int64]:
        """Those of a call's full blocks, in rising order."""
        if not self._share:
            return NO_BLOCKS
        start, self._passed = self._passed, self._passed + num_blocks
        while self._ahead[-1] < self._passed:
            self._ahead = np.concatenate([self._ahead, self._after(self._ahead[-1])])
        count = self._ahead.searchsorted(self._passed)
        drawn, self._ahead = self._ahead[:count] - start, self._ahead[count:]
        return drawn

    def _after(self, place: int) -> NDArray[np.int64]:
        """The next ones after that place."""
        gaps = np.minimum(self._random.geometric(self._share, DRAWN_AT_ONCE), FAR)
        return place + np.cumsum(gaps)
