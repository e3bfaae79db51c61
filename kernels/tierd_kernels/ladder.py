"""The ladder: from queries to outputs that meet their bound or are exact.

One call is one session and layer. Its rows are (query head, query token); a KV head's rows run together. The order: score, the
candidate bound, skip and promote, value pass, the bound from what was really used, once more with more promotions where it misses the
budget, then rung 3. Nothing leaves here with a bound above its budget unless the row was computed from the originals.
"""

import threading
from collections.abc import Callable

import numba
import numpy as np

from tierd_kernels.call import Call, Result, idle
from tierd_kernels.host import begin_copies, hot_block_bytes, prepare, reserve
from tierd_kernels.layout import Layout, Memory
from tierd_kernels.quantise.cpu import group_norms, quantise_blocks
from tierd_kernels.select.candidates import joined
from tierd_kernels.step import Step
from tierd_kernels.workspace import Workspace

ROWS_AT_ONCE = 64  # query tokens handled together: they bound the score buffer


_thread = threading.local()  # kernels are called from one thread; a second one gets memory of its own


def attend(
    layout: Layout, memory: Memory, calls: list[Call], num_q_heads: int, meanwhile: Callable[[], None] = idle
) -> list[Result | Exception]:  # fmt: skip
    """Answers every call, or returns the exception that explains why one has no answer (`ScoreOverflow`, ValueError). `meanwhile`
    is for backends that wait for a device: here the host computes, and it does not run."""
    if not hasattr(_thread, "space"):
        _thread.space = Workspace()
    answers: list[Result | Exception] = []
    for call in calls:
        try:
            answers.append(_attend(layout, memory, call, num_q_heads, _thread.space))
        except ValueError as error:
            answers.append(error)
    return answers


def limit_threads(count: int) -> None:
    """Kernels that the calling thread launches from now on run on `count` threads. Raises ValueError for more than there are cores."""
    numba.set_num_threads(count)


def _attend(layout: Layout, memory: Memory, call: Call, num_q_heads: int, space: Workspace) -> Result:
    heads, n, d = call.q.shape
    if heads != num_q_heads or num_q_heads % layout.num_kv_heads or d != layout.head_dim or not 1 <= n <= call.num_tokens:
        raise ValueError(f"q is {call.q.shape} over {call.num_tokens} tokens; expected [{num_q_heads}, n <= tokens, {layout.head_dim}]")
    parts = []
    for start in range(0, n, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, n)
        parts.append(Step(layout, memory, call, start, stop, space).run())
    if len(parts) == 1:
        return parts[0]
    return Result(
        np.concatenate([p.output for p in parts], axis=1),
        {name: np.concatenate([p.certificate[name] for p in parts], axis=1) for name in parts[0].certificate},
        np.logical_or.reduce([p.key_reads for p in parts]),
        np.logical_or.reduce([p.value_reads for p in parts]),
        lambda: joined([p.candidates() for p in parts], len(call.hot_offsets), call.candidates_max),
        parts[0].canary_failures,
        np.maximum.reduce([p.shares for p in parts if p.shares is not None]),
    )

__all__ = [
    "Call",
    "Result",
    "attend",
    "begin_copies",
    "group_norms",
    "hot_block_bytes",
    "limit_threads",
    "prepare",
    "quantise_blocks",
    "reserve",
]
