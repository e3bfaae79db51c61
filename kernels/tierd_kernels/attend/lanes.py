"""The intrinsics of the value pass. See `vector` for what all of them assume."""

from typing import Any

from llvmlite import ir

from tierd_kernels.vector import (
    DOUBLES,
    LANES,
    LONG,
    ROW_TILE,
    WIDE,
    WIDE_INT,
    Lanes,
    intrinsic,
    lowered,
    plus,
    steps,
    variables,
)


@intrinsic
def weigh_codes(
    _: Any, codes: Any, at: Any, tokens: Any, half: Any, group: Any, scales: Any, shifts: Any, weights: Any, weights_at: Any,
    weights_stride: Any, factors: Any, scaled: Any, sums: Any, out: Any, out_at: Any, out_stride: Any
) -> Any:  # fmt: skip
    """Adds factor_r sum_t w_t (code_t scale_t + shift_t), for a tile of rows, to float64 `out` [2 half] at `out_at + r * out_stride`.

    Codes uint8 [tokens, half] at a byte, two nibbles each, `half` a multiple of 16; `scales`, `shifts` FP32 [groups, tokens], a group
    `group` channels; row r's weights at `weights_at + r * weights_stride`, `factors` float64 [ROW_TILE]. A row whose factor is zero gets
    zero, whatever its weights. Weights meet scales before codes, once per token and group instead of once per element: `scaled`
    float32 [ROW_TILE, groups, tokens] and `sums` [groups, 16] are working space. Sums are FP32: products w scale, in token order, and
    apart from them those of w shift, in sixteen lanes.
    """

    def body(
        v: Lanes, codes: Any, at: Any, tokens: Any, half: Any, group: Any, scales: Any, shifts: Any, weights: Any, weights_at: Any,
        weights_stride: Any, factors: Any, scaled: Any, sums: Any, out: Any, out_at: Any, out_stride: Any
    ) -> None:  # fmt: skip
        rows = [ir.Constant(LONG, r) for r in range(ROW_TILE)]
        wide = [v.splat(v.b.load(v.b.gep(factors, [r])), DOUBLES) for r in rows]
        used = [v.b.fcmp_ordered(">", x, ir.Constant(DOUBLES, [0.0] * LANES)) for x in wide]
        width = v.b.mul(half, ir.Constant(LONG, 2))
        groups = v.b.udiv(plus(v, width, group, -1), group)
        per_row = v.b.mul(groups, tokens)
        with steps(v, groups, 1) as (g, _):
            totals = variables(v, ROW_TILE)
            with steps(v, tokens, LANES) as (t, _):
                where = plus(v, v.b.mul(g, tokens), t)
                scale, shift = v.load(scales, where), v.load(shifts, where)
                for r, row in enumerate(rows):
                    w = v.load(weights, plus(v, weights_at, v.b.mul(weights_stride, row), t))
                    w = v.b.select(used[r], w, v.constant(0.0))
                    v.store(v.b.fmul(w, scale), scaled, plus(v, v.b.mul(per_row, row), where))
                    v.b.store(v.fma(w, shift, v.b.load(totals[r])), totals[r])
            v.store(v.fold(v.b.fadd, [v.b.load(x) for x in totals]), sums, v.b.mul(g, ir.Constant(LONG, LANES)))
        with steps(v, half, LANES) as (c, _):
            columns = [(x, v.b.udiv(x, group)) for x in (c, v.b.add(c, half))]
            totals = variables(v, 2 * ROW_TILE)
            with steps(v, tokens, 1) as (t, _):
                both = v.b.zext(v.bytes16(codes, plus(v, at, v.b.mul(t, half), c)), WIDE_INT)
                nibbles = v.b.and_(both, v.integer(15)), v.b.lshr(both, v.integer(4))
                for i, (code, (_, g)) in enumerate(zip(nibbles, columns, strict=True)):
                    x = v.b.sitofp(code, WIDE)
                    for r, row in enumerate(rows):
                        w, into = v.scalar(scaled, plus(v, v.b.mul(per_row, row), v.b.mul(g, tokens), t)), totals[2 * r + i]
                        v.b.store(v.fma(w, x, v.b.load(into)), into)
            for i, (channel, g) in enumerate(columns):
                for r, row in enumerate(rows):
                    total = v.b.fadd(v.b.load(totals[2 * r + i]), v.scalar(sums, plus(v, v.b.mul(g, ir.Constant(LONG, LANES)), r)))
                    where = v.at(out, plus(v, out_at, v.b.mul(out_stride, row), channel), DOUBLES)
                    v.b.store(v.fma(wide[r], v.b.fpext(total, DOUBLES), v.b.load(where, align=8)), where, align=8)

    return lowered(
        body,
        (
            codes,
            at,
            tokens,
            half,
            group,
            scales,
            shifts,
            weights,
            weights_at,
            weights_stride,
            factors,
            scaled,
            sums,
            out,
            out_at,
            out_stride,
        ),
    )


@intrinsic
def weigh_values(
    _: Any, values: Any, tokens: Any, d: Any, weights: Any, at: Any, stride: Any, factors: Any, out: Any, out_at: Any, out_stride: Any
) -> Any:
    """Adds factor_r sum_t w_t values_t, for a tile of rows, to float64 `out` at `out_at + r * out_stride`.

    `values` FP32 [tokens, d], row r's weights at `at + r * stride`, `factors` float64 [ROW_TILE]. The sum is FP32, in token order; a row
    whose factor is zero is left as it is, whatever its weights.
    """

    def body(
        v: Lanes, values: Any, tokens: Any, d: Any, weights: Any, at: Any, stride: Any, factors: Any, out: Any, out_at: Any,
        out_stride: Any
    ) -> None:  # fmt: skip
        rows = [ir.Constant(LONG, r) for r in range(ROW_TILE)]
        factor = [v.b.load(v.b.gep(factors, [r])) for r in rows]
        wide = [v.splat(x, DOUBLES) for x in factor]
        used = [v.b.fcmp_ordered(">", x, ir.Constant(DOUBLES, [0.0] * LANES)) for x in wide]

        def columns(c: Any, number: int) -> None:
            sums = variables(v, number * ROW_TILE)
            with steps(v, tokens, 1) as (t, _):
                row = plus(v, v.b.mul(t, d), c)
                x = [v.load(values, plus(v, row, LANES * i)) for i in range(number)]
                for r in range(ROW_TILE):
                    w = v.scalar(weights, plus(v, at, v.b.mul(stride, rows[r]), t))
                    for i in range(number):
                        where = sums[r * number + i]
                        v.b.store(v.fma(w, x[i], v.b.load(where)), where)
            for r in range(ROW_TILE):
                for i in range(number):
                    where = v.at(out, plus(v, out_at, v.b.mul(out_stride, rows[r]), c, LANES * i), DOUBLES)
                    before = v.b.load(where, align=8)
                    after = v.b.fadd(before, v.b.fmul(wide[r], v.b.fpext(v.b.load(sums[r * number + i]), DOUBLES)))
                    v.b.store(v.b.select(used[r], after, before), where, align=8)

        pairs = v.b.and_(d, ir.Constant(LONG, -2 * LANES))
        with steps(v, pairs, 2 * LANES) as (c, _):
            columns(c, 2)
        with v.b.if_then(v.b.icmp_signed("<", pairs, d)):
            columns(pairs, 1)

    return lowered(body, (values, tokens, d, weights, at, stride, factors, out, out_at, out_stride))
