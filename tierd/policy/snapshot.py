"""What a policy is shown and what it answers.

Legend: m full blocks of a call, C rows of a block table, Hkv KV heads, n records; kind 0 keys, 1 values.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Worths = NDArray[np.float64]
NONE = -1  # in `copy_id`: no copy, and one may be made
FIRST_STEP = 8.0  # a note that is all zeros is never a recent one


class Snapshot(NamedTuple):
    """One answered call, of one layer of one session.

    `ids` int64 [m]: its full blocks in the table. `reads` int64 [3, n]: kinds, blocks (indices into `ids`) and heads of the originals
    that the answer needed, wherever they were read, none twice, keys first, in rising order. Those of `exact_heads` [Hkv] say nothing, for
    such a head reads all. `blocks` int32 and `scores` float32 [2, Hkv, c]: the candidates, blocks near needing their originals, as indices
    into `ids` in rising order and with their shares of what the bound may be, or of what their head promoted from on; -1 ends a shorter
    list. What was needed is mostly none of them (it may be where a call was answered in parts). `notes` [2, C, Hkv], of `tierd/notes.py`,
    are the table's: all but `copy_id` is the policy's own to write, and zero where nothing is known; residency ends `waits`. `now`: steps,
    a fraction for each layer; at least FIRST_STEP. `last`: when the layer was last looked at, infinite if never.
    """

    ids: Ids
    reads: Ids
    exact_heads: NDArray[np.bool_]
    blocks: NDArray[np.int32]
    scores: NDArray[np.float32]
    notes: NDArray[Any]
    now: float
    last: float


class Choice(NamedTuple):
    """What a call has taught. `records` int64 [n, 3] of (kind, block id, head) deserve a copy, best first (to a sixteenth of a need);
    `worths` float64 [n]: only copies of less than `displace` of that make room. `held` int64 [k]: copies that are worth more than before,
    namely `held_worths` float64 [k]. `settled`: next to none of what the layer needs, or comes near, is without a copy."""

    records: Ids
    worths: Worths
    displace: float
    held: Ids
    held_worths: Worths
    settled: bool = False


NO_READS: Ids = np.empty((3, 0), np.int64)
NOTHING = Choice(np.empty((0, 3), np.int64), np.empty(0), 1.0, np.empty(0, np.int64), np.empty(0))


class Policy(Protocol):
    """Writes the worth of records, and says which of those without a copy deserve one. Copies of less worth make room."""

    name: str
    wants_candidates: bool
    preference: int  # how many times its share of the bound an original counts that has a copy, where a call chooses what to promote

    def looks_at(self, turn: int, settled: int, needs: int, misses: int) -> bool:
        """Whether it is to be shown a call that needed so many originals and read `misses` of them from the host. `turn`: rises by one with
        each call of a layer, and differs between neighbouring layers; `settled`: how many of the layer's last looks found it so. A yes
        to a call without needs is one to whatever it needs."""
        ...

    def choose(self, snapshot: Snapshot) -> Choice:
        """What to copy after this call."""
        ...

    def rescale(self, now: float) -> float:
        """A factor that all worths ever written must be multiplied by before anything else is done; mostly 1."""
        ...
