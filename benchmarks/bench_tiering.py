"""What the tiering policies do with decode steps: hit rate, bytes from the host, exposed transfer time, waste, and what choosing and
beginning copies costs the engine's thread.

    python benchmarks/bench_tiering.py [--trace FOLDER ...] [--seed N]

Steps come from traces that benchmarks/quality/traces.py recorded and from synthetic regimes; the link is simulated
(`benchmarks/tiering/simulated.py`). The headline takes the worst of the regimes that the policy was fitted to, the worst of what it was not
(other seeds, other regimes), and the worst recorded trace of real length, at a scratch of 12.5 % of the originals; `waiting`: with copies
that begin when the engine begins them, while the others begin as soon as a policy chooses them. A step's time on a GPU:
`bench_tiering_cuda.py`. Refuses to report if a replay's accounts do not add up.

The committed run also has traces of the small model of `benchmarks/quality/`, which these commands record and which it was given in turn:

    traces.py --model MODEL --context 8192 --steps 256 --out text-8k
    traces.py --model MODEL --context 4096 --steps 256 --out text-4k
    traces.py --model MODEL --context 8192 --steps 192 --task niah --out niah-8k
    traces.py --model MODEL --context 8192 --steps 192 --task vt --out vt-8k
    traces.py --model MODEL --context 6144 --steps 256 --seed 11 --out text-6k
    traces.py --model MODEL --context 8192 --steps 192 --task niah_multiquery --seed 7 --out multiquery-8k
    traces.py --model MODEL --context 8192 --steps 192 --task niah_multivalue --seed 5 --out multivalue-8k
    traces.py --model MODEL --context 8192 --steps 192 --task fwe --seed 5 --out fwe-8k
    traces.py --model MODEL --context 7168 --steps 256 --seed 9 --out text-7k
    traces.py --model MODEL --context 8192 --steps 192 --task cwe --seed 11 --out cwe-8k
    traces.py --model MODEL --context 8192 --steps 192 --task niah_multikey --seed 12 --out multikey-8k

None of the policy's constants was chosen for the last two.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "tiering"))

import numpy as np
from common import write_results
from copy_cost import copies_us
from decode_steps import HELD_OUT, REGIMES, Steps, recorded
from rich.console import Console
from rich.table import Table
from simulated import Outcome, Replay

from tierd.config import EngineConfig
from tierd.notes import NOTE
from tierd.policy import FIRST_STEP, NO_READS, NONE, POLICIES, Predictive, Snapshot
from tierd.policy.predictive import EVERY

TRACES = [Path(__file__).parents[1] / "tests" / "quality" / "data" / "trace-tiny"]
SHARES = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)  # scratch, of the originals' records
HEADLINE_SHARE = 1 / 8
HEADLINE_SIZE = HEADLINE_SHARE, 0.5
KEY_SHARES = (0.25, 0.5, 0.75)  # of scratch, at the headline's size
RECENCY_SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8)
SIZES = [(share, 0.5) for share in SHARES] + [(HEADLINE_SHARE, key) for key in KEY_SHARES if key != 0.5]
TOKENS_MIN = 4096  # of a recorded trace that counts for the headline
LAYERS, BLOCKS, HEADS = 32, 8192, 8  # 128K tokens of an 8B model
COPIES = EngineConfig.migrations_max  # begun at once


def capacity(steps: Steps, share: float, key_share: float = 0.5) -> tuple[int, int]:
    """Slots for keys and for values."""
    total = round(steps.records * share)
    keys = round(total * key_share)
    return keys, total - keys


def sweep(steps: Steps, sizes: Sequence[tuple[float, float]] = SIZES) -> list[dict[str, Any]]:
    """A row for every policy, size and split of scratch; of the headline's size one more, for the default policy as the engine begins its
    copies, and of some sizes another, for its copies where the one goes that was read least recently."""
    rows = []
    for share, key_share in sizes:
        settings = [(policy, False, False) for policy in POLICIES]
        if (share, key_share) == HEADLINE_SIZE:
            settings.append((Predictive.name, True, False))
        if share in RECENCY_SHARES and key_share == 0.5:
            settings.append((Predictive.name, False, True))
        for policy, waits, recency in settings:
            outcome = Replay(steps, policy, capacity(steps, share, key_share), waits, recency).run()
            check(steps, outcome)
            size = {"scratch_share": share, "key_share": key_share}
            rows.append({"steps": steps.name, "policy": policy, "waits": waits, "recency": recency, **size, **outcome.row(steps)})
    return rows


def check(steps: Steps, outcome: Outcome) -> None:
    """Raises RuntimeError unless all that the steps ask for was looked at, all that was read was a hit or came from the host, and nothing
    was wasted that was not copied."""
    missed = outcome.demand_bytes // steps.record_bytes
    if outcome.asked != int(steps.needed.sum()) or outcome.hits + missed != outcome.needed or outcome.wasted > outcome.copied:
        raise RuntimeError(f"{steps.name}: the replay's accounts do not add up: {outcome}")


def policy_us(candidates: int, rounds: int = 30) -> float:
    """Median microseconds of a step's choices over `candidates` (block, score) pairs a kind, layer and KV head at 128K tokens, of which a
    quarter is near the threshold, as in a head that promotes, and few have a copy: nothing is copied here, so much is asked for; no layer
    is settled."""
    rng = np.random.default_rng(0)
    notes = np.full((2, LAYERS * BLOCKS, HEADS), 0, NOTE)  # filled, as the engine's table is: then it lies on large pages
    notes["copy_id"] = np.where(rng.random(notes.shape) < 0.125, 1, NONE)
    policy, exact = Predictive(), np.zeros(HEADS, bool)
    lists = (2, HEADS, candidates)
    picked = [
        (rng.integers(0, BLOCKS, lists).astype(np.int32), rng.gamma(0.5, 0.2, lists).astype(np.float32)) for _ in range(LAYERS)
    ]
    ids = [np.arange(layer * BLOCKS, (layer + 1) * BLOCKS) for layer in range(LAYERS)]
    times = []
    for step in range(rounds):
        began = time.perf_counter()
        for layer in range(LAYERS):
            if policy.looks_at(step + layer, settled=0, needs=0, misses=0):
                policy.choose(Snapshot(ids[layer], NO_READS, exact, *picked[layer], notes, FIRST_STEP + step, FIRST_STEP + step - EVERY))
        times.append(1e6 * (time.perf_counter() - began))
    return float(np.median(times))


def held_out(seed: int) -> list[dict[str, Any]]:
    """Rows of what no policy was fitted to, at the headline's size."""
    made = [regime(seed) for regime in HELD_OUT.values()]
    made += [replace(regime(seed + more), name=f"{name}, seed {seed + more}") for name, regime in REGIMES.items() for more in (1, 2)]
    return [{**row, "held_out": True} for steps in made for row in sweep(steps, (HEADLINE_SIZE,))]


