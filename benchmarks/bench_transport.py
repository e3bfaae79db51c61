"""The load test of what a sidecar costs: a daemon, 1, 2 and 4 worker processes, and attend calls of one row.

Engines: "null", whose kernels do nothing (8 query heads, one token), which leaves the hand-over; "cpu", real calls (32 query heads,
8 KV heads, 2048 tokens). Transports: in-process, unary calls, the client's stream. Loops: closed, and open at fixed rates, where a
call counts from when it was due. Each call's time is split: late (due, not yet begun: the worker was busy, or woke late), queue and
compute as the engine measured them, wire (all else: encoding, gRPC, threads, decoding). Replies are checked against attention in
extended precision first, through each transport; one that breaks its promise ends the run without a report. The headline names what a
bare gRPC stream costs at the same time, the scale of all else.

    python benchmarks/bench_transport.py
"""

import multiprocessing
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from bench_transport_bare import bare_stream_p50_us
from bench_transport_daemon import ENGINES
from bench_transport_worker import MEET_S, PARTS, Load, Samples, work
from common import RESULTS, machine_name, write_results
from rich.console import Console
from rich.table import Table

WORKERS = (1, 2, 4)
TRANSPORTS = ("in-process", "unary", "stream")
Q_HEADS = {"null": 8, "cpu": 32}
TOKENS = {"null": 1, "cpu": 2048}
RATES = {"null": (300, 800), "cpu": (100, 300)}  # calls a second, all workers together
SECONDS = 1.2  # of one loop


class Failed(Exception):
    """A worker or the daemon did not do its part; the text says how."""


@contextmanager
def daemon(engine: str) -> Iterator[tuple[str, int]]:
    """A daemon of its own; yields its target and process id. Raises Failed."""
    script = str(Path(__file__).with_name("bench_transport_daemon.py"))
    with tempfile.TemporaryDirectory(prefix="tierd-") as folder:
        command = [sys.executable, script, f"unix://{folder}/tierd.sock", engine]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                target = process.stdout.readline().strip()
                if not target:
                    raise Failed(f"the daemon ended with {process.wait()}")
                yield target, process.pid
            finally:
                process.terminate()


def cpu_seconds(pid: int) -> float:
    """CPU time of a whole process, by Linux' numbering of processes' clocks."""
    return time.clock_gettime((~pid << 3) | 2)


def run(loads: list[Load], rates: list[float | None], pid: int | None) -> list[dict[str, Any]]:
    """One row for each of `rates`, which are of one worker; `pid`: the daemon, if there is one. Raises Failed."""
    spawn = multiprocessing.get_context("spawn")
    meet, messages = spawn.Barrier(len(loads) + 1), spawn.Queue()
    workers = [
        spawn.Process(target=work, args=(load, rates, number / len(loads), SECONDS, meet, messages)) for number, load in enumerate(loads)
    ]
    for worker in workers:
        worker.start()
    rows = []
    try:
        for rate in rates:
            meet.wait(MEET_S)
            before = cpu_seconds(pid) if pid else 0.0
            meet.wait(MEET_S)
            daemon_cpu_s = cpu_seconds(pid) - before if pid else 0.0
            samples = [messages.get(timeout=MEET_S) for _ in loads]
            rows.append(describe(loads[0], rate, samples, daemon_cpu_s))
        meet.wait(MEET_S)
    except (threading.BrokenBarrierError, queue.Empty):
        for worker in workers:
            worker.kill()  # one whose samples nobody reads would not end
        raise Failed(_why(messages)) from None
    finally:
        for worker in workers:
            worker.join()
    return rows


def _why(messages: Any) -> str:
    """What the worker that failed said; samples of others may come first."""
    try:
        while not isinstance(message := messages.get(timeout=1.0), str):
            pass
    except queue.Empty:
        return "a worker ended without a word"
    return message


