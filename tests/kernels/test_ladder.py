"""The ladder keeps the promise: every reply is held against an oracle that sees only K, V, q and the reply."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernels_cache import Cache, raw, store
from numpy.typing import NDArray
from oracle import check_reply, exact_numbers
from tierd_kernels import ladder
from tierd_kernels.errors import ScoreOverflow
from tierd_kernels.in_scratch import InScratch
from tierd_kernels.layout import BLOCK_SIZES, HEAD_DIMS, VALUE_GROUPS, Layout
from tierd_kernels.policy import Budget, Coverage, Policy
from tierd_kernels.reads import exact_heads

REGIMES = ("random", "sharp", "sink", "outliers", "constant", "ties", "tiny", "huge", "mixed", "offset")


def draw(regime: str, heads: int, group: int, tokens: int, n: int, d: int, dtype: str, seed: int) -> tuple[NDArray[Any], ...]:
    """Raw K, V [heads, tokens, d] and q [heads * group, n, d] of one regime."""
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, heads, tokens, d))
    q = rng.standard_normal((heads * group, n, d))
    if regime == "sharp":
        q *= 6.0
    elif regime == "sink":
        k[:, 0] = 4.0 * q[::group, 0]
        v[:, 0] *= 1e-2
    elif regime == "outliers":
        v[..., ::17] *= 300.0
        k[..., 3] *= 50.0
    elif regime == "constant":
        k[..., ::2], v[..., ::3] = 1.7, -0.3
    elif regime == "ties":
        k[:] = k[:, :1]
    elif regime == "tiny":
        k, v, q = k * 1e-12, v * 1e-18, q * 1e-12
    elif regime == "huge":
        k, v, q = k * 1e15, v * 1e30, q * 1e15
    elif regime == "mixed":
        v *= 10.0 ** rng.uniform(-6, 3, v.shape)
        k *= 10.0 ** rng.uniform(-3, 1, k.shape)
    elif regime == "offset":
        k += 40.0
        v += 9.0
    return raw(k, dtype), raw(v, dtype), raw(q, dtype)


def answer(cache: Cache, q: NDArray[Any], rtol: float, policy: Policy, **more: Any) -> ladder.Result:
    result = ladder.attend(cache.layout, cache.memory, [cache.call(q, rtol, policy, **more)], len(q))[0]
    if isinstance(result, Exception):
        raise result
    return result


@given(
    regime=st.sampled_from(REGIMES),
    dtype=st.sampled_from(("float16", "bfloat16", "float32")),
    d=st.sampled_from(HEAD_DIMS),
    block_size=st.sampled_from(BLOCK_SIZES),
    value_group=st.sampled_from(VALUE_GROUPS),
    heads=st.integers(1, 3),
    group=st.integers(1, 4),
    tokens=st.integers(1, 1400),
    n=st.integers(1, 5),
    rtol=st.sampled_from((0.0, 1e-3, 0.02, 0.1, 0.5)),
    relative_to=st.sampled_from(("values", "output")),
    policy=st.sampled_from((Budget(), Budget(skip_share=0.0), Budget(skip_share=0.5, require_rank=True), Coverage())),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_every_reply_is_certified_or_exact(
    regime: str, dtype: str, d: int, block_size: int, value_group: int, heads: int, group: int, tokens: int, n: int,
    rtol: float, relative_to: str, policy: Policy, seed: int,
) -> None:  # fmt: skip
    n = min(n, tokens)
    k, v, q = draw(regime, heads, group, tokens, n, d, dtype, seed)
    cache = store(Layout(heads, d, block_size, value_group, dtype), k, v)
    result = answer(cache, q, rtol, policy, relative_to=relative_to, canary_blocks=np.arange(len(cache.hot))[::7])
    check_reply(
        k, v, q, result.output, result.certificate, rtol, 0.0, relative_to, softmax_scale=d**-0.5, block_size=block_size
    )
    assert not result.canary_failures
    if rtol == 0.0:
        assert result.certificate["exact"].all()
    exact, rung = result.certificate["exact"], result.certificate["rung"]
    np.testing.assert_array_equal(rung >= 3, exact)
    np.testing.assert_array_equal((rung == 4).any(axis=0), exact.all(axis=0))


@pytest.mark.parametrize("seed", range(8))
def test_products_that_underflow_are_in_the_bound(seed: int) -> None:
    """Values so small that weight * value is subnormal in FP32: the error is no longer relative to anything."""
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, 1, 15, 64))
    k, v, q = raw(k, "float32"), raw(v * 10.0 ** -(40 + seed % 3), "float32"), raw(rng.standard_normal((1, 1, 64)), "float32")
    result = answer(store(Layout(1, 64, 16, 16, "float32"), k, v), q, 0.1, Budget())
    check_reply(k, v, q, result.output, result.certificate, 0.1, 0.0, softmax_scale=0.125)
    assert not result.certificate["exact"].any()


@pytest.mark.parametrize("gap", [460, 600, 700])
def test_what_rounds_to_nothing_is_in_an_exact_bound(gap: int) -> None:
    """An output that no type holds, and whose square no double does: the token with a value weighs e^-gap."""
    k, v, q = np.zeros((1, 2, 64), np.float32), np.zeros((1, 2, 64), np.float32), np.zeros((1, 1, 64), np.float32)
    k[0, 0, 0], v[0, 1, 0], q[0, 0, 0] = gap, 1.0, 1.0
    result = answer(store(Layout(1, 64, 16, 16, "float32"), k, v), q, 0.0, Budget(), softmax_scale=1.0)
    assert result.certificate["exact"].all()
    assert float(result.certificate["bound"][0, 0]) >= np.exp(-float(gap)) / 2
    check_reply(k, v, q, result.output, result.certificate, 0.0, 0.0, softmax_scale=1.0)


@pytest.mark.parametrize("exponent", range(-10, 20, 3))
def test_a_tolerance_that_is_hardly_a_double_is_not_exceeded(exponent: int) -> None:
    """Counted in the values' unit it may be less than one, and be rounded up."""
    k, v, q = draw("random", 1, 1, 20, 1, 64, "float32", 3)
    cache = store(Layout(1, 64, 16, 16, "float32"), k, v * np.float32(10.0**exponent))
    for atol in (1e-310, 2e-312, 3e-324, 1e-300):
        assert (answer(cache, q, 0.0, Budget(), atol=atol).certificate["budget"] <= atol).all()


