"""Every certificate of millions of head-steps against exact attention: how often is the true error above the bound?

    python benchmarks/quality/violations.py --model CHECKPOINT --head-steps 10000000 --minutes 9

Text and task prompts by turns are read in chunks of 256 queries under every certified variant, and each head of each query is judged
(truth.py). Ends with 1 if any certificate was wrong.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import commandline
import tasks
import torch
from ledger import WHOLE, Ledger, Share
from running import negative_log_likelihood
from truth import Verdict
from variants import ALL, PACKAGES, connection

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results

CERTIFIED = [variant for variant in ALL if variant.certified and variant.rtol]  # "exact" has rounding alone to bound


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    checkpoint = checkpoints.load(options.model, options.device, options.dtype)
    identity = {"text": str(options.text), "context": options.context, "seed": options.seed}
    identity |= {"model": checkpoint.name, "dtype": str(checkpoint.model.dtype)}
    ledger = Ledger(options.ledger, identity, options.minutes, options.share)
    with connection(checkpoint.model, options.context) as tier:
        for index, window in enumerate(inputs(checkpoint, options)):
            if head_steps(ledger, options.share) >= options.head_steps // options.share.count:
                break
            for variant in CERTIFIED:
                ledger.part(
                    f"{index}/{variant.name}",
                    lambda v=variant, w=window: {"variant": v.name, **negative_log_likelihood(checkpoint, v, tier, w)},  # type: ignore[misc]
                    index,
                )
            if ledger.out_of_time:
                break
    if options.share != WHOLE:
        print(f"{head_steps(ledger, options.share)} head-steps in this share")
        return 0
    rows = summarise(ledger.records)
    headline = {name: sum(row[name] for row in rows) for name in ("head_steps", "violations", "broken", "loose_budgets")}
    path = write_results(f"quality_violations{checkpoint.suffix}", headline, rows, PACKAGES, identity)
    print(f"{headline} in {path.name}; largest error over bound {max(row['worst'] for row in rows):.4f}")
    return int(headline["violations"] > 0 or headline["broken"] > 0)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commandline.add_run(parser, "violations.jsonl")
    parser.add_argument("--text", type=Path, help="a text file or a folder of .txt (default: the standard library's source)")
    parser.add_argument("--context", type=int, default=4096, help="tokens of one text or prompt, at most")
    parser.add_argument("--head-steps", type=int, default=10_000_000, help="stop once so many are judged")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def inputs(checkpoint: checkpoints.Checkpoint, options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Ids [1, tokens]: a window of text, then a prompt of each task, another window, and so on; text that has run out is left out."""
    text = checkpoints.all_windows(checkpoint, options.text, options.context)
    for turn in range(1 << 30):
        if (window := next(text, None)) is not None:
            yield window
        for task in tasks.NAMES:
            example = tasks.example(task, options.context, checkpoint.count, options.seed + turn)
            yield torch.tensor([checkpoint.tokenizer.encode(example.prompt)], device=checkpoint.device)


def head_steps(ledger: Ledger, share: Share) -> int:
    """Judged so far of the inputs that are the share's."""
    return sum(record["verdict"]["head_steps"] for record in ledger.records if share.has(int(record["key"].split("/")[0])))


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a variant: its verdicts added up, and the seconds that reading and judging took."""
    verdicts: dict[str, Verdict] = defaultdict(Verdict)
    seconds: dict[str, float] = defaultdict(float)
    for record in records:
        verdicts[record["variant"]].add(Verdict(**record["verdict"]))
        seconds[record["variant"]] += record["seconds"]
    return [{"variant": name, **vars(verdict), "seconds": seconds[name]} for name, verdict in verdicts.items()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