def describe(load: Load, rate: float | None, samples: list[Samples], daemon_cpu_s: float) -> dict[str, Any]:
    """Numbers of one loop, all workers together; times in microseconds."""
    seconds = np.concatenate([worker.seconds for worker in samples])
    row: dict[str, Any] = {
        "engine": load.engine, "transport": load.transport, "workers": len(samples), "loop": "closed" if rate is None else "open",
        "offered_per_s": None if rate is None else rate * len(samples), "calls": len(seconds),
        "unsent": sum(worker.unsent for worker in samples),
        "calls_per_s": sum(len(worker.seconds) / worker.elapsed_s for worker in samples),
        "worker_cpu_us_per_call": sum(worker.cpu_s for worker in samples) / len(seconds) * 1e6,
        "daemon_cpu_us_per_call": daemon_cpu_s / len(seconds) * 1e6,
    }  # fmt: skip
    for part, column in zip(PARTS, seconds.T * 1e6, strict=True):
        p50, p90, p99 = np.percentile(column, (50, 90, 99)).tolist()
        row |= {f"{part}_p50_us": p50, f"{part}_p90_us": p90, f"{part}_p99_us": p99, f"{part}_mean_us": float(column.mean())}
    return row


def measure(console: Console) -> list[dict[str, Any]]:
    """All rows. Raises Failed."""
    rows: list[dict[str, Any]] = []
    for engine in ENGINES:
        with daemon(engine) as (target, pid):
            for transport in TRANSPORTS:
                own = transport == "in-process"
                for workers in WORKERS:
                    where = "inproc://" if own else target
                    loads = [Load(engine, transport, where, Q_HEADS[engine], TOKENS[engine], seed) for seed in range(workers)]
                    new = run(loads, [None, *(rate / workers for rate in RATES[engine])], None if own else pid)
                    console.print(f"{engine}, {transport}, {workers} workers: closed loop, p50 {new[0]['total_p50_us']:.0f} us")
                    rows += new
    return rows


def headline_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of the null engine, one worker, closed loop."""
    alone = {row["transport"]: row for row in rows if (row["engine"], row["workers"], row["loop"]) == ("null", 1, "closed")}
    return {
        "in_process_handover_p50_us": alone["in-process"]["total_p50_us"],
        "unary_handover_p50_us": alone["unary"]["total_p50_us"],
        "stream_handover_p50_us": alone["stream"]["total_p50_us"],
        "stream_handover_p99_us": alone["stream"]["total_p99_us"],
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Closed loops: mean parts stacked, p50 and p99 marked."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(ENGINES), figsize=(12, 5), layout="constrained")
    for axis, engine in zip(axes, ENGINES, strict=True):
        chosen = [row for row in rows if row["engine"] == engine and row["loop"] == "closed"]
        places, bottom = np.arange(len(chosen)), np.zeros(len(chosen))
        for part in ("queue", "compute", "wire"):
            means = np.array([row[f"{part}_mean_us"] for row in chosen])
            axis.bar(places, means, bottom=bottom, label=f"{part}, mean")
            bottom += means
        for mark, name in (("_", "p50"), ("^", "p99")):
            axis.scatter(places, [row[f"total_{name}_us"] for row in chosen], marker=mark, color="black", label=f"total, {name}")
        axis.set_xticks(places, [f"{row['transport']}\n{row['workers']}" for row in chosen], fontsize=7)
        axis.set(title=f"engine: {engine}, closed loop", xlabel="transport, workers", ylabel="microseconds a call")
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    console = Console(width=150)
    try:
        rows = measure(console)
    except Failed as failure:
        console.print(f"[red]no report[/red]\n{failure}", markup=True)
        return 1
    headline = headline_of(rows) | {"bare_stream_p50_us": bare_stream_p50_us()}
    columns = ("total_p50_us", "total_p90_us", "total_p99_us", "late_p50_us", "queue_p50_us", "compute_p50_us", "wire_p50_us",
               "calls_per_s", "worker_cpu_us_per_call", "daemon_cpu_us_per_call")  # fmt: skip
    table = Table("engine", "transport", "workers", "offered/s", *(name.removesuffix("_per_call").replace("_", " ") for name in columns))
    for row in rows:
        names = row["engine"], row["transport"], str(row["workers"]), str(row["offered_per_s"] or "closed")
        table.add_row(*names, *(f"{row[name]:.0f}" for name in columns))
    plot(rows, RESULTS / f"transport__{machine_name()}.png")
    console.print(table, headline, write_results("transport", headline, rows).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
