"""Generation through the cache gives the tokens of dense generation, over a tier that attends exactly."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_tier import FakeTier
from models import ARCHITECTURES, build, left_padded, prompt
from precision import check_same
from tierd_client.hf import TierdCache
from tierd_client.types import Tolerance
from transformers import DynamicCache, PreTrainedModel

EXACT = Tolerance(rtol=0.0)


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def tiered() -> PreTrainedModel:
    model = build("llama")
    model.set_attn_implementation("tierd")
    return model


@pytest.fixture
def tier() -> FakeTier:
    return FakeTier()


@pytest.fixture
def make(tier: FakeTier, tiered: PreTrainedModel) -> Callable[[], TierdCache]:
    return lambda: TierdCache(tier, tiered.config, tolerance=EXACT, max_tokens=300)


def greedy(model: PreTrainedModel, ids: torch.Tensor, cache: Any, new: int = 20, **options: Any) -> torch.Tensor:
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False, **options)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_with_left_padding(name: str, tier: FakeTier) -> None:
    model = build(name)
    ids, mask = left_padded([17, 9, 12])
    expected = greedy(model, ids, DynamicCache(), attention_mask=mask)
    model.set_attn_implementation("tierd")
    with TierdCache(tier, model.config, tolerance=EXACT, max_tokens=64) as cache:
        assert torch.equal(greedy(model, ids, cache, attention_mask=mask), expected)
        assert tier.calls["step_many"] == 19 * 3  # all rows of a layer in one message
        assert {session.length(layer=2) for session in tier.open} == {17 + 19, 9 + 19, 12 + 19}  # no padding stored
    assert len(set(expected[:, 17:].flatten().tolist())) >= 15
    assert not tier.open


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dimensions(head_dim: int, tier: FakeTier) -> None:
    model = build("llama", head_dim=head_dim)
    expected = greedy(model, prompt(1, 11), DynamicCache())
    model.set_attn_implementation("tierd")
    with TierdCache(tier, model.config, tolerance=EXACT, max_tokens=64) as cache:
        assert torch.equal(greedy(model, prompt(1, 11), cache), expected)


def test_several_turns(dense: PreTrainedModel, tiered: PreTrainedModel, make: Callable[[], TierdCache]) -> None:
    caches = (DynamicCache(), make())
    for (ids, mask) in [left_padded([10, 6])]:
        talks = [(ids, mask), (ids, mask)]
    for turn in range(3):
        for place, (model, cache) in enumerate(zip((dense, tiered), caches, strict=True)):
            ids, mask = talks[place]
            said = greedy(model, ids, cache, new=8, attention_mask=mask)
            ids = torch.cat([said, prompt(2, 5, seed=turn)], dim=1)
            talks[place] = ids, torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)
        assert torch.equal(talks[0][0], talks[1][0])


@pytest.mark.parametrize("options", [
    {"num_beams": 4},
    {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.3},
    {"prompt_lookup_num_tokens": 4},
    {"prefill_chunk_size": 5},
    {"prefill_chunk_size": 4, "num_beams": 2},
])
def test_ways_of_generating(
    options: dict[str, Any], dense: PreTrainedModel, tiered: PreTrainedModel, make: Callable[[], TierdCache], tier: FakeTier
) -> None:
    rows = 1 if "prompt_lookup_num_tokens" in options else 2
    ids = prompt(1, 8).repeat(rows, 3)[:, :22] if rows == 1 else left_padded([21, 13])[0]
    mask = torch.ones_like(ids) if rows == 1 else left_padded([21, 13])[1]
    expected = greedy(dense, ids, DynamicCache(), attention_mask=mask, **options)
    with make() as cache:
        assert torch.equal(greedy(tiered, ids, cache, attention_mask=mask, **options), expected)
    assert not tier.open


def test_assisted_decoding(dense: PreTrainedModel, tiered: PreTrainedModel, make: Callable[[], TierdCache], tier: FakeTier) -> None:
    assistant = copy.deepcopy(dense)
    with torch.no_grad():
        assistant.lm_head.weight += 0.15 * torch.randn(assistant.lm_head.weight.shape, generator=torch.Generator().manual_seed(5))
    expected = greedy(dense, prompt(1, 12), DynamicCache())
    with make() as cache:
        assert torch.equal(greedy(tiered, prompt(1, 12), cache, assistant_model=assistant), expected)
    assert tier.calls["truncate"] > 0  # some candidates were refused
    assert any(max(tokens) > 2 for tokens in tier.tokens_per_message)  # and some were asked together


def test_copies_of_a_prompt(dense: PreTrainedModel, tiered: PreTrainedModel, make: Callable[[], TierdCache]) -> None:
    start = prompt(1, 15)
    with torch.no_grad(), make() as cache:
        tiered(start, past_key_values=cache)
        for seed in range(2):
            ids = torch.cat([start, prompt(1, 4, seed=seed)], dim=1)
            with copy.deepcopy(cache) as twin:
                assert torch.equal(greedy(tiered, ids, twin), greedy(dense, ids, DynamicCache()))
        assert cache.get_seq_length() == 15


def test_repeat_select_and_crop_by_hand(dense: PreTrainedModel, tiered: PreTrainedModel, make: Callable[[], TierdCache]) -> None:
    ids, mask = left_padded([12, 7])
    reference = DynamicCache()
    with torch.no_grad(), make() as cache:
        for model, held in ((dense, reference), (tiered, cache)):
            model(ids, attention_mask=mask, past_key_values=held)
            held.batch_repeat_interleave(3)
            held.batch_select_indices(torch.tensor([5, 0, 4]))
            held.crop(-2)
        wide = torch.cat([mask[[1, 0, 1], :-2], torch.ones(3, 4, dtype=mask.dtype)], dim=1)
        new = prompt(3, 4, seed=9)
        expected = dense(new, attention_mask=wide, past_key_values=reference).logits
        check_same(tiered(new, attention_mask=wide, past_key_values=cache).logits, expected)
        assert cache.get_seq_length() == reference.get_seq_length() == 14
        cache.crop(13)  # the absolute length of transformers 4
        assert cache.get_seq_length() == 13
        cache.crop(100)
        assert cache.get_seq_length() == 13
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(greedy(tiered, ids, cache, attention_mask=mask), greedy(dense, ids, DynamicCache(), attention_mask=mask))


def test_padding_between_tokens_is_never_stored(
    dense: PreTrainedModel, tiered: PreTrainedModel, make: Callable[[], TierdCache], tier: FakeTier
) -> None:
    ids, mask = prompt(2, 10), torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 1, 1, 1, 1, 1]])
    where = (mask.cumsum(1) - 1).clamp(min=0)
    reference = DynamicCache()
    with torch.no_grad(), make() as cache:
        for part in (slice(0, 5), slice(5, 8), slice(8, 10)):
            outputs = [
                model(ids[:, part], attention_mask=mask[:, : part.stop], position_ids=where[:, part], past_key_values=held).logits
                for model, held in ((dense, reference), (tiered, cache))
            ]
            shown = mask[:, part].bool()
            check_same(outputs[1][shown], outputs[0][shown])
        assert sorted(session.length(layer=0) for session in tier.open) == [3, 8]
    # Row 0 has nothing cached until the second part, and nothing new in the first: it meets the daemon in the third.
    assert tier.tokens_per_message == [[3]] * 3 + [[1, 2]] * 3


def test_a_long_forward_is_cut_to_the_limit_of_a_message(dense: PreTrainedModel, tiered: PreTrainedModel) -> None:
    small = FakeTier(message_bytes_max=64 << 10)
    ids, mask = left_padded([60, 41])
    with torch.no_grad(), TierdCache(small, tiered.config, tolerance=EXACT, max_tokens=64) as cache:
        tiered(ids[:, :40], attention_mask=mask[:, :40], past_key_values=cache)
        logits = tiered(ids[:, 40:], attention_mask=mask, past_key_values=cache).logits
        expected = dense(ids, attention_mask=mask).logits[:, 40:]
        check_same(logits, expected)
    assert small.calls["step_many"] > 3
    assert max(sum(tokens) for tokens in small.tokens_per_message) * (2 * 6 * 64 * 4) < 64 << 10
