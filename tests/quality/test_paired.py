"""Paired statistics against counting by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paired import compare, mcnemar, mean_interval, perplexity_delta

scores = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=30)


@given(st.integers(0, 9), st.integers(0, 9))
def test_mcnemar_counts_the_assignments_of_discordant_pairs_that_are_as_uneven(first: int, second: int) -> None:
    n = first + second
    as_uneven = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(first - second))
    assert mcnemar(first, second) == pytest.approx(as_uneven / 2**n, abs=1e-12)


@given(scores)
def test_a_comparison_is_what_counting_gives(pairs: list[tuple[float, float]]) -> None:
    dense, variant = zip(*pairs, strict=True)
    found = compare(dense, variant)
    assert found.critical_failures == sum(d == 1.0 and v < 1.0 for d, v in pairs)
    assert found.only_variant_right == sum(v == 1.0 and d < 1.0 for d, v in pairs)
    assert found.delta == pytest.approx(found.variant_score - found.dense_score)
    assert found.delta_low - 1e-12 <= found.delta <= found.delta_high + 1e-12
    same = compare(dense, dense)
    assert (same.delta_low, same.delta_high, same.mcnemar_p, same.critical_failures) == (0.0, 0.0, 1.0, 0)


def test_an_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    covered = sum(low <= 0.0 <= high for low, high in (mean_interval(rng.standard_normal(60), seed) for seed in range(100)))
    assert 86 <= covered <= 100  # 95 expected; the percentile interval of 60 numbers covers a little less


def test_more_than_one_window_decides_a_perplexity() -> None:
    tokens = np.array([100.0, 300.0])
    dense, variant = np.array([100.0, 600.0]), np.array([110.0, 600.0])
    found = perplexity_delta(dense, variant, tokens)
    assert found["delta"] == pytest.approx(math.exp(710 / 400) - math.exp(700 / 400))
    assert found["delta_low"] == pytest.approx(0.0) and found["delta_high"] == pytest.approx(math.exp(1.1) - math.e)
    assert perplexity_delta(dense, dense, tokens)["delta_high"] == 0.0


@pytest.mark.parametrize(("dense", "variant"), [([], []), ([1.0], [1.0, 0.0])])
def test_examples_that_cannot_be_paired_are_refused(dense: list[float], variant: list[float]) -> None:
    with pytest.raises(ValueError, match="at least"):
        compare(dense, variant)
    with pytest.raises(ValueError, match="at least"):
        perplexity_delta(dense, variant, variant)
