"""A quick look at what a model can do: needles and tasks by teacher forcing, perplexity against how much context there is.

An answer that is the likeliest byte at each place, given the right bytes before it, is what greedy decoding writes: the first wrong byte
ends both. So exact answers are counted in one forward pass. RULER's score is higher where part of an answer is right.
"""

import time
from collections.abc import Callable
from typing import Any

import corpus
import numpy as np
import torch
from tasks import Haystack, completion, example
from vocabulary import END

from training.network import Network

LENGTHS = (1024, 4096, 8192, 16384, 32768)
EVALUATION_SEED = 1_000_000_007  # training draws 40-bit seeds at random: a prompt met in both is as good as impossible
CONTEXTS, MEASURED = (256, 512, 1024, 2048, 4096, 8192, 16384), 128
TASKS = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "vt", "fwe")
Report = Callable[[dict[str, Any]], None]


@torch.no_grad()
def exact(network: Network, name: str, length: int, count: int, tokens: int, device: str) -> float:
    """The share of `count` examples of a task, `length` long, whose answer greedy decoding gets right to the last byte."""
    right, done = 0, 0
    while done < count:
        rows = min(count - done, max(1, tokens // length))
        ids, answers = _examples(name, length, done, rows)
        batch = torch.from_numpy(ids).to(device, torch.long)
        _, hits = network(batch[:, :-1], batch[:, 1:])
        right += int((hits | ~torch.from_numpy(answers).to(device)).all(dim=1).sum())
        done += rows
    return right / count


def _examples(name: str, length: int, first: int, rows: int) -> tuple[Any, Any]:
    """Ids int64 [rows, length + 1] and which predictions [rows, length] are of the answer. The answer is at the end, before padding."""
    ids, answers = np.full((rows, length + 1), END, np.int64), np.zeros((rows, length), np.bool_)
    for row in range(rows):
        made = example(name, length, len, EVALUATION_SEED + first + row, haystack=_haystack(name))
        text = made.prompt + completion(made)
        ids[row, : len(text)] = np.frombuffer(text.encode("ascii"), np.uint8)
        answers[row, len(made.prompt) - 1 : len(text) - 1] = True
    return ids, answers


def _haystack(name: str) -> Haystack | None:
    return Haystack.source("held-out") if name == "niah" else None


@torch.no_grad()
def perplexity(network: Network, longest: int, count: int, device: str) -> dict[int, float]:
    """Perplexity per byte of the same held-out bytes by how much context they have: the last `MEASURED` of `count` windows of `longest`."""
    ids = torch.from_numpy(np.frombuffer("\n".join(corpus.documents("held-out")).encode("ascii"), np.uint8).astype(np.int64))
    windows = ids.unfold(0, longest + 1, longest)[:count].to(device)
    return {
        context: round(float(torch.stack([_last(network, window[-context - 1 :]) for window in windows]).mean().exp()), 4)
        for context in sorted({min(context, longest) for context in CONTEXTS})
    }


def _last(network: Network, ids: torch.Tensor) -> torch.Tensor:
    return network(ids[None, :-1], ids[None, 1:])[0][0, -MEASURED:].mean()


def evaluate(network: Network, device: str, tokens: int, count: int, longest: int, ends_at: float, report: Report) -> None:
    """Report one result after another, the most telling first, until `time.monotonic()` passes `ends_at`."""
    lengths = [length for length in LENGTHS if length <= longest]
    plan = [("niah", length) for length in lengths] + [(name, length) for length in lengths for name in TASKS]
    report({"event": "perplexity", "by_context": perplexity(network, min(longest, CONTEXTS[-1]), count, device)})
    for name, length in plan:
        if time.monotonic() > ends_at:
            report({"event": "evaluation cut short", "before": f"{name} at {length}"})
            return
        report(
            {"event": "exact", "task": name, "length": length, "of": count, "share": exact(network, name, length, count, tokens, device)}
        )
