"""One worker of the demo: a model process that generates from a long text, densely and through the daemon."""

import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

NEW_TOKENS = 256
TOLERANCES = (0.05, 0.0)
# Queries of some heads are scaled up so that they attend sharply: random weights alone give nothing but diffuse attention.
SHARPNESS = (1.0, 6.0, 14.0, 40.0)
MODULES = ("argparse", "tarfile")  # whose source the workers read


@dataclass
class Run:
    """One generation through the daemon; arrays of the cache's summary are summed over layers and heads."""

    rtol: float
    seconds: float
    tokens_equal: int
    bound_share_max: float = 0.0  # largest mean bound over mean budget of any head
    over_budget: int = 0
    answers: int = 0
    exact: int = 0
    rungs: list[int] = field(default_factory=list)
    promoted_blocks: int = 0
    skipped_blocks: int = 0
    host_bytes: int = 0


@dataclass
class Report:
    """What a worker found."""

    worker: int
    prompt_tokens: int
    distinct_tokens: int
    dense_seconds: float
    runs: list[Run] = field(default_factory=list)


def work(worker: int, target: str, prompt_tokens: int, messages: "Queue[Any]") -> None:
    """Runs in a process of its own; sends ("step", worker, text), one for each generated token, then ("done", worker, report)."""
    try:
        messages.put(("done", worker, asdict(_generate(worker, target, prompt_tokens, messages))))
    except BaseException:
        messages.put(("failed", worker, traceback.format_exc()))
        raise


def _generate(worker: int, target: str, prompt_tokens: int, messages: "Queue[Any]") -> Report:
    import torch
    from tierd_client import Tolerance, connect
    from tierd_client.hf import TierdCache
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(1)  # the daemon needs a core too
    warnings.filterwarnings("ignore", ".past_key_values. is deprecated", FutureWarning)  # the only name that transformers 5.23 knows

    class Steps(BaseStreamer):
        def __init__(self, name: str) -> None:
            self.name = name

        def put(self, value: Any) -> None:
            messages.put(("step", worker, self.name))

        def end(self) -> None: ...

    model = _model(seed=worker)
    text = Path(sys.modules["os"].__file__).with_name(f"{MODULES[worker]}.py").read_bytes()[:prompt_tokens]
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[None]

    def generate(name: str, cache: Any = None) -> tuple[Any, float]:
        torch.manual_seed(1000 + worker)
        start = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=True, past_key_values=cache, streamer=Steps(name)
        )
        return out[0, ids.shape[1] :], time.perf_counter() - start

    dense, seconds = generate("dense")
    report = Report(worker, ids.shape[1], len(set(dense.tolist())), seconds)
    model.set_attn_implementation("tierd")
    with connect(target) as tier:
        for rtol in TOLERANCES:
            with TierdCache(tier, model.config, tolerance=Tolerance(rtol=rtol), max_tokens=prompt_tokens + NEW_TOKENS) as cache:
                tokens, seconds = generate(f"rtol {rtol:g}", cache)
                s = cache.summary()
            run = Run(rtol, seconds, int((tokens == dense).sum()), over_budget=int(s.over_budget.sum()), answers=int(s.answers.sum()))
            certified = s.exact_share < 1
            if rtol > 0 and certified.any():
                run.bound_share_max = float((s.bound_mean / s.budget_mean)[certified].max())
            run.rungs = s.rungs.sum(axis=(0, 1)).tolist()
            run.exact = sum(run.rungs[3:])
            run.promoted_blocks = int(s.promoted_key_blocks.sum() + s.promoted_value_blocks.sum())
            run.skipped_blocks, run.host_bytes = int(s.skipped_blocks.sum()), int(s.host_bytes.sum())
            report.runs.append(run)
    return report


def _model(seed: int) -> Any:
    """A Llama-architecture model over bytes with seeded weights: 2 layers, 8 query heads, 2 KV heads, head dimension 128, FP32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=512, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        head_dim=128, max_position_embeddings=16384, bos_token_id=None, eos_token_id=None, pad_token_id=0, initializer_range=0.05,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.self_attn.q_proj.weight.view(8, 128, 512)
            for head in range(8):
                weight[head] *= SHARPNESS[head % len(SHARPNESS)]
    return model
