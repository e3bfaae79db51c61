"""The same promises over real kernels: in this process, and through a daemon that dies."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from daemon_process import DaemonProcess
from models import ARCHITECTURES, build, left_padded, prompt
from precision import check_logits, check_same
from tierd_client import DaemonUnavailable, InvalidArgument, Tier, Tolerance, connect
from tierd_client.hf import TierdCache, UnsupportedModel
from transformers import AutoConfig, DynamicCache, PreTrainedModel

EXACT = Tolerance(rtol=0.0)


@pytest.fixture(scope="module")
def tier() -> Iterator[Tier]:
    with connect("inproc://", timeout=120.0) as tier:
        yield tier


@pytest.fixture
def llama() -> PreTrainedModel:
    return build("llama").requires_grad_(False)


def greedy(model: PreTrainedModel, ids: torch.Tensor, cache: Any, new: int = 24, **options: Any) -> torch.Tensor:
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False, **options)


def test_a_head_dimension_that_no_kernel_takes_is_named(tier: Tier) -> None:
    config = AutoConfig.for_model("llama", hidden_size=64, num_attention_heads=2, head_dim=32)
    with pytest.raises(UnsupportedModel, match="head_dim: the model's heads have 32 channels; allowed: 64, 80, 96, 128, 256"):
        TierdCache(tier, config, tolerance=EXACT, max_tokens=64)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exact_tokens(name: str, tier: Tier) -> None:
    model = build(name)
    ids, mask = left_padded([60, 33])
    expected = greedy(model, ids, DynamicCache(), attention_mask=mask)
    model.set_attn_implementation("tierd")
    with TierdCache(tier, model.config, tolerance=EXACT, max_tokens=128) as cache:
        assert torch.equal(greedy(model, ids, cache, attention_mask=mask), expected)
        summary = cache.summary()
    assert (summary.answers == 2 * 23).all() and (summary.exact_share == 1.0).all()
    assert len(set(expected[:, 60:].flatten().tolist())) >= 15
    assert tier.status()["sessions"] == 0


@pytest.mark.gpu
def test_exact_tokens_over_the_cuda_backend(cuda: None, llama: PreTrainedModel) -> None:
    ids, mask = left_padded([33, 20])
    expected = greedy(llama, ids, DynamicCache(), new=8, attention_mask=mask)
    llama.set_attn_implementation("tierd")
    settings = {"backend": "cuda", "hot_bytes": 4 << 20, "originals_bytes": 8 << 20}
    with connect("inproc://", timeout=120.0, settings=settings) as tier:
        assert tier.backend == "cuda"
        with TierdCache(tier, llama.config, tolerance=EXACT, max_tokens=64) as cache:
            assert torch.equal(greedy(llama, ids, cache, new=8, attention_mask=mask), expected)
            assert (cache.summary().answers == 2 * 7).all()
    assert len(set(expected[:, 33:].flatten().tolist())) >= 8


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 5}, {"prefill_chunk_size": 17}])
def test_ways_of_generating(options: dict[str, Any], head_dim: int, tier: Tier) -> None:
    model = build("llama", head_dim=head_dim)
    ids = prompt(1, 12).repeat(1, 4)
    expected = greedy(model, ids, DynamicCache(), **options)
    model.set_attn_implementation("tierd")
    with TierdCache(tier, model.config, tolerance=EXACT, max_tokens=128) as cache:
        assert torch.equal(greedy(model, ids, cache, **options), expected)
    assert tier.status()["sessions"] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma"])
def test_half_precision(name: str, dtype: torch.dtype, tier: Tier) -> None:
    model = build(name, dtype, initializer_range=0.08)
    check_logits(model, lambda: TierdCache(tier, model.config, tolerance=EXACT, max_tokens=64))


@pytest.mark.parametrize("policy", ["budget", "coverage"])
def test_a_tolerance_is_kept_and_used(policy: Any, tier: Tier, llama: PreTrainedModel) -> None:
    llama.set_attn_implementation("tierd")
    with TierdCache(tier, llama.config, tolerance=Tolerance(rtol=0.1), policy=policy, max_tokens=400) as cache:
        greedy(llama, prompt(2, 300), cache, new=40)
        summary = cache.summary()
    assert not summary.over_budget.any()
    assert summary.rungs[..., :3].sum() > 0
    assert (summary.budget_mean > 0).all()


def test_a_forgotten_cache_releases_its_sessions(tier: Tier, llama: PreTrainedModel) -> None:
    llama.set_attn_implementation("tierd")
    cache = TierdCache(tier, llama.config, tolerance=EXACT, max_tokens=64)
    llama(prompt(2, 5), past_key_values=cache)
    watched = [session._collected for session in cache._store.at_rest().sessions]
    assert all(finaliser.alive for finaliser in watched) and tier.status()["sessions"] == 2
    del cache
    gc.collect()
    assert not any(finaliser.alive for finaliser in watched)  # each told the connection to close its session


def test_a_limit_that_the_daemon_names(tier: Tier, llama: PreTrainedModel) -> None:
    llama.set_attn_implementation("tierd")
    ids = prompt(2, 10)
    with TierdCache(tier, llama.config, tolerance=EXACT, max_tokens=10) as cache:
        with pytest.raises(InvalidArgument, match="max_tokens"):
            greedy(llama, ids[:, :6], cache, new=8)
        assert cache.get_seq_length() == 10
        cache.crop(-4)
        logits = llama(ids[:, 6:], past_key_values=cache).logits
    llama.set_attn_implementation("sdpa")
    check_same(logits, llama(ids).logits[:, 6:])


def test_a_daemon_that_dies(tmp_path: Path, llama: PreTrainedModel) -> None:
    expected = greedy(llama, prompt(2, 20), DynamicCache())
    llama.set_attn_implementation("tierd")
    with (
        DaemonProcess({"listen": f"unix://{tmp_path}/tierd.sock"}) as daemon,
        connect(daemon.target, timeout=120.0) as tier,
        TierdCache(tier, llama.config, tolerance=EXACT, max_tokens=64) as cache,
    ):
        assert torch.equal(greedy(llama, prompt(2, 20), cache), expected)
        daemon.process.kill()
        daemon.process.wait()
        for _ in range(2):
            with pytest.raises(DaemonUnavailable):
                llama(prompt(2, 1), past_key_values=cache)
            assert cache.get_seq_length() == 43