def headline(rows: Sequence[dict[str, Any]], us: float) -> dict[str, float]:
    """The worst of each kind, and the costs. A trace of a few hundred tokens says nothing of thousands."""
    sized = [row for row in rows if (row["scratch_share"], row["key_share"]) == HEADLINE_SIZE and not row["recency"]]
    at = {(row["steps"], row["policy"]): row for row in sized if not row["waits"]}
    kinds: dict[str, list[float]] = {}
    for row in sized:
        if row["policy"] != Predictive.name or ("tokens" in row and row["tokens"] < TOKENS_MIN):
            continue
        name, kind = row["steps"], "_recorded" if "tokens" in row else "_held_out" if "held_out" in row else ""
        kinds.setdefault(f"exposed_us_per_call{'_waiting' if row['waits'] else ''}{kind}", []).append(row["exposed_us_per_call"])
        if row["waits"]:
            continue
        ratio = row["exposed_us_per_step"] / at[name, "reactive"]["exposed_us_per_step"]
        kinds.setdefault(f"exposed_transfer_vs_reactive{kind}", []).append(ratio)
        kinds.setdefault(f"wasted_prefetch_share{kind}", []).append(row["wasted_share"])
    return {**{kind: max(shares) for kind, shares in kinds.items()}, "policy_us_per_step": us}


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table("steps", "scratch", "keys", "policy", "hit rate", "host KB/step", "exposed us/step", "wasted", "late")
    for row in rows:
        how = ", waits" * row["waits"] + ", recency" * row["recency"]
        table.add_row(
            row["steps"], f"{row['scratch_share']:.1%}", f"{row['key_share']:.0%}", row["policy"] + how,
            f"{row['hit_rate']:.3f}", f"{row['host_bytes_per_step'] / 1024:.1f}", f"{row['exposed_us_per_step']:.1f}",
            f"{row['wasted_share']:.1%}", str(row["late"]),
        )  # fmt: skip
    Console(width=120).print(table)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, nargs="*", action="extend", default=[], help="folders of recorded traces, besides ours")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic regimes")
    options = parser.parse_args(arguments)
    print(f"seed {options.seed}")
    traces = [recorded(trace) for trace in [*TRACES, *options.trace]]
    rows = [{**row, "tokens": int(steps.blocks[-1]) * steps.block_size} for steps in traces for row in sweep(steps)]
    rows += [row for regime in REGIMES.values() for row in sweep(regime(options.seed))] + held_out(options.seed)
    costs = {candidates: policy_us(candidates) for candidates in (8, 16, 32, 64)}
    show(rows)
    figures = headline(rows, costs[EngineConfig.prefetch_candidates_max]) | copies_us(COPIES)
    print(figures, costs)
    path = write_results("tiering", figures, [*rows, *({"candidates": n, "policy_us_per_step": us} for n, us in costs.items())])
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
