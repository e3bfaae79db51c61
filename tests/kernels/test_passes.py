"""The score and value passes, op by op, against their references in float64; selection against sorting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_cache import Cache, raw, store
from tierd_kernels.attend import cpu as attend_cpu
from tierd_kernels.attend import reference as attend_reference
from tierd_kernels.attend.cpu import group_dots, means
from tierd_kernels.bound.cpu import EXP_MIN, exponentials, weigh
from tierd_kernels.bound.reference import block_factors
from tierd_kernels.bound.statistics import DELTA, EPSILON, MAX_SCORE, NUM_STATISTICS, SUM, SUM_ERROR, SUM_NORM
from tierd_kernels.kvview import KVView, widen
from tierd_kernels.layout import DTYPE_CODE, Layout
from tierd_kernels.quantise.reference import decode, dequantise_values
from tierd_kernels.score import cpu as score_cpu
from tierd_kernels.score.reference import block_statistics, quantised_scores
from tierd_kernels.select import cpu as select_cpu
from tierd_kernels.select import reference as select_reference
from tierd_kernels.vector import ROW_TILE

GEOMETRIES = st.tuples(
    st.sampled_from((64, 80, 96, 128, 256)), st.sampled_from((16, 32, 64)), st.sampled_from((16, 32)), st.sampled_from(tuple(DTYPE_CODE)),
    st.integers(1, 2), st.integers(1, 2),
)  # fmt: skip


def filled(geometry: tuple[int, int, int, str, int, int], tokens: int, seed: int) -> tuple[Cache, np.ndarray]:
    d, B, g, dtype, heads, tiles = geometry
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, heads, tokens, d)) * 10.0 ** rng.uniform(-1, 1, (2, heads, 1, d))
    cache = store(Layout(heads, d, B, g, dtype), raw(k, dtype), raw(v, dtype))
    q = rng.standard_normal((heads, tiles * ROW_TILE, d))
    q[..., seed % d] *= 10.0 ** rng.uniform(0, 4, (heads, tiles * ROW_TILE))  # few steps are left for the other channels
    return cache, q / np.max(np.abs(q), axis=2, keepdims=True)


@given(geometry=GEOMETRIES, tokens=st.integers(1, 150), promoted=st.booleans(), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_weights_statistics_and_values(geometry: tuple[int, int, int, str, int, int], tokens: int, promoted: bool, seed: int) -> None:
    cache, q = filled(geometry, tokens, seed)
    layout, (heads, rows, d) = cache.layout, q.shape
    rng, B, blocks, full = np.random.default_rng(seed), layout.block_size, len(cache.originals), len(cache.hot)
    visible = np.sort(rng.integers(1, tokens + 1, rows))
    visible[-1] = tokens
    scale, unit = rng.uniform(0.01, 0.3, (heads, rows)), np.ldexp(1.0, rng.integers(5, 9, heads))
    exact = rng.random((2, heads, rows, blocks)) < 0.3 * promoted
    exact[..., full:] = False
    keys, values = cache.layout.own_locations(cache.originals[: len(cache.hot)])
    weights = np.full((heads, rows, blocks * B), np.nan, np.float32)
    statistics = np.zeros((NUM_STATISTICS, heads, rows, blocks), np.float32)
    score_cpu.score(
        layout.as_array, *cache.memory, q, scale, visible, unit, cache.hot, cache.originals, keys, exact[0],
        np.ones_like(exact[0]), 3, weights, statistics,
    )  # fmt: skip
    flat = statistics.reshape(NUM_STATISTICS, -1, blocks)
    factor = block_factors(flat[MAX_SCORE], flat[SUM], np.ones((heads * rows, blocks), np.bool_))
    factor, keep = factor.reshape(heads, rows, blocks), rng.random((heads, rows, blocks)) < 0.8
    keep &= factor > 0
    partial = np.full((heads, rows, 1, d), np.nan)
    view = KVView.of(layout, cache.memory, cache.hot, cache.originals, tokens, (cache.groups[0], cache.groups[1]))
    attend_cpu.attend(
        layout.as_array, *cache.memory, visible, cache.hot, cache.originals, values, view.raw_values_Hb, exact[1], keep, factor,
        weights, partial,
    )  # fmt: skip

    K, V = widen(cache.keys, layout.dtype), widen(cache.values, layout.dtype)
    used, size = np.zeros((2, heads, rows, tokens, d))
    for h in range(heads):
        for b in range(blocks):
            at = slice(b * B, min((b + 1) * B, tokens))
            block = None
            if b < full:
                start = cache.hot[b] + h * layout.hot_record_bytes
                block = decode(cache.memory.hot[start : start + layout.hot_record_bytes], layout)
            for r in range(rows):
                count = min(visible[r] - b * B, B)
                coded = block is not None and not exact[1, h, r, b] and not block.raw_values
                used[h, r, at], size[h, r, at] = V[h, at], np.abs(V[h, at])
                if coded and block is not None:
                    used[h, r, at] = dequantise_values(block, layout)
                    largest = 15.0 * block.value_scale_BG.astype(np.float64) + np.abs(block.value_offset_BG.astype(np.float64))
                    size[h, r, at] = np.repeat(largest, layout.value_group, axis=1)[:, :d]
                if count <= 0:
                    assert statistics[SUM, h, r, b] == 0
                    continue
                if block is None or exact[0, h, r, b] or block.raw_keys:
                    scores, delta, dnorm, limb = scale[h, r] * (K[h, at] @ q[h, r]), 0.0, 0.0, 0.0
                else:
                    scores, delta, dnorm, limb = quantised_scores(block, q[h, r], scale[h, r])
                nu, eta = np.linalg.norm(V[h, at], axis=1) / unit[h], np.zeros(len(V[h, at]))
                if block is not None:
                    nu, bits = widen(block.value_norm_B, "bfloat16") / unit[h], block.value_error_B
                    eta = np.zeros(B) if block.raw_values else widen(bits, "bfloat16") / unit[h]
                eps = float(statistics[EPSILON, h, r, b])
                w, wanted = block_statistics(scores[:count], nu[:count], eta[:count], delta + eps, dnorm + B**0.5 * eps, eps)
                got = statistics[:, h, r, b]
                # e^s may be off by this much, and m with it.
                off = eps + limb
                assert abs(got[MAX_SCORE] - wanted[MAX_SCORE]) <= off
                np.testing.assert_allclose(got[SUM:DELTA], wanted[SUM:DELTA], rtol=2 * np.expm1(2 * off) + 3e-6, atol=1e-12)
                np.testing.assert_allclose(got[DELTA:], wanted[DELTA:], rtol=1e-5)
                assert got[DELTA] >= wanted[DELTA] * (1 - 1e-9)
                np.testing.assert_allclose(weights[h, r, at][:count], w, rtol=2 * np.expm1(2 * off), atol=1e-37)
                assert (weights[h, r, b * B + count : (b + 1) * B] == 0).all()
        seen = weights[h, :, :tokens].astype(np.float64)
        wanted_sum = attend_reference.attend(np.nan_to_num(seen), factor[h] * keep[h], used[h], B)
        room = (B + 3) * 2.0**-24 * attend_reference.attend(np.nan_to_num(seen), factor[h] * keep[h], size[h], B) + 1e-30
        assert (np.abs(partial[h] - wanted_sum) <= room).all()


@given(seed=st.integers(0, 2**31), blocks=st.integers(1, 300), share=st.sampled_from((0.0, 1e-6, 0.01, 0.3, 1e9)))
@settings(max_examples=60, deadline=None)
def test_skipped_blocks_are_the_cheapest_that_fit(seed: int, blocks: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    statistics = np.zeros((NUM_STATISTICS, 2, blocks), np.float32)
    statistics[MAX_SCORE] = rng.normal(0, 6, (2, blocks))
    statistics[SUM] = rng.uniform(1, 16, (2, blocks))
    statistics[DELTA] = rng.uniform(0, 1.5, (2, blocks))
    norms, output = rng.random((1, blocks)), rng.random(2)
    everywhere = np.ones((2, blocks), np.bool_)
    factor = block_factors(statistics[MAX_SCORE], statistics[SUM], everywhere)
    mass = factor * statistics[SUM]
    mass /= mass.sum(axis=1, keepdims=True)
    cost = mass * np.exp(statistics[DELTA].astype(np.float64)) * (norms + output[:, None])
    allowance = share * cost.sum(axis=1)
    wanted = select_reference.skip_blocks(mass, cost, allowance)
    keep = everywhere.copy()
    rows, heads = np.arange(2), np.zeros(2, np.int64)
    select_cpu.skip_blocks(statistics, factor, rows, heads, norms, output, allowance, keep)
    assert (np.sum(cost * ~keep, axis=1) <= allowance * (1 + 1e-5)).all()
    assert keep[rows, np.argmax(mass, axis=1)].all()
    assert np.abs(np.sum(wanted, axis=1) - np.sum(~keep, axis=1)).max() <= 1  # the threshold may round a tie away


@pytest.mark.parametrize("everything", [False, True])
@given(seed=st.integers(0, 2**32 - 1), blocks=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_factors_and_masses_are_the_references(everything: bool, seed: int, blocks: int) -> None:
    rng, rows = np.random.default_rng(seed), np.array([2, 0])
    statistics = rng.uniform(0.5, 16, (NUM_STATISTICS, 3, blocks)).astype(np.float32)
    statistics[MAX_SCORE] = rng.normal(0, 30, (3, blocks))
    statistics[SUM][rng.random((3, blocks)) < 0.3] = 0.0
    statistics[:, :, 0] = 1.0
    keep = rng.random((3, blocks)) < 0.6
    keep[:, 0] = True
    wanted_keep = statistics[SUM] > 0 if everything else keep & (statistics[SUM] > 0)
    keep &= statistics[SUM] > 0
    factor, sums = np.full((3, blocks), np.nan), np.empty((3, 2))
    weigh(statistics, rows, everything, keep, factor, *sums)
    wanted = block_factors(statistics[MAX_SCORE, rows], statistics[SUM, rows], wanted_keep[rows])
    assert np.array_equal(keep[rows], wanted_keep[rows]) and np.isnan(factor[1]).all()
    assert np.allclose(factor[rows], wanted, rtol=1e-14, atol=0)
    for got, k in zip(sums, (SUM, SUM_NORM, SUM_ERROR), strict=True):
        assert np.allclose(got, np.sum(wanted * statistics[k, rows], axis=1), rtol=1e-13)


def test_float64_exponentials_are_exact_to_a_few_roundings() -> None:
    edges = [0.0, -5e-324, EXP_MIN, np.nextafter(EXP_MIN, -np.inf), -np.inf]
    x = np.concatenate([-np.random.default_rng(0).exponential(30.0, 100_000), edges])
    got = np.empty_like(x)
    exponentials(x, got)
    wanted = np.where(x >= EXP_MIN, np.exp(x.astype(np.longdouble)), 0)
    assert (np.abs(got - wanted) <= 2.0**-50 * wanted).all()


@given(seed=st.integers(0, 2**32 - 1), groups=st.integers(1, 5), d=st.sampled_from((64, 80)))
@settings(max_examples=20, deadline=None)
def test_outputs_and_their_dots_are_sums_over_groups(seed: int, groups: int, d: int) -> None:
    rng, rows = np.random.default_rng(seed), np.array([3, 1])
    partial, divisor, out = rng.standard_normal((4, groups, d)), rng.uniform(0.1, 9, 2), np.full((2, d), np.nan)
    means(partial, rows, divisor, out)
    assert np.allclose(out, partial[rows].sum(axis=1) / divisor[:, None], rtol=1e-13, atol=1e-14)
    dots = np.full((4, groups), np.nan)
    group_dots(partial, rows, divisor, out, dots)
    assert np.allclose(dots[rows], np.einsum("rgd,rd->rg", partial[rows], out) / divisor[:, None], rtol=1e-12, atol=1e-12)
    assert np.isnan(dots[[0, 2]]).all()


@pytest.mark.parametrize("count", [1, 5, 16])
def test_exponentials_are_as_exact_as_the_bound_takes_them(count: int) -> None:
    """Every weight of a block of scores between 0 and -100 is within EXP_ERROR of e^s, or zero below e^-86."""
    rng, heads, rows = np.random.default_rng(count), 1, ROW_TILE
    d, layout = 64, Layout(1, 64, 16, 16, "float32")
    k = np.zeros((1, 4000, d))
    k[0, :, 0] = -rng.uniform(0, 100, 4000)
    k[0, ::16, 0] = 0.0
    cache = store(layout, raw(k, "float32"), raw(k, "float32"))
    q = np.zeros((heads, rows, d))
    q[:, :, 0] = 1.0
    blocks, chosen = len(cache.originals), np.ones((heads, rows, len(cache.originals)), np.bool_)
    weights, statistics = np.empty((heads, rows, blocks * 16), np.float32), np.zeros((NUM_STATISTICS, heads, rows, blocks), np.float32)
    score_cpu.score(
        layout.as_array, *cache.memory, q, np.ones((heads, rows)), np.full(rows, 4000), np.ones(1), cache.hot, cache.originals,
        cache.layout.own_locations(cache.originals[: len(cache.hot)])[0], chosen, chosen, count, weights, statistics,
    )  # fmt: skip
    s = raw(k, "float32")[0, :, 0].astype(np.float64)
    kept = s > -86
    assert (np.abs(weights[0, 0][kept] / np.exp(s[kept]) - 1) <= score_cpu.EXP_ERROR).all()
    assert (weights[0, 0][s < -86.001] == 0).all()
