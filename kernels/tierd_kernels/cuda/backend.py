"""The CUDA backend, as `registry` wants a backend: quantised blocks and scratch on the device, originals in pinned host memory, which
kernels read by themselves. Called from one thread at a time.
"""

from collections.abc import Callable
from functools import partial
from operator import add, le
from typing import Any, NamedTuple

import cupy as cp
import numpy as np
from numpy.typing import NDArray

from tierd_kernels.call import Call, Result, idle
from tierd_kernels.copying import Copying
from tierd_kernels.cuda import launch
from tierd_kernels.cuda.kept import most_bytes
from tierd_kernels.cuda.launch import kernels
from tierd_kernels.cuda.lost import faults
from tierd_kernels.cuda.memory import BLOCK_BYTES_MIN, DeviceMemory, reserve
from tierd_kernels.cuda.norms import group_bounds
from tierd_kernels.cuda.packing import UNIT_MAX, UNIT_MIN, Part
from tierd_kernels.cuda.plan import plan_of
from tierd_kernels.cuda.record import Record
from tierd_kernels.cuda.results import result
from tierd_kernels.cuda.step import Answer, Step
from tierd_kernels.errors import ScoreOverflow
from tierd_kernels.layout import Layout, Memory
from tierd_kernels.reads import prepare as prepare_reads

NOT_READY = 600  # cudaErrorNotReady
ROWS_AT_ONCE = 64  # query tokens of a call handled together, at most


def hot_block_bytes(layout: Layout) -> int:
    """Bytes of a block in the hot pool."""
    return layout.num_kv_heads * Record(layout).nbytes


def limit_threads(count: int) -> None:
    """Nothing here runs on the host's threads."""


def prepare(layout: Layout) -> None:
    """Compiles the layout's kernels, unless they are there. Raises DeviceLost."""
    prepare_reads()
    with faults():
        launch.prepare(layout)


def _own(memory: Memory) -> DeviceMemory:
    assert isinstance(memory, DeviceMemory), "this memory is of another backend"
    return memory


