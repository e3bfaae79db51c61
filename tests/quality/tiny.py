"""A byte-level Llama of two layers with seeded weights, some of whose heads attend sharply.

`PYTHONPATH=benchmarks/quality python tests/quality/tiny.py` records its trace in data/ anew.
"""

from pathlib import Path
from typing import Any

import model
import torch
from checkpoints import Bytes, Checkpoint
from traces import Trace, record
from variants import BY_NAME, connection

SHARPNESS = (1.0, 4.0, 10.0, 25.0)


def build(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """2 layers, 4 query heads, 2 KV heads of 64 channels; dense over CPU."""
    config = model.configuration(layers=2, hidden=256, intermediate=128)
    config.head_dim, config.initializer_range = 64, 0.08
    torch.manual_seed(seed)
    built = model.LlamaForCausalLM(config)
    for layer in built.model.layers:
        weight = layer.self_attn.q_proj.weight.data.view(4, 64, 256)
        for head, sharpness in enumerate(SHARPNESS):
            weight[head] *= sharpness
    return built.to(dtype).eval().requires_grad_(False)


def checkpoint(dtype: torch.dtype = torch.float32, seed: int = 0) -> Checkpoint:
    """The same, ready to be evaluated."""
    return Checkpoint(f"tiny-{seed}", build(dtype, seed), Bytes())


def saved(folder: Path) -> Path:
    """The same, as a folder that `checkpoints.load` takes."""
    build().save_pretrained(folder)
    return folder


def ids(tokens: int, rows: int = 1, seed: int = 1) -> torch.Tensor:
    """Random bytes [rows, tokens]."""
    return torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(seed))


TRACE = Path(__file__).parent / "data" / "trace-tiny"
PREFILL, STEPS = 300, 24


def trace(path: Path) -> Trace:
    """Record 24 steps of the half-precision model after 300 tokens: the last of a repeated text, then what the model makes of it."""
    tiny = checkpoint(torch.float16)
    text = tiny.tokenizer.encode("def double(x):\n    return x + x\n\n" * 10)[: PREFILL + STEPS // 2]
    with connection(tiny.model, PREFILL + STEPS) as tier:
        return record(tiny, BY_NAME["rtol5"], tier, text, PREFILL, STEPS, path, "a repeated function")


if __name__ == "__main__":
    trace(TRACE)
