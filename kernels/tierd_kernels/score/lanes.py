"""The intrinsics of the score pass. See `vector` for what all of them assume."""

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from tierd_kernels.bound.statistics import (
    D_NORM,
    DELTA,
    EPSILON,
    MAX_SCORE,
    NUM_STATISTICS,
    NUM_SUMS,
    SUM,
    SUM_ERROR,
    SUM_NORM,
    SUM_SQUARE_ERROR,
    SUM_SQUARE_USED,
    SUM_SQUARES,
    SUM_SQUARES_NORM,
)  # fmt: skip
from tierd_kernels.layout import C1, RK, SK, H
from tierd_kernels.vector import (
    BYTE,
    CACHE_LINE,
    INT,
    LANES,
    LONG,
    ROW_TILE,
    SHORT,
    WIDE,
    WIDE_INT,
    Lanes,
    add,
    intrinsic,
    lowered,
    plus,
    prefetch_line,
    steps,
    variables,
)

# A row's q sigma is counted in steps of its largest size over this: 16-bit integers, whose products with codes and their sums
# over 256 channels stay below 2^31.
STEPS = 32512.0
LEAST = 2.0**-100  # q sigma below this counts as zero: the steps stay normal
MAGIC = 1.5 * 2.0**23  # added to a number below 2^22, rounds it to an integer, which the low bits then hold
# What `round_query` leaves in its sums: ||q sigma||_1 of row r at r, ||q sigma||_2^2 at 4 + r, q . offset at 8 + r, ||offset||_2^2 at
# 12, the row's step at 16 + r.
QUERY_L2, QUERY_OFFSET, OFFSET_L2, QUERY_STEP, NUM_QUERY_SUMS = 4, 8, 12, 16, 32


@intrinsic
def round_query(_: Any, q: Any, q_at: Any, d: Any, sigma: Any, shift: Any, wide: Any, out: Any, sums: Any) -> Any:
    """q sigma of a tile of rows as integers int16 `out` [ROW_TILE, d] of a step each, and `sums`. `wide` float32 [ROW_TILE, d] is working
    space, `shift` the keys' offset."""

    def body(v: Lanes, q: Any, q_at: Any, d: Any, sigma: Any, shift: Any, wide: Any, out: Any, sums: Any) -> None:
        totals, tops = variables(v, 3 * ROW_TILE + 1), variables(v, ROW_TILE)
        rows = [v.b.mul(d, ir.Constant(LONG, r)) for r in range(ROW_TILE)]
        with steps(v, d, LANES) as (c, _):
            scale, z = v.load(sigma, c), v.load(shift, c)
            v.b.store(v.fma(z, z, v.b.load(totals[OFFSET_L2])), totals[OFFSET_L2])
            for r, row in enumerate(rows):
                x = v.load(q, plus(v, q_at, row, c))
                a = v.b.fmul(x, scale)
                size = v.call("fabs", a)
                v.store(a, wide, plus(v, row, c))
                add(v, totals[r], size)
                v.b.store(v.larger(size, v.b.load(tops[r])), tops[r])
                for k, (one, other) in {QUERY_L2: (a, a), QUERY_OFFSET: (x, z)}.items():
                    v.b.store(v.fma(one, other, v.b.load(totals[k + r])), totals[k + r])
        v.store(v.fold(v.b.fadd, [v.b.load(x) for x in totals]), sums, ir.Constant(LONG, 0))
        top = v.larger(v.fold(v.larger, [v.b.load(x) for x in tops]), v.constant(LEAST))
        v.store(v.b.fmul(top, v.constant(1.0 / STEPS)), sums, ir.Constant(LONG, QUERY_STEP))
        inverse = v.b.fdiv(v.constant(STEPS), top)
        inverses = [v.b.shuffle_vector(inverse, inverse, ir.Constant(WIDE_INT, [r] * LANES)) for r in range(ROW_TILE)]
        with steps(v, d, LANES) as (c, _):
            for r, row in enumerate(rows):
                where = plus(v, row, c)
                rounded = v.b.bitcast(v.fma(v.load(wide, where), inverses[r], v.constant(MAGIC)), WIDE_INT)
                v.b.store(v.b.trunc(rounded, SHORTS), v.at(out, where, SHORTS), align=2)

    return lowered(body, (q, q_at, d, sigma, shift, wide, out, sums))


SHORTS, PAIRS, PAIR_PRODUCTS = (ir.VectorType(kind, n) for kind, n in ((SHORT, LANES), (SHORT, 2 * LANES), (INT, 2 * LANES)))


def _dot_pairs(v: Lanes, x: Any, y: Any) -> Any:
    """Lane i of the int32 result: x[2i] y[2i] + x[2i + 1] y[2i + 1] of int16. LLVM makes one instruction of it and of the sum that it is
    added to where the processor has one (vpdpwssd), and the same numbers everywhere."""
    product = v.b.mul(v.b.sext(x, PAIR_PRODUCTS), v.b.sext(y, PAIR_PRODUCTS))
    even, odd = (v.b.shuffle_vector(product, product, ir.Constant(WIDE_INT, list(range(i, 2 * LANES, 2)))) for i in (0, 1))
    return v.b.add(even, odd)


