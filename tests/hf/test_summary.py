"""What `summary` adds up."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from fake_tier import FakeTier, exact_certificate
from hypothesis import given
from models import build, left_padded
from tierd_client.hf import TierdCache
from tierd_client.hf.summary import Tally
from tierd_client.types import Tolerance


def test_sums_over_answers() -> None:
    tally = Tally(num_layers=2, num_q_heads=2)
    certificate = dataclasses.replace(
        exact_certificate(2, 3),
        bound=np.array([[1.0, 2.0, 3.0], [0.0, 4.0, 0.0]]),
        budget=np.array([[2.0, 2.0, 2.0], [1.0, 1.0, 1.0]]),
        exact=np.array([[False, False, True], [True, False, True]]),
        rung=np.array([[0, 2, 3], [3, 1, 4]]),
        host_bytes=np.array([[1, 2, 3], [4, 5, 6]]),
    )
    tally.add(1, certificate)
    tally.add(1, certificate)
    summary = tally.summary(forks=7)
    assert summary.answers.tolist() == [[0, 0], [6, 6]]
    assert summary.bound_max[1].tolist() == [3.0, 4.0] and np.isnan(summary.bound_max[0]).all()
    assert np.isnan(summary.bound_mean[0]).all() and np.allclose(summary.bound_mean[1], [2.0, 4 / 3])
    assert summary.budget_mean[1].tolist() == [2.0, 1.0]
    assert summary.over_budget.tolist() == [[0, 0], [0, 2]]
    assert np.allclose(summary.exact_share[1], [1 / 3, 2 / 3])
    assert summary.rungs[1].tolist() == [[2, 0, 2, 2, 0], [0, 2, 0, 2, 2]]
    assert summary.host_bytes[1].tolist() == [12, 30]
    assert summary.forks == 7
    assert str(summary).splitlines()[2].split() == ["1", "12", "1.67", "4", "1.5", "50.0%", "2", "2", "2", "4", "2"]


def test_of_a_cache() -> None:
    model = build("llama").requires_grad_(False)
    model.set_attn_implementation("tierd")
    ids, mask = left_padded([6, 4])
    with TierdCache(FakeTier(), model.config, tolerance=Tolerance(rtol=0.0), max_tokens=32) as cache:
        assert cache.summary().answers.shape == (3, 0)
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, num_beams=2, do_sample=False)
    summary = cache.summary()
    assert (summary.answers == 4 * 4).all()  # four rows, four tokens after the first, which the prefill answers
    assert (summary.exact_share == 1.0).all() and not summary.over_budget.any()
    assert summary.rungs[..., 4].sum() == summary.answers.sum()


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 5)), max_size=20), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_certificates_are_summed_up_together_as_one_by_one(answered: list[tuple[int, int]], together: int, seed: int) -> None:
    """Layer and tokens of each answer; a summary in between changes nothing."""
    rng, number = np.random.default_rng(seed), len(answered)
    drawn = [
        dataclasses.replace(
            exact_certificate(2, n), bound=rng.random((2, n)), budget=rng.random((2, n)), exact=rng.random((2, n)) < 0.3,
            rung=rng.integers(0, 5, (2, n)), promoted_key_blocks=rng.integers(0, 9, (2, n)), host_bytes=rng.integers(0, 99, (2, n)),
        )
        for _, n in answered
    ]  # fmt: skip
    found = []
    for size in (1, together):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tierd_client.hf.summary.TOGETHER", size)
            tally = Tally(num_layers=2, num_q_heads=2)
            for i, ((layer, _), certificate) in enumerate(zip(answered, drawn, strict=True)):
                if i == number // 2:
                    tally.summary(forks=0)
                tally.add(layer, certificate)
                assert all(sum(each.bound.shape[1] for each in waiting) < size for waiting in tally._waiting)
            found.append(tally.summary(forks=0))
    for field in dataclasses.fields(found[0]):
        assert np.allclose(*(getattr(summary, field.name) for summary in found), equal_nan=True), field.name
    assert found[1].answers.sum() == 2 * sum(n for _, n in answered)
