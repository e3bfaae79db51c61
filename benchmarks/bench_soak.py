"""A soak: what users of a sidecar fear most is a wrong answer that looks right, and memory that does not come back.

    python benchmarks/bench_soak.py [--minutes M] [--seed N] [--backend cpu|cuda] [--smoke]

A real daemon whose scratch is so small that copies push each other out all the time, and whose other pools are full now and then. Worker
processes open sessions of twelve geometries (each type, head sizes of 64 to 128, GQA groups, block sizes), tolerances of 0, 1, 2 and 5 %
and either policy; they append, step, attend with several query tokens, many sessions in a message, fork, truncate, close. Every few seconds
one is killed, and replaced. Some sessions are left to their lease, some connections cut while a call is under way, some left with sessions
open.

Every answer is held against attention in float64 over the originals that the worker kept (`tests/oracle.py`): error within the bound, bound
within the budget or the head exact, budget no more than asked for. In the end all workers leave. There is no report, but exit code 1 and
what was wrong, after a broken promise, a call without an answer or refused without cause, a session that outlives its lease, anything that
is not given back, a fault in the daemon's log or counters, or resident memory above that of the second quarter (`soak/samples.py`).

What workers draw follows the seed; in which order the daemon meets their calls does not.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "soak"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import draws
from common import write_results
from crew import Crew
from daemon import LEASE_S, Daemon, running, stopped
from rich.console import Console
from rich.table import Table
from samples import Row, given_back, growth, leaks, pools_left_bytes, rss_mb_per_1000_calls, sample
from tally import Tally
from tierd_client import Tolerance

WORKERS = 3
SAMPLES = 100
SMOKE_S = 8.0
SHOWN = "seconds", "calls", "sessions", "copies", "evicted", "originals_used_bytes", "rss_mib", "threads", "open_files"


@dataclass(frozen=True)
class Soak:
    """What came of one. `status`: the daemon's last."""

    rows: list[Row]
    tally: Tally
    killed: int
    status: dict[str, Any]
    problems: list[str]


def soak(daemon: Daemon, seed: int, seconds: float) -> Soak:
    """Lets workers loose, and waits until all is given back; ends early at the first problem."""
    geometries = draws.palette(seed)
    prepare(daemon, seed)
    crew = Crew(daemon.target, seed, geometries, LEASE_S, WORKERS)
    began_s, rows = time.monotonic(), []
    for number in range(1, SAMPLES + 1):
        crew.run(began_s + seconds * number / SAMPLES)
        if crew.problems:
            break
        rows.append(sample(daemon, crew.tally, crew.killed, began_s))
    crew.dismiss()
    status = given_back(daemon)
    rows.append(sample(daemon, crew.tally, crew.killed, began_s))
    problems = crew.problems + ([] if crew.problems else leaks(status)) + [f"the daemon logged: {line}" for line in daemon.faults()]
    return Soak(rows, crew.tally, crew.killed, status, problems)


def prepare(daemon: Daemon, seed: int) -> None:
    """Opens a session of each geometry, for which a GPU may have to compile, so that no lease runs out meanwhile."""
    for geometry in draws.palette(seed):
        daemon.monitor.open_session(geometry, tolerance=Tolerance(0.05), max_tokens=draws.MAX_TOKENS).close()


def unseen(done: Soak) -> list[str]:
    """What a soak must have met to mean anything, and did not."""
    seen = {
        "worker killed": done.killed, "lease that ran out": done.status["events"].get("lease_expired", 0),
        "copy evicted": done.status["evicted"], "original read from scratch": done.status["hits"], "exact head": done.tally.exact,
        "certified head": done.tally.head_steps - done.tally.exact, "fork": done.tally.forked, "truncation": done.tally.truncated,
        "connection cut": done.tally.dropped, "connection left": done.tally.left, "refusal of a full pool": done.tally.refused,
    }  # fmt: skip
    return [f"there was no {name}: the soak did not meet what it is about" for name, count in seen.items() if not count]


def headline(done: Soak) -> dict[str, float]:
    return {
        "calls": done.tally.calls, "head_steps": done.tally.head_steps, "violations": len(done.problems),
        "worst_error_over_bound": done.tally.worst, "worst_error_over_bound_certified": done.tally.worst_certified,
        "exact_share": done.tally.exact / max(1, done.tally.head_steps),
        "workers_killed": done.killed, "rss_mb_per_1000_calls": rss_mb_per_1000_calls(done.rows),
        "pools_left_bytes": pools_left_bytes(done.status),
    }  # fmt: skip


def show(done: Soak, console: Console) -> None:
    table = Table(*(name.replace("_", " ") for name in SHOWN))
    for row in done.rows[:: max(1, len(done.rows) // 10)]:
        table.add_row(*(f"{row[name]:,.0f}" for name in SHOWN))
    console.print(table, vars(done.tally), done.status["events"])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, metavar="M", help="how long (2)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws (0)")
    parser.add_argument("--backend", choices=("cpu", "cuda"), default="cpu", help="of the daemon (cpu)")
    parser.add_argument("--smoke", action="store_true", help="some seconds; memory over time is not judged, nothing is written")
    options = parser.parse_args(arguments)
    console = Console(width=150)
    console.print(f"seed {options.seed}")
    with running(options.backend) as daemon:
        done = soak(daemon, options.seed, SMOKE_S if options.smoke else 60.0 * options.minutes)
        code = stopped(daemon)
    problems = done.problems + ([f"the daemon ended with {code}"] if code else [])
    if not options.smoke and not problems:
        problems = growth(done.rows) + unseen(done)
    if problems:
        console.print("[red]no report[/red]", *(problem.replace("[", r"\[") for problem in problems), sep="\n")
        return 1
    show(done, console)
    figures = headline(done)
    console.print(figures)
    if not options.smoke:
        run = {"seed": options.seed, "minutes": options.minutes, "backend": options.backend, "workers": WORKERS} | vars(done.tally)
        console.print(write_results("soak", figures, list(done.rows), run=run))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
