"""What is remembered of an original record's copy, and by the tiering policy of the record: kept beside its block, and gone with it. And
what tiering has found at a layer."""

from dataclasses import dataclass
from math import inf

import numpy as np

# `copy_id` is residency's, the rest the policy's. `worth`: larger is better to keep. `seen`: the step at which the record was last a
# candidate, `share` its share of the error budget then. `asked`: one more than the grade (`policy/weighing.py`) at which a copy was asked
# for that no need has followed yet, or zero; `waits`: 1 from when a copy is wanted until one begins or scratch has no room for it, which
# residency says. In one place of 32 bytes, since a policy waits for memory more than for anything else: in four columns a candidate took
# four cache misses, and at 128K tokens a step's choices twice the time.
NOTE = np.dtype([
    ("copy_id", np.int64), ("worth", np.float64), ("seen", np.float64), ("share", np.float32), ("asked", np.int8), ("waits", np.int8),
], align=True)  # fmt: skip


@dataclass
class Looks:
    """Tiering's at the calls of one layer. `last`: the step of the last one, infinite if there was none; `settled`: how many of the last
    ones, in a row, found the layer settled (`policy/snapshot.py`)."""

    last: float = inf
    settled: int = 0

    def add(self, now: float, settled: bool) -> None:
        """One more, at step `now`."""
        self.last, self.settled = now, self.settled + 1 if settled else 0
