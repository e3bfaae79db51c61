"""The bound in Numba: one work item is a row. The same formulas as `reference`, in float64, with series where they vectorise."""

import math

import numpy as np
from numba import prange

from tierd_kernels.arrays import Doubles, Flags, Ints, Singles
from tierd_kernels.bound.annotations import Annotations, Bound
from tierd_kernels.bound.reference import GROUP_TOKENS, LOW_ROUNDING, THETA
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
from tierd_kernels.floats import compiled
from tierd_kernels.numerics import SAFETY, U32, gamma

# Below, psi, phi and 1 - e^-x are polynomials that lie above them; beyond, the exponential itself.
SERIES_MAX = 0.5
RANK_ROUNDING = gamma(80) + 4.0 * U32
SHARE_MAX = 3e38
EXP_MIN = -708.0  # e^x is a normal float64 from here on
LOG2_E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.6931471803691238, 1.9082149292705877e-10  # n times the high part is exact
PARTS = 6  # total, key, value, skip, arithmetic, value norm


@compiled(reassociate=True)
def series(delta_b: Doubles, x_b: Doubles, psi_b: Doubles, fall_b: Doubles) -> None:
    """psi(delta) and 1 - e^-x, x <= delta, both rounded up. The last coefficient of psi is raised by 7 % for the terms left out:
    0.5 / 9! times 1.06. The alternating series of the other ends in a positive term."""
    beyond = 0
    for b in range(len(delta_b)):
        y, x = delta_b[b], x_b[b]
        psi = y * (1.07 / 40320.0) + 1.0 / 5040.0
        psi = y * (y * (y * (y * (y * psi + 1.0 / 720.0) + 1.0 / 120.0) + 1.0 / 24.0) + 1.0 / 6.0) + 0.5
        psi_b[b] = psi
        fall_b[b] = x * (1.0 - x * (0.5 - x * (1.0 / 6.0 - x * (1.0 / 24.0 - x / 120.0))))
        beyond += not y <= SERIES_MAX
    if beyond == 0:
        return
    for b in range(len(delta_b)):
        if not delta_b[b] <= SERIES_MAX:
            y = delta_b[b]
            psi_b[b] = (math.expm1(y) - y) / (y * y) if y < math.inf else math.inf
            fall_b[b] = -math.expm1(-x_b[b])


@compiled()
def exponentials(x_b: Doubles, out_b: Doubles) -> None:
    """e^x of x <= 0 within 2^-50 of itself, zero below EXP_MIN. Vector code, which `math.exp` is not: it takes a third of the time.
    x = n ln 2 + r in two steps, the series of degree 13 on |r| <= 0.35, and n added to the exponent's bits."""
    bits_b, n_b = out_b.view(np.int64), np.empty(len(x_b), np.int64)
    for b in range(len(x_b)):
        x = x_b[b] if x_b[b] >= EXP_MIN else EXP_MIN
        n = np.rint(x * LOG2_E)
        r = (x - n * LN2_HIGH) - n * LN2_LOW
        y = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0
        y = y * r + 1.0 / 39916800.0
        y = y * r + 1.0 / 3628800.0
        y = y * r + 1.0 / 362880.0
        y = y * r + 1.0 / 40320.0
        y = y * r + 1.0 / 5040.0
        y = y * r + 1.0 / 720.0
        y = y * r + 1.0 / 120.0
        y = y * r + 1.0 / 24.0
        y = y * r + 1.0 / 6.0
        y = y * r + 0.5
        out_b[b] = (y * r + 1.0) * r + 1.0
        n_b[b] = np.int64(n)
    for b in range(len(x_b)):
        bits_b[b] += n_b[b] << 52
    for b in range(len(x_b)):
        out_b[b] = out_b[b] if x_b[b] >= EXP_MIN else 0.0


