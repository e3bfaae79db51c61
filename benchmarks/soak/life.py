"""A worker's life: sessions opened, filled, asked, forked, cut and closed at random, connections cut and left, every answer judged.

A call that is not answered, or answered with an error that nothing explains, is as bad as a wrong answer: it ends the worker with an
exception, which ends the soak.
"""

import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import draws
import numpy as np
from judging import judge
from mirror import Mirror
from numpy.typing import NDArray
from tally import Tally
from tierd_client import CapacityExceeded, DaemonUnavailable, Geometry, Result, Session, SessionNotFound, Tier, Tolerance, connect

Raw = NDArray[Any]
T = TypeVar("T")
CALL_S = 120.0  # a GPU may have a kernel to compile
SESSIONS_MAX = 5
SAYS_EVERY_S = 0.1
DONE = "done"
# A lease has run out by then: the engine looks at every turn, and each second when idle; the rest is for a machine that is busy.
LEASE_SLACK_S = 5.0
ACTIONS = {"ask": 60, "append": 10, "open": 8, "fork": 5, "truncate": 6, "close": 5, "forget": 0.4, "cut": 0.7, "leave": 0.7}


@dataclass(eq=False)
class Held:
    """A session and what it should hold. `focus`: the token that queries look at."""

    session: Session
    mirror: Mirror
    flavour: draws.Flavour
    focus: int = 0


@dataclass(eq=False)
class Question:
    """A row of a call; `k`, `v` None: attend only."""

    held: Held
    layer: int
    q: Raw
    k: Raw | None
    v: Raw | None


