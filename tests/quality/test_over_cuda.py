"""The same measurements over the CUDA backend, on a device or the emulated one: the model stays on the CPU, its attention does not."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import running
import tiny
import torch
from checkpoints import Checkpoint
from tierd_client import Tier, connect
from traces import record
from truth import exact_attention, judge
from variants import BY_NAME, attending

pytestmark = pytest.mark.gpu
SETTINGS = {"backend": "cuda", "hot_bytes": 4 << 20, "originals_bytes": 8 << 20, "scratch_bytes": 1 << 20}
TOKENS = 290  # a first chunk of 256 is dense; 33 queries of two layers follow
CERTIFIED = ("coverage", "rtol2", "rtol10")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return tiny.checkpoint(torch.bfloat16)


@pytest.fixture(scope="module")
def tier(cuda: None) -> Iterator[Tier]:
    with connect("inproc://", timeout=600.0, settings=SETTINGS) as tier:
        assert tier.backend == "cuda"
        yield tier


@pytest.mark.parametrize("name", CERTIFIED)
def test_every_certificate_is_judged_and_true(checkpoint: Checkpoint, tier: Tier, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    window = tiny.ids(TOKENS)
    found = running.negative_log_likelihood(checkpoint, BY_NAME[name], tier, window)
    verdict = found["verdict"]
    assert verdict["head_steps"] == found["tokens_scored"] * 2 * 4 == (TOKENS - 1 - running.CHUNK) * 2 * 4
    assert verdict["violations"] == verdict["broken"] == verdict["loose_budgets"] == 0 and 0.0 < verdict["worst"] <= 1.0
    dense = running.negative_log_likelihood(checkpoint, BY_NAME["dense"], tier, window)
    assert found["nll"] != dense["nll"] and found["nll"] == pytest.approx(dense["nll"], rel=0.02)
    share = 0.5 * verdict["worst"]

    def too_small(*arguments: Any) -> Any:
        q, k, v, scale, output, certificate, rtol = arguments
        return judge(q, k, v, scale, output, dataclasses.replace(certificate, bound=share * certificate.bound), rtol)

    monkeypatch.setattr(running, "judge", too_small)
    assert running.negative_log_likelihood(checkpoint, BY_NAME[name], tier, window)["verdict"]["violations"] > 0


def test_prompts_of_several_lengths_are_answered_together_as_alone(checkpoint: Checkpoint, tier: Tier) -> None:
    prompts = ["def double(x):\n    return x + x\n" * 5, "import os\n" * 4]
    attend = partial(attending, BY_NAME["exact"], checkpoint.model, tier)
    together, said = running.complete(checkpoint, attend, prompts, 4)
    alone = [running.complete(checkpoint, attend, [prompt], 4)[0][0] for prompt in prompts]
    assert together == alone and len(set(together)) == 2
    assert said["answers"] == said["rungs"][4] == 4 * 2 * 2 * 4 and said["over_budget"] == 0


def test_a_trace_of_it_is_what_was_answered(checkpoint: Checkpoint, tier: Tier, tmp_path: Path) -> None:
    prefill, steps = 100, 3
    text = checkpoint.tokenizer.encode("def double(x):\n    return x + x\n\n" * 10)[: prefill + 2]
    trace = record(checkpoint, BY_NAME["rtol5"], tier, text, prefill, steps, tmp_path, "a repeated function")
    for layer in range(trace.meta.layers):
        tensors = trace.layer(layer)
        assert tensors["keys"].dtype == tensors["outputs"].dtype == torch.bfloat16
        for step in range(steps):
            k, v = (tensors[name][:, : trace.seen(step)] for name in ("keys", "values"))
            truth = exact_attention(tensors["queries"][step][:, None], k, v, trace.meta.scale)
            error = (tensors["outputs"][step].double() - truth.output[:, 0]).norm(dim=1)
            assert (error <= tensors["certificate.bound"][step] + truth.noise[:, 0]).all()
        assert (tensors["certificate.promoted_value_blocks"].amax(dim=1) > 0).tolist() == tensors["needed"][:, 1].any(dim=(1, 2)).tolist()
