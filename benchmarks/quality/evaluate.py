"""Needles, RULER and perplexity of one model under every variant, paired: the same prompts, dense and otherwise.

    python benchmarks/quality/evaluate.py --model CHECKPOINT --contexts 4096 8192 --minutes 9

Each part is written to a ledger when it is done; the same command goes on where the last one stopped, and the results are written
from whatever is done for every variant. With --catastrophic value channels are rescaled first (see catastrophic.py), which
leaves dense outputs as they are.

The model computes in float32 unless another --dtype is given, so that what differs from dense is what its cache does. In 16 bits a model's
own rounding moves its logits by more than lies between the first and the second byte of some answers (margins.py shows which).
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import commandline
import running
import tasks
from catastrophic import rescale_value_channels
from ledger import WHOLE, Ledger
from naive import GROUP
from summarise import headline, summarise
from tierd_client import Tier
from variants import ALL, PACKAGES, Variant, attending, connection, layout_of, named

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results

IDENTITY = ("text", "examples", "batch", "seed", "catastrophic")  # what makes a ledger another run's, and is not in its parts' keys
DTYPE = "float32"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    checkpoint = checkpoints.load(options.model, options.device, options.dtype)
    if options.catastrophic:
        head_dim = layout_of(checkpoint.model.config.get_text_config(decoder=True), checkpoint.model.dtype).head_dim
        rescale_value_channels(checkpoint.model, channels=range(0, head_dim, GROUP))
    identity = {name: str(getattr(options, name)) for name in IDENTITY}
    identity |= {"model": checkpoint.name, "dtype": str(checkpoint.model.dtype)}
    ledger = Ledger(options.ledger, identity, options.minutes, options.share)
    longest = max(options.contexts) + max(tasks.new_tokens(name) for name in options.tasks)
    with connection(checkpoint.model, longest, options.batch) as tier:
        finished = all([ledger.part(key, compute, group) for group, key, compute in parts(options, checkpoint, tier)])
    if options.share != WHOLE:
        print(f"{'all' if finished else 'not all'} parts of this share done")
        return 0 if finished else 3
    rows = summarise(ledger.records)
    path = write_results(results_name(options.catastrophic, checkpoint), headline(rows), rows, PACKAGES, identity)
    print(f"{len(ledger.records)} parts, {'all' if finished else 'not all'} done; {path.name}")
    return 0 if finished else 3


def results_name(catastrophic: bool, checkpoint: checkpoints.Checkpoint) -> str:
    """A type other than the default and a model other than this repository's are named: results of one do not replace another's."""
    dtype = str(checkpoint.model.dtype).removeprefix("torch.")
    return f"quality_{'catastrophic' if catastrophic else 'evaluate'}{checkpoint.suffix}{'' if dtype == DTYPE else f'_{dtype}'}"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commandline.add_run(parser, "quality.jsonl", dtype=DTYPE)
    parser.add_argument("--text", type=Path, help="PG-19: a text file or a folder of .txt (default: the standard library's source)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 8192], help="tokens")
    parser.add_argument("--tasks", nargs="+", default=list(tasks.NAMES), choices=tasks.NAMES)
    parser.add_argument("--variants", nargs="+", default=[variant.name for variant in ALL], choices=[variant.name for variant in ALL])
    parser.add_argument("--examples", type=int, default=50, help="of each task and context")
    parser.add_argument("--batch", type=int, default=10, help="prompts of one forward")
    parser.add_argument("--windows", type=int, default=4, help="of text, of each context, for perplexity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--catastrophic", action="store_true", help="rescale value channels first")
    return parser.parse_args(arguments)


def parts(options: argparse.Namespace, checkpoint: checkpoints.Checkpoint, tier: Tier) -> Iterator[tuple[int, str, Any]]:
    """Group, key and computation of every part: contexts in their order, then text, then examples a batch at a time, all variants of one
    after another, so that a run that is cut off has whole comparisons. What is compared with one another is of one group."""
    variants, group = named(options.variants), 0
    for tokens in options.contexts:
        text = checkpoints.windows(checkpoint, options.text, tokens, options.windows) if options.windows else []
        for index, window in enumerate(text):
            group += 1
            for variant in variants:
                yield (
                    group, f"perplexity/{tokens}/{index}/{variant.name}",
                    lambda v=variant, w=window, t=tokens, i=index: {
                        "kind": "perplexity", "tokens": t, "window": i, "variant": v.name,
                        **running.negative_log_likelihood(checkpoint, v, tier, w),
                    },
                )  # fmt: skip
        for first in range(0, options.examples, options.batch):
            numbers = range(first, min(first + options.batch, options.examples))
            for task in options.tasks:
                group += 1
                for variant in variants:
                    key = f"{task}/{tokens}/{first}/{variant.name}"
                    yield group, key, lambda v=variant, t=task, n=tokens, i=numbers: answer(checkpoint, v, tier, t, n, i, options.seed)


def answer(
    checkpoint: checkpoints.Checkpoint, variant: Variant, tier: Tier, task: str, tokens: int, numbers: range, seed: int
) -> dict[str, Any]:
    """Scores of the examples `numbers` of a task at `tokens` tokens. Example i has the seed `seed + i`; needles of "niah" go through
    `DEPTHS`."""
    depths = [DEPTHS[i % len(DEPTHS)] if task == "niah" else None for i in numbers]
    examples = [tasks.example(task, tokens, checkpoint.count, seed + i, depth) for i, depth in zip(numbers, depths, strict=True)]
    completions, said = running.complete(
        checkpoint, partial(attending, variant, checkpoint.model, tier), [e.prompt for e in examples], tasks.new_tokens(task)
    )
    scores = [tasks.score(example, completion) for example, completion in zip(examples, completions, strict=True)]
    return {
        "kind": "task", "task": task, "tokens": tokens, "variant": variant.name, "numbers": list(numbers), "depths": depths,
        "scores": scores, "completions": completions, **said,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
