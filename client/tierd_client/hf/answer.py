"""The answers of one layer: rows with nothing cached attend among their own new tokens, all others go to the daemon."""

from collections.abc import Sequence

import torch
from tierd_proto.coding import CERTIFICATE_ROW_BYTES

from tierd_client.hf.batch import Batch
from tierd_client.hf.handover import HandOver
from tierd_client.hf.local import attend_locally
from tierd_client.hf.summary import Tally
from tierd_client.session import Session
from tierd_client.tier import Tier

Row = tuple[Session, int, torch.Tensor, torch.Tensor, torch.Tensor]
WHOLE = slice(None)
Place = torch.Tensor | slice | None
"""Which of a row's positions are tokens; WHOLE: all, None: none."""


def place_of(real: torch.Tensor) -> Place:
    """Which of a row's positions, `real` bool [n] on the CPU, are tokens."""
    if bool(real.all()):
        return WHOLE
    return real.nonzero()[:, 0] if bool(real.any()) else None


def answer_rows(
    tier: Tier,
    batch: Batch,
    places: Sequence[Place],
    module: torch.nn.Module,
    handover: HandOver,
    q: torch.Tensor,
    scaling: float | None,
    tally: Tally,
) -> torch.Tensor:
    """Store one layer's new tokens and attend: [rows, n, num_q_heads, head_dim], zeros at padding.

    `places`: of each row; `q` [rows, num_q_heads, n, head_dim]. Raises what the daemon reports; some rows may then have been stored.
    """
    rows: list[int] = []
    steps: list[Row] = []
    answers: list[torch.Tensor | None] = [None] * len(places)  # of each row [its tokens, num_q_heads, head_dim]
    for row, (session, place) in enumerate(zip(batch.sessions, places, strict=True)):
        if place is None:
            continue
        own_q, own_k, own_v = (tensor[row] for tensor in (q, handover.key, handover.value))
        if isinstance(place, torch.Tensor):
            own_q, own_k, own_v = (own[:, place.to(q.device)] for own in (own_q, own_k, own_v))
        if batch.lengths[row]:
            rows.append(row)
            steps.append((session, handover.layer, own_q, own_k, own_v))
        else:
            session.append(layer=handover.layer, k=own_k, v=own_v)
            answers[row] = attend_locally(module, own_q.detach(), own_k.detach(), own_v.detach(), scaling)
    for row, step_answer in zip(rows, _step(tier, steps, tally), strict=True):
        answers[row] = step_answer.transpose(0, 1)
    first = answers[0]
    if len(answers) == 1 and places[0] is WHOLE and first is not None:  # what decoding mostly is: nothing to put together
        return first[None].contiguous()
    output = torch.zeros_like(q).transpose(1, 2).contiguous()
    for row, (place, answer) in enumerate(zip(places, answers, strict=True)):
        if answer is not None:
            output[row, place] = answer
    return output


def _step(tier: Tier, steps: list[Row], tally: Tally) -> list[torch.Tensor]:
    """Outputs [num_q_heads, n, head_dim] of the rows, in one message, or as few as the daemon's limit takes: tokens in order, since
    each attends to those before it only."""
    if not steps:
        return []
    at_once = _tokens_at_once(tier, steps)
    longest = max(q.shape[1] for _, _, q, _, _ in steps)
    if longest <= at_once:
        return _outputs(tier, steps, tally)
    pieces: list[list[torch.Tensor]] = [[] for _ in steps]
    for start in range(0, longest, at_once):
        part = slice(start, start + at_once)
        asked = [index for index, step in enumerate(steps) if step[2].shape[1] > start]
        message = [(s, layer, q[:, part], k[:, part], v[:, part]) for s, layer, q, k, v in (steps[index] for index in asked)]
        for index, output in zip(asked, _outputs(tier, message, tally), strict=True):
            pieces[index].append(output)
    return [torch.cat(piece, dim=1) for piece in pieces]


def _outputs(tier: Tier, steps: list[Row], tally: Tally) -> list[torch.Tensor]:
    results = tier.step_many(steps)
    for step, result in zip(steps, results, strict=True):
        tally.add(step[1], result.certificate)
    return [result.output for result in results]


def _tokens_at_once(tier: Tier, steps: list[Row]) -> int:
    """Tokens of each row for which neither message nor reply can pass the limit; at least 1, which the daemon may then refuse."""
    _, _, q, k, _ = steps[0]
    heads, _, head_dim = q.shape
    per_token = 2 * (heads + k.shape[0]) * head_dim * q.element_size() + heads * CERTIFICATE_ROW_BYTES
    overhead = 4096 * len(steps)
    return max(1, (tier.limits.message_bytes_max - overhead) // (per_token * len(steps)))
