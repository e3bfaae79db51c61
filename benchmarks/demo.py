"""Two model processes generate text through one daemon, every head of every step certified or exact. `make demo` runs this.

Exits with 1 if a promise was broken: a bound above its budget without being exact, or at rtol 0 a token that dense generation
would not have given.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import demo_worker
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

PROMPT_TOKENS = (4096, 6144)
DAEMON_FLAGS = {"hot-bytes": 64 << 20, "originals-bytes": 256 << 20, "scratch-bytes": 16 << 20}


def main() -> int:
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    with tempfile.TemporaryDirectory(prefix="tierd-") as folder:
        target = f"unix://{folder}/tierd.sock"
        flags = [text for name, value in DAEMON_FLAGS.items() for text in (f"--{name}", str(value))]
        console.print("starting the daemon (the first start after an installation compiles the kernels, up to a minute or two)")
        command = [sys.executable, "-m", "tierd", "serve", "--log-level", "warning", "--listen", target, *flags]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TIERD_")}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as daemon:
            try:
                assert daemon.stdout is not None
                line = daemon.stdout.readline()
                if not line:
                    console.print(f"[red]the daemon ended with {daemon.wait()}")
                    return 1
                console.print(line.strip())
                start = time.perf_counter()
                reports, peak = run_workers(target, console)
                console.print(f"both workers done in {time.perf_counter() - start:.0f} s")
            finally:
                daemon.terminate()
            stopped = daemon.wait(60)
    if len(reports) < len(PROMPT_TOKENS) or stopped != 0:
        console.print(f"[red]a worker failed, or the daemon's stop did (exit {stopped})")
        return 1
    return judge(reports, peak, console)


def run_workers(target: str, console: Console) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The workers' reports, and the daemon's status while both had their caches."""
    spawn = multiprocessing.get_context("spawn")
    messages: Any = spawn.Queue()
    workers = [
        spawn.Process(target=demo_worker.work, args=(number, target, tokens, messages)) for number, tokens in enumerate(PROMPT_TOKENS)
    ]
    for worker in workers:
        worker.start()
    reports: list[dict[str, Any]] = []
    peak: dict[str, Any] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bars: dict[tuple[int, str], Any] = {}
        ended = 0
        while ended < len(workers):
            kind, number, content = messages.get(timeout=600)
            if kind == "step":
                if (number, content) not in bars:
                    bars[number, content] = progress.add_task(f"worker {number}, {content}", total=demo_worker.NEW_TOKENS + 1)
                progress.advance(bars[number, content])
                if content != "dense" and progress.tasks[bars[number, content]].completed == demo_worker.NEW_TOKENS // 2:
                    now = ask_status(target)
                    peak = max(peak, now, key=lambda status: status.get("tokens", 0))
            else:
                ended += 1
                if kind == "done":
                    reports.append(content)
                else:
                    console.print(f"[red]worker {number} failed[/red]\n{content}")
    for worker in workers:
        worker.join()
    return sorted(reports, key=lambda report: report["worker"]), peak


def ask_status(target: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tierd", "status", "--json", "--listen", target]
    status: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    return status


def judge(reports: list[dict[str, Any]], peak: dict[str, Any], console: Console) -> int:
    """Print the table; 0 if every promise was kept and everything that the demo is to show was seen."""
    total = demo_worker.NEW_TOKENS
    table = Table("worker", "prompt", "run", "tokens/s", "= dense", "bound/budget", "answers by rung 0-4", "skipped", "promoted", "fetched")
    problems = []
    for report in reports:
        table.add_row(str(report["worker"]), str(report["prompt_tokens"]), "dense", f"{total / report['dense_seconds']:.1f}")
        for run in report["runs"]:
            fetched = f"{run['host_bytes'] / 2**20:.0f} MiB"
            share = f"{run['bound_share_max']:.2f}" if run["bound_share_max"] else "exact"
            table.add_row(
                "", "", f"rtol {run['rtol']:g}", f"{total / run['seconds']:.1f}", f"{run['tokens_equal']}/{total}", share,
                " ".join(map(str, run["rungs"])), str(run["skipped_blocks"]), str(run["promoted_blocks"]), fetched,
            )  # fmt: skip
            if run["over_budget"]:
                problems.append(f"worker {report['worker']}: {run['over_budget']} bounds above their budget without being exact")
            if run["rtol"] == 0 and run["tokens_equal"] != total:
                problems.append(f"worker {report['worker']}: {total - run['tokens_equal']} tokens differ from dense generation at rtol 0")
        if report["distinct_tokens"] < 64:
            problems.append(f"worker {report['worker']} gave {report['distinct_tokens']} distinct tokens: too few to mean anything")
    for name in ("promoted_blocks", "skipped_blocks", "exact"):
        if not sum(run[name] for report in reports for run in report["runs"]):
            problems.append(f"no {name} in any run: the demo did not show what it is to show")
    console.print(table)
    originals, hot = (peak["pools"][name]["used_bytes"] for name in ("originals", "hot"))
    console.print(
        f"hot tier, at its fullest, {hot / 2**20:.1f} MiB for {originals / 2**20:.1f} MiB of originals: "
        f"{(originals - hot) / 2**20:.1f} MiB saved; scratch cache {peak['hits']} hits, {peak['misses']} misses so far"
    )
    for problem in problems:
        console.print(f"[red]{problem}")
    console.print("[green]every answer was certified or exact" if not problems else "[red]the demo failed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
