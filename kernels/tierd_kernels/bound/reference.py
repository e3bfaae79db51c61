"""The bound of CERTIFICATE.md, section "The bound", for many rows at once, in float64.

Legend of suffixes: R rows (query head, query token), b blocks, G groups of 1024 tokens. The statistics are those of the weights
e^{s - m} inside a block, m being the block's largest score, so that nothing overflows; `Weights` carries them to the row's scale.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.numerics import SAFETY, U32, Array, gamma, phi, psi

GROUP_TOKENS = 1024
# Indices into a row and block's statistics, float64[R, b, NUM_STATISTICS]; sums run over the block's visible tokens.
(MAX_SCORE, SUM, SUM_SQUARES, SUM_NORM, SUM_SQUARES_NORM, SUM_ERROR, SUM_SQUARE_USED, SUM_SQUARE_ERROR, DELTA, D_NORM, EPSILON) = range(11)
NUM_STATISTICS = 11
# Masses in the bound and weights in the value pass differ by two roundings of FP32 each and float64 noise.
THETA = 16.0 * U32


@dataclass(frozen=True)
class Annotations:
    """What the bound needs of the blocks besides statistics, per row (its KV head's): all norms are divided by `unit`.

    `value_spectral_Rb` sV, `amplitude_Rb` the norm that arithmetic errors of a block's values scale with, `value_norm_max_Rb`
    the largest ||V_t||, `group_value_RG` SV and `group_error_RG` SR, infinite where not known. `underflow_R` is what the value
    pass may lose to FP32 products below the smallest normal, whatever their weights.
    """

    value_spectral_Rb: Array
    amplitude_Rb: Array
    value_norm_max_Rb: Array
    group_value_RG: Array
    group_error_RG: Array
    underflow_R: Array
    num_tokens: int
    block_size: int

    def take(self, rows: NDArray[np.int64]) -> "Annotations":
        return Annotations(
            self.value_spectral_Rb[rows],
            self.amplitude_Rb[rows],
            self.value_norm_max_Rb[rows],
            self.group_value_RG[rows],
            self.group_error_RG[rows],
            self.underflow_R[rows],
            self.num_tokens,
            self.block_size,
        )


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
    def of(statistics: Array, keep_Rb: NDArray[np.bool_]) -> "Weights":
        top = np.max(np.where(keep_Rb, statistics[..., MAX_SCORE], -np.inf), axis=1, keepdims=True)
        with np.errstate(over="ignore", invalid="ignore"):
            scale = np.where(statistics[..., SUM] > 0, np.exp(statistics[..., MAX_SCORE] - top), 0.0)
        kept = np.sum(np.where(keep_Rb, scale * statistics[..., SUM], 0.0), axis=1, keepdims=True)
        everywhere = scale / kept
        here = np.where(keep_Rb, everywhere, 0.0)
        return Weights(
            everywhere * statistics[..., SUM],
            here * statistics[..., SUM],
            here * np.sqrt(statistics[..., SUM_SQUARES]),
            here * (statistics[..., SUM] > 0),
            here * statistics[..., SUM_NORM],
            here * np.sqrt(statistics[..., SUM_SQUARES_NORM]),
            here * statistics[..., SUM_ERROR],
            here * statistics[..., SUM_SQUARE_USED],
            here * statistics[..., SUM_SQUARE_ERROR],
        )


@dataclass(frozen=True)
class Bound:
    """The bound and its parts, each float64[R] in units of the values; `key_Rb` and `value_Rb` are the blocks' own shares."""

    total: Array
    key: Array
    value: Array
    skip: Array
    arithmetic: Array
    value_norm: Array
    key_Rb: Array
    value_Rb: Array


def group_sum(x_Rb: Array, blocks_per_group: int) -> Array:
    """Sums of `blocks_per_group` neighbouring blocks, [R, G]."""
    return np.asarray(np.add.reduceat(x_Rb, np.arange(0, x_Rb.shape[1], blocks_per_group), axis=1))


def evaluate(
    statistics: Array,
    annotations: Annotations,
    keep_Rb: NDArray[np.bool_],
    value_exact_Rb: NDArray[np.bool_],
    output_norm_R: Array,
    output_error_R: Array,
    group_dot_RG: Array | None,
) -> Bound:
    """The bound on ||O - O*|| of every row.

    `value_exact_Rb`: values read in original precision. `output_norm_R`: ||O||, or any upper bound of it where `group_dot_RG`
    (o_G . O) is not known yet, which gives the candidate bound. `output_error_R`: rounding of O to its type. An infinite or
    NaN statistic makes the row's bound infinite, never small.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return _evaluate(statistics, annotations, keep_Rb, value_exact_Rb, output_norm_R, output_error_R, group_dot_RG)


def _evaluate(
    statistics: Array,
    annotations: Annotations,
    keep_Rb: NDArray[np.bool_],
    value_exact_Rb: NDArray[np.bool_],
    output_norm_R: Array,
    output_error_R: Array,
    group_dot_RG: Array | None,
) -> Bound:
    per_group = GROUP_TOKENS // annotations.block_size
    delta, dnorm = statistics[..., DELTA], statistics[..., D_NORM]
    w = Weights.of(statistics, keep_Rb)
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
        amplitude = group_sum(w.rho_Rb * annotations.amplitude_Rb, per_group)
        slack = 4.0 * (gamma(annotations.block_size + 8) + THETA) * (used2 + rho_G * o**2 + 2.0 * o * amplitude)
        slack = slack + 2.0 * o * annotations.underflow_R[:, None]
        width = np.sqrt(np.maximum(used2 - 2.0 * group_dot_RG + rho_G * o**2, 0.0) + slack)
    t2 = (width + np.sqrt(group_sum(w.error2_Rb, per_group))) * np.sqrt(spread)
    c = phi_b * np.minimum(w.rmax_Rb * dnorm, w.a2_Rb * delta)
    t3 = annotations.group_value_RG * np.sqrt(group_sum(c * c, per_group)) + o * group_sum(g, per_group)
    key = np.sum(np.fmin(t1, np.fmin(t2, t3)), axis=1)

    value_b = np.where(value_exact_Rb | ~live, 0.0, np.fmin(w.error_Rb, w.a2_Rb * annotations.value_spectral_Rb))
    a2_left = np.where(value_exact_Rb, 0.0, w.a2_Rb)
    grouped = annotations.group_error_RG * np.sqrt(group_sum(a2_left**2, per_group))
    value = np.sum(np.fmin(group_sum(value_b, per_group), grouped), axis=1)

    present = statistics[..., SUM] > 0
    skipped = present & ~keep_Rb
    delta_all = np.where(present, statistics[..., DELTA], 0.0)
    top_norm = np.max(np.where(present, annotations.value_norm_max_Rb, 0.0), axis=1)
    skip = np.sum(np.where(skipped, w.mass_Rb * np.exp(delta_all) * (annotations.value_norm_max_Rb + o), 0.0), axis=1)
    delta_max = np.max(delta_all, axis=1)
    # Weights below FP32's smallest normal: their whole mass, counted as skipped.
    skip = skip + annotations.num_tokens * 2.0**-125 * np.exp(delta_max) * (top_norm + output_norm_R)
    # A block's partial sum is FP32, block_size products of rounded weights and rounded values; the rest is float64.
    arithmetic = gamma(annotations.block_size + 6) * np.sum(
        np.where(live, w.rho_Rb * annotations.amplitude_Rb, 0.0), axis=1
    ) + 2.0**-40 * output_norm_R + annotations.underflow_R + output_error_R

    denominator = 1.0 - np.sum(low, axis=1) + np.sum(np.where(skipped, w.mass_Rb * np.exp(-delta_all), 0.0), axis=1)
    denominator = np.where(denominator > 2.0**-20, denominator, np.nan) / ((1.0 + THETA) * SAFETY)
    total = (key + value + skip + arithmetic) / denominator
    capped = np.tanh(delta_max) * (top_norm + output_norm_R + value + arithmetic) + value + arithmetic
    capped = np.where(np.any(skipped, axis=1), np.inf, capped * ((1.0 + THETA) * SAFETY))
    total = np.fmin(total, capped)
    total = np.where(np.isfinite(total), total, np.inf)
    return Bound(
        total,
        key / denominator,
        value / denominator,
        skip / denominator,
        arithmetic / denominator,
        np.sum(w.norm_Rb, axis=1),
        np.where(live, t1_b, 0.0),
        value_b,
    )


def top_block_certified(statistics: Array) -> NDArray[np.bool_]:
    """Whether the row's heaviest block is heaviest under exact scores too (CERTIFICATE.md, section "Ranking"), [R]."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        total = statistics[..., SUM]
        present = total > 0
        lse = np.where(present, statistics[..., MAX_SCORE] + np.log(np.where(present, total, 1.0)), -np.inf)
        delta = statistics[..., DELTA]
        x = np.minimum(delta, np.sqrt(statistics[..., SUM_SQUARES]) * statistics[..., D_NORM] / np.where(present, total, 1.0))
        widen = gamma(80) + 4.0 * U32 + 2.0 * U32 * np.abs(np.where(present, lse, 0.0))
        low = np.where(present, lse - x - widen, -np.inf)
        high = np.where(present, lse + np.log1p(phi(delta) * x) + widen, -np.inf)
    best = np.argmax(lse, axis=1)
    rows = np.arange(len(best))
    others = high.copy()
    others[rows, best] = -np.inf
    return np.asarray(low[rows, best] > np.max(others, axis=1))
