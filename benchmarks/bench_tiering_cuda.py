"""What tiering costs a decode step on a CUDA device: scratch of 12.5 % of the originals against everything at hand, and other policies.

    python benchmarks/bench_tiering_cuda.py [--smoke]

An engine in this process, over the CUDA backend: 4 layers of 131,072 tokens, 32 query heads, 8 KV heads, d = 128, FP16, layer after layer
as a model calls them (`benchmarks/tiering/needle_trace.py`): needs like those of a trained model, and "stress" rows, whose needs are
harder. "resident" has scratch for everything and makes all steps twice: the second time whatever they need is there, and it has no policy
any more, which would look at calls for nothing. Times are of the calls, from the queue to the answer, all layers together, after the first
third of the steps: until then scratch fills, and the predictive policy begins many times as many copies. "filling" is the median of the
first third's. Settings take turns, each group of them with a resident row of its own, and what a step is exposed to is how much longer it
takes in the mean than one of that row's: in the mean, since copies begin at few calls, and those wait for it. Ends without a report if an
error is above its bound, nothing was promoted, or a resident row had to read the host. Rows that two minutes have no room for are left
out, the least important first. --smoke: small shapes, the CPU backend, nothing written.

Where a step's time goes is told by a second table: means over 16 more steps of the thread that has the turn, stages as in
`bench_host_path.py` ("unpack" holds the wait for the device) and, of tiering, waiting for candidates, choosing, beginning copies and taking
in those that are done, where a call's own thread does it; what the engine's thread does between calls is in none. "other" is the rest,
queue, threads that wait for one another, and the caller. "GPU busy" is the time of a step in which a kernel or copy ran, from a profile of
eight more. On the CPU backend the stages of tiering only.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "tiering"))

import numpy as np
import torch
from asking import thread_of
from bench_host_path import STAGES, stages
from common import write_results
from engine_steps import Driven, Setting, check, driven
from needle_trace import Shape, Trace
from rich.console import Console
from rich.table import Table
from stopwatch import Stopwatch

from tierd.commands import RowResult
from tierd.engine.caching import ScratchCache
from tierd.policy import POLICIES
from tierd.warm import warm_policy

# Storing a layer takes the host 2 to 3 s, once for every row of the report: four are more than the L2 holds, and leave it within minutes.
FULL = Shape(layers=4, tokens=131072, q_heads=32, kv_heads=8, head_dim=128, steps=600)
SMOKE = Shape(layers=2, tokens=2048, q_heads=4, kv_heads=2, head_dim=64, steps=64)
HEADLINE_SHARE = 1 / 8
RESIDENT = Setting("resident", "reactive", 1.0, replayed=True)  # which fetches all that was read, if nothing keeps it from it
PREDICTIVE = Setting("predictive", "predictive", HEADLINE_SHARE)
NONE, REACTIVE = Setting("none", "none", 0.0), Setting("reactive", "reactive", HEADLINE_SHARE)
# The settings of one group take turns, the first of which is what the others are held against. The first group has what the headline needs.
SETTINGS = (
    (RESIDENT, PREDICTIVE, NONE, REACTIVE),
    tuple(replace(setting, name=f"{setting.name}, stress", stress=True) for setting in (RESIDENT, PREDICTIVE)),
    (RESIDENT, *(Setting("predictive", "predictive", share) for share in (1 / 64, 1 / 32, 1 / 4))),
)
TURN = 8  # steps: within a second the same host is a third faster or slower
RESIDENT_HITS_MIN = 0.98  # blocks that fill during the trace have no copy at first
PROFILED, STAGED = 8, 16  # steps
TIERING = "candidates", "choose", "begin", "take in"
SECONDS_MAX = 120.0  # no settings are begun that would end after so long, if they took as long as those that took longest


def measure(trace: Trace, settings: Sequence[Setting], backend: str) -> list[dict[str, Any]]:
    """A row for each of the settings, which take turns, held against the first. The first third of the steps warms up."""
    steps, filling_us = trace.shape.steps - PROFILED - STAGED, list[list[float]]()
    filling = steps // 3
    with ExitStack() as runs_stop:
        runs = [runs_stop.enter_context(driven(trace, setting, backend)) for setting in settings]
        for setting, run in zip(settings, runs, strict=True):
            if setting.replayed:
                run.replay()
            filling_us.append([run.step(number)[0] for number in range(filling)])
        timed = [Timed(run) for run in runs]
        for start in range(filling, steps, TURN):
            for one in timed:
                one.turn(range(start, min(start + TURN, steps)))
        rows = [one.row(trace, setting, steps, backend) for one, setting in zip(timed, settings, strict=True)]
    return [
        row | held_against(rows[0]["turns_us"], row["turns_us"]) | {"filling_p50_us": float(np.median(us))}
        for row, us in zip(rows, filling_us, strict=True)
    ]


def held_against(residents_us: list[float], turns_us: list[float]) -> dict[str, float]:
    """What the steps of some turns are exposed to, and their gap to the resident row's of the same turns."""
    own, theirs = float(np.mean(turns_us)), float(np.mean(residents_us))
    return {"exposed_us": max(0.0, own - theirs), "resident_gap": own / theirs - 1.0}


