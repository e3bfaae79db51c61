"""A forward that ends early never leaves layers of different length behind, and nothing is kept open."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_tier import FakeTier, Lost
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, left_padded, prompt
from tierd_client.errors import CapacityExceeded, DeadlineExceeded, InvalidArgument, SessionNotFound
from tierd_client.hf import IncompleteForward, TierdCache
from tierd_client.types import Tolerance

MODEL = build("llama").requires_grad_(False)
MODEL.set_attn_implementation("tierd")


def cached(tier: FakeTier, max_tokens: int = 64) -> TierdCache:
    return TierdCache(tier, MODEL.config, tolerance=Tolerance(rtol=0.0), max_tokens=max_tokens)


def lengths(tier: FakeTier) -> list[list[int]]:
    return sorted([session.length(layer=layer) for layer in range(3)] for session in tier.open)


def run(cache: TierdCache, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return MODEL(ids, attention_mask=mask, past_key_values=cache).logits


@settings(max_examples=40)
@given(
    method=st.sampled_from(["append", "step_many"]),
    number=st.integers(0, 5),
    error=st.sampled_from([Lost("x"), DeadlineExceeded("x"), KeyboardInterrupt(), CapacityExceeded("x")]),
    tokens=st.lists(st.integers(1, 4), min_size=3, max_size=4),
)
def test_a_failed_call_is_taken_back_and_the_forward_can_run_again(
    method: str, number: int, error: BaseException, tokens: list[int]
) -> None:
    ids, mask = left_padded([sum(tokens), sum(tokens) - 1])
    tier, calm = FakeTier(), FakeTier()
    tier.fail_at[method] = {number: error}
    cache, reference = cached(tier), cached(calm)
    failures, start = 0, 0
    for count in tokens:
        part = slice(start, start + count)
        expected = run(reference, ids[:, part], mask[:, : part.stop])
        try:
            actual = run(cache, ids[:, part], mask[:, : part.stop])
        except type(error):
            failures += 1
            assert cache.get_seq_length() == start
            actual = run(cache, ids[:, part], mask[:, : part.stop])
        assert torch.equal(actual, expected)
        assert lengths(tier) == lengths(calm)
        start = part.stop
    assert failures == (tier.calls[method] > number)
    cache.close()
    assert not tier.open


def test_an_answer_that_comes_after_the_deadline_writes_to_a_session_that_is_gone() -> None:
    tier = FakeTier()
    cache = cached(tier)
    MODEL(prompt(1, 5), past_key_values=cache)
    (session,) = tier.open
    tier.fail_at["step_many"] = {1: DeadlineExceeded("late")}
    with pytest.raises(DeadlineExceeded):
        MODEL(prompt(1, 1), past_key_values=cache)
    MODEL(prompt(1, 1), past_key_values=cache)
    with pytest.raises(SessionNotFound):
        session.append(layer=1, k=torch.zeros(2, 1, 64), v=torch.zeros(2, 1, 64))
    assert lengths(tier) == [[6, 6, 6]]


@pytest.mark.parametrize("first", [True, False])
def test_a_forward_that_stops_elsewhere_is_reported_once_and_taken_back(first: bool) -> None:
    tier = FakeTier()
    cache = cached(tier)
    seen = 0 if first else 6
    if not first:
        MODEL(prompt(2, 6), past_key_values=cache)

    def stop(*_: Any) -> None:
        raise MemoryError("of the model's own")

    hook = MODEL.model.layers[1].mlp.register_forward_hook(stop)
    with pytest.raises(MemoryError):
        MODEL(prompt(2, 3), past_key_values=cache)
    hook.remove()
    assert cache.get_seq_length() == seen
    with pytest.raises(IncompleteForward, match=f"2 of the 3 layers.*back at its {seen} positions"):
        MODEL(prompt(2, 3), past_key_values=cache)
    assert lengths(tier) == ([] if first else [[6] * 3] * 2)
    MODEL(prompt(2, 3), past_key_values=cache)
    assert lengths(tier) == [[seen + 3] * 3] * 2


@pytest.mark.parametrize(
    "change", [lambda c: c.crop(-1), lambda c: c.reorder_cache(torch.tensor([0])), lambda c: c.batch_repeat_interleave(2)]
)
def test_a_model_that_runs_fewer_layers_than_its_configuration_names(change: Any) -> None:
    tier = FakeTier()
    cache = cached(tier)
    MODEL(prompt(1, 4), past_key_values=cache)
    layers = MODEL.model.layers
    MODEL.model.layers = layers[:2]
    try:
        MODEL(prompt(1, 1), past_key_values=cache)
        with pytest.raises(IncompleteForward, match="2 of the 3 layers"):
            change(cache)
    finally:
        MODEL.model.layers = layers
    assert lengths(tier) == [[4, 4, 4]]


@pytest.mark.parametrize("error", [Lost("x"), DeadlineExceeded("x")])
def test_taking_back_can_itself_fail_and_is_made_up(error: BaseException) -> None:
    tier = FakeTier()
    cache = cached(tier)
    MODEL(prompt(2, 4), past_key_values=cache)
    tier.fail_at = {"step_many": {1: error}, "truncate": {1: error}}
    for _ in range(2):
        with pytest.raises(type(error)):
            MODEL(prompt(2, 1), past_key_values=cache)
        assert cache.get_seq_length() == 4
    old = set(tier.open)
    MODEL(prompt(2, 1), past_key_values=cache)
    assert lengths(tier) == [[5, 5, 5]] * 2
    assert not old & tier.open  # a truncate that was given up could still arrive, and cut what came later


def test_a_crop_that_fails_half_way_is_made_up() -> None:
    tier = FakeTier()
    cache = cached(tier)
    MODEL(prompt(3, 8), past_key_values=cache)
    tier.fail_at["truncate"] = {1: Lost("x")}
    with pytest.raises(Lost):
        cache.crop(-3)
    MODEL(prompt(3, 1), past_key_values=cache)
    assert lengths(tier) == [[6, 6, 6]] * 3


def test_the_limit_of_tokens() -> None:
    tier = FakeTier()
    cache = cached(tier, max_tokens=5)
    MODEL(prompt(1, 4), past_key_values=cache)
    with pytest.raises(InvalidArgument, match="max_tokens"):
        MODEL(prompt(1, 2), past_key_values=cache)
    MODEL(prompt(1, 1), past_key_values=cache)
    assert lengths(tier) == [[5, 5, 5]]


def test_sessions_open_all_or_none_and_forks_too() -> None:
    tier = FakeTier(max_sessions=3)
    cache = cached(tier)
    with pytest.raises(CapacityExceeded):
        MODEL(prompt(4, 4), past_key_values=cache)
    assert not tier.open
    MODEL(prompt(2, 4), past_key_values=cache)
    with pytest.raises(CapacityExceeded):
        cache.batch_repeat_interleave(2)
    assert (len(tier.open), cache.batch_size) == (2, 2)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([False, True]))
    assert (tier.calls["fork"], len(tier.open)) == (2, 1)  # one of the two was refused, and the other closed again


@given(parents=st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_beams_fork_no_more_than_they_must(parents: list[int]) -> None:
    tier = FakeTier()
    cache = cached(tier)
    MODEL(prompt(4, 3), past_key_values=cache)
    before = [session.keys[0] for session in cache._store.at_rest().sessions]
    cache.reorder_cache(torch.tensor(parents))
    after = [session.keys[0] for session in cache._store.at_rest().sessions]
    assert all(torch.equal(keys, before[parent]) for keys, parent in zip(after, parents, strict=True))
    assert tier.calls["fork"] == cache.summary().forks == len(parents) - len(set(parents))
    assert len(tier.open) == len(parents)
    cache.close()
    assert not tier.open


def test_release() -> None:
    tier = FakeTier()
    cache = cached(tier)
    assert not tier.open  # nothing before the first forward
    MODEL(prompt(2, 3), past_key_values=cache)
    cache.reset()
    assert (len(tier.open), cache.get_seq_length(), cache.batch_size) == (0, 0, -1)
    MODEL(prompt(3, 3), past_key_values=cache)
    cache.close()
    cache.close()
    assert not tier.open
    uses: list[Callable[[TierdCache], object]] = [
        TierdCache.reset, lambda c: c.crop(-1), lambda c: MODEL(prompt(3, 1), past_key_values=c), copy.deepcopy,
    ]
    for use in uses:
        with pytest.raises(InvalidArgument, match="closed"):
            use(cache)
