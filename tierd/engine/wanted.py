"""What looks at calls still want copied: a part of it begins in each turn of tiering that hides behind a call's kernels."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tierd.engine.scratch import Asker
from tierd.policy import Choice
from tierd.residency import BlockTable

# A part is one in PART of the records that are wanted, and PART_MIN at least. To begin any takes 0.15 to 0.2 ms and each 2 us more, and to
# take them in as much again. Beyond 0.2 ms, which kernels hide, tiering took 114 us a call where a look's 54 copies began together with it,
# 134 in parts of 32, and 70 in one part (`benchmarks/bench_host_path.py` with 917 originals a call; copies arrive by the next).
PART, PART_MIN = 4, 64
# Fewer than FEW wait for others, or for PATIENCE turns: where nearly all is at hand a look wants some nine records, and to begin them by
# themselves was a third of what tiering added to a step (`benchmarks/bench_tiering_cuda.py` on an H200: 0.37 to 0.46 of it, now 0.28). A
# turn is a call of one layer: of 32 layers copies are there when theirs is called next.
FEW, PATIENCE = 32, 16


@dataclass(eq=False)
class Wish:
    """What a row wants copied: `choice` from record `at` on, but for kinds that are `full` [2], of which scratch had no room for a better
    one. The blocks are of `table`."""

    asker: Asker
    table: BlockTable
    choice: Choice
    at: int = 0
    full: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(2, np.bool_))

    @property
    def left(self) -> int:
        """Records."""
        return len(self.choice.records) - self.at

    def next(self, most: int) -> slice:
        """The best of them, which are left no more."""
        some = slice(self.at, self.at + min(most, self.left))
        self.at = some.stop
        return some

    def end(self) -> None:
        """Nothing more is copied."""
        self.at = len(self.choice.records)


class Wanted:
    """At most one wish of each layer of a session: a later look at the layer names all that is worth a copy then, at its worth of then. So
    what waits is bounded, however often is looked. None may outlive the blocks that it names, nor its session."""

    def __init__(self) -> None:
        self._wishes: list[Wish] = []  # in the order of their turns
        self._waited = 0  # turns that something waits and nothing is due

    def __len__(self) -> int:
        """Records."""
        return sum(wish.left for wish in self._wishes)

    def due(self) -> int:
        """How many records may begin behind a call's kernels, asked once a turn: none while there are few that have not waited long, else
        so many that what waits is at most four times what a look wants."""
        self._waited = self._waited + 1 if self._wishes else 0
        if len(self) < FEW and self._waited < PATIENCE:
            return 0
        self._waited = 0
        return max(PART_MIN, -(-len(self) // PART))

    def add(self, wish: Wish) -> None:
        """In place of what the same layer has wanted."""
        row = wish.asker.session_id, wish.asker.layer
        self._wishes = [other for other in self._wishes if (other.asker.session_id, other.asker.layer) != row] + [wish]

    def rescale(self, factor: float) -> None:
        """All worths have been multiplied by `factor`."""
        for wish in self._wishes:
            wish.choice.worths[...] *= factor

    def fill(self, session_id: str, kind: int) -> None:
        """Scratch has no room for what this session wants most of a kind: all that it wants is worth less."""
        for wish in self._wishes:
            if wish.asker.session_id == session_id:
                wish.full[kind] = True

    def clear(self) -> None:
        """Nothing is wanted any more."""
        self._wishes = []

    def serve(self, most: int, room: Callable[[Wish], int], begin: Callable[[Wish, slice], None]) -> None:
        """Has copies of `most` records begun, the best of each wish in turn: as many as it has `room` for and, where that is not for all of
        them, no more than its part of it while others wait. One that has no room ends. Where `most` are done before all have had their
        turn, the next time goes on there: a little of each row every time would take longer than all of one."""
        while most and len(self):
            self._wishes = wishes = [wish for wish in self._wishes if wish.left]
            for number, wish in enumerate(wishes):
                if not (free := room(wish)):
                    wish.end()
                    continue
                some = wish.next(most if free >= most else -(-free // (len(wishes) - number)))
                begin(wish, some)
                most -= some.stop - some.start
                if not most:
                    self._wishes = [*wishes[number + 1 :], *wishes[: number + 1]]
                    break
        self._wishes = [wish for wish in self._wishes if wish.left]
