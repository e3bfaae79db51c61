"""Why a variant parts from dense attention: the first byte at which their answers differ, and by how much dense preferred its own.

    python benchmarks/quality/margins.py ../results/quality_evaluate_bfloat16__MACHINE.json --variants rtol2 exact --minutes 9

The result of an evaluation names the prompts that dense answers right and a variant does not. Each is answered again by dense and
certified attention in BF16 and in float32, and dense's logits after what both answers begin with are compared: where the margin is smaller
than the spacing of the type's numbers there, which byte comes next is decided by rounding and by no cache. For the byte-level model.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import commandline
import running
import tasks
import torch
from ledger import WHOLE, Ledger
from tierd_client import Tier
from variants import BY_NAME, DENSE, PACKAGES, attending, connection
from vocabulary import END

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results

DTYPES = ("bfloat16", "float32")
ANSWERED = ("dense", "rtol2", "rtol5", "exact")
Row = dict[str, Any]


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    said = json.loads(options.result.read_text())
    failures = list(found(said["rows"], options.variants))
    seed = int(said["run"]["seed"])
    finished, name, suffix = True, "", ""
    for dtype in DTYPES:
        checkpoint = checkpoints.load(options.model, options.device, dtype)
        name, suffix = checkpoint.name, checkpoint.suffix
        if name != said["run"]["model"] or not isinstance(checkpoint.tokenizer, checkpoints.Bytes):
            raise ValueError(f"{options.result.name} is of the model {said['run']['model']}, and {name} was given; it must be byte-level")
        ledger = Ledger(options.ledger, {"model": name, "result": options.result.name, "seed": seed}, options.minutes, options.share)
        longest = max((row["tokens"] + tasks.new_tokens(row["task"]) for row in failures), default=1)
        with connection(checkpoint.model, longest) as tier:
            finished &= all([ledger.part(*part) for part in parts(checkpoint, tier, failures, seed, dtype)])
    if options.share == WHOLE:
        rows = [{key: value for key, value in record.items() if key not in ("key", "seconds")} for record in ledger.records]
        margins = {dtype: [abs(row["margin"]) for row in rows if row["kind"] == "margin" and row["dtype"] == dtype] for dtype in DTYPES}
        headline = {f"largest_margin_{dtype}": max(values) for dtype, values in margins.items() if values}
        path = write_results(f"quality_margins{suffix}", headline, rows, PACKAGES, {"model": name, "of": options.result.name, "seed": seed})
        print(headline, path.name)
    return 0 if finished else 3


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="of evaluate.py")
    commandline.add_run(parser, "margins.jsonl")
    parser.add_argument("--variants", nargs="+", default=["rtol2", "exact"], choices=[name for name in BY_NAME if name != DENSE.name])
    return parser.parse_args(arguments)


def found(rows: list[Row], variants: list[str]) -> Iterator[Row]:
    """One row a failure of these variants: task, tokens, number, variant, and both answers."""
    for row in rows:
        if row["kind"] == "task" and row["variant"] in variants:
            for failure in row["failures"]:
                yield {name: row[name] for name in ("task", "tokens")} | {"by": row["variant"]} | failure


def parts(checkpoint: checkpoints.Checkpoint, tier: Tier, failures: list[Row], seed: int, dtype: str) -> Iterator[tuple[str, Any]]:
    """Key and computation: of each failure the margin, of each prompt among them an answer by each of `ANSWERED`."""
    for failure in failures:
        where = f"{failure['task']}/{failure['tokens']}/{failure['number']}"
        example = tasks.example(failure["task"], failure["tokens"], checkpoint.count, seed + failure["number"])
        head = {name: failure[name] for name in ("task", "tokens", "number")} | {"dtype": dtype}
        yield f"{where}/{failure['by']}/{dtype}", partial(margin_row, checkpoint, tier, example.prompt, failure, head)
        for variant in ANSWERED:
            yield f"{where}/answer/{variant}/{dtype}", partial(answer_row, checkpoint, tier, example, variant, head)


def answer_row(checkpoint: checkpoints.Checkpoint, tier: Tier, example: tasks.Example, variant: str, head: Row) -> Row:
    attend = partial(attending, BY_NAME[variant], checkpoint.model, tier)
    (text,), _ = running.complete(checkpoint, attend, [example.prompt], tasks.new_tokens(example.task))
    return head | {"kind": "answer", "variant": variant, "answer": text, "score": tasks.score(example, text)}


def margin_row(checkpoint: checkpoints.Checkpoint, tier: Tier, prompt: str, failure: Row, head: Row) -> Row:
    """`margin`: dense's logit of its own next byte less that of the variant's; `spacing` of the type's numbers at the greater of them."""
    ours, theirs = ([*failure[side].encode(), END] for side in ("variant", "dense"))
    place = next(at for at, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b)
    logits = after(checkpoint, tier, prompt, theirs[:place])
    pair = logits[theirs[place]], logits[ours[place]]
    top = torch.maximum(*pair)
    spacing = torch.finfo(logits.dtype).eps * 2.0 ** float(top.float().abs().log2().floor())
    words = {"begins": failure["dense"][:place], "dense": failure["dense"][place:], "variant_says": failure["variant"][place:]}
    return head | {"kind": "margin", "variant": failure["by"], **words, "margin": float(pair[0] - pair[1]), "spacing": spacing}


@torch.no_grad()
def after(checkpoint: checkpoints.Checkpoint, tier: Tier, prompt: str, begun: list[int]) -> torch.Tensor:
    """Dense logits [vocabulary] after the prompt and `begun`, token by token as in an answer."""
    ids = [*checkpoint.tokenizer.encode(prompt), *begun]
    first = len(ids) - len(begun) - 1
    rows = torch.tensor([ids], device=checkpoint.device)
    with attending(DENSE, checkpoint.model, tier, len(ids)) as cache:
        checkpoint.model(rows[:, :first], past_key_values=cache, logits_to_keep=1)
        for at in range(first, len(ids)):
            logits = checkpoint.model(rows[:, at : at + 1], past_key_values=cache).logits
    last: torch.Tensor = logits[0, -1]
    return last


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
