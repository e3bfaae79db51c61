"""Answers a batch of attend commands: append, one kernel launch per geometry, verify, repair, commit or undo."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tierd_kernels.call import Call, Result, idle
from tierd_kernels.copying import Copying
from tierd_kernels.floats import is_finite
from tierd_kernels.layout import Layout, Memory
from tierd_kernels.reads import Reads, exact_heads

from tierd.commands import EXACT, Attend, Row, RowResult, Tolerance
from tierd.engine.canaries import NO_BLOCKS, Canaries
from tierd.engine.counters import Counters
from tierd.engine.validate import check_row
from tierd.errors import CertificateUnavailable, InvalidArgument, TierdError
from tierd.residency import NAMES, Ids, Pinned, Residency
from tierd.session import Quantiser, Savepoint, Session

log = logging.getLogger(__name__)


class Kernels(Quantiser, Protocol):
    """A backend: all that the daemon asks of it. `tierd_kernels.registry` names those that exist.

    DeviceLost may be raised (and is never returned) by all that touches the arenas; afterwards nothing more may be asked.
    """

    def reserve(self, hot_bytes: int, scratch_bytes: int, originals_bytes: int) -> Memory:
        """The arenas, zeros. `originals` is a numpy array, the others are the backend's. Raises DeviceUnavailable."""
        ...

    def prepare(self, layout: Layout) -> None:
        """Makes kernels for a layout ready, before anything else is asked for it. The first time may take seconds. Raises if it cannot."""
        ...

    def hot_block_bytes(self, layout: Layout) -> int:
        """What the backend's quantised form of one block, all KV heads, takes in the hot arena."""
        ...

    def begin_copies(self, memory: Memory, sources: NDArray[np.int64], targets: NDArray[np.int64], nbytes: int) -> Copying:
        """Begins copies from originals to scratch (byte offsets [n]), of the first records at least, once those begun before are done."""
        ...

    def attend(
        self, layout: Layout, memory: Memory, calls: list[Call], num_q_heads: int, meanwhile: Callable[[], None]
    ) -> list[Result | Exception]:  # fmt: skip
        """One answer, or the exception that explains its absence, per call. `meanwhile` (it raises nothing) is for a backend that waits for
        a device: it runs at most once, before that wait, when copies to scratch that begin now can no more change what the calls read."""
        ...

    def limit_threads(self, count: int) -> None:
        """Launches of the calling thread use `count` threads from now on."""
        ...


@dataclass(eq=False)
class Work:
    """One row under way. `ids`: its full blocks. `result` is set once, before anything that follows from it is asked for."""

    session: Session
    row: Row
    call: Call
    ids: Ids
    result: Result | None = None
    late_records: int = 0

    @cached_property
    def exact_heads(self) -> NDArray[np.bool_]:
        """KV heads [Hkv] of which any row was computed from the originals themselves."""
        assert self.result is not None
        return exact_heads(self.result.certificate["exact"].astype(bool), self.session.layout.num_kv_heads)

    @property
    def reads(self) -> Reads:
        """Original records that were read; mostly none."""
        assert self.result is not None
        return self.result.reads

    @cached_property
    def from_host(self) -> Ids:
        """Those of these that were read from the host, as `BlockTable.stored` has them."""
        return self.session.table.stored(*self.reads, self.ids)


@dataclass(eq=False)
class Job:
    """One attend command under way: its rows, how to take its appends back, and why it failed, if it did."""

    command: Attend
    future: "Future[Any]"
    sessions: list[Session]
    saved: list[tuple[Session, Savepoint]] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    error: TierdError | None = None