@intrinsic
def dot_codes(_: Any, codes: Any, codes_at: Any, later_at: Any, q: Any, d: Any, sums: Any, out: Any, out_at: Any, out_stride: Any) -> Any:
    """Dot products of a tile of keys with a tile of rows: codes int8 [d / 2, 16, 2] at a byte, `q` int16 [ROW_TILE, d] and `sums` from
    `round_query`, d a multiple of 4; row r's sixteen go to `out_at + r * out_stride`, float32, q's step multiplied in. The sums are exact
    but for that product. The tile at `later_at` is prefetched line by line on the way."""

    def body(v: Lanes, codes: Any, codes_at: Any, later_at: Any, q: Any, d: Any, sums: Any, out: Any, out_at: Any, out_stride: Any) -> None:
        totals, lines = [cgutils.alloca_once(v.b, WIDE_INT) for _ in range(2 * ROW_TILE)], CACHE_LINE // (2 * LANES)
        for total in totals:
            v.b.store(v.integer(0), total)
        pairs = v.b.lshr(d, ir.Constant(LONG, 1))
        with steps(v, pairs, lines) as (pair, _):
            at = v.b.mul(pair, ir.Constant(LONG, 2 * LANES))
            prefetch_line(v, v.b.gep(codes, [v.b.add(later_at, at)]))
            for i in range(lines):
                where = v.at(codes, plus(v, codes_at, at, 2 * LANES * i), ir.VectorType(BYTE, 2 * LANES))
                key = v.b.sext(v.b.load(where, align=1), PAIRS)
                for r in range(ROW_TILE):
                    row = v.b.gep(v.b.bitcast(q, INT.as_pointer()), [plus(v, v.b.mul(pairs, ir.Constant(LONG, r)), pair, i)])
                    x = v.b.bitcast(v.splat(v.b.load(row, align=2), WIDE_INT), PAIRS)
                    into = totals[2 * r + i % 2]
                    v.b.store(v.b.add(v.b.load(into), _dot_pairs(v, key, x)), into)
        for r in range(ROW_TILE):
            whole = v.b.sitofp(v.b.add(v.b.load(totals[2 * r]), v.b.load(totals[2 * r + 1])), WIDE)
            step = v.scalar(sums, ir.Constant(LONG, QUERY_STEP + r))
            v.store(v.b.fmul(whole, step), out, plus(v, out_at, v.b.mul(out_stride, ir.Constant(LONG, r))))

    return lowered(body, (codes, codes_at, later_at, q, d, sums, out, out_at, out_stride))


# What `block_weights` and `block_errors` leave in facts: statistic k of row r of the tile at k * ROW_TILE + r, and behind the
# statistics the rows' largest |score|.
FACT_TOP_ABS = NUM_STATISTICS * ROW_TILE
NUM_FACTS = FACT_TOP_ABS + LANES
QUAD = ir.VectorType(ir.FloatType(), ROW_TILE)


