"""What tiering costs a decode step on a CUDA device: scratch of 12.5 % of the originals against everything at hand, and other policies.

    python benchmarks/bench_tiering_cuda.py [--smoke]

An engine in this process, over the CUDA backend: 4 layers of 131,072 tokens, 32 query heads, 8 KV heads, d = 128, FP16, layer after
layer as a model calls them; queries look for needles that swell and fade (`benchmarks/tiering/needle_trace.py`). "resident" has scratch for
everything and makes all steps twice: the second time whatever they need is there, and nothing has to be copied. Times are of the calls,
from the queue to the answer, all layers together; what a step is exposed to is its median above resident's. GPU time is the time of a step
in which a kernel or copy ran, from a profile of eight more. Ends without a report if an error is above its bound, nothing was promoted, or
resident had to read the host. --smoke: small shapes, the CPU backend, nothing written.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "tiering"))

import numpy as np
import torch
from common import write_results
from engine_steps import Driven, Setting, check, driven
from needle_trace import Shape, Trace
from rich.console import Console
from rich.table import Table

from tierd.warm import warm_policy

# Storing a layer takes the host 2 to 3 s, once for every row of the report: four are more than the L2 holds, and leave it within minutes.
FULL = Shape(layers=4, tokens=131072, q_heads=32, kv_heads=8, head_dim=128, steps=136)
SMOKE = Shape(layers=2, tokens=2048, q_heads=4, kv_heads=2, head_dim=64, steps=40)
HEADLINE_SHARE = 1 / 8
RESIDENT = Setting("resident", "reactive", 1.0, replayed=True)  # which fetches all that was read, if nothing keeps it from it
SETTINGS = (
    RESIDENT,
    Setting("predictive", "predictive", HEADLINE_SHARE),
    Setting("reactive", "reactive", HEADLINE_SHARE),
    Setting("none", "none", 0.0),
    *(Setting("predictive", "predictive", share) for share in (1 / 64, 1 / 32, 1 / 4)),
)
RESIDENT_HITS_MIN = 0.98  # blocks that fill during the trace have no copy at first
PROFILED = 8  # steps
SECONDS_MAX = 120.0  # no further size of scratch is begun after so long


def measure(trace: Trace, setting: Setting, backend: str) -> dict[str, Any]:
    """A row. The first quarter of the steps warms up."""
    steps = trace.shape.steps - PROFILED
    with driven(trace, setting, backend) as run:
        if setting.replayed:
            for number in range(trace.shape.steps):
                run.step(number)
            run.back()
        for number in range(steps // 4):
            run.step(number)
        before, times = run.counts(), []
        for number in range(steps // 4, steps):
            took_us, results = run.step(number)
            times.append(took_us)
        done = {name: amount - before[name] for name, amount in run.counts().items()}
        ratio = check(trace, steps - 1, results)
        gpu_us = profiled(run, range(steps, trace.shape.steps)) if torch.cuda.is_available() else None
    p20, p50, p80 = np.percentile(times, [20, 50, 80]).tolist()
    timed, needed = len(times), done["hits"] + done["misses"]
    return {
        "name": setting.name, "policy": setting.policy, "scratch_share": setting.share, "p20_us": p20, "p50_us": p50, "p80_us": p80,
        "gpu_us": gpu_us, "needed_per_step": needed / timed, "hit_rate": done["hits"] / max(1, needed),
        "late_per_step": done["late"] / timed,
        "host_bytes_per_step": (done["demand_bytes"] + done["prefetch_bytes"]) / timed,
        "wasted_share": done["wasted"] / max(1, done["prefetched"]), "exact_share": done["exact_heads"] / done["head_steps"],
        "error_over_bound": ratio,
    }  # fmt: skip


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
    resident = next(row for row in rows if row["name"] == RESIDENT.name)
    if not all(row["needed_per_step"] for row in rows):
        sys.exit("a run promoted nothing: its steps say nothing of tiering")
    if resident["hit_rate"] < RESIDENT_HITS_MIN:
        sys.exit(f"resident had {resident['hit_rate']:.3f} of its originals at hand: it is not what the others are to be held against")
    for row in rows:
        row["exposed_us"] = max(0.0, row["p50_us"] - resident["p50_us"])
        row["resident_gap"] = row["p50_us"] / resident["p50_us"] - 1.0
    ours, reactive, none = (
        next(row for row in rows if row["policy"] == policy and row is not resident) for policy in ("predictive", "reactive", "none")
    )
    return {
        "resident_gap_at_12_5pct": ours["resident_gap"], "reactive_gap_at_12_5pct": reactive["resident_gap"],
        "none_gap": none["resident_gap"], "hit_rate_at_12_5pct": ours["hit_rate"], "resident_p50_us": resident["p50_us"],
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    columns = "scratch", "policy", "p20 us", "p50 us", "p80 us", "GPU us", "gap", "hit rate", "needed", "late", "host KB", "wasted", "exact"
    table = Table(*columns)
    for row in rows:
        table.add_row(
            f"{row['scratch_share']:.1%}", row["name"], *(f"{row[x]:.0f}" for x in ("p20_us", "p50_us", "p80_us")),
            "" if row["gpu_us"] is None else f"{row['gpu_us']:.0f}", f"{row['resident_gap']:+.1%}", f"{row['hit_rate']:.4f}",
            f"{row['needed_per_step']:.0f}", f"{row['late_per_step']:.1f}", f"{row['host_bytes_per_step'] / 1024:.0f}",
            f"{row['wasted_share']:.0%}", f"{row['exact_share']:.4f}",
        )  # fmt: skip
    Console(width=150).print(table)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small shapes on the CPU backend, for a look at the program itself")
    options = parser.parse_args(arguments)
    began_s, seed = time.monotonic(), 0
    print(f"seed {seed}")
    warm_policy()
    trace = Trace(SMOKE if options.smoke else FULL, seed)
    rows: list[dict[str, Any]] = []
    for number, setting in enumerate(SETTINGS):
        if number > 3 and time.monotonic() - began_s > SECONDS_MAX:
            print(f"no time is left for scratch of {setting.share:.1%}")
            continue
        rows.append(measure(trace, setting, "cpu" if options.smoke else "cuda"))
        print(f"{time.monotonic() - began_s:.0f} s: {setting.name}, {setting.share:.1%}, {rows[-1]['p50_us']:.0f} us a step", flush=True)
    figures = headline(rows)
    show(rows)
    print(figures)
    if not options.smoke:
        print(write_results("tiering", figures, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
