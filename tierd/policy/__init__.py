"""Choices about the scratch cache. Pure: a snapshot of one answered call in, records to copy and copies to drop out; no clock, no I/O."""

from collections.abc import Callable

from tierd.policy.eviction import Shelf
from tierd.policy.link import LinkBudget
from tierd.policy.predictive import Predictive
from tierd.policy.reactive import Nothing, Reactive
from tierd.policy.snapshot import FIRST_STEP, NO_READS, NONE, Choice, Policy, Snapshot
from tierd.policy.turns import Turns

POLICIES: dict[str, Callable[[], Policy]] = {"none": Nothing, "reactive": Reactive, "predictive": Predictive}


def named(name: str) -> Policy:
    """A new policy. Raises ValueError for a name that is none of `POLICIES`."""
    if name not in POLICIES:
        raise ValueError(f"tiering_policy is {name!r}; allowed: {', '.join(POLICIES)}")
    return POLICIES[name]()


__all__ = [
    "FIRST_STEP", "NONE", "NO_READS", "POLICIES", "Choice", "LinkBudget", "Nothing", "Policy", "Predictive", "Reactive", "Shelf",
    "Snapshot", "Turns", "named",
]  # fmt: skip
