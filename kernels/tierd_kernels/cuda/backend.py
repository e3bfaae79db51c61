"""The CUDA backend, as `registry` wants a backend: quantised blocks and scratch on the device, originals in pinned host memory, which
kernels read by themselves. Called from one thread.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import add, le
from typing import Any, NamedTuple

import cupy as cp
import numpy as np
from numpy.typing import NDArray

from tierd_kernels.call import Call, Result, idle
from tierd_kernels.copying import Copying
from tierd_kernels.cuda import launch
from tierd_kernels.cuda.launch import CALL, CERTIFIED, EXACT, FIELDS, kernels
from tierd_kernels.cuda.marks import count_reads
from tierd_kernels.cuda.marks import prepare as prepare_marks
from tierd_kernels.cuda.memory import ALIGNMENT, BLOCK_BYTES_MIN, DeviceMemory, reserve
from tierd_kernels.cuda.norms import group_bounds
from tierd_kernels.cuda.packing import UNIT_MAX, UNIT_MIN, Part, plan_of
from tierd_kernels.cuda.record import Record
from tierd_kernels.cuda.sources import ROW_TILE
from tierd_kernels.cuda.start import FAULTS
from tierd_kernels.cuda.step import Answer, Step
from tierd_kernels.errors import SCORE_MAX, DeviceLost, ScoreOverflow
from tierd_kernels.in_scratch import NOTHING
from tierd_kernels.layout import Layout, Memory
from tierd_kernels.select.candidates import Candidates, joined

NOT_READY = 600  # cudaErrorNotReady
ROWS_AT_ONCE = 64  # query tokens of a call handled together, at most
CALL_ROOM = 2 * CALL.itemsize + ALIGNMENT  # of a call's numbers, of which a launch may carry twice as many as it has calls
COUNTS = "promoted_key_blocks", "promoted_value_blocks", "skipped_blocks"
IN_CERTIFICATE = tuple(name for name in FIELDS if name != "score_top")


def hot_block_bytes(layout: Layout) -> int:
    """Bytes of a block in the hot pool."""
    return layout.num_kv_heads * Record(layout).nbytes


def limit_threads(count: int) -> None:
    """Nothing here runs on the host's threads."""


@contextmanager
def faults() -> Iterator[None]:
    """A device that reports an error is lost: its context does not recover, and what it holds cannot be trusted."""
    try:
        yield
    except FAULTS as error:
        raise DeviceLost(f"the CUDA device failed: {error}; restart the daemon") from error


def prepare(layout: Layout) -> None:
    """Compiles the layout's kernels, unless they are there. Raises DeviceLost."""
    prepare_marks()
    with faults():
        launch.prepare(layout)


def _own(memory: Memory) -> DeviceMemory:
    assert isinstance(memory, DeviceMemory), "this memory is of another backend"
    return memory


