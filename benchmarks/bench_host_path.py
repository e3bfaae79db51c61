"""What the host does for a decode call, in microseconds by stage, if the device took no time. Needs no GPU.

    python benchmarks/bench_host_path.py [--smoke]

An engine as in a daemon, whose event loop takes its turns, over the CUDA backend; kernels are replaced
(`benchmarks/hostpath/stub_device.py`), and what they and copies to and from the device take is left out. So a real call costs what is said
here and, where the device does not hide it, the driver's own time: some 10 us a launch, copy and wait. One session, 32 query heads, 8 KV
heads, d = 128, FP16, blocks of 16; calls of one token follow one another, layer after layer, and append it. Settings: nothing promoted; 1 %
of the records promoted, the set changing by a tenth a step, read from the host (policy none) or, mostly, from scratch (predictive).

`host_us`: from one answer to the next, less the device's part. Stages are means of the thread that has the turn: "store" the new token,
"plan" the call, "pack" it for the device, "unpack" its answer, "result", "verify", "answer"; behind the answer "tiering". "other" is the
rest: queue, threads that wait for one another, the caller. Ends without a report if an output is not the call's own, or if the originals
that the engine counted as read are not those that the kernels marked.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).parent / "hostpath"))

import numpy as np
from asking import answered, thread_of
from common import write_results
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from stopwatch import Stopwatch
from stub_device import Script, stubbed
from tierd_kernels.policy import Budget

from tierd.commands import Append, Attend, Command, Geometry, OpenSession, Row, Tolerance
from tierd.engine import Engine, EngineConfig
from tierd.engine.batch import Batch
from tierd.engine.caching import ScratchCache
from tierd.session import Session
from tierd.warm import warm_policy

Ints = NDArray[np.int64]
LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM, BLOCK = 2, 32, 8, 128, 16
SIZES = 8192, 32768, 131072
SHARE = 0.01  # of the records, promoted
CHANGED = 0.1  # of these, from one step to the next
NEAR = 16  # candidates of a KV head that are not promoted
STAGES = "store", "plan", "pack", "unpack", "result", "verify", "answer", "tiering", "other"
DEVICE, WORKER = "device", "bench"
WARM, CALLS = 32, 128
APPENDED = 4096  # tokens at once


@dataclass(frozen=True)
class Setting:
    """`share`: of the records of a call, promoted."""

    tokens: int
    policy: str
    share: float

    @property
    def blocks(self) -> int:
        return self.tokens // BLOCK

    @property
    def wanted(self) -> int:
        """Blocks of a KV head that a call promotes, all heads together."""
        return round(self.share * KV_HEADS * self.blocks)


def settings(sizes: Sequence[int]) -> list[Setting]:
    """All rows of the report."""
    kinds = ("predictive", 0.0), ("none", SHARE), ("predictive", SHARE)
    return [Setting(tokens, policy, share) for tokens in sizes for policy, share in kinds]


def script(setting: Setting, rng: np.random.Generator, calls: int) -> list[tuple[Ints, NDArray[np.int32]]]:
    """What each call finds, as `Script` has it: a set of blocks for each layer, of which a tenth changes from step to step."""

    def drawn(count: int) -> Ints:
        return np.stack(np.divmod(rng.choice(KV_HEADS * setting.blocks, count, replace=False), setting.blocks), axis=1)

    sets, found = [drawn(setting.wanted) for _ in range(LAYERS)], []
    for number in range(calls):
        layer = number % LAYERS
        mixed = np.concatenate([rng.permutation(sets[layer])[round(CHANGED * setting.wanted) :], drawn(setting.wanted)])
        _, first = np.unique(mixed, axis=0, return_index=True)
        sets[layer] = mixed[np.sort(first)[: setting.wanted]]
        near = [rng.choice(setting.blocks, NEAR, replace=False, shuffle=False) for _ in range(KV_HEADS)]
        found.append((sets[layer], np.sort(np.array(near, np.int32))))
    return found


class Driven:
    """An engine with its tokens stored, on threads of its own as in a daemon, until the context is left."""

    def __init__(self, setting: Setting, told: Script, seed: int) -> None:
        self._told, rng = told, np.random.default_rng(seed)
        most = setting.tokens + WARM + CALLS
        originals = LAYERS * 2 * KV_HEADS * (most + BLOCK) * HEAD_DIM * 2
        self.engine = Engine(EngineConfig(
            backend="cuda", hot_bytes=originals, originals_bytes=originals, scratch_bytes=originals // 8, tiering_policy=setting.policy,
        ))  # fmt: skip
        self.engine.start()
        opening = OpenSession(Geometry(LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM, "float16"), Tolerance(0.05), Budget(), most, worker=WORKER)
        self._session = str(self._run(opening))
        self._kv = rng.standard_normal((KV_HEADS, APPENDED, HEAD_DIM)).astype(np.float16)
        for start in range(0, setting.tokens, APPENDED):
            some = self._kv[:, : setting.tokens - start]
            for layer in range(LAYERS):
                self._run(Append(self._session, layer, some, some, worker=WORKER))
        self._found = script(setting, rng, WARM + CALLS)  # ahead, or its making would hold up the engine's thread
        self._q = rng.standard_normal((WARM + CALLS, Q_HEADS, 1, HEAD_DIM)).astype(np.float16)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.stop(grace_s=10.0)

    def call(self, number: int) -> None:
        """Ends the program where the answer is not the call's own, or where it does not say what was read."""
        promoted, self._told.near = self._found[number]
        self._told.promoted = promoted
        new, q = self._kv[:, number : number + 1], self._q[number]
        result = self._run(Attend([Row(self._session, number % LAYERS, q, new, new)], worker=WORKER))[0]
        told = result.certificate["promoted_key_blocks"].sum()
        if not np.array_equal(result.output, q) or told != len(promoted):
            sys.exit(f"call {number}: the answer is not the call's own: nothing is reported")

    def check(self, number: int) -> None:
        """Once `number` calls were made and the context is left: the engine has counted as read, from scratch or host, what kernels marked,
        keys and values."""
        counted = self.engine.counters.hits + self.engine.counters.misses
        marked = 2 * sum(len(promoted) for promoted, _ in self._found[:number])
        if counted != marked:
            sys.exit(f"{counted} originals were counted as read, and {marked} were: nothing is reported")
        self.engine.check_integrity()

    def _run(self, command: Command) -> Any:
        return answered(self.engine, command)


