"""The one loop that changes anything: drain, expire, plan, attend, migrate, complete.

Commands come from any thread through `submit`. Turns of the loop are taken one at a time, by the engine's own thread or, where that is not
worth waking, by whoever asks (`help`). Commands of one session take effect in the order of submission. Attends whose
sessions are all different run as one batch, as far as `batch_rows_max` allows; whatever would touch a session of the waiting
batch, and every command that is neither Attend nor Append, lets the batch run first. Status is of no session: it is answered as soon as
the command or batch under way is done.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, cast

import numpy as np
from tierd_kernels import registry
from tierd_kernels.errors import DeviceUnavailable
from tierd_kernels.layout import Memory

from tierd.clock import Clock, SystemClock
from tierd.commands import (
    Append,
    Attend,
    CloseSession,
    CloseWorker,
    Command,
    Fork,
    Lengths,
    OpenSession,
    Status,
    Truncate,
)
from tierd.config import EngineConfig
from tierd.engine.batch import Batch, Job, Kernels
from tierd.engine.caching import ScratchCache
from tierd.engine.counters import Counters
from tierd.engine.device import Device
from tierd.engine.sessions import Sessions
from tierd.engine.timed import TimedFuture
from tierd.errors import CapacityExceeded, DeadlineExceeded, InvalidArgument, TierdError, Unavailable
from tierd.ids import new_epoch
from tierd.leases import Leases
from tierd.migrator import Migrator
from tierd.pools import Arenas
from tierd.residency import Residency

log = logging.getLogger(__name__)
IDLE_TICK_S = 1.0  # how often an idle engine looks for leases that ran out
# Longer than a model takes from layer to layer: the next call's kernels hide what tiering does for the last one, 0.3 to 0.9 ms on an H100's
# host, and its answer does not wait for the interpreter's lock. With 0.2 ms, during which a call is still under way, this thread took that
# lock from it in between: 40 us a call.
LINGER_S = 1e-3
STATUS_WAITING_MAX = 64  # monitors and people who ask at once; they have room when the queue is full
NEED_NO_DEVICE = (Status, CloseSession, CloseWorker)
HELPED_TOKENS_MAX = 64  # query tokens of a call that its own thread may take the turn for: one launch answers so many


class Engine:
    """All sessions and pools of one daemon. `kernels` None: those of the configured backend. `seed`: of the canaries' draw. `linger_s`: so
    long its thread leaves it to the next call to do what the last one has taught. Raises Unavailable, naming cause and remedy, if the
    backend cannot start. `backend` is the name of the one that runs.

    Without `start` there is no thread: `run_once` does everything on the caller's.
    """

    def __init__(
        self, config: EngineConfig, clock: Clock | None = None, kernels: Kernels | None = None, seed: int = 0, linger_s: float = LINGER_S
    ) -> None:  # fmt: skip
        self.config = config
        self.epoch = new_epoch()
        self.counters = Counters()
        self._clock = clock or SystemClock()
        self.backend, kernels, memory = _started(config, kernels)
        self._device = device = Device(self.backend, kernels)
        # One key, written once: safe on whichever thread meets the fault.
        device.lost.add_done_callback(lambda _: self.counters.events.update(device_lost=1))
        self.residency = Residency(Arenas(memory, config.scratch_key_share), device.hot_block_bytes)
        self._leases = Leases(self._clock, config.lease_s or None)
        self.sessions = Sessions(config, self.residency, device, self._leases)
        self._migrator = Migrator(partial(device.begin_copies, memory), max(1, config.migrations_max))
        self._cache = ScratchCache(config, self.residency, self._migrator, self.counters, self.sessions.by_id, self._clock)
        self._batch = Batch(
            self.residency, device, self.sessions.by_id, self.counters, config.canary_share, self._cache.candidates_max,
            self._cache.preference, self._cache.looks_at, seed,
        )
        self._handlers: dict[type[Command], Callable[[Any], Any]] = {
            OpenSession: self.sessions.open,
            CloseSession: self.sessions.close,
            CloseWorker: self.sessions.close_worker,
            Append: self.sessions.append,
            Truncate: self.sessions.truncate,
            Fork: self.sessions.fork,
            Lengths: self.sessions.lengths,
            Status: lambda _: self.status(),
        }
        self._linger_s = linger_s
        self._turn = threading.Lock()  # of whoever takes a turn
        self._turned_s = time.perf_counter()  # when the last one ended, by the machine's clock, as the thread's sleep is
        self._wake = threading.Condition()
        self._queue: deque[tuple[Command, Future[Any]]] = deque()
        self._asked: list[tuple[Command, Future[Any]]] = []  # Status only
        self._heard: set[str] = set()  # workers of whom a part of a command has come since the last turn
        self._stopping = self._dozes = False  # dozes: its thread sleeps until it is woken, or for long
        self._thread: threading.Thread | None = None
        self._jobs: list[Job] = []
        self._busy: set[str] = set()  # sessions of the waiting batch
        self._num_rows = 0
        self._hides = False  # whether kernels of the last batch ran while tiering did its work

    @property
    def lost(self) -> "Future[str]":
        """Completed with the fault's text, on any thread, when the device is lost: from then on every command fails with Unavailable,
        except those that ask for the status or close sessions."""
        return self._device.lost

    def check_device(self) -> None:
        """Raises Unavailable, as every command would, if the device is lost. Any thread."""
        self._device.check()

    def submit(self, command: Command, wake: bool = True) -> TimedFuture:
        """Queue a command, from any thread. Raises CapacityExceeded when the queue is full, Unavailable when stopping. Without `wake` the
        engine's thread is left asleep: whoever submits calls `help` next.

        CloseWorker always finds room: it gives back what others wait for, and there is one per worker. Status has room of its own, since a
        full queue is when it is asked for.
        """
        future = TimedFuture()
        with self._wake:
            if self._stopping:
                raise Unavailable("the daemon is stopping and takes no new calls")
            if isinstance(command, Status):
                if len(self._asked) >= STATUS_WAITING_MAX:
                    raise CapacityExceeded(f"{len(self._asked)} requests for the status are waiting, 0 free; allowed: {STATUS_WAITING_MAX}")
                self._asked.append((command, future))
            elif len(self._queue) < self.config.queue_max or isinstance(command, CloseWorker):
                self._queue.append((command, future))
            else:
                raise CapacityExceeded(f"{len(self._queue)} commands are waiting, 0 free: queue_max is {self.config.queue_max}")
            if wake:
                self._wake.notify()
        return future

    def hear(self, worker: str) -> None:
        """A part of a command has come from the worker: it is not silent, though the rest may take longer than its lease. Any thread."""
        with self._wake:
            self._heard.add(worker)

    def help(self) -> None:
        """Takes a turn on the calling thread, if nobody else has it and all that waits are short calls that a device computes; else wakes
        the engine's thread. To hand a call to another thread and its answer back takes 0.1 to 0.3 ms, as much as a short call costs the
        host. What the CPU's kernels take is long, and how many threads they use is set for the engine's."""
        with self._wake:
            if not self._waiting:
                return
            short = bool(self._queue) and all(_is_short(command) for command, _ in self._queue)
            helps = self._hides and not self._stopping and short
            if not (helps and self._turn.acquire(blocking=False)):
                self._wake.notify()
                return
        try:
            _logged(self._take_turn)
        finally:
            self._turn.release()
        if self._dozes:
            with self._wake:
                self._wake.notify()  # it lingers for what this call has taught

    def run_once(self) -> int:
        """One turn of the loop over all that waits; returns the number of commands completed, failed ones included."""
        with self._turn:
            return self._take_turn()

    def _take_turn(self) -> int:
        with self._wake:
            drained = list(self._queue)
            self._queue.clear()
            heard, self._heard = self._heard, set()
        num_asked = 0
        try:
            for worker in heard | {command.worker for command, _ in drained}:
                self._leases.touch(worker)
            num_asked += self._answer_asked()
            self._expire_leases()
            for command, future in drained:
                self._take(command, future)
                num_asked += self._answer_asked()
            self._run_batch()
            if not (drained and self._hides and self._thread):
                self._tier()
            for command, _ in drained:
                self._leases.touch(command.worker)  # however long the turn took: who waited for it was not silent
        finally:
            # Only a fault of ours leaves a command without an answer; its caller must not wait for ever.
            for _, future in drained:
                if not future.done():
                    self.counters.events["fault"] += 1
                    future.set_exception(Unavailable("a fault in the daemon ended this call"))
            self._clear_batch()
            self._turned_s = time.perf_counter()
        self.counters.commands += len(drained) + num_asked
        return len(drained) + num_asked

    def start(self) -> None:
        """Run the loop on a thread of its own."""
        assert self._thread is None and not self._stopping
        self._thread = threading.Thread(target=self._run, name="tierd-engine", daemon=True)
        self._thread.start()

    def stop(self, grace_s: float) -> None:
        """Refuse new commands, answer waiting ones for at most `grace_s` seconds, fail the rest; ends the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is None:
            self.run_once()
        else:
            self._thread.join(grace_s)
            with self._wake:
                left = [*self._asked, *self._queue]
                self._asked.clear()
                self._queue.clear()
            for _, future in left:
                if future.set_running_or_notify_cancel():
                    future.set_exception(Unavailable("the daemon stopped before this call's turn came"))
            self._thread.join()
            self._thread = None
        with self._turn:
            self._tier()
            while self.residency.num_in_flight:
                self._migrator.wait(IDLE_TICK_S)
                self._cache.collect()  # what failed is tried once more

    def status(self) -> dict[str, Any]:
        """Numbers for people and monitors. Call it through a `Status` command where the engine has a thread."""
        pools = {
            pool.name: {"used_bytes": pool.used_bytes, "free_bytes": pool.free_bytes, "total_bytes": pool.total_bytes}
            for pool in self.residency.arenas.pools
        }
        return {
            "epoch": self.epoch,
            "backend": self.backend,
            "fault": self.lost.result() if self.lost.done() else "",
            "sessions": len(self.sessions.by_id),
            "workers": self._leases.num_workers,
            "queue": len(self._queue),
            "blocks": sum(table.num_live for table in self.residency.tables.values()),
            "tokens": sum(sum(session.lengths) for session in self.sessions.by_id.values()),
            "copies": self.residency.num_copies,
            "pools": pools,
            "tiering": self._cache.status(),
            **self.counters.as_dict(),
        }

    def check_integrity(self) -> None:
        """Assert that all accounts agree and that every reference to a block is a session's. Only while nothing runs."""
        self.residency.check_integrity()
        for table in self.residency.tables.values():
            held = [s.ids for x in self.sessions.by_id.values() if x.table is table for s in x.layers]
            counts = np.bincount(np.concatenate([np.empty(0, np.int64), *held]), minlength=len(table.references))
            assert (counts == table.references).all(), "reference counts do not match what sessions hold"

    def _run(self) -> None:
        if self.config.threads:
            self._device.limit_threads(self.config.threads)
        while True:
            with self._wake:
                if not self._waiting and not self._stopping:
                    self._dozes = not (self._cache.is_behind or self.residency.num_in_flight)
                    self._wake.wait(IDLE_TICK_S if self._dozes else self._linger_s)
                    self._dozes = False
                if not self._waiting:
                    if self._stopping:
                        return
                    if self._turn.locked() or time.perf_counter() < self._turned_s + self._linger_s:
                        continue  # others have taken the turns meanwhile, and the next may hide what is left to do
            _logged(self.run_once)

    @property
    def _waiting(self) -> bool:
        """Whether any command does."""
        return bool(self._queue or self._asked)

    def _answer_asked(self) -> int:
        """Answer the requests for the status that wait now; returns their number."""
        if not self._asked:
            return 0
        with self._wake:
            asked = list(self._asked)
            self._asked.clear()
        for command, future in asked:
            self._leases.touch(command.worker)
            self._take(command, future)
        return len(asked)

    def _expire_leases(self) -> None:
        for worker in self._leases.expired():
            self._tier()  # while its sessions' blocks are what they were
            closed = self.sessions.close_all(self._leases.sessions_of(worker))
            self.counters.events["lease_expired"] += 1
            log.warning(
                "worker %s was silent for %s s; its %d sessions were closed", worker, self.config.lease_s, closed
            )

    def _take(self, command: Command, future: "Future[Any]") -> None:
        """Complete a command, or put it into the waiting batch."""
        if not future.set_running_or_notify_cancel():
            return
        try:
            self._check_deadline(command)
            if isinstance(command, Attend):
                self._device.check()
                self._join_batch(command, future)
                return
            if not isinstance(command, Status) and not (isinstance(command, Append) and command.session_id not in self._busy):
                self._run_batch()
            self._tier()  # whatever it is may free blocks that were read
            if not isinstance(command, NEED_NO_DEVICE):
                self._device.check()  # only now: the batch may have lost it
            future.set_result(self._handlers[type(command)](command))
        except TierdError as error:
            future.set_exception(error)
        except Exception as error:
            log.exception("a %s failed", type(command).__name__)
            self.counters.events["fault"] += 1
            future.set_exception(Unavailable(f"a fault in the daemon ended this call: {type(error).__name__}: {error}"))

    def _check_deadline(self, command: Command) -> None:
        now_s = self._clock.now()
        if command.deadline is not None and now_s > command.deadline:
            self.counters.events["deadline_exceeded"] += 1
            raise DeadlineExceeded(
                f"the deadline passed {now_s - command.deadline:.3f} s before this call's turn; nothing was done"
            )

    def _join_batch(self, command: Attend, future: "Future[Any]") -> None:
        limit = self.config.batch_rows_max
        if not 1 <= len(command.rows) <= limit:
            raise InvalidArgument(f"one attend has {len(command.rows)} rows; allowed: 1 to {limit}")
        sessions = [self.sessions.find(row.session_id, command.worker) for row in command.rows]
        names = {session.session_id for session in sessions}
        if names & self._busy or self._num_rows + len(sessions) > limit:
            self._run_batch()
        self._jobs.append(Job(command, future, sessions))
        self._busy |= names
        self._num_rows += len(sessions)

    def _run_batch(self) -> None:
        jobs = self._clear_batch()
        if jobs:
            self._hides = False

            def meanwhile() -> None:
                self._hides = True
                self._tier(hidden=True)

            self._cache.answered(self._batch.run(jobs, self._cache.wait(jobs), meanwhile))
            if not self._hides:
                self._tier(collect=False)

    def _tier(self, collect: bool = True, hidden: bool = False) -> None:
        """What tiering does for calls that have their answers; with `collect`, finished copies are taken in. `hidden`: see `update`."""
        try:
            with suppress(Unavailable):  # the device was lost behind its answers, as `lost` says: they are given, and no more will be
                self._cache.update(hidden)
            if collect and not hidden:
                self._cache.collect()
        except Exception:  # a call may be under way, whose answer does not depend on it
            log.exception("a turn of tiering failed")
            self.counters.events["fault"] += 1

    def _clear_batch(self) -> list[Job]:
        jobs, self._jobs, self._busy, self._num_rows = self._jobs, [], set(), 0
        return jobs



def _logged(turn: Callable[[], int]) -> None:
    """A turn whose failure ends no thread: its commands have been told of it."""
    try:
        turn()
    except Exception:
        log.exception("a turn of the engine failed")


def _is_short(command: Command) -> bool:
    return isinstance(command, Attend) and sum(row.q.shape[1] for row in command.rows) <= HELPED_TOKENS_MAX


def _started(config: EngineConfig, kernels: Kernels | None) -> tuple[str, Kernels, Memory]:
    """The backend's name, its kernels and its arenas. Raises Unavailable."""
    sizes = config.hot_bytes, config.scratch_bytes, config.originals_bytes
    try:
        if kernels is not None:
            return config.backend, kernels, kernels.reserve(*sizes)
        name, module, memory = registry.resolve(config.backend, *sizes)
        return name, cast(Kernels, module), memory
    except DeviceUnavailable as error:
        raise Unavailable(str(error)) from error
