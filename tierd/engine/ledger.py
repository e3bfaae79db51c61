"""What tiering did for each session and layer: hits, misses, and bytes over the host link by cause."""

from collections.abc import Iterable
from itertools import count
from typing import Any

FIELDS = ("hits", "misses", "late", "prefetched", "wasted", "demand_bytes", "prefetch_bytes", "wasted_bytes")
SESSIONS_SHOWN_MAX = 64  # a status with 1024 sessions of 32 layers would be 2 MB


class Ledger:
    """Totals since each session began. Sessions are told apart by numbers in order of appearance: their names are secrets of their workers.

    A hit is an original read from scratch, a miss one read from the host (`demand_bytes`), late if its copy was on its way. `wasted` are
    copies that ended without having been read.
    """

    def __init__(self, now_s: float) -> None:
        self._sessions: dict[str, _Account] = {}
        self._numbers = count(1)
        self._began_s = now_s
        self.retry_bytes = 0

    def add(self, session_id: str, num_layers: int, layer: int, **amounts: int) -> None:
        """Add to the fields of a layer."""
        account = self._account(session_id, num_layers)
        for field, amount in amounts.items():
            account.amounts[field][layer] += amount

    def forget(self, session_ids: Iterable[str]) -> None:
        """These sessions are closed."""
        for session_id in session_ids:
            self._sessions.pop(session_id, None)

    def __len__(self) -> int:
        """How many sessions it knows."""
        return len(self._sessions)

    @property
    def session_ids(self) -> set[str]:
        return set(self._sessions)

    def as_dict(self, now_s: float, link_bytes_per_s: float) -> dict[str, Any]:
        """For the status: busiest sessions first, each with a number a layer and field, and the share of the link that it took."""
        accounts = sorted(self._sessions.values(), key=lambda account: -account.link_bytes)
        carried = link_bytes_per_s * max(now_s - self._began_s, 1e-9)
        return {
            "sessions": [
                {
                    "session": account.number,
                    "link_share": account.link_bytes / carried,
                    "layers": {field: list(amounts) for field, amounts in account.amounts.items()},
                }
                for account in accounts[:SESSIONS_SHOWN_MAX]
            ],
            "sessions_left_out": max(0, len(accounts) - SESSIONS_SHOWN_MAX),
        }

    def _account(self, session_id: str, num_layers: int) -> "_Account":
        if session_id not in self._sessions:
            self._sessions[session_id] = _Account(next(self._numbers), num_layers)
        return self._sessions[session_id]


class _Account:
    def __init__(self, number: int, num_layers: int) -> None:
        self.number = number
        self.amounts = {field: [0] * num_layers for field in FIELDS}  # by layer; a call adds to four, and arrays took 1 us for each

    @property
    def link_bytes(self) -> int:
        return sum(self.amounts["demand_bytes"]) + sum(self.amounts["prefetch_bytes"])
