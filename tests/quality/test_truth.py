"""The float64 oracle against the 80-bit one of the tests, and that it catches what is wrong with a certificate."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
import truth
from hypothesis import given, settings
from hypothesis import strategies as st
from tierd_client import Tier, Tolerance
from truth import Verdict, exact_attention, judge
from variants import connection, softmax_scale
from watched import Answer, WatchedCache

SCALE = 0.3


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(0, 20), st.sampled_from([torch.float32, torch.float16]), st.booleans())
def test_exact_attention_is_that_of_the_longer_arithmetic(seed: int, n: int, before: int, dtype: torch.dtype, sliced: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = (6, n, 8), (2, n + before, 8), (2, n + before, 8)
    q, k, v = (torch.randn(shape, generator=generator).mul_(3).to(dtype) for shape in shapes)
    with pytest.MonkeyPatch.context() as patch:
        if sliced:
            patch.setattr(truth, "ROWS_AT_ONCE", 1)
        found = exact_attention(q, k, v, SCALE)
    expected = oracle.attention(k.numpy(), v.numpy(), q.numpy(), SCALE)
    error = np.linalg.norm((found.output.numpy() - expected.output).astype(float), axis=2)
    assert (error <= found.noise.numpy()).all() and (found.noise < 1e-10).all()
    np.testing.assert_allclose(found.value_norm.numpy(), expected.value_norm, rtol=1e-12)


@pytest.mark.parametrize(("q", "k"), [((3, 1, 8), (2, 4, 8)), ((4, 5, 8), (2, 4, 8)), ((4, 1, 8), (2, 4, 4))])
def test_shapes_that_do_not_fit_are_named(q: tuple[int, ...], k: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="q is \\[heads, n, d\\]"):
        exact_attention(torch.zeros(q), torch.zeros(k), torch.zeros(k), 1.0)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.build().requires_grad_(False)


@pytest.fixture(scope="module")
def tier(model: Any) -> Iterator[Tier]:
    with connection(model, 512) as tier:
        yield tier


@pytest.fixture(scope="module")
def answers(model: Any, tier: Tier) -> list[Answer]:
    """Of two forwards over a filled cache, the second of one token."""
    found: list[Answer] = []
    model.set_attn_implementation("tierd")
    ids = tiny.ids(130)
    with torch.no_grad(), WatchedCache(tier, model.config, found.append, tolerance=Tolerance(rtol=0.1), max_tokens=256) as cache:
        for start, stop in ((0, 64), (64, 129), (129, 130)):
            model(ids[:, start:stop], past_key_values=cache)
        assert torch.equal(cache.keys[1], found[-1].k) and cache.values[0].shape == (2, 130, 64)
    return found


def verdict(model: Any, answer: Answer, rtol: float = 0.1, output: torch.Tensor | None = None, **changed: Any) -> Verdict:
    certificate = dataclasses.replace(answer.certificate, **changed)
    output = answer.output if output is None else output
    return judge(answer.q, answer.k, answer.v, softmax_scale(model), output, certificate, rtol)[0]


def test_honest_answers_pass_and_every_head_step_is_counted(model: Any, answers: list[Answer]) -> None:
    total = Verdict()
    for answer in answers:
        total.add(verdict(model, answer))
    assert total.head_steps == 2 * 4 * (65 + 1)
    assert (total.violations, total.broken, total.loose_budgets) == (0, 0, 0)
    assert 0.0 < total.worst <= 1.0


def test_a_halved_bound_is_a_violation_where_the_error_is_above_the_half(model: Any, answers: list[Answer]) -> None:
    caught = 0
    for answer in answers:
        _, error = judge(answer.q, answer.k, answer.v, softmax_scale(model), answer.output, answer.certificate, 0.1)
        expected = int((error > 0.5 * answer.certificate.bound + 1e-12).sum())
        assert verdict(model, answer, bound=0.5 * answer.certificate.bound).violations == expected
        below = np.where(np.arange(error.shape[1]) == 0, 0.5 * error, answer.certificate.bound)
        assert verdict(model, answer, bound=below).violations == len(error)
        caught += expected
    assert caught > 0, "no bound of these answers is within twice the error: the test shows nothing"


def test_every_other_lie_is_counted_too(model: Any, answers: list[Answer]) -> None:
    answer = answers[-1]
    everything = answer.certificate.bound.size
    assert verdict(model, answer, bound=np.full_like(answer.certificate.bound, np.nan)).violations == everything
    assert verdict(model, answer, output=answer.output + 1.0).violations == everything
    assert verdict(model, answer, output=answer.output * torch.nan).violations == everything
    assert verdict(model, answer, budget=0.5 * answer.certificate.bound, exact=np.zeros_like(answer.certificate.exact)).broken == everything
    assert verdict(model, answer, budget=2.0 * answer.certificate.budget, rtol=0.1).loose_budgets == everything


def test_more_than_one_sequence_is_refused(model: Any, tier: Tier) -> None:
    model.set_attn_implementation("tierd")
    with (
        WatchedCache(tier, model.config, print, tolerance=Tolerance(rtol=0.1), max_tokens=64) as cache,
        pytest.raises(ValueError, match="one sequence can be watched"),
    ):
        model(tiny.ids(4, rows=2), past_key_values=cache)


def test_a_forward_that_takes_several_messages_is_watched_token_by_token(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierd_client.hf.answer._tokens_at_once", lambda tier, steps: 7)
    found: list[Answer] = []
    model.set_attn_implementation("tierd")
    terms = {"tolerance": Tolerance(rtol=0.05), "max_tokens": 64}
    with connection(model, 128) as tier, WatchedCache(tier, model.config, found.append, **terms) as cache:
        model(tiny.ids(20), past_key_values=cache)
        model(tiny.ids(20, seed=2), past_key_values=cache)
    assert [answer.k.shape[1] for answer in found] == [27, 34, 40] * 2
    assert sum(verdict(model, answer, rtol=0.05).violations for answer in found) == 0
