"""How much of the host link copies may take, and whose turn it is."""

from collections.abc import Collection

BURST_S = 1e-3  # of link time that can be saved up: 50 MB at 50 GB/s, some 12,000 records of 4 KB


class LinkBudget:
    """Bytes that may be copied now. Time is told, not read: seconds on any clock that does not run backwards.

    Copies get at most `share` of the link's `bytes_per_s`, and no more than reads that calls wait for have left of it. Every active session
    earns the same part and keeps at most its part of `BURST_S`; what it does not use is there for all. While calls' own reads take all of
    the link nobody earns. Otherwise a session that asks gets its part in the end, whatever others ask for.
    """

    def __init__(self, bytes_per_s: float, share: float) -> None:
        assert bytes_per_s > 0.0 and 0.0 <= share <= 1.0
        self._bytes_per_s, self._share = bytes_per_s, share
        self._full = bytes_per_s * share * BURST_S
        self._common = self._full
        self._own: dict[str, float] = {}
        self._debt = 0.0  # bytes of calls' own reads that the link has not had time for
        self._then_s: float | None = None

    def read(self, nbytes: int) -> None:
        """A call read so much over the link by itself."""
        self._debt += nbytes

    def refill(self, now_s: float, active: Collection[str]) -> None:
        """Time has passed; `active` sessions earn. What others had saved goes to the common pool."""
        passed_s = 0.0 if self._then_s is None else now_s - self._then_s
        self._then_s = now_s
        carried = self._bytes_per_s * passed_s
        earned = max(0.0, min(self._share * carried, carried - self._debt))
        self._debt = max(0.0, self._debt - carried)
        for gone in self._own.keys() - set(active):
            self._common += self._own.pop(gone)
        most = self._full / max(1, len(active))
        for name in active:
            had = self._own.get(name, 0.0) + earned / len(active)
            self._own[name] = min(had, most)
            self._common += had - self._own[name]
        if not active:
            self._common += earned
        self._common = min(self._common, self._full)

    def available(self, owner: str) -> int:
        """Bytes that `owner` may copy now."""
        return int(self._own.get(owner, 0.0) + self._common)

    def spend(self, owner: str, nbytes: int) -> None:
        """`owner` copies so much, which must be available: from its own first."""
        assert nbytes <= self.available(owner)
        own = min(self._own.get(owner, 0.0), float(nbytes))
        if own:
            self._own[owner] -= own
        self._common = max(0.0, self._common - (nbytes - own))
