"""Certified attention against dense attention on the CPU: one query token, 32 query heads, 8 KV heads, head dimension 128.

Dense opponents: SDPA on FP32 and on BF16, each grouped by enable_gqa and packed (the group's queries as rows), and BF16 as
matmul, softmax, matmul; the best of them is what certified attention is held against. Opponents alternate call by call, so that
whatever else the machine does meets all alike. Certified calls are checked against float64 attention first; a bound below
the true error, or a rung other than the row's name says, ends the run without a report.

    python benchmarks/bench_attend_cpu.py
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from common import write_results
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tierd_kernels import ladder
from tierd_kernels.layout import Layout, Memory
from tierd_kernels.policy import Budget
from torch.nn.functional import scaled_dot_product_attention as sdpa

HEADS, GROUP, D, BLOCK = 8, 4, 128, 16
TOKENS = (2048, 8192, 32768)
RTOL = {False: 0.05, True: 0.1}  # diffuse, concentrated: INT4 values cannot be within 5 % where few tokens hold the mass
SKIP_SHARE = {False: 0.0, True: 0.1}
ROUNDS = {2048: 200, 8192: 100, 32768: 40}
Output = NDArray[Any]
Opponent = Callable[[], Any]


@dataclass
class Cache:
    """One session's stored layer; the kernels' view of it is `call`."""

    layout: Layout
    memory: Memory
    q: Output
    skipping: bool
    call: dict[str, Any]

    def attend(self) -> ladder.Result:
        policy = Budget(skip_share=SKIP_SHARE[self.skipping])
        call = ladder.Call(q=self.q, rtol=RTOL[self.skipping], atol=0.0, policy=policy, **self.call)
        (result,) = ladder.attend(self.layout, self.memory, [call], HEADS * GROUP)
        if isinstance(result, Exception):
            raise result
        return result


def store(k: Output, v: Output, q: Output, skipping: bool) -> Cache:
    """Quantise `k`, `v` FP16 [HEADS, tokens, D], tokens a multiple of 1024."""
    layout = Layout(HEADS, D, BLOCK, 16, "float16")
    blocks = k.shape[1] // BLOCK
    both = np.stack([x.reshape(HEADS, blocks, BLOCK, D).transpose(1, 0, 2, 3) for x in (k, v)], axis=1)
    hot = np.zeros(blocks * layout.hot_block_bytes, np.uint8)
    memory = Memory(hot, np.zeros(64, np.uint8), np.ascontiguousarray(both).reshape(-1).view(np.uint8))
    originals = np.arange(blocks, dtype=np.int64) * layout.original_block_bytes
    offsets = np.arange(blocks, dtype=np.int64) * layout.hot_block_bytes
    ladder.quantise_blocks(layout, memory, originals, offsets)
    value_norms, error_norms = ladder.group_norms(layout, memory, *(x.reshape(-1, 1024 // BLOCK) for x in (originals, offsets)))
    call = {
        "num_tokens": k.shape[1], "softmax_scale": D**-0.5, "hot_offsets": offsets, "original_offsets": originals,
        "in_scratch": None, "group_value_norms": value_norms, "group_error_norms": error_norms,
    }  # fmt: skip
    return Cache(layout, memory, q, skipping, call)


def draw(tokens: int, concentrated: bool, seed: int = 0) -> tuple[Output, Output, Output]:
    """FP16 k, v, q. Diffuse: all Gaussian. Concentrated: the queries of a KV head look the same way, and a sixteenth of the keys, in
    runs of 64 tokens, lie there and hold all but a thousandth of the mass, as recent or retrieved passages do."""
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, HEADS, tokens, D))
    q = rng.standard_normal((HEADS, GROUP, D))
    if concentrated:
        lead = rng.standard_normal((HEADS, 1, D))
        q = lead + 0.5 * q
        for start in rng.choice(tokens // 64, tokens // 1024, replace=False):
            k[:, start * 64 : start * 64 + 64] += 0.9 * lead
    return k.astype(np.float16), v.astype(np.float16), q.reshape(HEADS * GROUP, 1, D).astype(np.float16)


def dense_opponents(k: Output, v: Output, q: Output) -> dict[str, Opponent]:
    """Callables over their own copies of the inputs."""
    opponents: dict[str, Opponent] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        K, V, Q = (torch.from_numpy(x).to(dtype)[None].contiguous() for x in (k, v, q))
        packed = Q.reshape(1, HEADS, GROUP, D)
        opponents[f"sdpa {name} enable_gqa"] = lambda K=K, V=V, Q=Q: sdpa(Q, K, V, enable_gqa=True)
        opponents[f"sdpa {name} packed"] = lambda K=K, V=V, Q=packed: sdpa(Q, K, V)
        if name == "bf16":
            transposed = K.transpose(2, 3)
            opponents["matmul bf16"] = lambda K=transposed, V=V, Q=packed: torch.softmax((Q @ K) * D**-0.5, -1) @ V
    return opponents


def check(cache: Cache, k: Output, v: Output) -> dict[str, float]:
    """Facts of one certified call. Raises RuntimeError for a promise that does not hold or a row that is not what it is called."""
    result = cache.attend()
    certificate = result.certificate
    worst = 0.0
    for head in range(HEADS * GROUP):
        K, V = (x[head // GROUP].astype(np.float64) for x in (k, v))
        s = K @ cache.q[head, 0].astype(np.float64) * D**-0.5
        w = np.exp(s - s.max())
        error = np.linalg.norm(result.output[head, 0].astype(np.float64) - w @ V / w.sum())
        worst = max(worst, float(error / certificate["bound"][head, 0]))
    if worst > 1.0 or not (certificate["bound"] <= certificate["budget"]).all():
        raise RuntimeError(f"the promise does not hold: true error over bound is {worst}")
    if certificate["rung"].any() or bool(certificate["skipped_blocks"].any()) != cache.skipping:
        raise RuntimeError(f"not rung 0, or skips that do not match: rungs {np.bincount(certificate['rung'].ravel())}")
    total = HEADS * GROUP * k.shape[1] / BLOCK
    return {
        "rtol": RTOL[cache.skipping],
        "error_over_bound": worst,
        "bound_over_budget": float((certificate["bound"] / certificate["budget"]).max()),
        "skipped_share": float(certificate["skipped_blocks"].sum()) / total,
    }


def measure(opponents: dict[str, Opponent], rounds: int) -> dict[str, Output]:
    """Seconds of each call, opponents alternating."""
    seconds: dict[str, list[float]] = {name: [] for name in opponents}
    for turn in range(rounds + 5):
        for name, call in opponents.items():
            start = time.perf_counter()
            call()
            if turn >= 5:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def main() -> int:
    rows: list[dict[str, Any]] = []
    ratios: dict[tuple[int, int, str], float] = {}
    for tokens in TOKENS:
        diffuse, concentrated = draw(tokens, concentrated=False), draw(tokens, concentrated=True)
        plain, sharp = store(*diffuse, skipping=False), store(*concentrated, skipping=True)
        facts = {"certified": check(plain, *diffuse[:2]), "certified, skipping": check(sharp, *concentrated[:2])}
        opponents = dense_opponents(*diffuse)
        dense = list(opponents)
        opponents |= {"certified": plain.attend, "certified, skipping": sharp.attend}
        for threads in (1, 2):
            numba.set_num_threads(threads)
            torch.set_num_threads(threads)
            seconds = measure(opponents, ROUNDS[tokens])
            best = min(dense, key=lambda name: np.median(seconds[name]))
            for name, values in seconds.items():
                p20, p50, p80 = np.percentile(values, (20, 50, 80)) * 1e3
                ratio = float(p50 / np.median(seconds[best]) / 1e3)
                ratios[tokens, threads, name] = ratio
                row = {"tokens": tokens, "threads": threads, "name": name, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80}
                rows.append(row | {"ratio_to_best_dense": ratio, "best_dense": best} | facts.get(name, {}))
    headline = {
        "cpu_ratio_to_best_dense_8k": ratios[8192, 2, "certified"],
        "cpu_ratio_to_best_dense_32k_skipping": ratios[32768, 2, "certified, skipping"],
    }
    table = Table("tokens", "threads", "call", "p20 ms", "p50 ms", "p80 ms", "ratio to best dense")
    for row in rows:
        numbers = (f"{row[key]:.2f}" for key in ("p20_ms", "p50_ms", "p80_ms", "ratio_to_best_dense"))
        table.add_row(str(row["tokens"]), str(row["threads"]), row["name"], *numbers)
    Console(width=110).print(table, headline, write_results("attend_cpu", headline, rows).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