@intrinsic
def block_weights(
    _: Any, dots: Any, size: Any, scales: Any, offsets: Any, counts: Any, norms: Any, errors: Any, out: Any, at: Any,
    stride: Any, facts: Any
) -> Any:  # fmt: skip
    """Weights e^{s - m} of a tile of rows over one block, s = scale (dot + offset), m a row's largest score, and their statistics up to
    SUM_SQUARE_ERROR.

    `dots` [ROW_TILE, size] is overwritten; `scales`, `offsets`, `counts` [ROW_TILE]; the first counts[r] scores of row r are visible, the
    others weigh zero (a row that sees none gets facts that mean nothing). `norms` and `errors` [size] are nu_t and eta_t. Row r's weights
    go to `at + r * stride`.
    """

    def body(
        v: Lanes, dots: Any, size: Any, scales: Any, offsets: Any, counts: Any, norms: Any, errors: Any, out: Any, at: Any, stride: Any,
        facts: Any
    ) -> None:  # fmt: skip
        rows = [ir.Constant(LONG, r) for r in range(ROW_TILE)]
        lane, least = ir.Constant(WIDE_INT, list(range(LANES))), v.constant(float("-inf"))
        scale, offset = ([v.scalar(x, r) for r in rows] for x in (scales, offsets))
        count = [v.splat(v.b.trunc(v.b.load(v.b.gep(counts, [r])), INT), WIDE_INT) for r in rows]
        tops = variables(v, ROW_TILE, float("-inf")) + variables(v, ROW_TILE)
        with steps(v, size, LANES) as (tile, _):
            for r in range(ROW_TILE):
                where = plus(v, v.b.mul(size, rows[r]), tile)
                seen = v.b.icmp_signed("<", lane, v.b.sub(count[r], v.splat(v.b.trunc(tile, INT), WIDE_INT)))
                s = v.b.fmul(scale[r], v.b.fadd(v.load(dots, where), offset[r]))
                masked = v.b.select(seen, s, least)
                v.store(masked, dots, where)
                v.b.store(v.larger(masked, v.b.load(tops[r])), tops[r])
                size_s = v.b.select(seen, v.call("fabs", s), v.constant(0.0))
                v.b.store(v.larger(size_s, v.b.load(tops[ROW_TILE + r])), tops[ROW_TILE + r])
        top = v.fold(v.larger, [v.b.load(x) for x in tops])
        v.store(top, facts, ir.Constant(LONG, MAX_SCORE * ROW_TILE))
        v.store(v.b.shuffle_vector(top, top, ir.Constant(WIDE_INT, [4, 5, 6, 7] * 4)), facts, ir.Constant(LONG, FACT_TOP_ABS))
        tops_wide = [v.b.shuffle_vector(top, top, ir.Constant(WIDE_INT, [r] * LANES)) for r in range(ROW_TILE)]
        sums = variables(v, NUM_SUMS * ROW_TILE)
        with steps(v, size, LANES) as (tile, _):
            nu, eta = v.load(norms, tile), v.load(errors, tile)
            used, failed = v.b.fadd(nu, eta), v.b.fmul(eta, eta)
            used = v.b.fmul(used, used)
            for r in range(ROW_TILE):
                w = v.exp(v.b.fsub(v.load(dots, plus(v, v.b.mul(size, rows[r]), tile)), tops_wide[r]))
                v.store(w, out, plus(v, at, v.b.mul(stride, rows[r]), tile))
                normed = v.b.fmul(w, nu)
                factors = {
                    SUM_SQUARES: (w, w), SUM_NORM: (w, nu), SUM_SQUARES_NORM: (normed, normed), SUM_ERROR: (w, eta),
                    SUM_SQUARE_USED: (w, used), SUM_SQUARE_ERROR: (w, failed),
                }  # fmt: skip
                add(v, sums[r], w)
                for k, (x, y) in factors.items():
                    where = sums[(k - SUM) * ROW_TILE + r]
                    v.b.store(v.fma(x, y, v.b.load(where)), where)
        values = [v.b.load(x) for x in sums]
        for first in range(0, len(values), LANES):
            v.store(v.fold(v.b.fadd, values[first : first + LANES]), facts, ir.Constant(LONG, SUM * ROW_TILE + first))

    return lowered(body, (dots, size, scales, offsets, counts, norms, errors, out, at, stride, facts))


@intrinsic
def block_errors(_: Any, sums: Any, notes: Any, scales: Any, q_norms: Any, q_norms_at: Any, constants: Any, facts: Any) -> Any:
    """DELTA, D_NORM and EPSILON of a tile of rows over a quantised block into `facts`, which hold the rows' largest |score| (see
    CERTIFICATE.md, sections 3 and 10). `sums` from `round_query`, `notes` the record's annotations, `q_norms` from `q_norms_at` on the
    norms of q; `constants`: gamma, the floors under a product and a score, roundings of a score, the root of B, and the room for FP32."""

    def body(v: Lanes, sums: Any, notes: Any, scales: Any, q_norms: Any, q_norms_at: Any, constants: Any, facts: Any) -> None:
        def four(pointer: Any, at: Any) -> Any:
            return v.b.load(v.at(pointer, plus(v, ir.Constant(LONG, 0), at), QUAD), align=4)

        def all_four(pointer: Any, at: int) -> Any:
            whole = v.scalar(pointer, ir.Constant(LONG, at))
            return v.b.shuffle_vector(whole, whole, ir.Constant(ir.VectorType(INT, ROW_TILE), list(range(ROW_TILE))))

        gamma, product_floor, score_floor, roundings, root, room = (all_four(constants, i) for i in range(6))
        l1, l2, z2 = four(sums, 0), v.call("sqrt", four(sums, QUERY_L2)), v.call("sqrt", all_four(sums, OFFSET_L2))
        size, times, summed = v.call("fabs", four(scales, 0)), v.b.fmul, v.b.fadd
        half_step = times(four(sums, QUERY_STEP), ir.Constant(QUAD, [0.5] * ROW_TILE))
        limb = times(half_step, all_four(notes, C1))
        by_size, by_norm = times(all_four(notes, H), l1), times(all_four(notes, RK), l2)
        delta = times(size, summed(v.b.select(v.b.fcmp_ordered("<", by_norm, by_size), by_norm, by_size), limb))
        dnorm = times(size, summed(times(all_four(notes, SK), l2), times(root, limb)))
        rounded = summed(times(l1, ir.Constant(QUAD, [128.0] * ROW_TILE)), times(four(q_norms, q_norms_at), z2))
        eps = times(size, summed(times(gamma, rounded), product_floor))
        eps = summed(eps, summed(times(roundings, four(facts, FACT_TOP_ABS)), score_floor))
        for k, x in {DELTA: summed(delta, eps), D_NORM: summed(dnorm, times(root, eps)), EPSILON: eps}.items():
            v.b.store(times(x, room), v.at(facts, ir.Constant(LONG, k * ROW_TILE), QUAD), align=4)

    return lowered(body, (sums, notes, scales, q_norms, q_norms_at, constants, facts))