def stages() -> list[tuple[str, Any, str]]:
    """Stage, owner and name of the functions whose time it is. Only inside `stubbed`."""
    from tierd_kernels.cuda import backend
    from tierd_kernels.cuda.step import Step

    return [
        ("store", Session, "append"), ("plan", Batch, "_prepare"), ("pack", backend, "attend"), ("pack", Step, "upload"),
        ("unpack", Step, "answers"), ("result", backend, "result"), ("verify", Batch, "_verify"), ("answer", Batch, "_finish"),
        ("tiering", ScratchCache, "update"), ("tiering", ScratchCache, "collect"), ("tiering", ScratchCache, "wait"),
    ]  # fmt: skip


def measure(setting: Setting, seed: int) -> dict[str, Any]:
    """A row: medians over the calls after the first."""
    told, watch = Script(Q_HEADS * HEAD_DIM * 2), Stopwatch(thread_of("cuda"))
    samples = []
    with stubbed(told, lambda do: watch.timed(DEVICE, do)):
        with Driven(setting, told, seed) as run:
            for number in range(WARM):
                run.call(number)
            with watch.over(stages()):
                began_s = perf_counter()
                for number in range(WARM, WARM + CALLS):
                    watch.reset()
                    run.call(number)
                    ended_s = perf_counter()
                    samples.append({**watch.taken_s, "whole": ended_s - began_s})
                    began_s = ended_s
        run.check(WARM + CALLS)
        counters = run.engine.counters
        read = counters.hits / max(1, counters.hits + counters.misses)
    del run
    gc.collect()  # engine and residency hold one another
    for sample in samples:
        sample["host"] = sample["whole"] - sample.get(DEVICE, 0.0)
        sample["other"] = sample["host"] - sum(sample.get(stage, 0.0) for stage in STAGES)
    amounts = {stage: 1e6 * np.array([sample.get(stage, 0.0) for sample in samples]) for stage in ("host", *STAGES)}
    p20, p50, p80 = np.percentile(amounts.pop("host"), [20, 50, 80]).tolist()
    return {
        "tokens": setting.tokens, "policy": setting.policy, "promoted_records": 2 * setting.wanted, "hit_rate": read,
        "host_us_p20": p20, "host_us_p50": p50, "host_us_p80": p80,
        **{f"{stage}_us": float(np.mean(amount)) for stage, amount in amounts.items()},
    }  # fmt: skip


def headline(rows: list[dict[str, Any]]) -> dict[str, float]:
    largest = [row for row in rows if row["tokens"] == max(row["tokens"] for row in rows)]
    quiet, promoting = (next(r for r in largest if r["policy"] == "predictive" and (r["promoted_records"] > 0) == some) for some in (0, 1))
    return {"host_us_per_call_128k": quiet["host_us_p50"], "host_us_per_call_128k_promoting_1pct": promoting["host_us_p50"]}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("tokens", "policy", "promoted", "hit rate", "p20 us", "p50 us", "p80 us", *STAGES)
    for row in rows:
        table.add_row(
            str(row["tokens"]), row["policy"], str(row["promoted_records"]), f"{row['hit_rate']:.2f}",
            *(f"{row[f'host_us_{p}']:.0f}" for p in ("p20", "p50", "p80")), *(f"{row[f'{stage}_us']:.0f}" for stage in STAGES),
        )  # fmt: skip
    Console(width=150).print(table)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the smallest size only, nothing written")
    options = parser.parse_args(arguments)
    seed = 0
    print(f"seed {seed}")
    warm_policy()
    rows = [measure(setting, seed) for setting in settings(SIZES[:1] if options.smoke else SIZES)]
    figures = headline(rows)
    show(rows)
    print(figures)
    if not options.smoke:
        print(write_results("host_path", figures, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
