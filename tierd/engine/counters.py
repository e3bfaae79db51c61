"""What the engine has done since it started."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from tierd_kernels.call import Result


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
        self.head_steps += certificate["exact"].size
        self.exact_heads += int(np.count_nonzero(certificate["exact"]))
        self.promoted_blocks += _sum(certificate["promoted_key_blocks"]) + _sum(certificate["promoted_value_blocks"])
        self.skipped_blocks += _sum(certificate["skipped_blocks"])
        self.host_bytes += _sum(certificate["host_bytes"])

    def as_dict(self) -> dict[str, object]:
        """All of it, ready for JSON."""
        return {**vars(self), "events": dict(self.events)}


def _sum(column: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> int:
    return int(column.sum(dtype=np.int64))