def test_a_chunk_of_queries_is_answered_as_its_tokens_are() -> None:
    k, v, q = draw("random", 2, 2, 300, 130, 64, "float32", 5)
    cache = store(Layout(2, 64, 16, 16, "float32"), k, v)
    result = answer(cache, q, 0.1, Budget())
    check_reply(k, v, q, result.output, result.certificate, 0.1, 0.0, softmax_scale=64**-0.5)
    assert result.output.shape == (4, 130, 64)


@pytest.mark.parametrize("rtol", [0.05, 0.07])
def test_a_chunk_of_queries_reads_what_its_runs_do(rtol: float) -> None:
    """Runs of 64 queries are answered one after the other; the first sees two blocks less, and some heads have exact rows."""
    k, v, q = draw("random", 2, 2, 672, 96, 64, "float32", 5)
    k[0, :16], q[0, 3] = 1e3 * k[0, :16], 1e3 * q[0, 3]  # of the first run, a row of the first head
    cache = store(Layout(2, 64, 16, 16, "float32"), k, v)
    (whole,) = ladder.attend(cache.layout, cache.memory, [cache.call(q, rtol, Budget())], 4)
    runs = []
    for tokens, rows in ((640, slice(64)), (672, slice(64, 96))):
        call = cache.call(q[:, rows], rtol, Budget())
        call.num_tokens, call.hot_offsets, call.original_offsets = tokens, cache.hot[: tokens // 16], cache.originals[: tokens // 16]
        runs += ladder.attend(cache.layout, cache.memory, [call], 4)
    assert isinstance(whole, ladder.Result) and all(isinstance(run, ladder.Result) for run in runs)
    exact = exact_heads(whole.certificate["exact"].astype(bool), 2)
    assert exact.tolist() == [True, False]
    expected = {tuple(record) for run in runs for record in run.reads.records.T.tolist()}  # type: ignore[union-attr]
    expected |= {(kind, block, 0) for kind in (0, 1) for block in range(42)}
    assert [tuple(record) for record in whole.reads.records.T.tolist()] == sorted(expected) and len(expected) > 84
    assert whole.reads.from_host.all()
    shares = np.maximum.reduce([run.candidates().shares(42) for run in runs])  # type: ignore[union-attr]
    assert np.array_equal(whole.candidates().shares(42), shares) and shares[:, 40:].any()


def test_loose_tolerance_stays_on_rung_zero_and_skips() -> None:
    k, v, q = draw("sharp", 2, 4, 2048, 1, 128, "float16", 1)
    cache = store(Layout(2, 128, 16, 16, "float16"), k, v)
    certificate = answer(cache, q, 1.5, Budget(skip_share=0.3)).certificate
    assert (certificate["rung"] == 0).any()
    assert (certificate["skipped_blocks"] > 0).any()


def test_promotions_are_fewer_than_all_blocks() -> None:
    k, v, q = draw("random", 2, 4, 4096, 1, 64, "float32", 2)
    cache = store(Layout(2, 64, 16, 16, "float32"), k, v)
    certificate = answer(cache, q, 0.03, Budget()).certificate
    climbed = (certificate["rung"] == 1) | (certificate["rung"] == 2)
    assert climbed.any()
    assert (certificate["promoted_key_blocks"] + certificate["promoted_value_blocks"])[climbed].max() < 2 * len(cache.hot)


def test_originals_are_found_at_their_own_places() -> None:
    k, v, q = draw("random", 2, 2, 700, 1, 64, "float16", 3)
    cache = store(Layout(2, 64, 16, 16, "float16"), k, v)
    policy, canaries = Coverage(tau_cov=0.9, v_tol=0.0), np.arange(len(cache.hot))
    told, itself = (cache.call(q, 1e-3, policy, atol=10.0, canary_blocks=canaries) for _ in range(2))
    told.in_scratch = InScratch.of(~cache.layout.own_locations(cache.originals[: len(cache.hot)]))
    memory = cache.memory._replace(scratch=cache.memory.originals.copy())
    first, second = (ladder.attend(cache.layout, memory, [call], len(q))[0] for call in (told, itself))
    assert isinstance(first, ladder.Result) and isinstance(second, ladder.Result)
    assert not first.canary_failures and not second.canary_failures
    assert {*first.reads.records[0]} == {0, 1} and not first.certificate["exact"].all()
    np.testing.assert_array_equal(first.output, second.output)
    certified = ~first.certificate["exact"]
    assert not first.certificate["host_bytes"][certified].any() and second.certificate["host_bytes"][certified].all()


def test_what_is_at_hand_is_promoted_before_what_is_not() -> None:
    k, v, q = draw("random", 2, 4, 1500, 2, 64, "float16", 3)
    cache = store(Layout(2, 64, 16, 16, "float16"), k, v)
    memory = cache.memory._replace(scratch=cache.memory.originals.copy())
    call, found = cache.call(q, 0.03, Budget()), {}
    locations = cache.layout.own_locations(cache.originals[: len(cache.hot)])
    locations[0, ::2], locations[1, 1::2] = ~locations[0, ::2], ~locations[1, 1::2]
    call.in_scratch = InScratch.of(locations)
    for call.preference in (1, 4):
        (result,) = ladder.attend(cache.layout, memory, [call], len(q))
        assert isinstance(result, ladder.Result) and not result.certificate["exact"].any()
        check_reply(k, v, q, result.output, result.certificate, 0.03, 0.0, softmax_scale=call.softmax_scale, block_size=16)
        found[call.preference] = result
    plain, preferring = found.values()
    assert preferring.reads.from_host.sum() < 0.75 * plain.reads.from_host.sum()
    assert preferring.certificate["host_bytes"].sum() < 0.75 * plain.certificate["host_bytes"].sum()
    read = [{tuple(x) for x in result.reads.records.T.tolist()} for result in (plain, preferring)]
    near = {tuple(x) for x, far in zip(plain.reads.records.T.tolist(), plain.reads.from_host, strict=True) if not far}
    assert near < read[1], "of what is at hand nothing is left out for it"
    call.in_scratch = None
    (result,) = ladder.attend(cache.layout, memory, [call], len(q))
    assert isinstance(result, ladder.Result)
    assert np.array_equal(result.reads.records, plain.reads.records), "where there is none it changes nothing"


def test_a_corrupt_scratch_copy_changes_the_answer() -> None:
    k, v, q = draw("random", 1, 1, 512, 1, 64, "float32", 3)
    cache = store(Layout(1, 64, 16, 16, "float32"), k, v)
    size = cache.layout.original_record_bytes
    scratch = np.empty(2 * len(cache.hot) * size, np.uint8)
    call = cache.call(q, 1e-3, Coverage(tau_cov=1.0, v_tol=0.0), atol=10.0)
    for i, at in enumerate(~np.concatenate(call.locations(cache.layout))[:, 0]):
        scratch[i * size : (i + 1) * size] = cache.memory.originals[at : at + size]
    memory = cache.memory._replace(scratch=scratch)
    call.in_scratch = InScratch.of(np.arange(2 * len(cache.hot)).reshape(2, -1, 1) * size)
    direct = answer(cache, q, 1e-3, Coverage(tau_cov=1.0, v_tol=0.0), atol=10.0)
    cached = ladder.attend(cache.layout, memory, [call], 1)[0]
    assert isinstance(cached, ladder.Result)
    assert cached.certificate["rung"].item() == 2
    np.testing.assert_array_equal(cached.output, direct.output)
    assert cached.certificate["host_bytes"].item() == 0 < direct.certificate["host_bytes"].item()
    scratch[len(cache.hot) * size :].view(np.float32)[:] += 1.0
    spoiled = ladder.attend(cache.layout, memory, [call], 1)[0]
    assert isinstance(spoiled, ladder.Result)
    assert np.abs(spoiled.output - direct.output).max() > 0.5


@pytest.mark.parametrize("field", ["codes", "originals"])
def test_the_canary_sees_corruption(field: str) -> None:
    k, v, q = draw("random", 2, 2, 256, 1, 64, "float32", 4)
    cache = store(Layout(2, 64, 16, 16, "float32"), k, v)
    if field == "codes":
        cache.memory.hot[cache.hot[3] : cache.hot[3] + 16 * 64] ^= 0x55
    else:
        at = cache.originals[3]
        cache.memory.originals[at : at + cache.layout.original_record_bytes].view(np.float32)[:] *= -3.0
    result = answer(cache, q, 10.0, Budget(), canary_blocks=np.array([2, 3]))
    assert result.canary_failures == [(3, 0)]


def test_the_same_call_gives_the_same_bits() -> None:
    k, v, q = draw("random", 2, 2, 700, 2, 80, "bfloat16", 6)
    cache = store(Layout(2, 80, 32, 32, "bfloat16"), k, v)
    first, second = (answer(cache, q, 0.03, Budget()) for _ in range(2))
    np.testing.assert_array_equal(first.output, second.output)
    for name, values in first.certificate.items():
        np.testing.assert_array_equal(values, second.certificate[name])


def test_a_score_that_cannot_be_answered_is_refused() -> None:
    k, v, q = (raw(np.full(shape, 1e20), "float32") for shape in ((1, 20, 64), (1, 20, 64), (1, 1, 64)))
    cache = store(Layout(1, 64, 16, 16, "float32"), k, v)
    with pytest.raises(ScoreOverflow, match="above 3e\\+38"):
        answer(cache, q, 0.1, Budget())


def test_blocks_that_stay_original_are_certified_too() -> None:
    k, v, q = draw("random", 1, 2, 200, 1, 64, "float32", 8)
    v[:, 32:48] *= 1e8  # no FP16 scale fits this block
    k[:, 32:48] += 0.5
    cache = store(Layout(1, 64, 16, 16, "float32"), k, v)
    result = answer(cache, q, 0.2, Budget())
    check_reply(k, v, q, result.output, result.certificate, 0.2, 0.0, softmax_scale=64**-0.5)
    assert not result.certificate["exact"].any()


def test_bad_shapes_are_refused() -> None:
    k, v, _ = draw("random", 2, 2, 40, 1, 64, "float32", 0)
    cache = store(Layout(2, 64, 16, 16, "float32"), k, v)
    with pytest.raises(ValueError, match="expected"):
        answer(cache, np.zeros((4, 41, 64), np.float32), 0.1, Budget())


EXPONENTS = st.sampled_from((-45, -30, -10, -3, 0, 0, 3, 12, 25, 38))


@given(
    dtype=st.sampled_from(("float32", "bfloat16", "float16")), tokens=st.integers(1, 120), n=st.integers(1, 2), k_exponent=EXPONENTS,
    v_exponent=EXPONENTS, q_exponent=EXPONENTS, where=st.sampled_from(("everywhere", "token", "block", "channel")),
    zeros=st.sampled_from((0.0, 0.5, 1.0)), scale=st.sampled_from((0.125, -0.125, 1e-320, 1e-30, 1e5, 1e30, 1e307, 1.7e308)),
    rtol=st.sampled_from((0.0, 1e-3, 0.5, 1e200)), atol=st.sampled_from((0.0, 1e-310, 1e300)),
    relative_to=st.sampled_from(("values", "output")),
    policy=st.sampled_from((Budget(), Budget(0.9, require_rank=True), Coverage(), Coverage(k_min=0, k_max=1, boundary_check=False))),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@example(  # norms of keys beyond FP32
    dtype="float32", tokens=16, n=1, k_exponent=38, v_exponent=0, q_exponent=0, where="everywhere", zeros=0.0, scale=1e-30, rtol=0.5,
    atol=0.0, relative_to="values", policy=Budget(), seed=0,
)  # fmt: skip
@example(  # values that stay original, of no weight
    dtype="float32", tokens=64, n=1, k_exponent=0, v_exponent=12, q_exponent=0, where="everywhere", zeros=0.0, scale=1e5, rtol=0.5,
    atol=0.0, relative_to="values", policy=Coverage(), seed=0,
)  # fmt: skip
@example(  # scores of tiny keys and a huge scale, of which the judge's own estimate is beyond double
    dtype="bfloat16", tokens=1, n=1, k_exponent=-45, v_exponent=-45, q_exponent=3, where="everywhere", zeros=0.0, scale=1.7e308, rtol=0.0,
    atol=0.0, relative_to="values", policy=Budget(), seed=0,
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_any_finite_input_is_answered_without_a_warning(
    dtype: str, tokens: int, n: int, k_exponent: int, v_exponent: int, q_exponent: int, where: str, zeros: float, scale: float,
    rtol: float, atol: float, relative_to: str, policy: Policy, seed: int,
) -> None:  # fmt: skip
    """Warnings are errors here: whatever overflows on the way was meant to, and is handled."""
    rng, n = np.random.default_rng(seed), min(n, tokens)

    def drawn(heads: int, count: int, exponent: int) -> NDArray[Any]:
        x = rng.standard_normal((heads, count, 64)) * (rng.random((heads, count, 64)) >= zeros)
        at = {"everywhere": ..., "token": (slice(None), slice(0, 1)), "block": (slice(None), slice(16, 32)), "channel": (..., 5)}[where]
        x[at] *= 10.0**exponent  # type: ignore[index]
        return raw(x, dtype)

    k, v, q = drawn(1, tokens, k_exponent), drawn(1, tokens, v_exponent), drawn(2, n, q_exponent)
    cache = store(Layout(1, 64, 16, 16, dtype), k, v)
    try:
        terms: dict[str, Any] = {"atol": atol, "relative_to": relative_to, "softmax_scale": scale}
        result = answer(cache, q, rtol, policy, canary_blocks=np.arange(len(cache.hot)), **terms)
    except ScoreOverflow:
        largest = np.max(np.abs(attention_scores(k, q, scale)))
        assert largest > 1e38
        return
    assert not result.canary_failures
    check_reply(k, v, q, result.output, result.certificate, rtol, atol, relative_to, softmax_scale=scale)


def attention_scores(k: NDArray[Any], q: NDArray[Any], scale: float) -> NDArray[np.longdouble]:
    return np.longdouble(scale) * (exact_numbers(q) @ exact_numbers(k[0]).T)