@compiled(parallel=True, reassociate=True)
def weigh(
    statistics_sRb: Singles, rows_i: Ints, everything: bool, keep_Rb: Flags, factor_Rb: Doubles, mass_i: Doubles, norm_i: Doubles,
    error_i: Doubles
) -> None:  # fmt: skip
    """As `bound.reference.block_factors` for the rows `rows_i`, and the rows' sums of SUM, SUM_NORM and SUM_ERROR by those factors, skipped
    blocks included. `everything`: every block that a row sees is kept from now on."""
    num_blocks = statistics_sRb.shape[2]
    for i in prange(len(rows_i)):
        r = rows_i[i]
        total, top_b, factor, keep = statistics_sRb[SUM, r], statistics_sRb[MAX_SCORE, r], factor_Rb[r], keep_Rb[r]
        norm, error = statistics_sRb[SUM_NORM, r], statistics_sRb[SUM_ERROR, r]
        top = -math.inf
        for b in range(num_blocks):
            if everything:
                keep[b] = total[b] > 0.0
            top = max(top, np.float64(top_b[b]) if keep[b] else -math.inf)
        below_b = np.empty(num_blocks)
        for b in range(num_blocks):
            below_b[b] = np.float64(top_b[b]) - top if total[b] > 0.0 else -math.inf
        exponentials(below_b, factor)
        mass = norms = errors = 0.0
        for b in range(num_blocks):
            mass += factor[b] * total[b]
            norms += factor[b] * norm[b]
            errors += factor[b] * error[b]
        mass_i[i], norm_i[i], error_i[i] = mass, norms, errors


