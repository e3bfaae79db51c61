"""What certified attention cannot answer for is refused by name, before anything wrong is returned."""

from typing import Any

import pytest
import torch
from fake_tier import FakeTier
from models import build, left_padded, prompt
from tierd_client.errors import InvalidArgument
from tierd_client.hf import TierdCache, UnsupportedModel
from tierd_client.types import Tolerance
from transformers import AttentionInterface, AutoConfig, DynamicCache, PreTrainedModel
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

EXACT = Tolerance(rtol=0.0)


def cached(model: PreTrainedModel, tier: FakeTier | None = None, max_tokens: int = 64) -> TierdCache:
    return TierdCache(tier or FakeTier(), model.config, tolerance=EXACT, max_tokens=max_tokens)


@pytest.fixture
def llama() -> PreTrainedModel:
    model = build("llama")
    model.set_attn_implementation("tierd")
    return model.requires_grad_(False)


@pytest.mark.parametrize(("name", "changes", "feature"), [
    ("mistral", {"sliding_window": 63}, "sliding window"),
    ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}, "sliding window"),
    ("gemma2", {"sliding_window": 64}, "soft-capping"),
    ("t5", {}, "cross-attention"),
    ("bart", {}, "cross-attention"),
    ("llama4_text", {"attention_chunk_size": 32}, "chunked_attention"),
    ("mamba", {}, "linear_attention"),
    ("llama", {"is_causal": False}, "bidirectional"),
    ("gpt2", {"add_cross_attention": True}, "cross-attention"),
])
def test_configurations(name: str, changes: dict[str, Any], feature: str) -> None:
    config = AutoConfig.for_model(name, **changes)
    with pytest.raises(UnsupportedModel, match=feature):
        TierdCache(FakeTier(), config, tolerance=EXACT, max_tokens=64)


@pytest.mark.parametrize(("name", "changes", "size"), [
    ("llama", {"head_dim": 32}, 32),
    ("llama", {"head_dim": None, "hidden_size": 384, "num_attention_heads": 8}, 48),
    ("gpt2", {"n_embd": 256, "n_head": 8}, 32),
])
def test_heads_of_a_size_that_is_not_served(name: str, changes: dict[str, Any], size: int) -> None:
    with pytest.raises(UnsupportedModel, match=f"head_dim: the model's heads have {size} channels; allowed: 64, 80, 96, 128, 256"):
        TierdCache(FakeTier(), AutoConfig.for_model(name, **changes), tolerance=EXACT, max_tokens=64)


def test_what_the_configuration_does_not_say_is_refused_in_the_first_forward(llama: PreTrainedModel) -> None:
    attend, small, double = AttentionInterface()["tierd"], torch.ones(1, 2, 1, 32), torch.ones(1, 2, 1, 64, dtype=torch.float64)
    for tensor, feature in ((small, "head_dim: the model's heads have 32"), (double, "dtype: the model computes in float64; allowed: fl")):
        tier = FakeTier()
        cache = cached(llama, tier)
        query = tensor.repeat_interleave(2, dim=1)
        with pytest.raises(UnsupportedModel, match=feature):
            attend(llama.model.layers[0].self_attn, query, *cache.update(tensor, tensor.clone(), 0), None)
        assert not tier.open


@pytest.mark.parametrize(("name", "changes"), [
    ("mistral", {"sliding_window": 64}),
    ("qwen2", {"sliding_window": 32, "use_sliding_window": False}),
    ("gemma3_text", {"sliding_window": 100}),
])
def test_windows_that_cannot_be_outgrown_are_fine(name: str, changes: dict[str, Any]) -> None:
    TierdCache(FakeTier(), AutoConfig.for_model(name, **changes), tolerance=EXACT, max_tokens=64)


def test_a_long_enough_window_generates_and_padding_cannot_outgrow_it_unseen() -> None:
    model = build("mistral", sliding_window=24)
    ids, mask = left_padded([12, 5])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **options)
    model.set_attn_implementation("tierd")
    assert torch.equal(model.generate(ids, past_key_values=cached(model, max_tokens=24), **options), expected)
    ids, mask = left_padded([22, 5])
    with pytest.raises(UnsupportedModel, match="sliding window: it spans 24 positions and this forward needs 25"):
        model.generate(ids, past_key_values=cached(model, max_tokens=24), max_new_tokens=12, attention_mask=mask)


