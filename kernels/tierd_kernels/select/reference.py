"""Selection in numpy, for many rows at once. Pure: bounds and shares in, masks out."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.numerics import Array, phi
from tierd_kernels.policy import Coverage

Mask = NDArray[np.bool_]
BISECTIONS = 14


def skip_blocks(mass_Rb: Array, cost_Rb: Array, allowance_R: Array) -> Mask:
    """Blocks that the value pass need not read: the cheapest ones, whose `cost_Rb` (infinite: never) together stays within
    `allowance_R`; never the heaviest block."""
    cost = cost_Rb.copy()
    np.put_along_axis(cost, np.argmax(mass_Rb, axis=1)[:, None], np.inf, axis=1)
    order = np.argsort(cost, axis=1, kind="stable")
    spent = np.cumsum(np.take_along_axis(cost, order, axis=1), axis=1)
    skipped = np.zeros(cost.shape, np.bool_)
    np.put_along_axis(skipped, order, spent <= allowance_R[:, None], axis=1)
    return skipped


def cheapest_within(
    shares_Rb: tuple[Array, Array], target_R: Array, predict: Callable[[Mask, Mask], Array]
) -> tuple[Mask, Mask, Mask]:
    """The fewest promotions (keys, values) whose predicted bound is at most `target_R`, by bisection over one threshold.

    A key and a value record cost the same bytes, so one threshold on both shares ranks them. Returns the two masks and, per row,
    whether the target can be met at all.
    """
    key_Rb, value_Rb = (np.nan_to_num(x, nan=np.inf, posinf=1e300) for x in shares_Rb)
    top = np.maximum(key_Rb.max(axis=1), value_Rb.max(axis=1))
    high = np.log(np.maximum(top, 1e-300)) + 1e-9
    low = high - np.log(2.0) * 40.0
    reachable = predict(key_Rb > np.exp(low)[:, None], value_Rb > np.exp(low)[:, None]) <= target_R
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        threshold = np.exp(middle)[:, None]
        fits = predict(key_Rb > threshold, value_Rb > threshold) <= target_R
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    threshold = np.exp(low)[:, None]
    return key_Rb > threshold, value_Rb > threshold, np.asarray(reachable)


def coverage_keys(
    rho_Rb: Array, delta_max_R: Array, norm_max_R: Array, present_Rb: Mask, policy: Coverage
) -> tuple[Mask, Array]:
    """The paper's key promotion (CERTIFICATE.md, section "Policies"): blocks by falling mass until `tau_cov` of it, between `k_min` and
    `k_max` blocks, twice as many where the paper's key bound is above `key_bound_max`. Returns the mask and that bound for it, in
    the units of `norm_max_R`, the largest norm of a value."""
    order = np.argsort(-rho_Rb, axis=1)
    falling = np.take_along_axis(rho_Rb, order, axis=1)
    covered = np.cumsum(falling, axis=1)
    beyond = np.pad(np.cumsum(falling[:, ::-1], axis=1)[:, ::-1], ((0, 0), (0, 1)))  # the mass from the k-th block on: 0 after all
    count = np.clip(1 + np.sum(covered < policy.tau_cov, axis=1), policy.k_min, policy.k_max)
    count = np.minimum(count, np.sum(present_Rb, axis=1))

    def key_bound(k: NDArray[np.int64]) -> Array:
        tail = np.take_along_axis(beyond, k[:, None], axis=1)[:, 0]
        with np.errstate(over="ignore", invalid="ignore"):
            grown = 2.0 * norm_max_R * np.exp(3 * delta_max_R) * (2.0 * delta_max_R) * phi(2.0 * delta_max_R)
            # Without a tail, or values, nothing is left to err, however much scores may.
            return np.where((tail > 0.0) & (norm_max_R > 0.0), grown * tail, 0.0)

    again = key_bound(count) > policy.key_bound_max
    count = np.where(again, np.minimum(2 * count, np.sum(present_Rb, axis=1)), count)
    chosen = np.zeros_like(present_Rb)
    np.put_along_axis(chosen, order, np.arange(rho_Rb.shape[1])[None, :] < count[:, None], axis=1)
    return chosen & present_Rb, key_bound(count)
