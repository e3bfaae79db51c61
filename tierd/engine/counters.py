"""What the engine has done since it started."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tierd_kernels.call import Result

from tierd.compiling import compiled

COUNTED = "exact", "promoted_key_blocks", "promoted_value_blocks", "skipped_blocks", "host_bytes"


@dataclass
class Counters:
    """Totals. `head_steps`: (query head, token) pairs answered. `hits`, `misses`: original records read from scratch, from the host;
    `late`: misses whose copy was on its way; `prefetched`: copies begun; `wasted`: of these, gone without having been read;
    `demand_bytes`, `prefetch_bytes`, `wasted_bytes`: what misses, copies and wasted copies took of the host link.

    `host_bytes`: originals read from the host by the kernels. `events`: by name, what should not happen: `corrupt_original`,
    `canary_repaired`, `corrupt_copy`, `failed_copy` (attempts), `broken_promise`, `fault`, `device_lost`; and what may: `lease_expired`,
    `deadline_exceeded`, `undone`.
    """

    commands: int = 0
    launches: int = 0
    head_steps: int = 0
    exact_heads: int = 0
    promoted_blocks: int = 0
    skipped_blocks: int = 0
    host_bytes: int = 0
    canaries: int = 0
    hits: int = 0
    misses: int = 0
    late: int = 0
    prefetched: int = 0
    wasted: int = 0
    evicted: int = 0
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    wasted_bytes: int = 0
    events: Counter[str] = field(default_factory=Counter)

    def add(self, result: Result) -> None:
        """Count an answered row."""
        certificate = result.certificate
        columns: list[NDArray[Any]] = [certificate[name].reshape(-1) for name in COUNTED]
        exact, promoted, skipped, host_bytes = _sums(*columns)
        self.head_steps += certificate["exact"].size
        self.exact_heads += exact
        self.promoted_blocks += promoted
        self.skipped_blocks += skipped
        self.host_bytes += host_bytes

    def as_dict(self) -> dict[str, object]:
        """All of it, ready for JSON."""
        return {**vars(self), "events": dict(self.events)}


Counts = NDArray[np.int64]


@compiled
def _sums(exact: NDArray[np.bool_], keys: Counts, values: Counts, skipped: Counts, host_bytes: Counts) -> tuple[int, int, int, int]:
    """Of a certificate's columns [n], keys and values together. Five of numpy's own took 8 us a call."""
    e = p = s = h = 0
    for i in range(len(exact)):
        e += exact[i]
        p += keys[i] + values[i]
        s += skipped[i]
        h += host_bytes[i]
    return e, p, s, h


def prepare() -> None:
    """Compiles it, or loads it."""
    none = np.zeros(0, np.int64)
    _sums(np.zeros(0, np.bool_), none, none, none, none)
