"""Rung 0 on a CUDA device against dense attention: one query token, 32 query heads, 8 KV heads, head dimension 128, FP16.

Everything runs in CUDA graphs over several caches in turn, more than the L2 holds, as the layers of a model would. Dense opponents are
SDPA by flash attention and by cuDNN; ratios are to the faster. The certified output is held against float64 attention first: a bound
below the true error ends the run without a report. Times are of one step of one layer, or of all eight sessions where batch is 8.

    python benchmarks/bench_attend_cuda.py
"""

import sys
from collections.abc import Callable
from typing import Any

import cupy as cp
import numpy as np
import torch
from common import write_results
from rich.console import Console
from rich.table import Table
from tierd_kernels.cuda.cache import LayerCache, Step
from tierd_kernels.cuda.launch import Kernels
from tierd_kernels.layout import Layout
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, GROUP, D = 8, 4, 128
CASES = [(8192, 1), (32768, 1), (65536, 1), (131072, 1), (32768, 8)]
BLOCKS = (16, 64)
COLD_BYTES = 400e6  # of FP16 keys and values in turn: eight times the L2
ROUNDS = 60
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
Times = dict[str, float]


def percentiles(samples_us: list[float]) -> Times:
    return dict(zip(("p20_us", "p50_us", "p80_us"), np.percentile(samples_us, [20, 50, 80]).tolist(), strict=True))


def timed(run: Callable[[], None], stream: Any, repeats: int) -> Times:
    """Microseconds of one of the `repeats` steps that `run` holds."""
    samples = []
    with stream:
        for _ in range(10):
            run()
        for _ in range(ROUNDS):
            start, stop = cp.cuda.Event(), cp.cuda.Event()
            start.record(stream)
            run()
            stop.record(stream)
            stop.synchronize()
            samples.append(cp.cuda.get_elapsed_time(start, stop) * 1e3 / repeats)
    return percentiles(samples)


def captured(run: Callable[[Any], None], stream: Any) -> Any:
    run(stream)
    stream.synchronize()
    stream.begin_capture()
    run(stream)
    return stream.end_capture()


