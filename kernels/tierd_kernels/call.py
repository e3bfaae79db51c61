"""What a call to the ladder carries, and what comes back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.in_scratch import InScratch
from tierd_kernels.layout import Layout
from tierd_kernels.policy import Budget, Policy
from tierd_kernels.reads import Reads
from tierd_kernels.select.candidates import CANDIDATES_MAX, Candidates


def always(needs: int, misses: int) -> bool:
    """Every call is looked at."""
    return True


@dataclass
class Call:
    """One session, one layer, `n >= 1` query tokens whose keys and values are stored already.

    q [Hq, n, d] in the originals' type; `num_tokens` what the newest query sees. Offsets are int64 bytes: `hot_offsets` of the full
    blocks, `original_offsets` of all (the trailing one last). `in_scratch`: which records of the full blocks have a copy there, None: none;
    the others are read where the originals lie. `group_*_norms` float32 [groups, Hkv]: spectral norms of complete groups of 1024 tokens.
    `canary_blocks`: full blocks to re-score from originals. `preference`: how many times its share of the bound an original counts of which
    there is a copy, where promotion by budget chooses: what is at hand spares what is not. `candidates_max`: of a KV head, keys and values
    apart. `is_looked_at`: whether anybody will ask for candidates of a call that read so many originals, and so many of them from the host;
    a yes for one that read none is a yes for whatever it reads.
    """

    q: NDArray[np.generic]
    num_tokens: int
    softmax_scale: float
    hot_offsets: NDArray[np.int64]
    original_offsets: NDArray[np.int64]
    in_scratch: InScratch | None
    group_value_norms: NDArray[np.float32]
    group_error_norms: NDArray[np.float32]
    rtol: float
    atol: float
    relative_to: str = "values"
    policy: Policy = field(default_factory=Budget)
    canary_blocks: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    preference: int = 1
    candidates_max: int = CANDIDATES_MAX
    is_looked_at: Callable[[int, int], bool] = always

    @property
    def lasting(self) -> list[NDArray[Any]]:
        """The arrays that one call after another is given, for as long as what they say holds. They are never written again: a backend may
        know them by their identity, and keeps copies."""
        return [self.hot_offsets, self.original_offsets, self.group_value_norms, self.group_error_norms]

    def locations(self, layout: Layout) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where records of the full blocks' keys and values lie, int64 [full, Hkv] each: a byte offset in scratch, or ~offset of the record
        among the originals."""
        originals = self.original_offsets[: len(self.hot_offsets)]
        keys, values = layout.own_locations(originals) if self.in_scratch is None else self.in_scratch.locations(layout, originals)
        return keys, values


@dataclass
class Result:
    """Output [Hq, n, d] in q's type, certificate fields [Hq, n]; `reads`: the original records that were read. `candidates()`: the blocks
    that come near needing their originals, none where a device was told that nobody looks at the call; it works them out behind the answer,
    and only who asks for them waits. It raises DeviceLost. `shares` float32 [2, full, Hkv], on the CPU: of the budget before any promotion,
    of keys and of values, the largest of a KV head's rows; None on a device, which keeps them to itself."""

    output: NDArray[np.generic]
    certificate: dict[str, NDArray[np.generic]]
    reads: Reads
    candidates: Callable[[], Candidates]
    canary_failures: list[tuple[int, int]]
    shares: NDArray[np.float32] | None = None


def idle() -> None:
    """What is done meanwhile where there is nothing to do."""
