"""The score pass in float64, one row and one block at a time. See `bound.statistics` for what it leaves."""

import numpy as np

from tierd_kernels.bound.statistics import (
    D_NORM,
    DELTA,
    EPSILON,
    MAX_SCORE,
    NUM_STATISTICS,
    SUM,
    SUM_ERROR,
    SUM_NORM,
    SUM_SQUARE_ERROR,
    SUM_SQUARE_USED,
    SUM_SQUARES,
    SUM_SQUARES_NORM,
)
from tierd_kernels.layout import C1, RK, SK, H
from tierd_kernels.numerics import Array
from tierd_kernels.quantise.reference import QuantisedBlock, dequantise_keys
from tierd_kernels.score.lanes import LEAST, STEPS


def block_statistics(scores_t: Array, norms_t: Array, errors_t: Array, delta: float, dnorm: float, eps: float) -> tuple[Array, Array]:
    """Weights [t] and statistics float64 [NUM_STATISTICS] of one row and block, all of whose tokens are visible."""
    w = np.exp(scores_t - np.max(scores_t))
    statistics = np.empty(NUM_STATISTICS)
    statistics[MAX_SCORE] = np.max(scores_t)
    statistics[SUM] = np.sum(w)
    statistics[SUM_SQUARES] = np.sum(w**2)
    statistics[SUM_NORM] = np.sum(w * norms_t)
    statistics[SUM_SQUARES_NORM] = np.sum((w * norms_t) ** 2)
    statistics[SUM_ERROR] = np.sum(w * errors_t)
    statistics[SUM_SQUARE_USED] = np.sum(w * (norms_t + errors_t) ** 2)
    statistics[SUM_SQUARE_ERROR] = np.sum(w * errors_t**2)
    statistics[[DELTA, D_NORM, EPSILON]] = delta, dnorm, eps
    return w, statistics


def quantised_scores(block: QuantisedBlock, q_d: Array, scale: float) -> tuple[Array, float, float, float]:
    """Scores [B] of one row over a quantised block, Delta and D without the floating-point part, and what q sigma as 16-bit integers
    adds to Delta (CERTIFICATE.md, sections "Score error" and "Floating point")."""
    q_sigma = q_d * block.key_scale_d.astype(np.float64)
    l1, l2 = np.sum(np.abs(q_sigma)), np.linalg.norm(q_sigma)
    notes, size = block.annotations.astype(np.float64), abs(scale)
    scores = scale * (dequantise_keys(block) @ q_d)
    limb = 0.5 * notes[C1] * max(np.max(np.abs(q_sigma)), LEAST) / STEPS
    root = np.sqrt(len(block.key_codes_Bd))
    return scores, size * (min(notes[H] * l1, notes[RK] * l2) + limb), size * (notes[SK] * l2 + root * limb), size * limb