def check(step: Step, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> float:
    """The largest error over bound; ends the program where it is above 1."""
    scores = torch.einsum("hgd,htd->hgt", q.view(HEADS, GROUP, D).double(), k.double()) * D**-0.5
    truth = torch.einsum("hgt,htd->hgd", scores.softmax(-1), v.double()).reshape(-1, D)
    error = (torch.from_dlpack(step.output()).view(-1, D).double() - truth).norm(dim=1)
    ratio = float((error / torch.from_dlpack(step.fields()["bound"]).view(-1)).max())
    if not ratio <= 1.0:
        sys.exit(f"an error is {ratio} times its bound: nothing is reported")
    return ratio


def dense(name: str, groups: list[list[tuple[torch.Tensor, ...]]]) -> Times:
    """Groups of sessions, each answered in one call."""
    stacked = [tuple(torch.stack(x) for x in zip(*group, strict=True)) for group in groups]

    def run() -> None:
        for k, v, q in stacked:
            torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    with sdpa_kernel(BACKENDS[name]):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        stream = cp.cuda.Stream(non_blocking=True)
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            return timed(graph.replay, stream, len(groups))


def certified(layout: Layout, groups: list[list[tuple[torch.Tensor, ...]]]) -> tuple[Times, dict[str, Any]]:
    stream, steps = cp.cuda.Stream(non_blocking=True), []
    for group in groups:
        caches = [LayerCache(layout, k.cpu().numpy(), v.cpu().numpy()) for k, v, _ in group]
        steps.append(Step(caches, [q.cpu().numpy() for _, _, q in group], D**-0.5, rtol=0.05))
    cp.cuda.Device().synchronize()
    graph = captured(lambda on: [step.run(on) for step in steps] and None, stream)
    ratio = check(steps[0], *groups[0][0])
    fields = {name: x.get() for name, x in steps[0].fields().items()}
    facts = {
        "error_over_bound": ratio, "bound_over_vbar": float(np.median(fields["bound"] / fields["value_norm"])),
        "quantised_bytes": sum(cache_bytes(layout, k.shape[1]) for k, _, _ in groups[0]),
    }  # fmt: skip
    return timed(lambda: graph.launch(stream), stream, len(groups)), facts


def cache_bytes(layout: Layout, tokens: int) -> int:
    return tokens // layout.block_size * HEADS * Kernels(layout).record.nbytes


def appended(layout: Layout) -> Times:
    """Quantising one full block of every KV head of a layer, originals read from pinned host memory."""
    k, v = (np.random.default_rng(0).standard_normal((HEADS, layout.block_size * 64, D)).astype(np.float16) for _ in range(2))
    cache, stream = LayerCache(layout, k, v), cp.cuda.Stream(non_blocking=True)
    norms = cp.zeros((1, HEADS), cp.float32)

    def run(on: Any) -> None:
        for i in range(64):
            at, hot = cache.original_at[i : i + 1], cache.hot_at[i : i + 1]
            cache.kernels.quantise(cache.originals.ctypes.data, cache.hot.data.ptr, at, hot, norms, on)

    cp.cuda.Device().synchronize()
    graph = captured(run, stream)
    return timed(lambda: graph.launch(stream), stream, 64)


def main() -> int:
    table = Table("B", "tokens", "batch", "what", "p20 us", "p50 us", "p80 us", "TB/s", "to the better dense", "bound / Vbar")
    headline: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for block in BLOCKS:
        layout = Layout(HEADS, D, block, 16, "float16")
        for tokens, batch in CASES:
            generator = torch.Generator(device="cuda").manual_seed(tokens)
            size = 4 * HEADS * tokens * D
            shapes = (HEADS, tokens, D), (HEADS, tokens, D), (HEADS * GROUP, 1, D)
            groups = [
                [tuple(torch.randn(*x, device="cuda", generator=generator).half() for x in shapes) for _ in range(batch)]
                for _ in range(max(2, round(COLD_BYTES / size / batch)))
            ]
            results: dict[str, tuple[Times, dict[str, Any]]] = {name: (dense(name, groups), {}) for name in BACKENDS}
            results["certified rung 0"] = certified(layout, groups)
            best = min(results[name][0]["p50_us"] for name in BACKENDS)
            for name, (times, facts) in results.items():
                nbytes = facts.get("quantised_bytes", batch * size)
                ratio = times["p50_us"] / best
                rows.append({"block_size": block, "tokens": tokens, "batch": batch, "what": name, **times, "ratio_to_best_dense": ratio})
                rows[-1] |= facts | {"tb_per_s": nbytes / times["p50_us"] / 1e6}
                shown = [f"{times[x]:.1f}" for x in ("p20_us", "p50_us", "p80_us")]
                bound = f"{facts['bound_over_vbar']:.4f}" if facts else ""
                table.add_row(str(block), str(tokens), str(batch), name, *shown, f"{rows[-1]['tb_per_s']:.2f}", f"{ratio:.2f}", bound)
            if block == BLOCKS[0] and batch == 1:
                headline[f"ratio_rung0_{tokens // 1024}k"] = rows[-1]["ratio_to_best_dense"]
    for block in BLOCKS:
        times = appended(Layout(HEADS, D, block, 16, "float16"))
        rows.append({"block_size": block, "what": "quantise one block of each KV head", **times})
        table.add_row(str(block), "", "", "quantise one block of each KV head", *(f"{x:.1f}" for x in times.values()), "", "", "")
        headline.setdefault("append_us", times["p50_us"])  # the token that fills a block; the others cost nothing here
    Console(width=150).print(table, headline, write_results("attend_cuda", headline, rows).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