class Timed:
    """The steps of one run that count, as it takes its turns."""

    def __init__(self, run: Driven) -> None:
        self._run, self._before, self._steps = run, run.counts(), 0
        self._times_us: list[list[float]] = []  # by turn
        self._results: list[RowResult] = []

    def turn(self, numbers: range) -> None:
        """Its first step is not timed: the threads of who had the turn before may still be at work."""
        times_us = []
        for number in numbers:
            took_us, self._results = self._run.step(number)
            times_us.append(took_us)
        self._times_us.append(times_us[1:])
        self._steps += len(numbers)

    def row(self, trace: Trace, setting: Setting, steps: int, backend: str) -> dict[str, Any]:
        """Of the report, once `steps` were made."""
        run, done = self._run, {name: amount - self._before[name] for name, amount in self._run.counts().items()}
        ratio = check(trace, steps - 1, self._results)
        staged_us = stages_us(run, range(steps, steps + STAGED), backend)
        gpu_us = profiled(run, range(steps + STAGED, trace.shape.steps)) if torch.cuda.is_available() else None
        return _row(setting, self._times_us, self._steps, done) | {"gpu_us": gpu_us, "error_over_bound": ratio, "stages_us": staged_us}


def _row(setting: Setting, times_us: list[list[float]], steps: int, done: dict[str, int]) -> dict[str, Any]:
    """What was counted in so many steps, and what they took, by turn."""
    p20, p50, p80 = np.percentile(list(chain(*times_us)), [20, 50, 80]).tolist()
    needed = done["hits"] + done["misses"]
    return {
        "name": setting.name, "policy": setting.policy, "stress": setting.stress, "scratch_share": setting.share,
        "p20_us": p20, "p50_us": p50, "p80_us": p80, "turns_us": [float(np.mean(turn)) for turn in times_us],
        "needed_per_step": needed / steps, "hit_rate": done["hits"] / max(1, needed), "late_per_step": done["late"] / steps,
        "host_bytes_per_step": (done["demand_bytes"] + done["prefetch_bytes"]) / steps,
        "wasted_share": done["wasted"] / max(1, done["prefetched"]), "exact_share": done["exact_heads"] / done["head_steps"],
        "prefetched_per_step": done["prefetched"] / steps,
    }  # fmt: skip


def stages_us(run: Driven, numbers: range, backend: str) -> dict[str, float]:
    """Microseconds of a step by stage of the thread that has the turn."""
    watch, whole_us = Stopwatch(thread_of(backend)), 0.0
    tiering = [
        ("candidates", ScratchCache, "_snapshot"), ("begin", ScratchCache, "_begin"), ("take in", ScratchCache, "collect"),
        *(("choose", type(policy()), "choose") for policy in POLICIES.values()),
    ]  # fmt: skip
    with watch.over([*(stages() if backend == "cuda" else ()), *tiering]):
        for number in numbers:
            whole_us += run.step(number)[0]
    taken = {stage: 1e6 * watch.taken_s.get(stage, 0.0) / len(numbers) for stage in (*STAGES[:-1], *TIERING)}
    return taken | {"other": whole_us / len(numbers) - sum(taken.values())}


