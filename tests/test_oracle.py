"""The oracle against attention written out with fractions and `math.fsum`, and every way in which a reply can lie."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests import oracle

SCALE = 0.25
Raw = NDArray[Any]


def case(seed: int, dtype: str = "float16", tokens: int = 21, n: int = 3) -> tuple[Raw, Raw, Raw]:
    """K, V [2, tokens, 8] and q [4, n, 8] of the type."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Raw:
        numbers = rng.standard_normal(shape).astype(np.float32)
        if dtype == "bfloat16":
            return (numbers.view(np.uint32) >> 16).astype(np.uint16)
        return numbers.astype(dtype)

    return draw(2, tokens, 8), draw(2, tokens, 8), draw(4, n, 8)


def honest(seed: int = 0, rtol: float = 0.05) -> tuple[Raw, Raw, Raw, Raw, dict[str, Raw]]:
    """A reply that keeps the promise: K, V, q, output, certificate."""
    k, v, q = case(seed)
    truth = oracle.attention(k, v, q, SCALE)
    output = truth.output.astype(np.float16)
    error = np.sqrt(((output.astype(np.longdouble) - truth.output) ** 2).sum(axis=2)).astype(np.float64)
    certificate: dict[str, Raw] = {
        "bound": error * 1.01 + 1e-12,
        "budget": rtol * truth.value_norm,
        "exact": np.zeros(q.shape[:2], bool),
        "paper_key_bound": np.full(q.shape[:2], np.nan),
        "rung": np.zeros(q.shape[:2], np.int64),
    }
    return k, v, q, output, certificate


@given(st.integers(0, 2**32 - 1), st.sampled_from(["float16", "bfloat16", "float32"]), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_attention_is_the_textbook_formula(seed: int, dtype: str, n: int) -> None:
    k, v, q = case(seed, dtype, tokens=9, n=n)
    truth = oracle.attention(k, v, q, SCALE)
    keys, values, queries = (oracle.exact_numbers(x).astype(float) for x in (k, v, q))
    for head in range(4):
        for j in range(n):
            seen = 9 - n + 1 + j
            scores = [SCALE * math.fsum(queries[head, j] * keys[head // 2, t]) for t in range(seen)]
            weights = [math.exp(s - max(scores)) for s in scores]
            for c in range(8):
                expected = math.fsum(w * values[head // 2, t, c] for t, w in enumerate(weights)) / math.fsum(weights)
                assert abs(float(truth.output[head, j, c]) - expected) <= 1e-13
            norms = [math.sqrt(math.fsum(values[head // 2, t] ** 2)) for t in range(seen)]
            mean = math.fsum(w * x for w, x in zip(weights, norms, strict=True)) / math.fsum(weights)
            assert truth.value_norm[head, j] == pytest.approx(mean, rel=1e-12)
    assert (truth.noise < 1e-15).all()


def test_later_tokens_are_not_seen() -> None:
    k, v, q = case(1)
    before = oracle.attention(k, v, q, SCALE).output
    k[:, -1], v[:, -1] = 7, 9
    after = oracle.attention(k, v, q, SCALE).output
    assert (before[:, :-1] == after[:, :-1]).all() and (before[:, -1] != after[:, -1]).any()


def test_huge_scores_do_not_overflow() -> None:
    k, v, q = case(2, "float32")
    truth = oracle.attention(k * np.float32(1e15), v, q * np.float32(1e15), SCALE)
    assert np.isfinite(truth.output).all()


def test_an_honest_reply_passes() -> None:
    for seed in range(5):
        k, v, q, output, certificate = honest(seed)
        oracle.check_reply(k, v, q, output, certificate, 0.05, 0.0, softmax_scale=SCALE, score_error=0.0)


def test_an_exact_head_may_exceed_its_budget() -> None:
    k, v, q, output, certificate = honest()
    certificate["budget"][:] = 0.0
    certificate["exact"][:] = True
    oracle.check_reply(k, v, q, output, certificate, 0.0, 0.0, softmax_scale=SCALE)


def lie(output: Raw, certificate: dict[str, Raw], what: str) -> None:
    if what == "low bound":
        certificate["bound"][1, 2] *= 0.9
    elif what == "over budget":
        certificate["bound"][0, 0] = certificate["budget"][0, 0] * 1.001
    elif what == "NaN bound":
        certificate["bound"][3, 1] = np.nan
    elif what == "infinite bound":
        certificate["bound"][3, 1] = np.inf
        certificate["exact"][3, 1] = True
    elif what == "NaN output":
        output[0, 0, 0] = np.nan
    elif what == "wrong output":
        output[2, 1, 3] += np.float16(0.01)
    elif what == "large budget":
        certificate["budget"][2, 0] *= 1.002
    else:
        del certificate["exact"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("low bound", "below the true error"),
        ("over budget", "not exact"),
        ("NaN bound", "bound is NaN"),
        ("infinite bound", "bound is infinite"),
        ("NaN output", "not finite"),
        ("wrong output", "below the true error"),
        ("large budget", "budget is above"),
        ("no field", "no exact"),
    ],
)
def test_every_lie_is_caught(what: str, message: str) -> None:
    k, v, q, output, certificate = honest()
    lie(output, certificate, what)
    with pytest.raises(AssertionError, match=message):
        oracle.check_reply(k, v, q, output, certificate, 0.05, 0.0, softmax_scale=SCALE, score_error=0.0)


def test_budgets_relative_to_the_output_use_the_returned_output() -> None:
    k, v, q, output, certificate = honest()
    certificate["budget"] = 0.05 * np.linalg.norm(output.astype(np.float64), axis=2) + 0.001
    oracle.check_reply(k, v, q, output, certificate, 0.05, 0.001, "output", softmax_scale=SCALE)
    certificate["budget"][1, 1] *= 1.01
    with pytest.raises(AssertionError, match="budget is above"):
        oracle.check_reply(k, v, q, output, certificate, 0.05, 0.001, "output", softmax_scale=SCALE)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["float16", "bfloat16", "float32"]), st.floats(-3, 3))
@settings(max_examples=25, deadline=None)
def test_int8_score_error_covers_a_plain_int8_rounding(seed: int, dtype: str, offset: float) -> None:
    k, _, q = case(seed, dtype, tokens=32)
    if dtype != "bfloat16":
        k = (k + offset).astype(k.dtype)
    keys = oracle.exact_numbers(k).astype(float)
    blocks = keys.reshape(2, 2, 16, 8)
    middle = (0.5 * (blocks.max(axis=2) + blocks.min(axis=2))).astype(np.float16).astype(float)[:, :, None]
    step = np.maximum(np.abs(blocks - middle).max(axis=2, keepdims=True) / 127.0 * (1 + 2.0**-10), 2.0**-14)
    step = step.astype(np.float16).astype(float)
    rounded = (np.rint((blocks - middle) / step) * step + middle).reshape(2, 32, 8)
    moved = np.einsum("hnd,htd->hnt", oracle.exact_numbers(q).astype(float), np.repeat(rounded - keys, 2, axis=0))
    assert (np.abs(moved).max(axis=2) * SCALE <= oracle.int8_score_error(k, q, SCALE)).all()


def test_a_reference_missing_skipped_tokens_may_be_larger_but_not_above_the_largest_norm() -> None:
    truth = oracle.attention(*case(4), SCALE)
    none = np.zeros((4, 3))
    assert (oracle.reference_ceiling(truth, none, none) == truth.value_norm).all()
    assert (oracle.reference_ceiling(truth, none, none + 0.1) > truth.value_norm).all()
    assert (oracle.reference_ceiling(truth, none + 50.0, none) == truth.value_norm_max).all()