@compiled(parallel=True, reassociate=True)
def bounds(
    statistics_sRb: Singles, factor_Rb: Doubles, keep_Rb: Flags, value_exact_Rb: Flags, rows_i: Ints, head_R: Ints,
    promote_ib: Flags, fetch_ib: Flags, spectral_Hb: Doubles, amplitude_Hb: Doubles, norm_max_Hb: Doubles,
    group_value_HG: Doubles, group_error_HG: Doubles, underflow_H: Doubles, block_size: int, num_tokens: int,
    norm_i: Doubles, error_i: Doubles, dot_iG: Doubles, gamma_block: float, gamma_dot: float,
    parts_pi: Doubles, key_ib: Doubles, value_ib: Doubles
) -> None:  # fmt: skip
    """Fills parts_pi [PARTS, rows], and the blocks' own shares key_ib and value_ib. `promote_ib`, `fetch_ib` [rows, b] or [0, 0]:
    keys and values to count as original though they were not read so. `dot_iG` [rows, G] or [0, 0]: not known."""
    num_blocks = statistics_sRb.shape[2]
    per_group = GROUP_TOKENS // block_size
    groups = (num_blocks + per_group - 1) // per_group
    root = math.sqrt(block_size)
    for i in prange(len(rows_i)):
        r = rows_i[i]
        h = head_R[r]
        # One contiguous row of each statistic: a slice of all of them has a stride that keeps loops from becoming vector code.
        total_b, squares_b, norm_b = statistics_sRb[SUM, r], statistics_sRb[SUM_SQUARES, r], statistics_sRb[SUM_NORM, r]
        norm2_b, error_b = statistics_sRb[SUM_SQUARES_NORM, r], statistics_sRb[SUM_ERROR, r]
        used2_b, error2_b = statistics_sRb[SUM_SQUARE_USED, r], statistics_sRb[SUM_SQUARE_ERROR, r]
        delta_sb, dnorm_sb, eps_b = statistics_sRb[DELTA, r], statistics_sRb[D_NORM, r], statistics_sRb[EPSILON, r]
        factor, keep, fetched = factor_Rb[r], keep_Rb[r], value_exact_Rb[r]
        o = norm_i[i]
        here_b, rho_b, a2_b = np.empty(num_blocks), np.empty(num_blocks), np.empty(num_blocks)
        delta_b, dnorm_b, x_b = np.empty(num_blocks), np.empty(num_blocks), np.empty(num_blocks)
        psi_b, fall_b = np.empty(num_blocks), np.empty(num_blocks)
        key_b, value_b = key_ib[i], value_ib[i]
        kept = 0.0
        for b in range(num_blocks):
            kept += factor[b] * total_b[b] if keep[b] else 0.0
        scale = 1.0 / kept
        # A loop that writes one array and reads eight at most becomes vector code; of more, LLVM does not check that they lie apart.
        for b in range(num_blocks):
            here_b[b] = factor[b] * scale if keep[b] & (factor[b] > 0.0) else 0.0
        for b in range(num_blocks):
            rho_b[b] = here_b[b] * total_b[b]
        for b in range(num_blocks):
            a2_b[b] = here_b[b] * math.sqrt(np.float64(squares_b[b]))
        for b in range(num_blocks):
            delta_b[b] = delta_sb[b]
        for b in range(num_blocks):
            dnorm_b[b] = dnorm_sb[b] if here_b[b] > 0.0 else 0.0
        if promote_ib.shape[0] > 0:
            for b in range(num_blocks):
                if promote_ib[i, b]:
                    eps = np.float64(eps_b[b])
                    delta_b[b] = eps
                    dnorm_b[b] = root * eps if dnorm_b[b] > 0.0 else 0.0
        for b in range(num_blocks):
            x = a2_b[b] * dnorm_b[b] / rho_b[b]
            x = delta_b[b] if delta_b[b] < x else x
            x_b[b] = x if rho_b[b] > 0.0 else 0.0
        series(delta_b, x_b, psi_b, fall_b)
        for b in range(num_blocks):
            live = rho_b[b] > 0.0
            delta = delta_b[b] if live else 0.0
            psi = psi_b[b] if live else 0.5
            rho, a2, dnorm, here = rho_b[b], a2_b[b], dnorm_b[b], here_b[b] if live else 0.0
            phi, cross = 1.0 + delta * psi, a2 * dnorm
            g = min(phi * min(rho * delta, cross), cross + psi * here * dnorm * dnorm)
            norm2 = here * math.sqrt(np.float64(norm2_b[b]))
            key_b[b] = phi * min(delta * (here * norm_b[b]), dnorm * norm2) + g * o
        for b in range(num_blocks):
            share = here_b[b] * np.float64(error_b[b])
            other = a2_b[b] * spectral_Hb[h, b]  # NaN where a2 underflowed and sV is not known
            share = other if other < share else share
            value_b[b] = share if (rho_b[b] > 0.0) & (not fetched[b]) else 0.0
        check = kept
        for b in range(num_blocks):
            check += delta_b[b] + dnorm_b[b] + norm_b[b] + error_b[b]
        key = value = low = raised = skip = arithmetic = norm_sum = delta_max = top_norm = 0.0
        any_skipped = False
        for group in range(groups):
            start, stop = group * per_group, min((group + 1) * per_group, num_blocks)
            t1 = t3 = spread = used2 = error2 = rho_G = amplitude = g_sum = value_G = a2_left = 0.0
            for b in range(start, stop):
                live = rho_b[b] > 0.0
                delta = delta_b[b] if live else 0.0
                psi = psi_b[b] if live else 0.5
                rho, a2, dnorm, here = rho_b[b], a2_b[b], dnorm_b[b], here_b[b] if live else 0.0
                phi, cross = 1.0 + delta * psi, a2 * dnorm
                low += rho * fall_b[b]
                g_sum += min(phi * min(rho * delta, cross), cross + psi * here * dnorm * dnorm)
                t1 += key_b[b]
                norm_sum += here * norm_b[b]
                spread += phi * phi * min(min(rho * delta * delta, here * dnorm * dnorm), delta * cross)
                used2 += here * used2_b[b]
                error2 += here * error2_b[b]
                rho_G += rho
                amplitude += rho * amplitude_Hb[h, b]
                c = phi * min(here * dnorm, a2 * delta)
                t3 += c * c
                value_G += value_b[b]
                a2_left += a2 * a2 if live & (not fetched[b]) else 0.0
            if fetch_ib.shape[0] > 0:
                value_G = a2_left = 0.0
                for b in range(start, stop):
                    coded = not (fetched[b] or fetch_ib[i, b])
                    value_G += value_b[b] if coded else 0.0
                    a2_left += a2_b[b] * a2_b[b] if coded else 0.0
            if dot_iG.shape[0] > 0:
                slack = 4.0 * gamma_dot * (used2 + rho_G * o * o + 2.0 * o * amplitude) + 2.0 * o * underflow_H[h]
                width = math.sqrt(max(used2 - 2.0 * dot_iG[i, group] + rho_G * o * o, 0.0) + slack)
            else:
                width = math.sqrt(used2) + math.sqrt(rho_G) * o
            best = t1
            other = (width + math.sqrt(error2)) * math.sqrt(spread)
            best = best if best <= other else other
            if group_value_HG[h, group] < math.inf:
                other = group_value_HG[h, group] * math.sqrt(t3) + o * g_sum
                best = best if best <= other else other
            key += best
            if group_error_HG[h, group] < math.inf:
                other = group_error_HG[h, group] * math.sqrt(a2_left)
                value_G = value_G if value_G <= other else other
            value += value_G
            arithmetic += amplitude
        for b in range(num_blocks):
            present = total_b[b] > 0.0
            top_norm = max(top_norm, norm_max_Hb[h, b] if present else 0.0)
            delta_max = max(delta_max, delta_b[b] if present else 0.0)
            any_skipped = any_skipped or (present and not keep[b])
        if any_skipped:
            for b in range(num_blocks):
                if total_b[b] > 0.0 and not keep[b]:
                    mass = factor[b] * scale * total_b[b]
                    grow = 1.0 + delta_b[b] * (1.0 + delta_b[b] * psi_b[b])
                    skip += mass * grow * (norm_max_Hb[h, b] + o)
                    raised += mass / grow
        # Weights below the smallest that is kept: their whole mass, counted as skipped.
        lost = num_tokens * 2.0**-124 * (top_norm + o)
        skip += lost * math.exp(delta_max)
        rounding = gamma_block * arithmetic + 8.0 * U32 * o + underflow_H[h] + error_i[i]
        denominator = 1.0 - low * LOW_ROUNDING + raised
        stretch = (1.0 + THETA) * SAFETY / denominator if denominator > 2.0**-20 else math.inf
        total = (key + value + skip + rounding) * stretch
        if not any_skipped:
            spread_all = math.tanh(delta_max) * (top_norm + o + value + rounding)
            capped = (spread_all + value + 2.0 * lost + rounding) * ((1.0 + THETA) * SAFETY)
            if not total <= capped:
                total, stretch, key, skip = capped, (1.0 + THETA) * SAFETY, spread_all, 2.0 * lost
        # A NaN anywhere must not hide behind a comparison that it makes false.
        if not (total < math.inf and check == check):
            total = math.inf
        parts_pi[0, i] = total
        for p, part in enumerate((key, value, skip, rounding)):
            parts_pi[1 + p, i] = part * stretch
        parts_pi[5, i] = norm_sum