class Batch:
    """Runs jobs whose sessions are all different from one another. Owned by whoever has the engine's turn. `looks_at`: of a session's
    layer, the `is_looked_at` of its next call."""

    def __init__(
        self,
        residency: Residency,
        kernels: Kernels,
        sessions: dict[str, Session],
        counters: Counters,
        canary_share: float,
        candidates_max: int,
        preference: int,
        looks_at: Callable[[Session, int], Callable[[int, int], bool]],
        seed: int,
    ) -> None:
        self._residency = residency
        self._kernels = kernels
        self._sessions = sessions
        self._counters = counters
        self._canaries = Canaries(canary_share, seed)
        self._candidates_max, self._preference, self._looks_at = candidates_max, preference, looks_at
        self._prefetch_wait_s = 0.0

    def run(self, jobs: list[Job], prefetch_wait_s: float, meanwhile: Callable[[], None]) -> list[Work]:
        """Answer all `jobs` and complete their futures; returns the rows that succeeded. `prefetch_wait_s` is for their answers.
        `meanwhile` runs at most once, while a device computes: of it they see nothing."""
        self._prefetch_wait_s = prefetch_wait_s
        self._residency.next_turn()
        for job in jobs:
            self._prepare(job)
        self._launch([(job, work) for job in jobs for work in job.works], meanwhile)
        answered: list[Work] = []
        for job in jobs:
            for work in list(job.works):
                if job.error is None:
                    self._guarded(job, self._verify, job, work)
            if self._finish(job):
                answered += job.works
        return answered

    def _prepare(self, job: Job) -> None:
        """Check every row, then append; leaves `job.works` empty if anything fails."""
        try:
            seen: set[tuple[str, int]] = set()
            for session, row in zip(job.sessions, job.command.rows, strict=True):
                check_row(session, row)
                if (row.session_id, row.layer) in seen:
                    raise InvalidArgument(f"session {row.session_id}, layer {row.layer} appears twice in one attend")
                seen.add((row.session_id, row.layer))
        except TierdError as error:
            job.error = error
            return
        self._guarded(job, self._append, job)

    def _append(self, job: Job) -> None:
        for session, row in zip(job.sessions, job.command.rows, strict=True):
            if row.k is not None and row.v is not None:
                job.saved.append((session, session.append(row.layer, row.k, row.v)))
        job.works = [self._plan(session, row) for session, row in zip(job.sessions, job.command.rows, strict=True)]

    def _plan(self, session: Session, row: Row, tolerance: Tolerance | None = None, canaries: bool = True) -> Work:
        tolerance = tolerance or row.tolerance or session.tolerance
        state, table, ids = session.layers[row.layer], session.table, session.full_ids(row.layer)
        hot_offsets, original_offsets = session.offsets(row.layer)
        call = Call(
            q=row.q,
            num_tokens=state.length,
            softmax_scale=session.geometry.scale,
            hot_offsets=hot_offsets,
            original_offsets=original_offsets,
            in_scratch=state.places.of(table, ids),
            group_value_norms=state.group_value_norms,
            group_error_norms=state.group_error_norms,
            rtol=tolerance.rtol,
            atol=tolerance.atol,
            relative_to=tolerance.relative_to,
            policy=session.policy,
            canary_blocks=self._draw_canaries(len(ids)) if canaries else NO_BLOCKS,
            preference=self._preference,
            candidates_max=self._candidates_max,
            is_looked_at=self._looks_at(session, row.layer),
        )
        return Work(session, row, call, ids)

    def _draw_canaries(self, num_blocks: int) -> NDArray[np.int64]:
        drawn = self._canaries.draw(num_blocks)
        self._counters.canaries += len(drawn)
        return drawn

    def _launch(self, rows: Iterable[tuple[Job, Work]], meanwhile: Callable[[], None]) -> None:
        """One kernel call per geometry, with the last of which `meanwhile` goes; a job fails with its first row that has no answer."""
        groups: dict[tuple[Layout, int], list[tuple[Job, Work]]] = defaultdict(list)
        for job, work in rows:
            groups[work.session.layout, work.session.geometry.num_q_heads].append((job, work))
        for number, ((layout, num_q_heads), members) in enumerate(groups.items()):
            try:
                calls = [work.call for _, work in members]
                answers = self._attend(layout, calls, num_q_heads, meanwhile if number == len(groups) - 1 else idle)
                assert len(answers) == len(calls)
            except Exception as error:
                log.exception("the attend kernels failed")
                answers = [error] * len(members)
            self._counters.launches += 1
            for (job, work), answer in zip(members, answers, strict=True):
                if isinstance(answer, Exception):
                    job.error = job.error or self._refusal(answer)
                else:
                    work.result = answer

    def _attend(self, layout: Layout, calls: list[Call], num_q_heads: int, meanwhile: Callable[[], None]) -> list[Result | Exception]:
        with Pinned(self._residency.table(layout)) as pin:

            def unpinned() -> None:
                pin.release()  # a copy that replaces another comes behind what the calls read
                meanwhile()

            return self._kernels.attend(layout, self._residency.arenas.memory, calls, num_q_heads, unpinned)

    def _verify(self, job: Job, work: Work) -> None:
        """Raises CertificateUnavailable, or leaves in `job.works` an answer to the row whose promise holds: after a repair another."""
        self._check_reads(work)
        assert work.result is not None
        if work.result.canary_failures:
            self._repair(work, work.result.canary_failures)
            again = self._plan(work.session, work.row, EXACT, canaries=False)
            self._launch([(job, again)], idle)
            if job.error is not None:
                return
            job.works[job.works.index(work)] = work = again
            self._check_reads(work)
        self._check_promise(work)

    def _check_reads(self, work: Work) -> None:
        """Every original that came from the host must still be what was stored."""
        if bad := work.session.table.corrupt(work.from_host):
            self._counters.events["corrupt_original"] += len(bad)
            kind, block, head = bad[0]
            raise CertificateUnavailable(
                f"session {work.session.session_id}, layer {work.row.layer}: the original {NAMES[kind]} of block {block}, KV head "
                f"{head}, fail their checksum ({len(bad)} such records); nothing certified or exact can be given"
            )

    def _repair(self, work: Work, failures: list[tuple[int, int]]) -> None:
        """Quantise anew every block that failed its canary, if its originals are sound; whatever was cached of it goes."""
        table = work.session.table
        blocks = np.unique(work.ids[[index for index, _ in failures]])
        for block in blocks.tolist():
            try:
                table.require_sound(block)
            except CertificateUnavailable:
                self._counters.events["corrupt_original"] += 1
                raise
        self._residency.drop_copies(table, blocks)
        memory = self._residency.arenas.memory
        self._kernels.quantise_blocks(table.layout, memory, table.original_offset[blocks], table.hot_offset[blocks])
        for session in self._sessions.values():
            if session.table is table:
                for block in blocks.tolist():
                    session.measure_again(block)
        self._counters.events["canary_repaired"] += len(blocks)
        log.warning("blocks %s failed their canary and were quantised anew from sound originals", blocks.tolist())

    def _check_promise(self, work: Work) -> None:
        """The last gate: no NaN, and no bound above its budget without `exact`."""
        assert work.result is not None
        certificate = work.result.certificate
        within = np.less_equal(certificate["bound"], certificate["budget"])  # no NaN is
        kept = within.all() or ((within | certificate["exact"]).all() and not np.isnan(certificate["bound"]).any())
        if not (kept and is_finite(work.result.output, work.session.geometry.dtype)):
            self._counters.events["broken_promise"] += 1
            raise CertificateUnavailable("the kernels returned an answer without a valid certificate; it is withheld")

    def _finish(self, job: Job) -> bool:
        """Complete the job's future; a failed job's appends are taken back, newest first."""
        if job.error is None:
            for work in job.works:
                assert work.result is not None
                self._counters.add(work.result)
                if work.from_host.size:
                    work.late_records = self._residency.num_late(work.session.table, work.from_host, work.exact_heads)
            waited_s = self._prefetch_wait_s
            job.future.set_result(
                [RowResult(w.result.output, w.result.certificate, w.late_records, waited_s) for w in job.works if w.result is not None]
            )
            return True
        for session, saved in reversed(job.saved):
            session.undo(saved)
            self._counters.events["undone"] += 1
        job.future.set_exception(job.error)
        return False

    def _guarded(self, job: Job, step: Callable[..., None], *args: Any) -> None:
        try:
            step(*args)
        except TierdError as error:
            job.error = error
        except Exception as error:
            log.exception("an attend failed")
            job.error = self._refusal(error)

    def _refusal(self, error: Exception) -> TierdError:
        """A kernel's ValueError is about what was asked; anything else is a fault of ours."""
        if isinstance(error, TierdError):
            return error
        if isinstance(error, ValueError):
            return InvalidArgument(str(error))
        self._counters.events["fault"] += 1
        return CertificateUnavailable(f"a fault in the daemon kept it from answering: {type(error).__name__}: {error}")
