"""Choices about the scratch cache: pure functions from a snapshot to a list of actions."""

from tierd.policy.eviction import Evictable, choose_evictions
from tierd.policy.prefetch import PrefetchSnapshot, Record, choose_prefetches

__all__ = ["Evictable", "PrefetchSnapshot", "Record", "choose_evictions", "choose_prefetches"]
