"""Certified attention on a CUDA device against dense attention: one query token, 32 query heads, 8 KV heads, head dimension 128, FP16.

Everything runs in CUDA graphs over several caches in turn, more than the L2 holds, as the layers of a model would. Dense opponents are
SDPA by flash attention and by cuDNN; ratios are to the faster. "rung 0" are the kernels of a step that needs no more, "naive" the
same without what only the certificate needs, "step" is the whole ladder, whose upper kernels return at once where no row needs them;
"promoted" is the step at the tolerance at which that share of the originals of the KV heads is read, keys and values counted alike, on
average over all caches that are timed: a block is a KV head's, and its original is read once for all rows that need it. The column "read"
has the share that was found, "a row" the share of its KV head's originals that a single row needs, less where rows need different ones.
Outputs are held against float64 attention first: a bound below the true error ends the run without a report. Times are of one step of one
layer, or of all eight sessions where batch is 8.

    python benchmarks/bench_attend_cuda.py
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "attend"))

import cupy as cp
import numpy as np
import torch
from common import write_results
from rich.console import Console
from rich.table import Table
from shares import tolerance
from tierd_kernels.call import Call
from tierd_kernels.cuda import backend
from tierd_kernels.cuda.launch import CERTIFIED, kernels
from tierd_kernels.cuda.memory import DeviceMemory
from tierd_kernels.cuda.packing import Part
from tierd_kernels.cuda.step import Answer, Step
from tierd_kernels.in_scratch import InScratch
from tierd_kernels.layout import Layout
from tierd_kernels.policy import Budget
from timing import BACKENDS, Times, captured, dense, profile, timed

HEADS, GROUP, D = 8, 4, 128
CASES = [(8192, 1), (32768, 1), (65536, 1), (131072, 1), (32768, 8)]
BLOCKS = (16, 64)
COLD_BYTES = 400e6  # of FP16 keys and values in turn: eight times the L2
COST_AT = (131072, 1)  # where the cost of promotion is stated
Session = tuple[torch.Tensor, ...]  # k, v, q
SHARES = (0.01, 0.05)
RTOL = 0.05  # at which rung 0 does


def check(answer: Answer, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> float:
    """The largest error over bound; ends the program where it is above 1."""
    scores = torch.einsum("hgd,htd->hgt", q.view(HEADS, GROUP, D).double(), k.double()) * D**-0.5
    truth = torch.einsum("hgt,htd->hgd", scores.softmax(-1), v.double()).reshape(-1, D)
    error = (torch.from_numpy(answer.output).cuda().view(-1, D).double() - truth).norm(dim=1)
    ratio = float((error / torch.from_numpy(answer.fields["bound"]).cuda().view(-1)).max())
    if not ratio <= 1.0:
        sys.exit(f"an error is {ratio} times its bound: nothing is reported")
    return ratio


def stored(layout: Layout, sessions: list[Session]) -> tuple[DeviceMemory, list[Call]]:
    """The sessions' caches, and a call of each; scratch holds all their originals."""
    B, size, hot = layout.block_size, layout.original_block_bytes, backend.hot_block_bytes(layout)
    blocks = [k.shape[1] // B for k, _, _ in sessions]
    memory = backend.reserve(sum(blocks) * hot, sum(blocks) * size, sum(blocks) * size)
    calls, first = [], 0
    for count, (k, v, q) in zip(blocks, sessions, strict=True):
        ids = np.arange(first, first + count)
        arena = memory.originals.view(np.float16).reshape(-1, 2, HEADS, B, D)
        for part, x in enumerate((k, v)):
            arena[ids, part] = x.cpu().numpy().reshape(HEADS, count, B, D).transpose(1, 0, 2, 3)
        for start in range(0, count, 1 << 16):
            some = ids[start : start + (1 << 16)]
            backend.quantise_blocks(layout, memory, some * size, some * hot)
        groups = ids[: count - count % (1024 // B)].reshape(-1, 1024 // B)
        above, errors = backend.group_norms(layout, memory, groups * size, groups * hot)
        calls.append(Call(
            q=q.cpu().numpy(), num_tokens=count * B, softmax_scale=D**-0.5, hot_offsets=ids * hot, original_offsets=ids * size,
            in_scratch=None, group_value_norms=above, group_error_norms=errors, rtol=RTOL, atol=0.0,
            policy=Budget(),
        ))  # fmt: skip
        first += count
    memory.scratch.set(memory.originals)
    return memory, calls


class Graph:
    """Steps, one a group of sessions, captured behind one another."""

    def __init__(self, layout: Layout, memories: list[DeviceMemory], groups: list[list[Call]], what: str = "step") -> None:
        self.steps = []
        for buffers, calls in zip(memories, groups, strict=True):
            step = Step(layout, buffers, [Part(layout, call, 0, 1) for call in calls])
            step.upload()
            self.steps.append(step)
        self.what, self.stream = what, memories[0].stream
        cp.cuda.Device().synchronize()
        self.graph = captured(lambda on: [self._launch(step, on) for step in self.steps] and None, self.stream)

    def _launch(self, step: Step, on: Any) -> None:
        if self.what == "step":
            step.enqueue(on)
        elif self.what == "candidates":
            step.kernels.candidates(step.at, step.grid, on)
        else:
            kernels(step.layout, self.what == "naive").certify(step.at, step.grid, False, on)

    def answers(self) -> list[Answer]:
        """Of every call. Candidates are found from the workspace, which steps share: each is asked before the next one runs."""
        found = []
        for step in self.steps:
            self._launch(step, self.stream)
            found += step.answers()
        return found

    def times(self) -> Times:
        return timed(lambda: self.graph.launch(self.stream), self.stream, len(self.steps))


def own_buffers(memory: DeviceMemory) -> DeviceMemory:
    """The same pools and workspace, as one layer after the other has them, and buffers for calls of its own: a captured step keeps what it
    was captured with."""
    fresh = backend.reserve(0, 0, 0)
    other = DeviceMemory(*memory)
    kept = ("hot_at", "scratch_at", "originals_at", "exponents", "exponent", "stream", "workspace", "workspace_at")
    other.__dict__.update(fresh.__dict__ | {name: memory.__dict__[name] for name in kept})
    return other


def read_share(answer: Answer, call: Call) -> float:
    """Of the original records, keys and values alike, the share that some query row read: each of them is read once."""
    return float(answer.reads.from_host.size) / (2 * HEADS * len(call.hot_offsets))


def needed(layout: Layout, memory: DeviceMemory, batches: list[list[Call]], share: float) -> float:
    """The relative tolerance at which that share of the originals is read, on average over all calls."""

    def share_at(rtol: float) -> float:
        shares = []
        for calls in batches:
            for call in calls:
                call.rtol = rtol
            step = Step(layout, memory, [Part(layout, call, 0, 1) for call in calls])
            step.upload()
            step.launch()
            found = zip(step.answers(), calls, strict=True)
            shares += [1.0 if (x.states != CERTIFIED).any() else read_share(x, call) for x, call in found]
        return float(np.mean(shares))

    return tolerance(share_at, share)


def facts_of(answers: list[Answer], sessions: list[Session], call: Call, quantised: int) -> dict[str, Any]:
    """Of the answers to all sessions that a graph holds. The program ends where the first one's error is above its bound."""
    fields = {name: np.stack([x.fields[name] for x in answers]) for name in answers[0].fields}
    return {
        "error_over_bound": check(answers[0], *sessions[0]), "bound_over_vbar": float(np.median(fields["bound"] / fields["value_norm"])),
        "read": float(np.mean([read_share(x, call) for x in answers])),
        "a_row": float(np.mean(fields["promoted_key_blocks"] + fields["promoted_value_blocks"])) / (2 * len(call.hot_offsets)),
        "exact": float(np.mean([x.states != CERTIFIED for x in answers])), "rtol": call.rtol, "quantised_bytes": quantised,
    }  # fmt: skip


def certified(layout: Layout, groups: list[list[Session]]) -> dict[str, tuple[Times, dict[str, Any]]]:
    sessions = [session for group in groups for session in group]
    memory, calls = stored(layout, sessions)
    batches = [calls[i : i + len(groups[0])] for i in range(0, len(calls), len(groups[0]))]
    quantised = sum(cache_bytes(layout, k.shape[1]) for k, _, _ in groups[0])
    buffers = [own_buffers(memory) for _ in batches]
    found: dict[str, tuple[Times, dict[str, Any]]] = {}

    def measure(name: str, what: str = "step") -> None:
        graph = Graph(layout, buffers, batches, what)
        found[name] = graph.times(), facts_of(graph.answers(), sessions, calls[0], quantised)
        if name == "certified step":
            found[name][1].update(profile(graph.graph, graph.stream, len(graph.steps)))

    found["naive"] = Graph(layout, buffers, batches, "naive").times(), {"quantised_bytes": quantised}
    measure("certified rung 0", "rung 0")
    measure("certified step")
    found["candidates, behind the answers"] = Graph(layout, buffers, batches, "candidates").times(), {}  # of what the last step left
    for share in SHARES:
        rtol = needed(layout, memory, batches, share)
        for where in ("host", "scratch"):
            for call in calls:
                call.rtol = rtol
                own = layout.own_locations(call.original_offsets[: len(call.hot_offsets)])
                call.in_scratch = InScratch.of(~own) if where == "scratch" else None
            measure(f"promoted {share:.0%}, {where}")
    return found


def exact_head(tokens: int) -> Times:
    """Rung 3 of one KV head, four query heads."""
    layout = Layout(1, D, 16, 16, "float16")
    generator = np.random.default_rng(tokens)
    k, v, q = (generator.standard_normal((h, n, D)).astype(np.float16) for h, n in ((1, tokens), (1, tokens), (GROUP, 1)))
    size, hot, blocks = layout.original_block_bytes, backend.hot_block_bytes(layout), np.arange(tokens // 16)
    memory = backend.reserve(hot * len(blocks), 0, size * len(blocks))
    arena = memory.originals.view(np.float16).reshape(-1, 2, 1, 16, D)
    for part, x in enumerate((k, v)):
        arena[:, part] = x.reshape(1, -1, 16, D).transpose(1, 0, 2, 3)
    backend.quantise_blocks(layout, memory, blocks * size, blocks * hot)
    none = np.zeros((0, 1), np.float32)
    call = Call(q, tokens, D**-0.5, blocks * hot, blocks * size, None, none, none, 0.0, 0.0)
    return Graph(layout, [memory], [[call]]).times()


def cache_bytes(layout: Layout, tokens: int) -> int:
    return tokens // layout.block_size * backend.hot_block_bytes(layout)


def appended(layout: Layout) -> Times:
    """Quantising one full block of every KV head of a layer, originals read from pinned host memory."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    shapes = (HEADS, 1024, D), (HEADS, 1024, D), (HEADS * GROUP, 1, D)
    k, v, q = (torch.randn(*x, device="cuda", generator=generator).half() for x in shapes)
    memory, (call,) = stored(layout, [(k, v, q)])
    count = 1024 // layout.block_size
    memory.blocks[:, :count] = call.original_offsets, call.hot_offsets
    (from_at, to_at), each = memory.blocks_at, memory.blocks.itemsize

    def run(on: Any) -> None:
        for i in range(count):
            places = from_at + i * each, to_at + i * each, memory.norms_at
            kernels(layout).quantise(memory.originals_at, memory.hot_at, *places, 1, on)

    cp.cuda.Device().synchronize()
    graph = captured(run, memory.stream)
    return timed(lambda: graph.launch(memory.stream), memory.stream, count)


def main() -> int:
    columns = "B", "tokens", "batch", "what", "p20 us", "p50 us", "p80 us", "TB/s", "to dense", "bound / Vbar", "read", "a row", "exact"
    table = Table(*columns)
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
            results |= certified(layout, groups)
            best = min(results[name][0]["p50_us"] for name in BACKENDS)
            for name, (times, facts) in results.items():
                nbytes = facts.get("quantised_bytes", batch * size)
                ratio = times["p50_us"] / best
                rows.append({"block_size": block, "tokens": tokens, "batch": batch, "what": name, **times, "ratio_to_best_dense": ratio})
                rows[-1] |= facts | {"tb_per_s": nbytes / times["p50_us"] / 1e6}
                shown = [f"{times[x]:.1f}" for x in ("p20_us", "p50_us", "p80_us")]
                more = [f"{facts[x]:.4f}" for x in ("bound_over_vbar", "read", "a_row", "exact") if x in facts]
                table.add_row(str(block), str(tokens), str(batch), name, *shown, f"{rows[-1]['tb_per_s']:.2f}", f"{ratio:.2f}", *more)
            if block == BLOCKS[0] and batch == 1:
                headline[f"ratio_rung0_{tokens // 1024}k"] = results["certified rung 0"][0]["p50_us"] / best
            if block == BLOCKS[0] and (tokens, batch) == COST_AT:
                step = results["certified step"][0]["p50_us"]
                headline["certificate_cost"] = results["certified rung 0"][0]["p50_us"] / results["naive"][0]["p50_us"] - 1.0
                headline["promote_1pct_cost"] = results["promoted 1%, scratch"][0]["p50_us"] / step - 1.0
                headline["promote_1pct_host_cost"] = results["promoted 1%, host"][0]["p50_us"] / step - 1.0
    for tokens in sorted({tokens for tokens, _ in CASES}):
        times = exact_head(tokens)
        rows.append({"block_size": BLOCKS[0], "tokens": tokens, "what": "rung 3 of one KV head", **times})
        table.add_row(str(BLOCKS[0]), str(tokens), "", "rung 3 of one KV head", *(f"{x:.1f}" for x in times.values()))
    for block in BLOCKS:
        times = appended(Layout(HEADS, D, block, 16, "float16"))
        rows.append({"block_size": block, "what": "quantise one block of each KV head", **times})
        table.add_row(str(block), "", "", "quantise one block of each KV head", *(f"{x:.1f}" for x in times.values()))
        headline.setdefault("append_us", times["p50_us"] / block)  # a token; the one that fills a block pays for all of its tokens
        headline.setdefault("append_block_us", times["p50_us"])
    Console(width=170).print(table, headline, write_results("attend_cuda", headline, rows).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