@compiled(parallel=True, reassociate=True)
def certify_set(statistics_sRb: Singles, factor_Rb: Doubles, rows_i: Ints, inside_ib: Flags, certified_i: Flags) -> None:
    """As `bound.reference.set_certified`, over masses instead of their logarithms: no block outside may reach the least possible mass
    of one inside. `inside_ib` [rows, b], or [0, 0]: the heaviest block alone. The widening of a log-mass, 2 u |lse| and the sums'
    rounding, is taken for the largest score of the row."""
    num_blocks = statistics_sRb.shape[2]
    for i in prange(len(rows_i)):
        r = rows_i[i]
        factor, total_b, squares_b = factor_Rb[r], statistics_sRb[SUM, r], statistics_sRb[SUM_SQUARES, r]
        dnorm_sb, top_b = statistics_sRb[D_NORM, r], statistics_sRb[MAX_SCORE, r]
        delta_b, x_b = statistics_sRb[DELTA, r].astype(np.float64), np.empty(num_blocks)
        psi_b, fall_b = np.empty(num_blocks), np.empty(num_blocks)
        for b in range(num_blocks):
            x = math.sqrt(np.float64(squares_b[b])) * dnorm_sb[b] / total_b[b]
            x = delta_b[b] if delta_b[b] < x else x
            x_b[b] = x if total_b[b] > 0.0 else 0.0
        series(delta_b, x_b, psi_b, fall_b)
        heaviest = reach = 0.0
        best = 0
        for b in range(num_blocks):
            reach = max(reach, abs(np.float64(top_b[b])))
            mass = factor[b] * total_b[b]
            if mass > heaviest:
                heaviest, best = mass, b
        inside_b = np.zeros(num_blocks, np.bool_)
        inside_b[best] = True
        if inside_ib.shape[0] > 0:
            inside_b = inside_ib[i]
        widen = RANK_ROUNDING + 2.0 * U32 * (reach + 5.0)  # log 64 is below 5
        least = math.inf
        for b in range(num_blocks):
            if inside_b[b] and total_b[b] > 0.0:
                low = factor[b] * total_b[b] * math.exp(-x_b[b] - 2.0 * widen)
                least = min(least, low) if low == low else -1.0  # of a NaN nothing lies below
        reached = 0
        for b in range(num_blocks):
            most = factor[b] * total_b[b] * (1.0 + (1.0 + delta_b[b] * psi_b[b]) * x_b[b])
            reached += not (inside_b[b] | (total_b[b] <= 0.0) | (most < least))
        certified_i[i] = reached == 0


