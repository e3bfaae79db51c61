"""What is measured of a model and a variant: answers by greedy decoding, and perplexity, teacher-forced."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from checkpoints import Checkpoint
from tierd_client import Tier
from tierd_client.hf import TierdCache
from truth import Verdict, judge
from variants import Variant, attending, softmax_scale
from watched import Answer

CHUNK = 256  # query tokens of one forward
# From the most tokens that a row may have, and the padding that leads each row, to an empty cache for the forwards of the block.
Attend = Callable[[int, Sequence[int]], AbstractContextManager[Any]]


@torch.no_grad()
def complete(
    checkpoint: Checkpoint, attend: Attend, prompts: Sequence[str], new_tokens: int, each: Callable[[], None] | None = None
) -> tuple[list[str], dict[str, Any]]:
    """Greedy completions of the prompts, and totals of what certificates said (none of a cache without). `each` is called after the
    prefill and after each token.

    All tokens of a prompt but the last are its prefill, which is dense over an empty cache: each generated token follows from the cache's
    own attention over all that is in it. Raises ValueError for a prompt of fewer than two tokens.
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    for number, prompt in enumerate(encoded):
        if len(prompt) < 2:
            raise ValueError(f"prompt {number} has {len(prompt)} tokens; two at least: one to prefill, one to begin with")
    ids, mask = _padded(encoded, checkpoint.device)
    pads = (mask == 0).sum(dim=1).tolist()
    token, place = ids[:, -1:], mask.cumsum(dim=1) - 1
    rows: list[list[int]] = [[] for _ in prompts]
    with attend(ids.shape[1] + new_tokens, pads) as cache:
        here = {"position_ids": place[:, :-1].clamp(min=0), "attention_mask": mask[:, :-1]}
        model(ids[:, :-1], past_key_values=cache, logits_to_keep=1, **here)
        if each:
            each()
        for step in range(new_tokens):
            here = {"position_ids": place[:, -1:] + step, "attention_mask": mask}
            token = model(token, past_key_values=cache, **here).logits[:, -1:].argmax(dim=2)
            mask = torch.cat((mask, torch.ones_like(token)), dim=1)
            for row, new in zip(rows, token[:, 0].tolist(), strict=True):
                row.append(new)
            if each:
                each()
            if all(tokenizer.end.intersection(row) for row in rows):
                break
        said = totals(cache.summary()) if isinstance(cache, TierdCache) else {}
    return [tokenizer.decode(_until_end(row, tokenizer.end)) for row in rows], said


def _padded(rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [rows, longest], short rows padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _until_end(ids: list[int], end: frozenset[int]) -> list[int]:
    return ids[: next((at for at, token in enumerate(ids) if token in end), len(ids))]


def totals(summary: Any) -> dict[str, Any]:
    """A cache's summary over all layers and heads."""
    names = ("answers", "over_budget", "promoted_key_blocks", "promoted_value_blocks", "skipped_blocks", "host_bytes")
    counts: dict[str, Any] = {name: int(getattr(summary, name).sum()) for name in names}
    return counts | {"rungs": summary.rungs.sum(axis=(0, 1)).tolist()}


@torch.no_grad()
def negative_log_likelihood(checkpoint: Checkpoint, variant: Variant, tier: Tier, window: torch.Tensor) -> dict[str, Any]:
    """Sum over the tokens of `window` [1, tokens] after the first chunk, in nats, teacher-forced in chunks of 256 queries.

    Every certificate is held against exact attention on the way; `verdict` counts what was found. The first chunk meets an empty
    cache and is dense in every variant, so that its tokens are not counted.
    """
    model, nll, verdict = checkpoint.model, 0.0, Verdict()
    scale, length = softmax_scale(model), window.shape[1]
    if length <= CHUNK:
        raise ValueError(f"a window of {length} tokens; it must be longer than the first chunk, {CHUNK}")

    def see(answer: Answer) -> None:
        found, _ = judge(answer.q, answer.k, answer.v, scale, answer.output, answer.certificate, variant.rtol)
        verdict.add(found)

    with attending(variant, model, tier, length, see=see) as cache:
        model(window[:, :CHUNK], past_key_values=cache, logits_to_keep=1)
        for start in range(CHUNK, length - 1, CHUNK):
            stop = min(start + CHUNK, length - 1)
            logits = model(window[:, start:stop], past_key_values=cache).logits[0].float()
            nll += float(torch.nn.functional.cross_entropy(logits, window[0, start + 1 : stop + 1], reduction="sum"))
    said = {"verdict": vars(verdict)} if variant.certified else {}
    return {"nll": nll, "tokens_scored": length - 1 - CHUNK, **said}
