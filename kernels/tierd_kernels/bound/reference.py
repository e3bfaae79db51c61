"""The bound of CERTIFICATE.md, section "The bound", for many rows at once, in float64.

Legend of suffixes: R rows (query head, query token), b blocks, G groups of 1024 tokens. The statistics are those of the weights
e^{s - m} inside a block, m being the block's largest score, so that nothing overflows; `Weights` carries them to the row's scale.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.arrays import Singles
from tierd_kernels.bound.annotations import Annotations, Bound
from tierd_kernels.bound.statistics import (
    D_NORM,
    DELTA,
    EPSILON,
    MAX_SCORE,
    SUM,
    SUM_ERROR,
    SUM_NORM,
    SUM_SQUARE_ERROR,
    SUM_SQUARE_USED,
    SUM_SQUARES,
    SUM_SQUARES_NORM,
)
from tierd_kernels.numerics import SAFETY, U32, Array, gamma, phi, psi

GROUP_TOKENS = 1024
# The masses of the bound are sums in FP32 of the very weights that the value pass uses.
THETA = 16.0 * U32
# What the denominator loses is a sum of such masses, each off by 60 u at most, and is subtracted from 1: no factor on the result
# would cover that.
LOW_ROUNDING = 1.0 + 2.0**-17


@dataclass(frozen=True)
class Weights:
    """Normalised statistics over kept blocks: rho_b, a2_b, rmax_b and the sums with norms. `mass_Rb` is over the kept mass and
    also defined for skipped blocks."""

    mass_Rb: Array
    rho_Rb: Array
    a2_Rb: Array
    rmax_Rb: Array
    norm_Rb: Array
    norm2_Rb: Array
    error_Rb: Array
    used2_Rb: Array
    error2_Rb: Array

    @staticmethod
    def of(statistics: Array, factor_Rb: Array, keep_Rb: NDArray[np.bool_]) -> "Weights":
        kept = np.sum(np.where(keep_Rb, factor_Rb * statistics[SUM], 0.0), axis=1, keepdims=True)
        everywhere = factor_Rb / kept
        here = np.where(keep_Rb, everywhere, 0.0)
        return Weights(
            everywhere * statistics[SUM],
            here * statistics[SUM],
            here * np.sqrt(statistics[SUM_SQUARES]),
            here * (statistics[SUM] > 0),
            here * statistics[SUM_NORM],
            here * np.sqrt(statistics[SUM_SQUARES_NORM]),
            here * statistics[SUM_ERROR],
            here * statistics[SUM_SQUARE_USED],
            here * statistics[SUM_SQUARE_ERROR],
        )


def group_sum(x_Rb: Array, blocks_per_group: int) -> Array:
    """Sums of `blocks_per_group` neighbouring blocks, [R, G]."""
    return np.asarray(np.add.reduceat(x_Rb, np.arange(0, x_Rb.shape[1], blocks_per_group), axis=1))


def block_factors(max_score_Rb: Singles, sum_Rb: Singles, keep_Rb: NDArray[np.bool_]) -> Array:
    """e^{m_b - top}, top the largest kept m_b: what carries a block's weights to the row's scale. Zero for invisible blocks."""
    top = np.max(np.where(keep_Rb, max_score_Rb, -np.inf), axis=1, keepdims=True).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.where(sum_Rb > 0, np.exp(max_score_Rb - top), 0.0))


def evaluate(
    statistics_sRb: Singles,
    factor_Rb: Array,
    annotations: Annotations,
    rows_i: NDArray[np.int64],
    keep_Rb: NDArray[np.bool_],
    value_exact_Rb: NDArray[np.bool_],
    norm_i: Array,
    error_i: Array,
    dot_iG: Array | None = None,
    promote_ib: NDArray[np.bool_] | None = None,
    fetch_ib: NDArray[np.bool_] | None = None,
) -> Bound:
    """The bound on ||O - O*|| of the rows `rows_i` (arrays with R hold all rows, those with i only these).

    `factor_Rb` from `block_factors`. `value_exact_Rb`: values read in original precision. `norm_i`: ||O||, or any upper bound of it
    where `dot_iG` (o_G . O) is not known yet, which gives the candidate bound. `error_i`: rounding of O to its type. `promote_ib`,
    `fetch_ib`: keys and values to count as original though they were not read so, for a prediction. An infinite statistic never
    makes a bound small, a NaN makes it infinite.
    """
    statistics = statistics_sRb[:, rows_i].astype(np.float64)
    if promote_ib is not None:
        statistics[DELTA] = np.where(promote_ib, statistics[EPSILON], statistics[DELTA])
        statistics[D_NORM] = np.where(promote_ib, np.sqrt(annotations.block_size) * statistics[EPSILON], statistics[D_NORM])
    value_exact = value_exact_Rb[rows_i] if fetch_ib is None else value_exact_Rb[rows_i] | fetch_ib
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return _evaluate(
            statistics, factor_Rb[rows_i], annotations, annotations.head_R[rows_i], keep_Rb[rows_i], value_exact, norm_i, error_i, dot_iG
        )


def _evaluate(
    statistics: Array, factor_Rb: Array, annotations: Annotations, head: NDArray[np.int64], keep_Rb: NDArray[np.bool_],
    value_exact_Rb: NDArray[np.bool_], output_norm_R: Array, output_error_R: Array, group_dot_RG: Array | None,
) -> Bound:  # fmt: skip
    per_group = GROUP_TOKENS // annotations.block_size
    delta, dnorm = statistics[DELTA], statistics[D_NORM]
    w = Weights.of(statistics, factor_Rb, keep_Rb)
    o = output_norm_R[:, None]
    phi_b, psi_b = phi(delta), psi(delta)
    # 0 * inf would be NaN, and an absent block has neither mass nor error.
    live = w.rho_Rb > 0
    phi_b, psi_b = np.where(live, phi_b, 1.0), np.where(live, psi_b, 0.5)
    delta, dnorm = np.where(live, delta, 0.0), np.where(live, dnorm, 0.0)

    cross = w.a2_Rb * dnorm
    low = w.rho_Rb * -np.expm1(-np.minimum(delta, cross / np.where(live, w.rho_Rb, 1.0)))
    g = np.minimum(phi_b * np.minimum(w.rho_Rb * delta, cross), cross + psi_b * w.rmax_Rb * dnorm**2)
    t1_b = phi_b * np.minimum(delta * w.norm_Rb, dnorm * w.norm2_Rb) + g * o
    t1 = group_sum(t1_b, per_group)
    spread = group_sum(phi_b**2 * np.minimum(np.minimum(w.rho_Rb * delta**2, w.rmax_Rb * dnorm**2), delta * cross), per_group)
    used2, rho_G = group_sum(w.used2_Rb, per_group), group_sum(w.rho_Rb, per_group)
    if group_dot_RG is None:
        width = np.sqrt(used2) + np.sqrt(rho_G) * o
    else:
        amplitude = group_sum(w.rho_Rb * annotations.amplitude_Hb[head], per_group)
        slack = 4.0 * (gamma(annotations.block_size + 8) + THETA) * (used2 + rho_G * o**2 + 2.0 * o * amplitude)
        slack = slack + 2.0 * o * annotations.underflow_H[head][:, None]
        width = np.sqrt(np.maximum(used2 - 2.0 * group_dot_RG + rho_G * o**2, 0.0) + slack)
    t2 = (width + np.sqrt(group_sum(w.error2_Rb, per_group))) * np.sqrt(spread)
    c = phi_b * np.minimum(w.rmax_Rb * dnorm, w.a2_Rb * delta)
    t3 = annotations.group_value_HG[head] * np.sqrt(group_sum(c * c, per_group)) + o * group_sum(g, per_group)
    key = np.sum(np.fmin(t1, np.fmin(t2, t3)), axis=1)

    value_b = np.where(value_exact_Rb | ~live, 0.0, np.fmin(w.error_Rb, w.a2_Rb * annotations.value_spectral_Hb[head]))
    a2_left = np.where(value_exact_Rb, 0.0, w.a2_Rb)
    grouped = annotations.group_error_HG[head] * np.sqrt(group_sum(a2_left**2, per_group))
    value = np.sum(np.fmin(group_sum(value_b, per_group), grouped), axis=1)

    present = statistics[SUM] > 0
    skipped = present & ~keep_Rb
    delta_all = np.where(present, statistics[DELTA], 0.0)
    top_norm = np.max(np.where(present, annotations.value_norm_max_Hb[head], 0.0), axis=1)
    skip = np.sum(np.where(skipped, w.mass_Rb * np.exp(delta_all) * (annotations.value_norm_max_Hb[head] + o), 0.0), axis=1)
    delta_max = np.max(delta_all, axis=1)
    # Weights below the smallest that is kept (e^-86 < 2^-124): their whole mass, counted as skipped.
    lost = annotations.num_tokens * 2.0**-124 * (top_norm + output_norm_R)
    skip = skip + lost * np.exp(delta_max)
    # A block's partial sum is FP32, block_size products of weights and rounded values. The weights' sum, which divides
    # the output, is FP32 inside a block too; the rest is float64.
    arithmetic = gamma(annotations.block_size + 6) * np.sum(
        np.where(live, w.rho_Rb * annotations.amplitude_Hb[head], 0.0), axis=1
    ) + 8.0 * U32 * output_norm_R + annotations.underflow_H[head] + output_error_R

    denominator = 1.0 - np.sum(low, axis=1) * LOW_ROUNDING + np.sum(np.where(skipped, w.mass_Rb * np.exp(-delta_all), 0.0), axis=1)
    stretch = np.where(denominator > 2.0**-20, (1.0 + THETA) * SAFETY / denominator, np.inf)
    total = (key + value + skip + arithmetic) * stretch
    tilt = np.tanh(delta_max) * (top_norm + output_norm_R + value + arithmetic)
    capped = np.where(np.any(skipped, axis=1), np.inf, (tilt + value + 2.0 * lost + arithmetic) * ((1.0 + THETA) * SAFETY))
    use_cap = ~(total <= capped)
    total = np.where(use_cap, capped, total)
    key, skip = np.where(use_cap, tilt, key), np.where(use_cap, 2.0 * lost, skip)
    stretch = np.where(use_cap, (1.0 + THETA) * SAFETY, stretch)
    broken = np.isnan(np.sum(statistics[SUM:EPSILON], axis=(0, 2)) + np.sum(np.where(keep_Rb, factor_Rb, 0.0), axis=1))
    total = np.where(np.isfinite(total) & ~broken, total, np.inf)
    return Bound(
        total,
        key * stretch,
        value * stretch,
        skip * stretch,
        arithmetic * stretch,
        np.sum(w.norm_Rb, axis=1),
        np.where(live, t1_b, 0.0),
        value_b,
    )


def set_certified(statistics: Array, inside_Rb: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether every block of the set `inside_Rb` weighs more than every other one under exact scores too (CERTIFICATE.md, section
    "Ranking"), [R]. True where no visible block is left outside."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        total = statistics[SUM]
        present = total > 0
        lse = np.where(present, statistics[MAX_SCORE] + np.log(np.where(present, total, 1.0)), -np.inf)
        delta = statistics[DELTA]
        x = np.minimum(delta, np.sqrt(statistics[SUM_SQUARES]) * statistics[D_NORM] / np.where(present, total, 1.0))
        widen = gamma(80) + 4.0 * U32 + 2.0 * U32 * np.abs(np.where(present, lse, 0.0))
        low = np.where(present & inside_Rb, lse - x - widen, np.inf)
        high = np.where(present & ~inside_Rb, lse + np.log1p(phi(delta) * x) + widen, -np.inf)
    return np.asarray((np.min(low, axis=1) > np.max(high, axis=1)) | ~np.any(present & ~inside_Rb, axis=1))


def heaviest(statistics: Array) -> NDArray[np.bool_]:
    """The row's heaviest block as a set of one, [R, b]."""
    with np.errstate(divide="ignore"):
        lse = np.where(statistics[SUM] > 0, statistics[MAX_SCORE] + np.log(statistics[SUM]), -np.inf)
    chosen = np.zeros(lse.shape, np.bool_)
    chosen[np.arange(len(lse)), np.argmax(lse, axis=1)] = True
    return chosen