@pytest.mark.parametrize(("max_tokens", "tolerance", "policy"), [
    (0, EXACT, "budget"), (1 << 40, EXACT, "budget"), (True, EXACT, "budget"), (64, 0.05, "budget"), (64, EXACT, "best"),
])
def test_options(max_tokens: int, tolerance: Any, policy: Any) -> None:
    with pytest.raises(InvalidArgument):
        TierdCache(FakeTier(), AutoConfig.for_model("llama"), tolerance=tolerance, policy=policy, max_tokens=max_tokens)


def test_masks(llama: PreTrainedModel) -> None:
    ids = prompt(2, 6)
    square = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    with pytest.raises(UnsupportedModel, match="4-D attention mask"):
        llama(ids, attention_mask=square, past_key_values=cached(llama))
    with pytest.raises(UnsupportedModel, match=r"its shape is \[2, 5\]"):
        llama(ids, attention_mask=torch.ones(2, 5), past_key_values=cached(llama))


@pytest.mark.parametrize("later", [[[0, 1, 1, 1], [1, 1, 1, 1]], [[1, 1, 1, 1], [1, 1, 1, 1]], None, [[0, 1, 0, 1], [0, 0, 1, 1]]])
def test_a_mask_that_changes_over_cached_positions(llama: PreTrainedModel, later: list[list[int]] | None) -> None:
    tier = FakeTier()
    cache = cached(llama, tier)
    llama(prompt(2, 3), attention_mask=torch.tensor([[0, 1, 1], [0, 0, 1]]), past_key_values=cache)
    with pytest.raises(UnsupportedModel, match="changed mask"):
        llama(prompt(2, 1), attention_mask=None if later is None else torch.tensor(later), past_key_values=cache)
    assert tier.calls["step_many"] == 0
    llama(prompt(2, 1), attention_mask=torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]]), past_key_values=cache)
    assert cache.get_seq_length() == 4


def test_patterns() -> None:
    from tierd_client.hf.refusals import check_pattern

    check_pattern(causal_mask_function, 1000)
    check_pattern(sliding_window_causal_mask_function(10), 10)
    for pattern in (
        sliding_window_causal_mask_function(9),
        or_masks(causal_mask_function, sliding_window_overlay(50)),
        and_masks(causal_mask_function, lambda batch, head, q, kv: q != kv + 1),
        lambda batch, head, q, kv: kv <= q,
    ):
        with pytest.raises(UnsupportedModel):
            check_pattern(pattern, 10)


@pytest.mark.parametrize(("arguments", "feature"), [
    ({"softcap": 30.0}, "soft-capping"),
    ({"s_aux": torch.zeros(4)}, "attention sinks"),
    ({"position_bias": torch.zeros(1)}, "position bias"),
    ({"sliding_window": 8}, "sliding window"),
    ({"output_attentions": True}, "output_attentions"),
    ({"cu_seq_lens_q": torch.zeros(2)}, "packed sequences"),
    ({"is_causal": False}, "bidirectional"),
    ({"temperature": torch.ones(1)}, "argument temperature"),
    ({"dropout": 0.1}, "dropout"),
])
def test_arguments_of_the_call(llama: PreTrainedModel, arguments: dict[str, Any], feature: str) -> None:
    cache, tensor = cached(llama), torch.zeros(1, 2, 1, 64)
    attend = AttentionInterface()["tierd"]
    key, value = cache.update(tensor, tensor.clone(), 0)
    with pytest.raises(UnsupportedModel, match=feature):
        attend(llama.model.layers[0].self_attn, torch.zeros(1, 4, 1, 64), key, value, None, scaling=0.1, **arguments)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # gpt2 keeps the argument from its attention
def test_output_attentions_of_a_model(name: str) -> None:
    model = build(name)
    model.set_attn_implementation("tierd")
    with pytest.raises(UnsupportedModel, match="output_attentions"):
        model(prompt(1, 4), past_key_values=cached(model), output_attentions=True)


