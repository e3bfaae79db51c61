"""The worker processes: begun, killed without warning, replaced, and heard."""

import multiprocessing
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
from life import DONE, live
from tally import Tally, together
from tierd_client import Geometry

SILENT_S = 180.0  # no worker is without a word for so long: its calls end before that
KILL_EVERY_S = 4.0  # on average


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    word: Connection
    heard_s: float
    tally: Tally = field(default_factory=Tally)
    is_done: bool = False


class Crew:
    """`size` workers of `seed`, each a process; the k-th that is begun draws from (seed, k). `problems`: what went wrong, in words."""

    def __init__(self, target: str, seed: int, geometries: list[Geometry], lease_s: float, size: int) -> None:
        # Read by the children's numpy: judges of a few heads are done sooner on one thread each than on several that wait for one another.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        self._spawn = multiprocessing.get_context("spawn")
        self._seed, self._common = seed, (geometries, lease_s)
        self._target, self._rng = target, np.random.default_rng((seed, 1 << 20))
        self._ended: list[Tally] = []
        self._number = 0
        self.problems: list[str] = []
        self.killed = 0
        self._workers = [self._begin() for _ in range(size)]
        self._kill_s = self._next_kill()

    @property
    def tally(self) -> Tally:
        return together([*self._ended, *(worker.tally for worker in self._workers)])

    def run(self, until_s: float) -> None:
        """Hears workers, kills and replaces some, until then on `time.monotonic` or until there is a problem."""
        while not self.problems and (left_s := until_s - time.monotonic()) > 0.0:
            self._hear(min(left_s, 0.2))
            if time.monotonic() > self._kill_s:
                self._kill_one()
                self._kill_s = self._next_kill()

    def dismiss(self) -> None:
        """Tells all to end, and waits until they have."""
        for worker in self._workers:
            self._tell(worker)
        while not self.problems and not all(worker.is_done for worker in self._workers):
            self._hear(0.2)
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()

    def _begin(self) -> _Worker:
        ours, theirs = self._spawn.Pipe()  # one each: a killed process may hold the lock of a queue that all share
        arguments: tuple[Any, ...] = (self._target, (self._seed, self._number), *self._common, theirs)
        process = self._spawn.Process(target=live, args=arguments)
        self._number += 1
        process.start()
        theirs.close()
        return _Worker(process, ours, time.monotonic())

    def _next_kill(self) -> float:
        return time.monotonic() + KILL_EVERY_S * float(self._rng.uniform(0.5, 1.5))

    def _kill_one(self) -> None:
        """One that has begun to work."""
        busy = [number for number, worker in enumerate(self._workers) if worker.tally.calls]
        if busy:
            number = busy[self._rng.integers(len(busy))]
            worker = self._workers[number]
            worker.process.kill()
            worker.process.join()
            while worker.word.poll() and self._take(worker):
                pass
            self._ended.append(worker.tally)
            self._workers[number] = self._begin()
            self.killed += 1

    def _hear(self, timeout_s: float) -> None:
        for ready in wait([worker.word for worker in self._workers if not worker.is_done], timeout_s):
            worker = next(worker for worker in self._workers if worker.word is ready)
            if not self._take(worker) and not worker.is_done:
                self.problems.append(f"a worker ended without a word, exit code {worker.process.exitcode}")
        for worker in self._workers:
            if not worker.is_done and time.monotonic() > worker.heard_s + SILENT_S:
                self.problems.append(f"a worker has said nothing for {SILENT_S} s: a call has no answer")

    def _take(self, worker: _Worker) -> bool:
        """Whether there was something to hear."""
        try:
            said = worker.word.recv()
        except (EOFError, OSError):
            return False
        worker.heard_s = time.monotonic()
        if isinstance(said, Tally):
            worker.tally = said
        elif said == DONE:
            worker.is_done = True
        else:
            self.problems.append(said)
        return True

    def _tell(self, worker: _Worker) -> None:
        with suppress(OSError):  # it has ended, which `_hear` finds
            worker.word.send("end")
