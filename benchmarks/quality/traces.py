"""Traces: what a model asked of its cache, token by token, and what it was answered.

    python benchmarks/quality/traces.py --model CHECKPOINT --context 8192 --steps 256 --task niah --out FOLDER

A trace is a folder of `trace.json` and one `layer-NNN.safetensors` a layer with
    keys, values             [kv_heads, tokens, d]       originals, as the model made them; step s sees the first `prefill + s + 1` tokens
    queries, outputs         [steps, heads, d]
    certificate.<field>      [steps, heads]              as returned
    needed                   [steps, 2, blocks, kv_heads] uint8: whose original keys (0), values (1) were read for the answer
    contributions            [steps, 2, blocks, kv_heads] float16: keys' and values' shares of the budget before any promotion, the
                             largest of the KV head's queries
The last two come from the CPU kernels, which are shown the recorded tensors again with nothing cached: prefetch policies
are judged by which blocks would have been at hand.
"""

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import checkpoints
import commandline
import numpy as np
import tasks
import torch
from naive import BLOCK, GROUP
from replay import Stored
from safetensors.torch import load_file, save_file
from tierd_client import Tier
from tierd_client.certificate import Certificate
from tierd_kernels import policy as kernel_policy
from variants import Variant, attending, connection, named, softmax_scale
from watched import Answer

FORMAT = 1
FIELDS = tuple(field.name for field in dataclasses.fields(Certificate))
SHARE_MAX = 60000.0  # of float16


@dataclass(frozen=True)
class Meta:
    """What trace.json says. `policy`: "budget" or "coverage"; `prefill`: tokens before the first step."""

    model: str
    dtype: str
    source: str
    layers: int
    prefill: int
    steps: int
    scale: float
    rtol: float
    policy: str
    block_size: int = BLOCK
    value_group: int = GROUP
    format: int = FORMAT


class Trace:
    """A recorded trace, read layer by layer. Raises ValueError for a folder that holds none, or one of another format."""

    def __init__(self, path: Path) -> None:
        if not (path / "trace.json").is_file():
            raise ValueError(f"{path} holds no trace.json; `traces.py` records a trace")
        said = json.loads((path / "trace.json").read_text())
        if said.get("format") != FORMAT:
            raise ValueError(f"{path} is a trace of format {said.get('format')}; this reader knows {FORMAT}")
        self.path, self.meta = path, Meta(**said)

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of a layer, by the names above."""
        if not 0 <= index < self.meta.layers:
            raise ValueError(f"layer {index} of a trace of {self.meta.layers} layers")
        return load_file(_layer_file(self.path, index))

    def seen(self, step: int) -> int:
        """Tokens that the queries of `step` see, their own included."""
        return self.meta.prefill + step + 1

    def stored(self, index: int) -> Stored:
        """The layer, ready to be asked again."""
        layer = self.layer(index)
        return Stored.of(layer["keys"], layer["values"], self.meta.scale, self.meta.block_size, self.meta.value_group)


@torch.no_grad()
def record(
    checkpoint: checkpoints.Checkpoint, variant: Variant, tier: Tier, ids: list[int], prefill: int, steps: int, path: Path, source: str
) -> Trace:
    """Prefill the first `prefill` ids, then record `steps` steps of one token: those of `ids`, and where they end greedy ones.

    Raises ValueError for a variant without certificates, no step, or fewer ids than the prefill and one.
    """
    if not variant.certified:
        raise ValueError(f"variant {variant.name!r} has no certificates to record")
    if not (steps >= 1 and 1 <= prefill < len(ids)):
        raise ValueError(f"{steps} steps after {prefill} of {len(ids)} tokens; one step at least, and a token to begin it with")
    answers: list[Answer] = []
    with attending(variant, checkpoint.model, tier, prefill + steps, see=answers.append) as cache:
        checkpoint.model(torch.tensor([ids[:prefill]], device=checkpoint.device), past_key_values=cache, logits_to_keep=1)
        token = ids[prefill]
        for at in range(prefill, prefill + steps):
            token = ids[at] if at < len(ids) else token
            logits = checkpoint.model(torch.tensor([[token]], device=checkpoint.device), past_key_values=cache).logits
            token = int(logits[0, -1].argmax())
        keys, values = cache.keys, cache.values
    dtype, scale = str(checkpoint.model.dtype).removeprefix("torch."), softmax_scale(checkpoint.model)
    meta = Meta(checkpoint.name, dtype, source, len(keys), prefill, steps, scale, variant.rtol, variant.kind)
    path.mkdir(parents=True, exist_ok=True)
    for layer in range(len(keys)):
        own = [answer for answer in answers if answer.layer == layer]
        save_file(_with_needs(meta, _tensors(own, keys[layer], values[layer])), _layer_file(path, layer))
    (path / "trace.json").write_text(json.dumps(dataclasses.asdict(meta), indent=1) + "\n")
    return Trace(path)


def _tensors(answers: list[Answer], keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {"keys": keys, "values": values}
    tensors |= {"queries": torch.stack([a.q[:, 0] for a in answers]), "outputs": torch.stack([a.output[:, 0] for a in answers])}
    for name in FIELDS:
        tensors[f"certificate.{name}"] = torch.from_numpy(np.stack([getattr(a.certificate, name)[:, 0] for a in answers]))
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _with_needs(meta: Meta, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    stored = Stored.of(tensors["keys"], tensors["values"], meta.scale, meta.block_size, meta.value_group)
    policy = kernel_policy.Coverage() if meta.policy == "coverage" else kernel_policy.Budget()
    shape = (meta.steps, 2, len(stored.hot), stored.layout.num_kv_heads)
    needed, contributions = np.zeros(shape, np.uint8), np.zeros(shape, np.float16)
    for step in range(meta.steps):
        result = stored.attend(tensors["queries"][step], meta.prefill + step + 1, meta.rtol, policy)
        assert result.shares is not None, "the CPU's kernels tell them"
        needed[step, *result.reads.records] = 1
        contributions[step, :, : result.shares.shape[1]] = np.minimum(result.shares, SHARE_MAX)
    return tensors | {"needed": torch.from_numpy(needed), "contributions": torch.from_numpy(contributions)}


def _layer_file(path: Path, layer: int) -> Path:
    return path / f"layer-{layer:03}.safetensors"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commandline.add_model(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the trace")
    parser.add_argument("--context", type=int, default=8192, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--task", choices=tasks.NAMES, help="generate after a prompt of this task (default: read text, token by token)")
    parser.add_argument("--text", type=Path, help="a text file or a folder of .txt (default: the standard library's source)")
    parser.add_argument("--variant", default="rtol5")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    checkpoint = checkpoints.load(options.model, options.device, options.dtype)
    variant = named([options.variant])[-1]
    if options.task:
        example = tasks.example(options.task, options.context, checkpoint.count, options.seed)
        ids = checkpoint.tokenizer.encode(example.prompt)
        prefill, source = len(ids) - 1, f"{options.task}, seed {options.seed}"
    else:
        (window,) = checkpoints.windows(checkpoint, options.text, options.context + options.steps, 1)
        ids, prefill = window[0].tolist(), options.context
        source = options.text.name if options.text else "standard library"
    with connection(checkpoint.model, prefill + options.steps) as tier:
        trace = record(checkpoint, variant, tier, ids, prefill, options.steps, options.out, source)
    size = sum(file.stat().st_size for file in trace.path.iterdir())
    print(f"{trace.meta.steps} steps of {trace.meta.layers} layers after {prefill} tokens: {size / 2**20:.1f} MiB in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