class Life:
    """One connection at a time and up to `SESSIONS_MAX` sessions of `geometries`; `lease_s` is the daemon's."""

    def __init__(self, target: str, seed: tuple[int, ...], geometries: list[Geometry], lease_s: float) -> None:
        self.tally = Tally()
        self.action = "connect"
        self._target, self._geometries, self._lease_s = target, geometries, lease_s
        self._rng = np.random.default_rng(seed)
        self._forgotten: list[tuple[float, Tier, Session]] = []  # since when
        self._connect()

    def _connect(self) -> None:
        self._tier = connect(self._target, timeout=CALL_S)
        self._answered_s, self._was_silent = time.monotonic(), False
        self._all: list[Held] = []

    def turn(self) -> None:
        """Does one thing, and looks after what was left to its lease."""
        self._collect()
        name = self._rng.choice(list(ACTIONS), p=np.array(list(ACTIONS.values())) / sum(ACTIONS.values()))
        self.action = str(name) if self._all else "open"
        try:
            getattr(self, f"_{self.action}")()
        except CapacityExceeded:
            self._make_room()
        except SessionNotFound as error:
            if not self._was_silent:
                raise AssertionError(f"a session was gone, and every call came within half a lease of the last: {error}") from error
        if self._was_silent:  # a machine that is busy: whether the lease ran out is anyone's guess
            self._tier.close()
            self._connect()
            self.tally.silent += 1

    def end(self) -> None:
        """Leaves with sessions open; what is left to its lease goes too."""
        for _, tier, _ in self._forgotten:
            tier.close()
        self._tier.close()

    def _call(self, do: Callable[[], T]) -> T:
        """The answer. What the daemon may refuse with is left to `turn`."""
        self._was_silent |= time.monotonic() > self._answered_s + self._lease_s / 2
        try:
            answer = do()
        except CapacityExceeded:
            self.tally.refused += 1
            self._count()
            raise
        self._count()
        return answer

    def _count(self) -> None:
        self._answered_s = time.monotonic()
        self.tally.calls += 1

    def _pick(self) -> Held:
        return self._all[self._rng.integers(len(self._all))]

    def _layer(self, held: Held) -> int:
        return int(self._rng.integers(held.mirror.geometry.num_layers))

    def _open(self) -> None:
        if len(self._all) >= SESSIONS_MAX:
            return self._close()
        held = self._opened(self._tier)
        self._all.append(held)
        self.tally.opened += 1
        for layer in range(held.mirror.geometry.num_layers):
            self._fill(held, layer, int(self._rng.choice(draws.TOKENS)))

    def _opened(self, tier: Tier) -> Held:
        rng = self._rng
        geometry = self._geometries[rng.integers(len(self._geometries))]
        terms: dict[str, Any] = {"tolerance": draws.tolerance(rng), "policy": draws.policy(rng), "max_tokens": draws.MAX_TOKENS}
        session = self._call(partial(tier.open_session, geometry, **terms))
        return Held(session, Mirror(geometry), draws.flavour(rng))

    def _append(self) -> None:
        held = self._pick()
        self._fill(held, self._layer(held), int(self._rng.choice(draws.TOKENS)))

    def _fill(self, held: Held, layer: int, n: int) -> None:
        n = min(n, draws.MAX_TOKENS - held.mirror.lengths[layer])
        if n:
            k, v = draws.keys_values(self._rng, held.mirror.geometry, held.flavour, n)
            self._call(partial(held.session.append, layer=layer, k=k, v=v))
            held.mirror.append(layer, k, v)

    def _ask(self) -> None:
        """One row as a step or an attend, with a tolerance of its own at times; or several sessions' rows in one message."""
        questions = self._questions()
        override = draws.tolerance(self._rng) if len(questions) == 1 and self._rng.random() < 0.3 else None
        results = self._call(partial(self._answers, questions, override))
        self._judge(questions, results, override)

    def _questions(self) -> list[Question]:
        count = 1 if self._rng.random() < 0.7 else min(3, len(self._all))
        chosen = self._rng.choice(len(self._all), count, replace=False)
        return [self._question(self._all[number]) for number in chosen]

    def _question(self, held: Held) -> Question:
        rng, mirror = self._rng, held.mirror
        layer, k, v = self._layer(held), None, None
        stored = mirror.lengths[layer]
        new = min(int(rng.choice(draws.NEW_TOKENS)), draws.MAX_TOKENS - stored)
        if new and (not stored or rng.random() < 0.7):
            k, v = draws.keys_values(rng, mirror.geometry, held.flavour, new)
        if rng.random() < 0.1:  # else the same tokens matter as in the step before, which tiering lives by
            held.focus = int(rng.integers(draws.MAX_TOKENS))
        most = stored + (0 if k is None else new)
        n = min(int(rng.choice(draws.QUERY_TOKENS)), most)
        q = draws.queries(rng, mirror.geometry, held.flavour, mirror.key(layer, held.focus), n)
        return Question(held, layer, q, k, v)

    def _answers(self, questions: list[Question], override: Tolerance | None) -> list[Result[Any]]:
        """Over the wire; also on a thread of its own."""
        if len(questions) > 1:
            return self._tier.step_many([(x.held.session, x.layer, x.q, x.k, x.v) for x in questions])
        x = questions[0]
        if x.k is None or x.v is None:
            return [x.held.session.attend(layer=x.layer, q=x.q, tolerance=override)]
        return [x.held.session.step(layer=x.layer, q=x.q, k=x.k, v=x.v, tolerance=override)]

    def _judge(self, questions: list[Question], results: list[Result[Any]], override: Tolerance | None) -> None:
        assert len(results) == len(questions), f"{len(results)} answers to {len(questions)} rows"
        for x, result in zip(questions, results, strict=True):
            if x.k is not None and x.v is not None:
                x.held.mirror.append(x.layer, x.k, x.v)
            verdict = judge(x.held.mirror, x.layer, x.q, result, override or x.held.session.tolerance)
            self.tally.head_steps += verdict.rows
            self.tally.exact += verdict.exact
            self.tally.worst = max(self.tally.worst, verdict.worst)
            self.tally.worst_certified = max(self.tally.worst_certified, verdict.worst_certified)

    def _fork(self) -> None:
        if len(self._all) >= SESSIONS_MAX:
            return self._close()
        held = self._pick()
        child = self._call(held.session.fork)
        self._all.append(Held(child, held.mirror.fork(), held.flavour, held.focus))
        self.tally.forked += 1

    def _truncate(self) -> None:
        """To within two blocks of an end, or anywhere."""
        held = self._pick()
        most = max(held.mirror.lengths)
        length = int(self._rng.integers(max(0, most - 40) if self._rng.random() < 0.7 else 0, most + 1))
        self._call(partial(held.session.truncate, length))
        held.mirror.truncate(length)
        self.tally.truncated += 1
        self._confirm(held)

    def _close(self) -> None:
        held = self._pick()
        self._all.remove(held)
        self._call(held.session.close)

    def _confirm(self, held: Held) -> None:
        lengths = self._call(held.session.lengths)
        assert lengths == held.mirror.lengths, f"a session holds {lengths} tokens, it was given {held.mirror.lengths}"

    def _make_room(self) -> None:
        """What was refused has changed nothing; a session goes."""
        for held in self._all:
            self._confirm(held)
        if self._all:
            self._close()

    def _forget(self) -> None:
        """Leaves a session on a connection that says nothing more."""
        tier = connect(self._target, timeout=CALL_S)
        answered_s = self._answered_s
        held = self._opened(tier)
        try:
            self._fill(held, 0, int(self._rng.choice(draws.TOKENS)))
        finally:
            self._forgotten.append((time.monotonic(), tier, held.session))
            self._answered_s = answered_s  # these calls were not of the connection whose lease it tells of

    def _collect(self) -> None:
        for entry in [entry for entry in self._forgotten if time.monotonic() > entry[0] + self._lease_s + LEASE_SLACK_S]:
            self._forgotten.remove(entry)
            _, tier, session = entry
            try:
                lengths = session.lengths()
            except SessionNotFound:
                self.tally.expired += 1
            else:
                raise AssertionError(f"a session of {lengths} tokens outlived its lease of {self._lease_s} s by {LEASE_SLACK_S} s")
            tier.close()

    def _cut(self) -> None:
        """As if the network did it: the connection ends while a call is under way, and nothing is said to the daemon."""
        questions = self._questions()
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(self._answers, questions, None)
            time.sleep(float(self._rng.uniform(0.0, 0.01)))
            self._tier._transport._channel.close()  # type: ignore[attr-defined]
        if answer.exception() is None:
            self._judge(questions, answer.result(), None)
        elif not isinstance(answer.exception(), DaemonUnavailable | CapacityExceeded):
            answer.result()
        self._come_back()
        self.tally.dropped += 1

    def _leave(self) -> None:
        """Closes the connection with its sessions open, and comes back with none."""
        self._come_back()
        self.tally.left += 1

    def _come_back(self) -> None:
        """What the old connection held is out of reach, and says so."""
        self._tier.close()
        for held in self._all:
            try:
                held.session.lengths()
            except DaemonUnavailable:
                continue
            raise AssertionError("a session answers on a connection that has ended")
        self._connect()


def live(target: str, seed: tuple[int, ...], geometries: list[Geometry], lease_s: float, word: Any) -> None:
    """A worker process: turns until there is something to read on `word`, a pipe. Sends its Tally now and then, and DONE in the end; or a
    text that says what went wrong."""
    life: Life | None = None
    try:
        life = Life(target, seed, geometries, lease_s)
        said_s = 0.0
        while not word.poll():
            life.turn()
            if time.monotonic() > said_s + SAYS_EVERY_S:
                said_s = time.monotonic()
                word.send(life.tally)
        life.end()
        word.send(life.tally)
        word.send(DONE)
    except (BrokenPipeError, EOFError, ConnectionResetError):
        pass  # whoever began the soak has gone
    except Exception:
        at = "connecting" if life is None else f"{life.action}, after {life.tally.calls} calls"
        word.send(f"worker {seed}, {at}: {traceback.format_exc()}")
