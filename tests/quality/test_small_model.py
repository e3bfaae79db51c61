"""The trained model of the evidence, as it is kept here: it finds a needle on a CPU in seconds, and so do its certified answers."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import running
import tasks
import torch
from tierd_client import Tier
from tierd_kernels.policy import Budget
from traces import Trace, record
from truth import exact_attention
from variants import BY_NAME, attending, connection

TOKENS, SEED = 1200, 3
EXAMPLES = 2


@pytest.fixture(scope="module")
def checkpoint() -> checkpoints.Checkpoint:
    return checkpoints.load(checkpoints.SMALL, "cpu")


@pytest.fixture(scope="module")
def tier(checkpoint: checkpoints.Checkpoint) -> Iterator[Tier]:
    with connection(checkpoint.model, TOKENS, rows=EXAMPLES) as tier:
        yield tier


@pytest.fixture(scope="module")
def needle(checkpoint: checkpoints.Checkpoint) -> tasks.Example:
    return tasks.example("niah_single", TOKENS, checkpoint.count, SEED, depth=0.4)


@pytest.fixture(scope="module")
def trace(checkpoint: checkpoints.Checkpoint, tier: Tier, needle: tasks.Example, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    ids = checkpoint.tokenizer.encode(needle.prompt)
    steps = len(tasks.completion(needle))
    return record(checkpoint, BY_NAME["rtol5"], tier, ids, len(ids) - 1, steps, tmp_path_factory.mktemp("trace"), "a needle")


@pytest.mark.parametrize("name", ["dense", "naive", "rtol5"])
def test_needles_are_found(checkpoint: checkpoints.Checkpoint, tier: Tier, name: str) -> None:
    examples = [tasks.example("niah", TOKENS, checkpoint.count, SEED + i) for i in range(EXAMPLES)]
    attend = partial(attending, BY_NAME[name], checkpoint.model, tier)
    found, said = running.complete(checkpoint, attend, [e.prompt for e in examples], tasks.new_tokens("niah"))
    assert [tasks.score(*pair) for pair in zip(examples, found, strict=True)] == [1.0] * EXAMPLES, found
    assert said.get("over_budget", 0) == 0


def test_every_recorded_answer_is_within_its_bound_and_is_replayed(trace: Trace) -> None:
    for layer in range(trace.meta.layers):
        tensors, stored = trace.layer(layer), trace.stored(layer)
        for step in range(0, trace.meta.steps, 4):
            seen, q = trace.seen(step), tensors["queries"][step]
            truth = exact_attention(q[:, None], tensors["keys"][:, :seen], tensors["values"][:, :seen], trace.meta.scale)
            error = (tensors["outputs"][step].double() - truth.output[:, 0]).norm(dim=1)
            bound = tensors["certificate.bound"][step]
            assert (error <= bound + truth.noise[:, 0]).all() and (bound <= tensors["certificate.budget"][step]).all()
            again = stored.attend(q, seen, trace.meta.rtol, Budget())
            assert np.array_equal(again.output[:, 0].view(np.int16), tensors["outputs"][step].view(torch.int16).numpy())


def test_originals_are_fetched_from_where_the_needle_lies(trace: Trace, needle: tasks.Example) -> None:
    """Of 75 blocks a few are read each step; while digits are being copied the needle's are among them."""
    (answer,) = needle.answers
    first, last = needle.prompt.index(answer), needle.prompt.index(answer) + len(answer) - 1
    blocks = range(first // trace.meta.block_size, last // trace.meta.block_size + 1)
    needed = torch.stack([trace.layer(layer)["needed"].bool().any(dim=3) for layer in range(trace.meta.layers)])
    by_step = needed.any(dim=0).any(dim=1)  # [steps, blocks]
    copying = by_step[1 : 1 + len(answer), blocks.start : blocks.stop].any(dim=1)
    assert copying.all(), copying.tolist()
    assert needed.float().mean() < 0.2, "most of what lies on the host was read: no needle was looked for"


def test_the_repository_holds_no_more_than_the_model_needs() -> None:
    assert {path.name for path in checkpoints.SMALL.iterdir()} == {"config.json", "model.safetensors", "training-log.jsonl"}
    assert sum(path.stat().st_size for path in Path(checkpoints.SMALL).iterdir()) < 16 << 20
