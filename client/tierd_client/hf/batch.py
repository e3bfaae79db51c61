"""The sessions of one batch, one a row, and which positions of each row are tokens."""

from collections.abc import Callable, Iterable, Sequence

import torch

from tierd_client.session import Session


class Batch:
    """Rows that all layers agree on. `real` bool [rows, seen] on the CPU: False is padding, which no session stores.

    Every method leaves rows and sessions as they were, or in agreement, whatever fails: what cannot be finished at once is
    made up by `settle`, which a caller runs before using the sessions again.
    """

    def __init__(self, sessions: Sequence[Session], real: torch.Tensor) -> None:
        self.sessions = list(sessions)
        self.real = real
        self.lengths = _lengths(real)
        self.forks = 0
        self._unsettled = False
        self._in_doubt = False

    @classmethod
    def open(cls, rows: int, open_session: Callable[[], Session]) -> "Batch":
        """`rows` empty sessions, or none if one cannot be opened."""
        return cls(_all_or_none(open_session() for _ in range(rows)), torch.ones(rows, 0, dtype=torch.bool))

    @property
    def seen(self) -> int:
        """Positions of every row, padding included."""
        return self.real.shape[1]

    def disturb(self) -> None:
        """Sessions are about to be written layer by layer: until `extend`, `settle` would take that back."""
        self._unsettled = True

    def doubt(self) -> None:
        """A request may still be under way: `settle` must leave the sessions that it could write."""
        self._in_doubt = self._unsettled

    def extend(self, real: torch.Tensor) -> None:
        """All layers hold the tokens of `real` [rows, n], too."""
        self.real = torch.cat([self.real, real], dim=1)
        self.lengths = [length + more for length, more in zip(self.lengths, _lengths(real), strict=True)]
        self._unsettled = False

    def crop(self, seen: int) -> None:
        """Keep the first `seen` positions of every row."""
        self.real = self.real[:, :seen]
        self.lengths = _lengths(self.real)
        self._unsettled = True
        self.settle()

    def settle(self) -> None:
        """Cut every session to the tokens of its row."""
        if not self._unsettled:
            return
        if self._in_doubt:
            forks = self._forked(self.sessions)
            old, self.sessions = self.sessions, forks
            close_all(old)
        self._in_doubt = True
        for session, length in zip(self.sessions, self.lengths, strict=True):
            session.truncate(length)
        self._unsettled = self._in_doubt = False

    def select(self, parents: Sequence[int]) -> None:
        """Make row i a copy of row `parents[i]`. The first copy of a row is its session itself; rows without a copy are closed."""
        taken: set[int] = set()
        again: list[int] = []
        for place, parent in enumerate(parents):
            if parent in taken:
                again.append(place)
            taken.add(parent)
        forks = self._forked([self.sessions[parents[place]] for place in again])
        old, self.sessions = self.sessions, [self.sessions[parent] for parent in parents]
        for place, fork in zip(again, forks, strict=True):
            self.sessions[place] = fork
        self.real = self.real[list(parents)]
        self.lengths = _lengths(self.real)
        close_all([session for row, session in enumerate(old) if row not in taken])

    def copy(self) -> "Batch":
        """Forks of all rows."""
        return Batch(self._forked(self.sessions), self.real)

    def close(self) -> None:
        """Close all sessions."""
        close_all(self.sessions)

    def _forked(self, sessions: Sequence[Session]) -> list[Session]:
        forks = _all_or_none(session.fork() for session in sessions)
        self.forks += len(forks)
        return forks


def close_all(sessions: Iterable[Session]) -> None:
    """Close `sessions`."""
    for session in sessions:
        session.close()


def _all_or_none(opening: Iterable[Session]) -> list[Session]:
    """The sessions that `opening` opens one by one; if one fails, those before it are closed again."""
    opened: list[Session] = []
    try:
        for session in opening:
            opened.append(session)
    except BaseException:
        close_all(opened)
        raise
    return opened


def _lengths(real: torch.Tensor) -> list[int]:
    return [int(length) for length in real.sum(dim=1)]