def quantise_blocks(
    layout: Layout, memory: Memory, original_offsets: NDArray[np.int64], hot_offsets: NDArray[np.int64]
) -> None:
    """Writes the hot blocks of n full original blocks; offsets int64 [n] in bytes. Raises DeviceLost.

    Offsets are read and norms written over the link: with arrays of CuPy's on the device a block took a decode step's host 0.39 to 0.49 ms,
    so 0.16."""
    own, heads = _own(memory), layout.num_kv_heads
    at_once = min(own.blocks.shape[1], own.norms.size // heads)
    for start in range(0, len(hot_offsets), at_once):
        originals, hot = original_offsets[start : start + at_once], hot_offsets[start : start + at_once]
        own.blocks[0, : len(hot)], own.blocks[1, : len(hot)] = originals, hot
        with faults(), own.device:
            kernels(layout).quantise(own.originals_at, own.hot_at, *own.blocks_at, own.norms_at, len(hot), own.stream)
            own.stream.synchronize()
        largest = own.norms[: len(hot) * heads].reshape(-1, heads).max(axis=1)
        # 2^(e - 1) is the least number of exponent e. A NaN counts as none.
        own.exponents[hot // BLOCK_BYTES_MIN] = np.frexp(np.fmax(np.minimum(largest, 2.0 ** (UNIT_MAX - 1)), 2.0 ** (UNIT_MIN - 1)))[1]


def group_norms(
    layout: Layout, memory: Memory, original_offsets: NDArray[np.int64], hot_offsets: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """As the CPU's. Raises DeviceLost."""
    own = _own(memory)
    with faults(), own.device, own.stream:
        above, errors = group_bounds(layout, own, original_offsets, hot_offsets)
    return above, errors


def begin_copies(memory: Memory, sources: NDArray[np.int64], targets: NDArray[np.int64], nbytes: int) -> Copying:
    """As the host's, of as many of the records as there is room for, the first ones: on a stream of its own, behind the last step that was
    enqueued, which may still read what lay at the targets; there and back again, so that what is told is what arrived. Only once the copies
    begun before are done. Raises DeviceLost."""
    own = _own(memory)
    count = min(len(sources), own.landing.nbytes // nbytes, own.ways.shape[1])
    own.ways[0, :count], own.ways[1, :count] = sources[:count], targets[:count]
    with faults(), own.device:
        own.copier.wait_event(own.answered)
        launch.gather(own.originals_at, own.scratch_at, own.landing_at, *own.ways_at, count, nbytes, own.copier)
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
    found: list[list[Answer] | ValueError] = []
    waiting: list[Waiting] = []
    for call in calls:
        answers: list[Answer] = []
        try:
            waiting += _parts(layout, own, call, num_q_heads, answers)
            found.append(answers)
        except ValueError as error:
            found.append(error)
    with faults(), own.device:
        batches = _batches(own, waiting)
        for batch in batches:
            step = Step(layout, own, [x.part for x in batch])
            step.upload()
            step.launch()
            for x, answer in zip(batch, step.answers(meanwhile if batch is batches[-1] else idle), strict=True):
                x.answers.append(answer)
    return [_result_of(layout, call, x) for call, x in zip(calls, found, strict=True)]


def _result_of(layout: Layout, call: Call, found: list[Answer] | ValueError) -> Result | Exception:
    try:
        return found if isinstance(found, ValueError) else result(layout, call, found)
    except ScoreOverflow as error:
        return error


class Waiting(NamedTuple):
    """A part of a call, where its answer goes, and what it needs at most, of each of `_limits`."""

    part: Part
    answers: list[Answer]
    needs: tuple[int, int, int, int]


def _parts(layout: Layout, memory: DeviceMemory, call: Call, num_q_heads: int, answers: list[Answer]) -> list[Waiting]:
    """A call's query tokens in runs whose buffers fit what is kept for calls."""
    heads, n, d = call.q.shape
    if heads != num_q_heads or num_q_heads % layout.num_kv_heads or d != layout.head_dim or not 1 <= n <= call.num_tokens:
        raise ValueError(f"q is {call.q.shape} over {call.num_tokens} tokens; expected [{num_q_heads}, n <= tokens, {layout.head_dim}]")
    at_once, limits = min(n, ROWS_AT_ONCE), _limits(memory)
    # The last part sees the most.
    while not _fits(needs := _needs(memory, last := Part(layout, call, n - at_once, n)), limits):
        if at_once == 1:
            raise ValueError(f"{call.num_tokens} tokens of {layout} need more than the {limits} bytes kept for calls")
        at_once //= 2
    if at_once == n:
        return [Waiting(last, answers, needs)]
    return [Waiting(Part(layout, call, start, min(start + at_once, n)), answers, needs) for start in range(0, n, at_once)]


def _limits(memory: DeviceMemory) -> tuple[int, int, int, int]:
    """Bytes kept for calls: in the workspace, for what goes in, for what comes back, for what stays."""
    return memory.workspace.nbytes, memory.inputs.host.size, memory.outputs.host.size, memory.kept.nbytes


def _needs(memory: DeviceMemory, part: Part) -> tuple[int, int, int, int]:
    """What a part takes of each of them, at most."""
    return *plan_of(part.layout, part.shape, memory.processors).needs, most_bytes(part.kept)


def _fits(needs: tuple[int, ...], limits: tuple[int, ...]) -> bool:
    return all(map(le, needs, limits))


def _batches(memory: DeviceMemory, waiting: list[Waiting]) -> list[list[Waiting]]:
    """Parts that fit together; each does alone."""
    if len(waiting) == 1:
        return [waiting]
    batches: list[list[Waiting]] = []
    used, limits = (0, 0, 0, 0), _limits(memory)
    for x in waiting:
        together = tuple(map(add, used, x.needs))
        if batches and _fits(together, limits):
            batches[-1].append(x)
            used = together
        else:
            batches.append([x])
            used = x.needs
    return batches


__all__ = ["attend", "begin_copies", "group_norms", "hot_block_bytes", "limit_threads", "quantise_blocks", "reserve"]