def quantise_blocks(
    layout: Layout, memory: Memory, original_offsets: NDArray[np.int64], hot_offsets: NDArray[np.int64]
) -> None:
    """Writes the hot blocks of n full original blocks; offsets int64 [n] in bytes. Raises DeviceLost."""
    if not len(hot_offsets):
        return
    own = _own(memory)
    with faults(), own.stream:
        at = cp.asarray(np.stack([original_offsets, hot_offsets]))
        norms = cp.empty((len(hot_offsets), layout.num_kv_heads), cp.float32)
        kernels(layout).quantise(own.originals_at, own.hot_at, at[0], at[1], norms, own.stream)
        largest = norms.max(axis=1).get(stream=own.stream).astype(np.float64)
        own.stream.synchronize()
    exponent = np.frexp(np.where(np.isfinite(largest), largest, 2.0**UNIT_MAX))[1]
    own.exponents[hot_offsets // BLOCK_BYTES_MIN] = np.clip(np.where(largest > 0, exponent, UNIT_MIN), UNIT_MIN, UNIT_MAX)


def group_norms(
    layout: Layout, memory: Memory, original_offsets: NDArray[np.int64], hot_offsets: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """As the CPU's. Raises DeviceLost."""
    own = _own(memory)
    with faults(), own.stream:
        above, errors = group_bounds(layout, own, original_offsets, hot_offsets)
    return above, errors


def begin_copies(memory: Memory, sources: NDArray[np.int64], targets: NDArray[np.int64], nbytes: int) -> Copying:
    """As the host's, of as many of the records as there is room for, the first ones: on a stream of its own, behind the last step that was
    enqueued, which may still read what lay at the targets; there and back again, so that what is told is what arrived. Only once the copies
    begun before are done. Raises DeviceLost."""
    own = _own(memory)
    count = min(len(sources), own.landing.nbytes // nbytes, own.ways.shape[1])
    own.ways[:, :count] = sources[:count], targets[:count], np.arange(count) * nbytes
    from_host, there, home = (way.ctypes.data for way in own.ways)
    with faults():
        own.copier.wait_event(own.answered)
        launch.gather(own.originals_at, own.scratch_at, from_host, there, count, nbytes, own.copier)
        launch.gather(own.scratch_at, own.landing.ctypes.data, there, home, count, nbytes, own.copier)
        own.copied.record(own.copier)
    return Copying(partial(_has_happened, own.copied), own.landing[: count * nbytes].reshape(count, nbytes))


def _has_happened(event: Any) -> bool:
    """Whether the device has come to it. CuPy's own question does not tell a fault from an event to come."""
    with faults():
        status = cp.cuda.runtime.eventQuery(event.ptr)
        if status not in (0, NOT_READY):
            raise cp.cuda.runtime.CUDARuntimeError(status)
    return bool(status == 0)


def attend(
    layout: Layout, memory: Memory, calls: list[Call], num_q_heads: int, meanwhile: Callable[[], None] = idle
) -> list[Result | Exception]:  # fmt: skip
    """Answers every call, or returns the exception that explains why one has no answer (`ScoreOverflow`, ValueError). `meanwhile` runs once
    while the device computes, if it does: all that reads scratch is enqueued by then, and copies to it come behind. Raises DeviceLost."""
    own = _own(memory)
    answers: dict[int, list[Answer] | Exception] = {}
    waiting: list[Waiting] = []
    for i, call in enumerate(calls):
        try:
            waiting += _parts(layout, own, i, call, num_q_heads)
        except ValueError as error:
            answers[i] = error
            continue
        answers[i] = []
    with faults():
        batches = list(_batches(own, waiting))
        for number, batch in enumerate(batches):
            step = Step(layout, own, [x.part for x in batch])
            step.upload()
            step.launch()
            for x, answer in zip(batch, step.answers(meanwhile if number == len(batches) - 1 else idle), strict=True):
                done = answers[x.number]
                assert isinstance(done, list)
                done.append(answer)
    results: list[Result | Exception] = []
    for i, call in enumerate(calls):
        found = answers[i]
        try:
            results.append(_result(layout, call, found) if isinstance(found, list) else found)
        except ScoreOverflow as error:
            results.append(error)
    return results


class Waiting(NamedTuple):
    """A part of the call of that number, and what it needs at most, of each of `_limits`."""

    number: int
    part: Part
    needs: tuple[int, int, int]


def _parts(layout: Layout, memory: DeviceMemory, number: int, call: Call, num_q_heads: int) -> list[Waiting]:
    """A call's query tokens in runs whose buffers fit what is kept for calls."""
    heads, n, d = call.q.shape
    if heads != num_q_heads or num_q_heads % layout.num_kv_heads or d != layout.head_dim or not 1 <= n <= call.num_tokens:
        raise ValueError(f"q is {call.q.shape} over {call.num_tokens} tokens; expected [{num_q_heads}, n <= tokens, {layout.head_dim}]")
    at_once, limits = min(n, ROWS_AT_ONCE), _limits(memory)
    while not _fits(needs := _needs(layout, memory, Part(call, n - at_once, n)), limits):  # the last part sees the most
        if at_once == 1:
            raise ValueError(f"{call.num_tokens} tokens of {layout} need more than the {limits} bytes kept for calls")
        at_once //= 2
    return [Waiting(number, Part(call, start, min(start + at_once, n)), needs) for start in range(0, n, at_once)]


def _limits(memory: DeviceMemory) -> tuple[int, int, int]:
    """Bytes kept for calls: in the workspace, for what goes in, for what comes back."""
    return memory.workspace.nbytes, memory.inputs.host.size, memory.outputs.host.size


def _needs(layout: Layout, memory: DeviceMemory, part: Part) -> tuple[int, int, int]:
    """What a part takes of each of them, at most."""
    per = kernels(layout).split_blocks(part.full(layout), 1, memory.processors)  # the most splits: more tiles make fewer
    workspace, inputs, answers, late = plan_of(layout, part, per).sizes
    return workspace, inputs + CALL_ROOM, answers + late


def _fits(needs: tuple[int, ...], limits: tuple[int, ...]) -> bool:
    return all(map(le, needs, limits))


def _batches(memory: DeviceMemory, waiting: list[Waiting]) -> Iterator[list[Waiting]]:
    """Parts that fit together."""
    batch: list[Waiting] = []
    used, limits = (0, 0, 0), _limits(memory)
    for x in waiting:
        together = tuple(map(add, used, x.needs))
        if batch and not _fits(together, limits):
            yield batch
            batch, together = [], x.needs
        batch.append(x)
        used = together
    if batch:
        yield batch


def _result(layout: Layout, call: Call, answers: list[Answer]) -> Result:
    """Views of the only answer, if there is one only. Raises ScoreOverflow, and RuntimeError where a row was left between the rungs:
    a fault of the kernels, with which nothing of a call may leave. Most often no row is exact and nothing was promoted, which is not worked
    out then."""

    def joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    found: dict[str, NDArray[Any]] = {name: joined([x.fields[name] for x in answers]) for name in IN_CERTIFICATE}
    states = joined([x.states for x in answers])
    exact = states != CERTIFIED
    some_exact = bool(exact.any())
    if some_exact:
        between = states[exact & (states != EXACT)]
        if between.size:
            found_states = sorted(set(between.tolist()))
            raise RuntimeError(f"{between.size} of {states.size} rows are neither certified nor exact: their states are {found_states}")
        top = joined([x.fields["score_top"] for x in answers])[exact]
        if not np.all(top <= SCORE_MAX):
            raise ScoreOverflow(f"a score of {np.nanmax(top):.3g} is above {SCORE_MAX:g}, the largest that is answered")
    rung = np.zeros(states.shape, np.int64)
    if any(x.marks is not None for x in answers):
        rung = np.where(found["promoted_value_blocks"] > 0, 2, found["promoted_key_blocks"] > 0)
    if some_exact:
        rung[exact] = 3
        rung[:, exact.all(axis=0)] = 4
    reads, host = _reads(layout, call, answers, exact, some_exact)
    for name in COUNTS:
        found[name] = found[name].astype(np.int64)
    found |= {"exact": exact, "rank_certified": found["rank_certified"] > 0, "rung": rung, "host_bytes": host}
    failures = answers[0].failures
    failed = [(int(call.canary_blocks[i]), int(h)) for i, h in np.argwhere(failures)] if failures.size and failures.any() else []
    output = joined([x.output for x in answers])
    return Result(output, found, reads[0], reads[1], partial(_candidates, call, [x.candidates for x in answers]), failed)


def _candidates(call: Call, parts: list[Callable[[], Candidates]]) -> Candidates:
    with faults():
        return joined([part() for part in parts], len(call.hot_offsets), call.candidates_max)


def _reads(
    layout: Layout, call: Call, answers: list[Answer], exact: NDArray[np.bool_], some_exact: bool
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which original records were read, [2, full, Hkv], and bytes from the host by row, [Hq, n]."""
    heads, full = layout.num_kv_heads, len(call.hot_offsets)
    host, reads = np.zeros(exact.shape, np.int64), np.zeros((2, full, heads), np.bool_)
    if some_exact:
        host += exact * (2 * call.num_tokens * layout.head_dim * layout.itemsize)
        reads |= exact.reshape(heads, -1).any(axis=1)
    start = 0
    for answer in answers:
        n = answer.output.shape[1]
        if answer.marks is not None:
            rows, cold = exact.shape[0] // heads * n, np.zeros(len(answer.marks) * ROW_TILE, np.int64)
            count_reads(answer.marks, heads, NOTHING if call.in_scratch is None else call.in_scratch.words, reads, cold)
            host[:, start : start + n] += cold.reshape(heads, -1)[:, :rows].reshape(exact.shape[0], n) * layout.original_record_bytes
        start += n
    return reads, host


__all__ = ["attend", "begin_copies", "group_norms", "hot_block_bytes", "limit_threads", "quantise_blocks", "reserve"]
