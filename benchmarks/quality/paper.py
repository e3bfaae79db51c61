"""The paper's own formulas (arXiv 2605.20868; CERTIFICATE.md, section "Policies") on the statistics of a step at rung 0.

    key bound    2 Vmax e^{3D} alpha (e^{2D} - 1)    alpha: mass of blocks whose keys are quantised, D: the largest score error
    value bound  sum over blocks of rho_b max eta_t   what the paper's policy compares with its threshold, block by block

D is taken from this project's statistics, which are never above the paper's own, the trailing block counts as original, and ties are
broken in the paper's favour: what is found here is what its formulas need at least.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tierd_kernels.bound.statistics import DELTA, SUM, SUM_NORM
from tierd_kernels.step import Step

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Facts:
    """Of rows R (query heads, in order) and full blocks b: `rho_Rb` the blocks' shares of the mass, `eta_Rb` the largest value error of
    each, `key_factor_R` 2 Vmax e^{3D} (e^{2D} - 1), `vbar_R`. Norms are in the values' own unit."""

    rho_Rb: Array
    eta_Rb: Array
    key_factor_R: Array
    vbar_R: Array

    @property
    def bound_R(self) -> Array:
        """With nothing promoted."""
        return np.asarray(self.key_factor_R * self.rho_Rb.sum(axis=1) + (self.rho_Rb * self.eta_Rb).sum(axis=1))


def used_rows(step: Step) -> NDArray[np.int64]:
    """The step's rows without padding, by query head."""
    return np.asarray(np.arange(step.heads)[:, None] * step.rows + np.arange(step.used), np.int64).reshape(-1)


def facts(step: Step) -> Facts:
    """Of a step that has run, all of whose rows were scored, with nothing promoted or skipped."""
    rows, full = used_rows(step), step.full
    statistics = step.statistics[:, rows].astype(np.float64)
    weight = step.factor[rows] / (step.factor[rows] * statistics[SUM]).sum(axis=1, keepdims=True)
    head, unit = step.annotations.head_R[rows], step.unit_R[rows]
    with np.errstate(over="ignore", invalid="ignore"):
        d = np.where(statistics[SUM] > 0, statistics[DELTA], 0.0).max(axis=1)
        v_max = step.view.value_norm_max_Hb.max(axis=1)[head] * unit
        factor = 2.0 * v_max * np.exp(3.0 * d) * np.expm1(2.0 * d)
    eta = step.view.value_error_max(step.layout, step.memory, step.hot_offsets)[head, :full] * unit[:, None]
    rho = (weight * statistics[SUM])[:, :full]
    return Facts(rho, eta, np.nan_to_num(factor, nan=np.inf), (weight * statistics[SUM_NORM]).sum(axis=1) * unit)


def fewest(paper: Facts, rtol: float) -> tuple[Mask, Mask]:
    """For each row the fewest blocks whose original keys (first mask), original values (second), [R, b], bring the bound within
    `rtol` times Vbar: keys by falling mass, values by falling share of the bound, the two numbers balanced against each other."""
    rho, value = paper.rho_Rb, paper.rho_Rb * paper.eta_Rb
    blocks = rho.shape[1]
    by_mass, by_value = np.argsort(-rho, axis=1), np.argsort(-value, axis=1)
    keys, values = np.zeros(rho.shape, np.bool_), np.zeros(rho.shape, np.bool_)
    for row, budget in enumerate(rtol * paper.vbar_R):
        tails = [_tail(x[row], order[row]) for x, order in ((rho, by_mass), (value, by_value))]
        with np.errstate(invalid="ignore"):
            left = budget - np.where(tails[0] > 0.0, paper.key_factor_R[row] * tails[0], 0.0)
        # Values needed beside k keys: the first count whose tail is within what the keys leave; the tails fall.
        needed = blocks + 1 - np.searchsorted(tails[1][::-1], left, side="right")
        k = int(np.argmin(np.where(left >= 0.0, np.arange(blocks + 1) + needed, np.iinfo(np.int64).max)))
        keys[row, by_mass[row, :k]] = True
        values[row, by_value[row, : int(needed[k])]] = True
    return keys, values


def _tail(share: Array, order: NDArray[np.int64]) -> Array:
    """What is left after the first 0, 1, ... of the order, [b + 1]; exactly 0 after all."""
    return np.append(np.cumsum(share[order][::-1])[::-1], 0.0)
