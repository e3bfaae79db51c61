"""What looks at calls still want copied: a part of it begins in each turn of tiering that hides behind a call's kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from tierd.engine.scratch import Asker
from tierd.policy import Choice
from tierd.policy.snapshot import Worths
from tierd.residency import BlockTable, Ids

# A part is one in PART of the records that are wanted, and PART_MIN at least. Where parts begin often, to begin any takes 0.15 to 0.2 ms
# and each 2 us more, and to take them in as much again. Beyond 0.2 ms, which kernels hide, tiering took 114 us a call where a look's 54
# copies began together with it, 134 in parts of 32, and 70 in one part (`benchmarks/bench_host_path.py` with 917 originals a call; copies
# arrive by the next).
PART, PART_MIN = 4, 64
# Fewer wait for others, or until calls have read so many originals from the host meanwhile. Where nearly all is at hand a look wants some
# nine records, and to begin ten kept an H200's host 0.56 ms longer at a call, for what is done so seldom is in no cache; an original that a
# call has to read itself costs it 1.6 us. So what waits costs about as much as to begin it before it is begun.
MISSES_BORNE = 256
# So a call that read fewer than so many is not looked at for that. Of calls of 26 needs at 8,192 tokens, three of which miss, four of five
# were looked at, and one of three so; an EPYC's host takes 0.41 ms a call for 0.47, and as many miss (one process, 100 calls in turns). In
# replays of recorded text and prompts calls wait 0.5 us longer for the link.
MISSES_SEEN = 8


@dataclass(eq=False)
class Wish:
    """What a row wants copied: `choice` from record `at` on. The blocks are of `table`."""

    asker: Asker
    table: BlockTable
    choice: Choice
    at: int = 0

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

    def leave_out(self, kind: int) -> Ids:
        """Nothing more of a kind is copied; returns the records [n, 3] that were left of it."""
        records, worths = self.choice.records[self.at :], self.choice.worths[self.at :]
        of_kind = records[:, 0] == kind
        left_out: Ids = records[of_kind]
        self.choice, self.at = self.choice._replace(records=records[~of_kind], worths=worths[~of_kind]), 0
        return left_out


Part = tuple[Wish, slice]  # which of its records


def that_count(misses: int) -> int:
    """How many of a call's misses speak for a look at it where copies wait: none of a few."""
    return misses if misses >= MISSES_SEEN else 0


def together(parts: list[Part]) -> tuple[Ids, Worths, Ids]:
    """What parts of one session's wishes name: records int64 [n, 3], worths [n], which part each is of [n]; of several the best first."""
    records, worths = [wish.choice.records[some] for wish, some in parts], [wish.choice.worths[some] for wish, some in parts]
    which = np.repeat(np.arange(len(parts)), [len(each) for each in worths])
    if len(parts) == 1:
        return records[0], worths[0], which
    all_worths = np.concatenate(worths)
    order = np.argsort(-all_worths, kind="stable")
    return np.concatenate(records)[order], all_worths[order], which[order]


class Wanted:
    """At most one wish of each layer of a session: a later look at the layer names all that is worth a copy then, at its worth of then. So
    what waits is bounded, however often is looked. None may outlive the blocks that it names, nor its session."""

    def __init__(self) -> None:
        self._wishes: list[Wish] = []  # in the order of their turns
        self._missed = 0  # since something waits and nothing was due

    def __len__(self) -> int:
        """Records."""
        return sum(wish.left for wish in self._wishes)

    def due(self) -> int:
        """How many records may begin behind a call's kernels, asked once a turn: none while there are few and calls read few from the host,
        else so many that what waits is at most four times what a look wants."""
        if len(self) < PART_MIN and self._missed < MISSES_BORNE:
            return 0
        self._missed = 0
        return max(PART_MIN, -(-len(self) // PART))

    def missed(self, count: int) -> None:
        """A call has read so many originals from the host."""
        self._missed += count if self._wishes else 0

    def add(self, wish: Wish) -> None:
        """In place of what the same layer has wanted, behind its session's other layers."""
        asker = wish.asker
        kept = [other for other in self._wishes if (other.asker.session_id, other.asker.layer) != (asker.session_id, asker.layer)]
        behind = [number for number, other in enumerate(kept, 1) if other.asker.session_id == asker.session_id]
        if wish.left:
            kept.insert(behind[-1] if behind else len(kept), wish)
        self._wishes = kept

    def rescale(self, factor: float) -> None:
        """All worths have been multiplied by `factor`."""
        for wish in self._wishes:
            wish.choice.worths[...] *= factor

    def leave_out(self, session_id: str, kind: int) -> list[Ids]:
        """Scratch has no room for what this session wants most of a kind: all that it wants is worth less, and is not wanted any more.
        Returns the records, [n, 3] of each wish."""
        return [wish.leave_out(kind) for wish in self._wishes if wish.asker.session_id == session_id]

    def clear(self) -> None:
        """Nothing is wanted any more."""
        self._wishes, self._missed = [], 0

    def serve(self, most: int, room: Callable[[Wish, int], int], begin: Callable[[list[Part]], None]) -> None:
        """Has copies of `most` records begun, the best of each wish in turn, those of a session that are neighbours together: as many as it
        has `room` for, besides what was taken for these, and where that is not for all of them, no more than its part of it while others
        wait. One that has no room ends. Where `most` are done before all have had their turn, the next time goes on there: a little of
        each row every time would take longer than all of one."""
        while most and len(self):
            wishes, number = [wish for wish in self._wishes if wish.left], 0
            for _, of_session in groupby(wishes, lambda wish: wish.asker.session_id):
                parts, taken = list[Part](), 0
                for wish in of_session:
                    if free := room(wish, taken):
                        some = wish.next(most if free >= most else -(-free // (len(wishes) - number)))
                        parts.append((wish, some))
                        taken, most = taken + some.stop - some.start, most - (some.stop - some.start)
                    else:
                        wish.end()
                    number += 1
                    if not most:
                        break
                if parts:
                    begin(parts)
                if not most:
                    break
            self._wishes = [*wishes[number:], *wishes[:number]]
        self._wishes = [wish for wish in self._wishes if wish.left]