@compiled(parallel=True, reassociate=True)
def kept_mass(statistics_sRb: Singles, factor_Rb: Doubles, keep_Rb: Flags, rows_i: Ints, mass_i: Doubles) -> None:
    """The rows' sums of weights over kept blocks."""
    for i in prange(len(rows_i)):
        r = rows_i[i]
        total = 0.0
        for b in range(keep_Rb.shape[1]):
            total += factor_Rb[r, b] * statistics_sRb[SUM, r, b] if keep_Rb[r, b] else 0.0
        mass_i[i] = total


@compiled(parallel=True)
def largest_shares(key_ib: Doubles, value_ib: Doubles, budget_i: Doubles, head_i: Ints, out_kbH: Singles) -> None:
    """Raises out_kbH float32 [2, blocks, Hkv] to the blocks' shares of the budget, the largest over the rows of a head."""
    blocks, heads = out_kbH.shape[1], out_kbH.shape[2]
    for item in prange(2 * heads):
        k, h = item % 2, item // 2
        shares = key_ib if k == 0 else value_ib
        largest_b = np.zeros(blocks)
        for i in range(len(budget_i)):
            if head_i[i] != h:
                continue
            for b in range(blocks):
                share = shares[i, b] / budget_i[i]
                largest_b[b] = share if share > largest_b[b] else largest_b[b]  # a NaN raises nothing
        for b in range(blocks):
            share = min(largest_b[b], SHARE_MAX)
            if share > out_kbH[k, b, h]:
                out_kbH[k, b, h] = share


NO_FLAGS = np.zeros((0, 0), np.bool_)
NO_DOTS = np.zeros((0, 0))


def evaluate(
    statistics_sRb: Singles, factor_Rb: Doubles, annotations: Annotations, rows_i: Ints, keep_Rb: Flags, value_exact_Rb: Flags,
    norm_i: Doubles, error_i: Doubles, dot_iG: Doubles | None = None, promote_ib: Flags | None = None, fetch_ib: Flags | None = None
) -> Bound:  # fmt: skip
    """As `bound.reference.evaluate`."""
    a, num_blocks = annotations, statistics_sRb.shape[2]
    parts, key, value = np.empty((PARTS, len(rows_i))), np.empty((len(rows_i), num_blocks)), np.empty((len(rows_i), num_blocks))
    bounds(
        statistics_sRb, factor_Rb, keep_Rb, value_exact_Rb, rows_i, a.head_R, NO_FLAGS if promote_ib is None else promote_ib,
        NO_FLAGS if fetch_ib is None else fetch_ib, a.value_spectral_Hb, a.amplitude_Hb, a.value_norm_max_Hb, a.group_value_HG,
        a.group_error_HG, a.underflow_H, a.block_size, a.num_tokens, norm_i, error_i, NO_DOTS if dot_iG is None else dot_iG,
        gamma(a.block_size + 6), gamma(a.block_size + 8) + THETA, parts, key, value,
    )  # fmt: skip
    return Bound(parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], key, value)
