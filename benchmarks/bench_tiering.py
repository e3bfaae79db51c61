"""What the tiering policies do with decode steps: hit rate, bytes from the host, exposed transfer time, waste, and what choosing costs.

    python benchmarks/bench_tiering.py [--trace FOLDER ...] [--seed N]

Steps come from traces that benchmarks/quality/traces.py recorded and from synthetic regimes; the link is simulated
(`benchmarks/tiering/simulated.py`). The headline takes the worst regime at a scratch of 12.5 % of the originals. What only a GPU can
tell, such as a step's time, is not in it. Refuses to report if a replay's accounts do not add up.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "tiering"))

import numpy as np
from common import write_results
from decode_steps import REGIMES, Steps, recorded
from rich.console import Console
from rich.table import Table
from simulated import Outcome, Replay

from tierd.policy import NONE, POLICIES, Predictive, Snapshot

TRACES = [Path(__file__).parents[1] / "tests" / "quality" / "data" / "trace-tiny"]
SHARES = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)  # scratch, of the originals' records
HEADLINE_SHARE = 1 / 8
KEY_SHARES = (0.25, 0.5, 0.75)  # of scratch, at the headline's size
LAYERS, BLOCKS, HEADS = 32, 8192, 8  # 128K tokens of an 8B model


def capacity(steps: Steps, share: float, key_share: float = 0.5) -> tuple[int, int]:
    """Slots for keys and for values."""
    total = round(steps.records * share)
    keys = round(total * key_share)
    return keys, total - keys


def sweep(steps: Steps) -> list[dict[str, Any]]:
    """A row for every policy, size and split of scratch."""
    rows = []
    sizes = [(share, 0.5) for share in SHARES] + [(HEADLINE_SHARE, key) for key in KEY_SHARES if key != 0.5]
    for share, key_share in sizes:
        for policy in POLICIES:
            outcome = Replay(steps, policy, capacity(steps, share, key_share)).run()
            check(steps, outcome)
            rows.append({"steps": steps.name, "policy": policy, "scratch_share": share, "key_share": key_share, **outcome.row(steps)})
    return rows


def check(steps: Steps, outcome: Outcome) -> None:
    """Raises RuntimeError unless every need was a hit or read from the host, and nothing was wasted that was not copied."""
    missed = outcome.demand_bytes // steps.record_bytes
    if outcome.needed != int(steps.needed.sum()) or outcome.hits + missed != outcome.needed or outcome.wasted > outcome.copied:
        raise RuntimeError(f"{steps.name}: the replay's accounts do not add up: {outcome}")


def policy_us(candidates: int, rounds: int = 30) -> float:
    """Median microseconds of a step's choices over `candidates` (block, score) pairs a kind, layer and KV head at 128K tokens, of which a
    quarter is near the threshold, as in a head that promotes."""
    rng = np.random.default_rng(0)
    shape = (2, LAYERS * BLOCKS, HEADS)
    copy_id = np.where(rng.random(shape) < 0.125, 1, NONE)
    columns = np.zeros(shape), np.zeros(shape, np.float32), np.zeros(shape)
    policy, reads, exact = Predictive(), np.zeros((2, BLOCKS, HEADS), bool), np.zeros(HEADS, bool)
    lists = (2, HEADS, candidates)
    picked = [
        (rng.integers(0, BLOCKS, lists).astype(np.int32), rng.gamma(0.5, 0.2, lists).astype(np.float32)) for _ in range(LAYERS)
    ]
    ids = [np.arange(layer * BLOCKS, (layer + 1) * BLOCKS) for layer in range(LAYERS)]
    times = []
    for step in range(rounds):
        began = time.perf_counter()
        for layer in range(LAYERS):
            policy.choose(Snapshot(ids[layer], reads[0], reads[1], exact, *picked[layer], copy_id, *columns, 1.0 + step))
        times.append(1e6 * (time.perf_counter() - began))
    return float(np.median(times))


def headline(rows: Sequence[dict[str, Any]], us: float) -> dict[str, float]:
    """The worst synthetic regime and the costs. A recorded trace of 324 tokens says nothing of 128K."""
    at = {(row["steps"], row["policy"]): row for row in rows if row["scratch_share"] == HEADLINE_SHARE and row["key_share"] == 0.5}
    made = sorted({name for name, _ in at if not name.startswith("recorded")})
    predictive = [at[name, "predictive"] for name in made]
    ratios = [row["exposed_us_per_step"] / at[row["steps"], "reactive"]["exposed_us_per_step"] for row in predictive]
    return {
        "exposed_transfer_vs_reactive": max(ratios),
        "wasted_prefetch_share": max(row["wasted_share"] for row in predictive),
        "policy_us_per_step": us,
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table("steps", "scratch", "keys", "policy", "hit rate", "host KB/step", "exposed us/step", "wasted", "late")
    for row in rows:
        table.add_row(
            row["steps"], f"{row['scratch_share']:.1%}", f"{row['key_share']:.0%}", row["policy"], f"{row['hit_rate']:.3f}",
            f"{row['host_bytes_per_step'] / 1024:.1f}", f"{row['exposed_us_per_step']:.1f}", f"{row['wasted_share']:.1%}", str(row["late"]),
        )  # fmt: skip
    Console(width=120).print(table)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, nargs="*", default=TRACES, help="folders of recorded traces")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic regimes")
    options = parser.parse_args(arguments)
    print(f"seed {options.seed}")
    rows = [row for trace in options.trace for row in sweep(recorded(trace))]
    rows += [row for regime in REGIMES.values() for row in sweep(regime(options.seed))]
    costs = {candidates: policy_us(candidates) for candidates in (8, 16, 64)}
    show(rows)
    figures = headline(rows, costs[16])
    print(figures, costs)
    path = write_results("tiering", figures, [*rows, *({"candidates": n, "policy_us_per_step": us} for n, us in costs.items())])
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
