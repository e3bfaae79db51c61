"""What each term of the bound (CERTIFICATE.md, sections 5 and 6) is worth: the bound without it over the bound with all.

A term is taken away by making infinite what only that term reads, so that the reference evaluates the very formula without it.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from paper import used_rows
from replay import Stored
from tierd_kernels import ladder
from tierd_kernels.attend.cpu import group_dots
from tierd_kernels.bound import cpu, reference
from tierd_kernels.bound.annotations import Annotations
from tierd_kernels.bound.reference import GROUP_TOKENS
from tierd_kernels.bound.statistics import SUM_NORM, SUM_SQUARE_ERROR, SUM_SQUARE_USED, SUM_SQUARES_NORM
from tierd_kernels.step import Step

Array = NDArray[np.float64]
TERMS = ("T1", "T2", "T3", "value, group form", "value, block form", "cap")
# What a term alone needs: statistics planes of the score pass (4 bytes a row and block), annotations, and passes.
NEEDS = {
    "T1": "2 planes (sum w nu serves Vbar, too)",
    "T2": "2 planes; o_G . O of each group after the value pass",
    "T3": "SV: one Gram matrix of values a KV head and 1024 tokens, when they are stored",
    "value, group form": "SR: one Gram matrix of value errors a KV head and 1024 tokens",
    "value, block form": "sV: one Gram matrix of 16 tokens a block",
    "cap": "none beyond the largest Delta",
}
UNREACHABLE = 1e300  # finite, for the cap's largest norm is multiplied by zeros elsewhere


def bounds(step: Step) -> dict[str, Array]:
    """Bounds [R] of the step's rows as they stand: under "all", and without each of TERMS; in the values' own unit."""
    rows = used_rows(step)
    found = {"all": _evaluate(step, rows, step.statistics, step.annotations)}
    for term in TERMS:
        found[term] = _evaluate(step, rows, *_without(term, step.statistics, step.annotations))
    return {name: bound * step.unit_R[rows] for name, bound in found.items()}


def _evaluate(step: Step, rows: NDArray[np.int64], statistics: NDArray[np.float32], annotations: Annotations) -> Array:
    norms = step.output_norm[rows], step.output_error[rows], step.group_dot[rows]
    return reference.evaluate(statistics, step.factor, annotations, rows, step.keep, step.value_exact, *norms).total


def _without(term: str, statistics: NDArray[np.float32], annotations: Annotations) -> tuple[NDArray[np.float32], Annotations]:
    def infinite(array: Array) -> Array:
        return np.full_like(array, np.inf)

    changed = statistics.copy()
    if term == "T1":
        changed[[SUM_NORM, SUM_SQUARES_NORM]] = np.inf
    elif term == "T2":
        changed[[SUM_SQUARE_USED, SUM_SQUARE_ERROR]] = np.inf
    elif term == "T3":
        annotations = replace(annotations, group_value_HG=infinite(annotations.group_value_HG))
    elif term == "value, group form":
        annotations = replace(annotations, group_error_HG=infinite(annotations.group_error_HG))
    elif term == "value, block form":
        annotations = replace(annotations, value_spectral_Hb=infinite(annotations.value_spectral_Hb))
    else:
        top = np.full_like(annotations.value_norm_max_Hb, UNREACHABLE)
        annotations = replace(annotations, value_norm_max_Hb=top, num_tokens=0)
    return changed, annotations


def costs_us(stored: Stored, step: Step, rounds: int = 20) -> dict[str, float]:
    """Medians on this CPU, in microseconds: both group norms per 1024 tokens of all KV heads, the products o_G . O of a step, and the
    whole evaluation of its bounds. A trace of less than 1024 tokens has no group norms to measure."""
    rows = used_rows(step)
    norms = step.output_norm[rows], step.output_error[rows], step.group_dot[rows]
    partial, divisor = step.partial.reshape(len(step.done), -1, step.d), np.ones(len(rows))
    wide, dots = np.zeros((len(rows), step.d)), np.empty_like(step.group_dot)
    measured = {
        "o_G . O": _median_us(lambda: group_dots(partial, rows, divisor, wide, dots), rounds),
        "bounds": _median_us(
            lambda: cpu.evaluate(step.statistics, step.factor, step.annotations, rows, step.keep, step.value_exact, *norms), rounds
        ),
    }
    per_group = GROUP_TOKENS // stored.layout.block_size
    if len(stored.hot) >= per_group:
        originals, hot = (x[:per_group].reshape(1, -1) for x in (stored.originals, stored.hot))
        measured["SV and SR"] = _median_us(lambda: ladder.group_norms(stored.layout, stored.memory, originals, hot), rounds)
    return measured


def _median_us(call: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]) * 1e6)