def profiled(run: Driven, numbers: range) -> float:
    """Microseconds of a step in which any kernel or copy runs on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for number in numbers:
            run.step(number)
        torch.cuda.synchronize()
    ranges = sorted((e.time_range.start, e.time_range.end) for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return busy(ranges) / len(numbers)


def busy(ranges: Sequence[tuple[float, float]]) -> float:
    """What sorted (start, end) cover together."""
    total, until = 0.0, float("-inf")
    for start, end in ranges:
        total, until = total + max(0.0, end - max(start, until)), max(until, end)
    return total


def headline(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Gaps to resident. Ends the program where the rows say nothing."""
    if not all(row["needed_per_step"] for row in rows):
        sys.exit("a run promoted nothing: its steps say nothing of tiering")
    for row in rows:
        if row["name"].startswith(RESIDENT.name) and row["hit_rate"] < RESIDENT_HITS_MIN:
            sys.exit(f"{row['name']} had {row['hit_rate']:.3f} of its originals at hand: it is not what the others are to be held against")
    at = {row["name"]: row for row in reversed(rows)}  # the first of each
    figures = {f"{policy}_gap": at[policy]["resident_gap"] for policy in ("reactive", "none")}
    figures["exposed_vs_reactive"] = at["predictive"]["exposed_us"] / at["reactive"]["exposed_us"]
    for trace, suffix in (("", ""), (", stress", "_stress")):
        if (ours := at.get(f"predictive{trace}")) is not None:
            figures[f"resident_gap_at_12_5pct{suffix}"] = ours["resident_gap"]
            figures[f"hit_rate_at_12_5pct{suffix}"] = ours["hit_rate"]
            figures[f"resident_p50_us{suffix}"] = at[f"resident{trace}"]["p50_us"]
    return figures


def show(rows: list[dict[str, Any]]) -> None:
    counted = "hit rate", "needed", "late", "copied", "host KB", "wasted", "exact"
    table = Table("scratch", "policy", "p20 us", "p50 us", "p80 us", "filling", "GPU us", "gap", *counted)
    for row in rows:
        table.add_row(
            f"{row['scratch_share']:.1%}", row["name"], *(f"{row[x]:.0f}" for x in ("p20_us", "p50_us", "p80_us", "filling_p50_us")),
            "" if row["gpu_us"] is None else f"{row['gpu_us']:.0f}", f"{row['resident_gap']:+.1%}", f"{row['hit_rate']:.4f}",
            f"{row['needed_per_step']:.0f}", f"{row['late_per_step']:.1f}", f"{row['prefetched_per_step']:.0f}",
            f"{row['host_bytes_per_step'] / 1024:.0f}", f"{row['wasted_share']:.0%}", f"{row['exact_share']:.4f}",
        )  # fmt: skip
    Console(width=150).print(table)


def show_stages(rows: list[dict[str, Any]]) -> None:
    """Where the time of a step goes, us of all layers together."""
    table = Table("scratch", "policy", *rows[0]["stages_us"], "GPU busy")
    for row in rows:
        busy_us = "" if row["gpu_us"] is None else f"{row['gpu_us']:.0f}"
        table.add_row(f"{row['scratch_share']:.1%}", row["name"], *(f"{us:.0f}" for us in row["stages_us"].values()), busy_us)
    Console(width=190).print(table)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small shapes on the CPU backend, for a look at the program itself")
    options = parser.parse_args(arguments)
    began_s, seed = time.monotonic(), 0
    print(f"seed {seed}")
    warm_policy()
    rows: list[dict[str, Any]] = []
    trace, longest_s = None, 0.0
    for settings in SETTINGS:
        now_s = time.monotonic() - began_s
        if rows and now_s + longest_s > SECONDS_MAX:
            print(f"no time is left for {', '.join(setting.name for setting in settings)}")
            continue
        if trace is None or trace.stress != settings[0].stress:
            trace = Trace(SMOKE if options.smoke else FULL, seed, settings[0].stress)
        measured = measure(trace, settings, "cpu" if options.smoke else "cuda")
        rows += measured
        longest_s = max(longest_s, (time.monotonic() - began_s - now_s) / len(settings))
        told = ", ".join(f"{row['name']}, {row['scratch_share']:.1%}, {row['p50_us']:.0f} us a step" for row in measured)
        print(f"{time.monotonic() - began_s:.0f} s: {told}", flush=True)
    figures = headline(rows)
    show(rows)
    show_stages(rows)
    print(figures)
    if not options.smoke:
        print(write_results("tiering", figures, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
