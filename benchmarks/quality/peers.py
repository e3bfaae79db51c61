"""Memory, speed and quality of other caches for transformers beside ours, on the same prompts.

    python benchmarks/quality/peers.py --model CHECKPOINT --contexts 8192 16384 --examples 20

Peers: the plain dense cache, transformers' offloaded cache, its QuantizedCache (optimum-quanto, 4 and 2 bits) and tierd in this process.
A peer that cannot run here is listed with the reason. Prompts are answered one at a time. Several processes may share most of what is
scored; the one without --share, which is to run alone, times tokens and scores the offloaded cache.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import commandline
import numpy as np
import tasks
from caches import Meter, Peer, peers
from ledger import WHOLE, Ledger
from paired import compare
from running import complete
from variants import DENSE, PACKAGES, connection

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results

Row = dict[str, Any]
TOGETHER = 2  # examples of one part: twenty of three tasks at two contexts are sixty groups, which seven shares halve to within 5 %
TIMED = 2  # examples of each task whose tokens are timed: some 100 tokens
TIMES = ("timed", "p20_ms", "p50_ms", "p80_ms")  # tokens, and quantiles of their milliseconds


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    checkpoint = checkpoints.load(options.model, options.device, options.dtype)
    identity = {"tasks": options.tasks, "examples": options.examples, "seed": options.seed, "model": checkpoint.name}
    ledger = Ledger(options.ledger, identity | {"dtype": str(checkpoint.model.dtype)}, options.minutes, options.share)
    with connection(checkpoint.model, max(options.contexts) + max(map(tasks.new_tokens, options.tasks))) as tier:
        all_peers = peers(checkpoint.model, tier)
        finished = all([ledger.part(key, compute, group) for group, key, compute in parts(options, checkpoint, all_peers)])
    if options.share != WHOLE:
        print(f"{'all' if finished else 'not all'} parts of this share done")
        return 0 if finished else 3
    rows = rows_of(ledger.records, checkpoint.device.type)
    absent = [peer for peer in all_peers if peer.missing]
    rows += [{"peer": peer.name, "tokens": tokens, "missing": peer.missing} for tokens in options.contexts for peer in absent]
    headline = {f"{row['peer']}_{row['tokens']}_delta": row["delta"] for row in rows if "delta" in row}
    path = write_results(f"quality_peers{checkpoint.suffix}", headline, rows, PACKAGES)
    print(f"{'all' if finished else 'not all'} parts done; {path.name}")
    return 0 if finished else 3


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commandline.add_run(parser, "peers.jsonl")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 16384], help="tokens")
    parser.add_argument("--tasks", nargs="+", default=["niah", "niah_multikey", "vt"], choices=tasks.NAMES)
    parser.add_argument("--examples", type=int, default=20, help="of each task and context")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def parts(options: argparse.Namespace, checkpoint: checkpoints.Checkpoint, all_peers: list[Peer]) -> Iterator[tuple[int, str, Any]]:
    """Group, key and computation of every part: the scores, all peers after one another on the same prompts, but for those that must be
    `alone`, and the times in a process that is not one of several."""
    able, group = [peer for peer in all_peers if not peer.missing and (options.share == WHOLE or not peer.alone)], 0
    for tokens in options.contexts:
        for first in range(0, options.examples, TOGETHER):
            numbers = range(first, min(first + TOGETHER, options.examples))
            for task in options.tasks:
                group += 1
                for peer in able:
                    key = f"score/{tokens}/{task}/{first}/{peer.name}"
                    yield group, key, lambda p=peer, n=tokens, t=task, i=numbers: scored(checkpoint, p, t, n, i, options.seed)
    if options.share == WHOLE:
        for tokens in options.contexts:
            for peer in able:
                yield 0, f"time/{tokens}/{peer.name}", lambda p=peer, n=tokens: timed(checkpoint, p, options.tasks, n, options.seed)


def scored(checkpoint: checkpoints.Checkpoint, peer: Peer, task: str, tokens: int, numbers: range, seed: int) -> Row:
    """Scores of the examples `numbers` of a task at `tokens` tokens, example i of the seed `seed + i`, and the largest memory."""
    meter, scores, said = Meter(peer.attend, checkpoint.device), [], {"over_budget": 0}
    for number in numbers:
        example = tasks.example(task, tokens, checkpoint.count, seed + number)
        (completion,), found = complete(checkpoint, meter.attend, [example.prompt], tasks.new_tokens(task), meter.tick)
        scores.append(tasks.score(example, completion))
        said["over_budget"] += found.get("over_budget", 0)
    place = {"kind": "score", "peer": peer.name, "tokens": tokens, "task": task, "numbers": list(numbers)}
    return place | {"scores": scores, "held_bytes": meter.largest()} | said


def timed(checkpoint: checkpoints.Checkpoint, peer: Peer, names: list[str], tokens: int, seed: int) -> Row:
    """Milliseconds a token of `TIMED` examples of each task. Each is answered once before: what a peer's libraries prepare for a length
    that they meet for the first time took 36 ms for a fifth of the tokens on an H100, and would be paid for by the first peer alone."""
    meter = Meter(peer.attend, checkpoint.device)
    for task in names:
        for number in range(TIMED):
            prompts, new = [tasks.example(task, tokens, checkpoint.count, seed + number).prompt], tasks.new_tokens(task)
            complete(checkpoint, peer.attend, prompts, new)
            complete(checkpoint, meter.attend, prompts, new, meter.tick)
    place = {"kind": "time", "peer": peer.name, "tokens": tokens}
    return place | dict(zip(TIMES, (len(meter.seconds), *np.quantile(meter.seconds, (0.2, 0.5, 0.8)) * 1e3), strict=True))


def rows_of(records: list[Row], device: str) -> list[Row]:
    """One row a peer and context, from the examples that dense has answered, too. `device_bytes`: what lies on the model's device, "cpu" or
    "cuda"; `host_bytes`: the rest; `peak_bytes`: see `Meter.largest`."""
    groups: dict[tuple[str, int, str], list[Row]] = defaultdict(list)
    for record in records:
        groups[record["kind"], record["tokens"], record["peer"]].append(record)
    rows = []
    for (kind, tokens, peer), own in groups.items():
        ours, dense = by_example(own), by_example(groups.get((kind, tokens, DENSE.name), []))
        both = sorted(ours.keys() & dense.keys())
        if kind != "score" or not both:
            continue
        row = {"peer": peer, "tokens": tokens} | memory(own, device) | {"over_budget": sum(record["over_budget"] for record in own)}
        for record in groups.get(("time", tokens, peer), []):
            row |= {name: record[name] for name in TIMES}
        names = dict.fromkeys(task for task, _ in both)
        row["task_scores"] = {name: float(np.mean([ours[at] for at in both if at[0] == name])) for name in names}
        rows.append(row | compare([dense[at] for at in both], [ours[at] for at in both]).row())
    return rows


def by_example(records: list[Row]) -> dict[tuple[str, int], float]:
    """Scores by task and number; none of records of times."""
    return {(r["task"], i): score for r in records if "scores" in r for i, score in zip(r["numbers"], r["scores"], strict=True)}


def memory(records: list[Row], device: str) -> dict[str, int]:
    """The largest of each kind."""
    held = {kind: max(record["held_bytes"][kind] for record in records) for kind in records[0]["held_bytes"]}
    row = {"device_bytes": held.get("hot", held.get(device, 0))}
    row |= {"host_bytes": held.get("originals", 0 if device == "cpu" else held.get("cpu", 0))}
    return row | ({"peak_bytes": held["peak"]} if "peak" in held else {})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
