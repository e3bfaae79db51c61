"""The coverage policy: which keys it promotes, and which heads it gives up to the exact rung."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_cache import Cache, raw, store
from numpy.typing import NDArray
from oracle import check_reply
from tierd_kernels import ladder
from tierd_kernels.layout import Layout
from tierd_kernels.policy import Coverage
from tierd_kernels.select.reference import coverage_keys

Array = NDArray[np.float64]


def paper_key_bound(norm_max: float, delta: float, tail: float) -> float:
    return float(2.0 * norm_max * np.exp(3.0 * delta) * tail * np.expm1(2.0 * delta))


@given(
    seed=st.integers(0, 2**31), blocks=st.integers(1, 60), seen=st.integers(1, 60), sharpness=st.sampled_from((0.0, 1.0, 4.0)),
    norm_max=st.sampled_from((1e-6, 0.3, 1.0, 40.0)), delta=st.sampled_from((1e-4, 0.01, 0.3)), tau=st.sampled_from((0.3, 0.9, 0.995, 1.0)),
    k_min=st.integers(0, 4), extra=st.integers(0, 50),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_coverage_promotes_by_mass_and_doubles_once(
    seed: int, blocks: int, seen: int, sharpness: float, norm_max: float, delta: float, tau: float, k_min: int, extra: int
) -> None:
    seen = min(seen, blocks)
    rng, policy = np.random.default_rng(seed), Coverage(tau_cov=tau, k_min=k_min, k_max=k_min + extra)
    rho = np.exp(sharpness * rng.standard_normal(blocks)) * (np.arange(blocks) < seen)
    rho /= rho.sum()
    keys, bound = (x[0] for x in coverage_keys(rho[None], np.array([delta]), np.array([norm_max]), rho[None] > 0, policy))
    size, falling = int(keys.sum()), np.sort(rho)[::-1]
    assert not keys[seen:].any()
    assert rho[keys].min(initial=np.inf) >= rho[~keys].max(initial=0.0)
    enough = 1 + int(np.sum(np.cumsum(falling) < tau))
    first = min(max(enough, policy.k_min), policy.k_max, seen)
    before = paper_key_bound(norm_max, delta, max(1.0 - falling[:first].sum(), 0.0))
    if abs(before / policy.key_bound_max - 1.0) > 1e-9:
        assert size == (min(2 * first, seen) if before > policy.key_bound_max else first)
    assert bound == pytest.approx(paper_key_bound(norm_max, delta, max(1.0 - falling[:size].sum(), 0.0)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("norm_max", "delta", "k_max"), [(np.inf, 0.1, 9), (0.0, np.inf, 1), (np.inf, np.inf, 9), (1.0, np.inf, 1)])
def test_the_key_bound_is_never_nan(norm_max: float, delta: float, k_max: int) -> None:
    rho = np.array([[0.7, 0.2, 0.1]])
    policy = Coverage(k_max=k_max, k_min=0)
    _, bound = coverage_keys(rho, np.array([delta]), np.array([norm_max]), rho > 0, policy)
    assert bound[0] == (np.inf if k_max == 1 and norm_max > 0 else 0.0)


def head(keys: Array, q: Array) -> tuple[Cache, NDArray[np.float32]]:
    """One head of d = 64 whose keys and query use channel 0 alone; values are all alike, so that any budget is met."""
    k, v = np.zeros((1, len(keys), 64)), np.ones((1, len(keys), 64))
    k[0, :, 0] = keys
    query = np.zeros((1, 1, 64), np.float32)
    query[0, 0, 0] = q
    return store(Layout(1, 64, 16, 16, "float32"), raw(k, "float32"), raw(v, "float32")), query


def exact(cache: Cache, q: NDArray[np.float32], policy: Coverage) -> bool:
    result = ladder.attend(cache.layout, cache.memory, [cache.call(q, 0.5, policy, softmax_scale=1.0)], 1)[0]
    assert isinstance(result, ladder.Result)
    check_reply(cache.keys, cache.values, q, result.output, result.certificate, 0.5, 0.0, softmax_scale=1.0)
    return bool(result.certificate["exact"].item())


def steps(heights: list[float], spread: float) -> Array:
    """Keys of blocks at the given heights; inside a block they vary by `spread`, which is what quantisation is exact to a 254th of."""
    return np.concatenate([h + np.linspace(-spread, spread, 16) for h in heights])


@pytest.mark.parametrize("check", [True, False])
def test_a_head_whose_promoted_set_is_not_certain_is_exact(check: bool) -> None:
    """The first block leads by far, so its rank is certain; where the promoted three end is a tie."""
    cache, q = head(steps([6.0, 3.0, 1.0, 1.0, 1.0, 0.0], 0.5), np.float64(1.0))
    policy = Coverage(k_min=3, k_max=3, key_bound_max=1e9, boundary_check=check)
    assert exact(cache, q, policy) == check


def test_a_promoted_set_with_a_gap_is_not_exact() -> None:
    cache, q = head(steps([6.0, 3.0, 1.0, -1.0, -1.0, -2.0], 0.5), np.float64(1.0))
    assert not exact(cache, q, Coverage(k_min=3, k_max=3, key_bound_max=1e9))
    assert exact(cache, q, Coverage(k_min=4, k_max=4, key_bound_max=1e9))


def test_the_set_that_doubled_is_the_one_that_is_checked() -> None:
    cache, q = head(steps([6.0, 3.0, 3.0, 1.0, -1.0, -2.0], 0.5), np.float64(1.0))
    assert exact(cache, q, Coverage(k_min=2, k_max=2, key_bound_max=1e9))
    assert not exact(cache, q, Coverage(k_min=2, k_max=2, key_bound_max=0.0))


def test_where_everything_or_nothing_is_promoted_there_is_no_boundary() -> None:
    cache, q = head(steps([6.0, 1.0, 1.0, 1.0], 0.5), np.float64(1.0))
    assert not exact(cache, q, Coverage(tau_cov=1.0, k_max=64))
    assert not exact(cache, q, Coverage(k_min=0, k_max=0))
    tied, q = head(steps([1.0, 1.0], 0.5), np.float64(1.0))  # but its heaviest block is not certain
    assert exact(tied, q, Coverage(tau_cov=1.0, k_max=64))
