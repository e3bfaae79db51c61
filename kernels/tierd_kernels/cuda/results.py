"""What the parts of a call have answered, as a call's result. Needs CuPy."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.call import Call, Result
from tierd_kernels.cuda.launch import CERTIFIED, EXACT, FIELDS
from tierd_kernels.cuda.lost import faults
from tierd_kernels.cuda.step import Answer
from tierd_kernels.errors import SCORE_MAX, ScoreOverflow
from tierd_kernels.layout import Layout
from tierd_kernels.reads import exact_heads, united
from tierd_kernels.select.candidates import Candidates, joined

COUNTS = "promoted_key_blocks", "promoted_value_blocks", "skipped_blocks"


def result(layout: Layout, call: Call, answers: list[Answer]) -> Result:
    """Raises ScoreOverflow, and RuntimeError where a row was left between the rungs. Most often no row is exact and nothing was promoted,
    which is not worked out then."""
    whole = answers[0] if len(answers) == 1 else _joined(layout, call, answers)
    found: dict[str, NDArray[Any]] = {**whole.fields}
    reads, exact = whole.reads, whole.states != CERTIFIED
    score_top = found.pop("score_top")
    rung, host = np.zeros(exact.shape, np.int64), np.zeros(exact.shape, np.int64)
    if reads.from_host.size:
        host += whole.cold * np.int64(layout.original_record_bytes)
        rung = np.where(found["promoted_value_blocks"] > 0, 2, found["promoted_key_blocks"] > 0)
    if np.count_nonzero(exact):
        _require_exact(whole.states[exact], exact.size, score_top[exact])
        rung[exact] = 3
        rung[:, exact.all(axis=0)] = 4
        host += exact * (2 * call.num_tokens * layout.head_dim * layout.itemsize)
    for name in COUNTS:
        found[name] = found[name].astype(np.int64)
    found["exact"], found["rung"], found["host_bytes"] = exact, rung, host
    found["rank_certified"] = found["rank_certified"] > 0
    failed = [(int(call.canary_blocks[i]), int(h)) for i, h in np.argwhere(whole.failures)] if np.count_nonzero(whole.failures) else []
    return Result(whole.output, found, reads, partial(_candidates, whole.candidates), failed)


def _require_exact(states: NDArray[np.int32], rows: int, score_top: NDArray[np.float64]) -> None:
    """Of those of `rows` that are not certified: a row left between the rungs is a fault of the kernels, with which nothing of a call may
    leave."""
    between = states[states != EXACT]
    if between.size:
        found = sorted(set(between.tolist()))
        raise RuntimeError(f"{between.size} of {rows} rows are neither certified nor exact: their states are {found}")
    if not np.all(score_top <= SCORE_MAX):
        raise ScoreOverflow(f"a score of {np.nanmax(score_top):.3g} is above {SCORE_MAX:g}, the largest that is answered")


def _joined(layout: Layout, call: Call, parts: list[Answer]) -> Answer:
    """All parts of a call as one; the first has its canaries."""
    output, states, cold = (np.concatenate(arrays, axis=1) for arrays in zip(*((x.output, x.states, x.cold) for x in parts), strict=True))
    fields = {name: np.concatenate([x.fields[name] for x in parts], axis=1) for name in FIELDS}
    reads = united(
        [x.reads for x in parts], len(call.hot_offsets), exact_heads(states != CERTIFIED, layout.num_kv_heads), call.in_scratch
    )  # fmt: skip
    late = [x.candidates for x in parts]
    return Answer(
        output, fields, states, parts[0].failures, reads, cold,
        lambda: joined([found() for found in late], len(call.hot_offsets), call.candidates_max),
    )  # fmt: skip


def _candidates(found: Callable[[], Candidates]) -> Candidates:
    with faults():
        return found()