def _rewrite(key: torch.Tensor) -> torch.Tensor:
    return key * 2


def _rewrite_in_place(key: torch.Tensor) -> torch.Tensor:
    return key.mul_(2)


@pytest.mark.parametrize("rewrite", [_rewrite, _rewrite_in_place])
def test_keys_rewritten_on_their_way(llama: PreTrainedModel, rewrite: Any) -> None:
    cache, tensor = cached(llama), torch.ones(1, 2, 1, 64)
    key, value = cache.update(tensor, tensor.clone(), 0)
    with pytest.raises(UnsupportedModel, match="keys rewritten"):
        AttentionInterface()["tierd"](llama.model.layers[0].self_attn, torch.ones(1, 4, 1, 64), rewrite(key), value, None)


def test_attention_that_is_not_over_the_cache(llama: PreTrainedModel) -> None:
    for options in ({"use_cache": False}, {"past_key_values": DynamicCache()}):
        with pytest.raises(UnsupportedModel, match="without a TierdCache"):
            llama(prompt(1, 4), **options)
    cache, tensor = cached(llama), torch.ones(1, 2, 1, 64)
    key, value = cache.update(tensor, tensor, 0)
    attend, query = AttentionInterface()["tierd"], torch.ones(1, 4, 1, 64)
    attend(llama.model.layers[0].self_attn, query, key, value, None)
    with pytest.raises(UnsupportedModel, match="layers share"):  # the same keys a second time
        attend(llama.model.layers[1].self_attn, query, key, value, None)


def test_a_model_left_on_another_implementation() -> None:
    model = build("llama")
    with pytest.raises(UnsupportedModel, match="'sdpa'"):
        model.generate(prompt(1, 4), past_key_values=cached(model), max_new_tokens=2)


def test_a_model_that_computes_attention_by_itself(llama: PreTrainedModel) -> None:
    cache, tensor = cached(llama), torch.ones(1, 2, 1, 64)
    cache.update(tensor, tensor, 0)
    with pytest.raises(UnsupportedModel, match="layer 0 never reached"):
        cache.update(tensor, tensor, 1)
    cache.update(tensor, tensor, 2)
    with pytest.raises(UnsupportedModel, match="layer 2 never reached"):
        cache.crop(-1)


def test_shapes_and_layers(llama: PreTrainedModel) -> None:
    cache, tensor = cached(llama), torch.ones(1, 2, 1, 64)
    with pytest.raises(UnsupportedModel, match="values of another shape"):
        cache.update(tensor, tensor[..., :32], 0)
    with pytest.raises(UnsupportedModel, match="extra layers"):
        cache.update(tensor, tensor, 3)
    attend, query = AttentionInterface()["tierd"], torch.ones(1, 4, 1, 64)
    attend(llama.model.layers[0].self_attn, query, *cache.update(tensor, tensor.clone(), 0), None, scaling=0.5)
    with pytest.raises(UnsupportedModel, match="layers of different shape"):
        attend(llama.model.layers[1].self_attn, query, *cache.update(tensor, tensor.clone(), 1), None, scaling=0.25)


def test_gradients_are_refused_and_inference_is_not() -> None:
    model = build("llama")
    model.set_attn_implementation("tierd")
    cache = cached(model)
    logits = model(prompt(1, 4), past_key_values=cache).logits
    with pytest.raises(UnsupportedModel, match="gradients"):
        logits.sum().backward()
    with torch.inference_mode():
        model(prompt(1, 4), past_key_values=cache)
    assert cache.get_seq_length() == 8


def test_another_batch_than_the_cached_one(llama: PreTrainedModel) -> None:
    cache = cached(llama)
    llama(prompt(2, 4), past_key_values=cache)
    with pytest.raises(InvalidArgument, match="3 rows and the cache 2"):
        llama(prompt(3, 1), past_key_values=cache)
    llama(prompt(2, 1), past_key_values=cache)
    for rows, error in ((torch.tensor([0, 2]), "do not exist"), (torch.tensor([], dtype=torch.long), "no row")):
        with pytest.raises(InvalidArgument, match=error):
            cache.batch_select_indices(rows)
    assert (cache.get_seq_length(), cache.batch_size) == (5, 2)
