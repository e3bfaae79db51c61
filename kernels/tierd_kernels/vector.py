"""Sixteen FP32 lanes at a time, for compiled kernels: LLVM vectors where Numba's loops do not become vector code by themselves.

Measured on an AVX-512 core, the plain loops of the score pass reach a tenth of these. On other processors LLVM splits the
vectors; results are the same bit for bit where the machine has fused multiply-add, and within the same error bounds elsewhere.

Every function takes contiguous one-dimensional arrays and an element offset into each; none checks either. Lanes of a tile are
sixteen tokens of a block, or sixteen channels of a value; a tile of rows is `ROW_TILE` rows.
"""

from collections.abc import Callable
from typing import Any

import numba.extending
from llvmlite import ir
from numba.core import cgutils, types

intrinsic: Callable[[Callable[..., Any]], Callable[..., None]] = numba.extending.intrinsic
ROW_TILE = 4
LANES = 16
CACHE_LINE = 64
PREFETCH_BLOCKS = 2  # score pass at 8192 tokens from memory, two threads: 1.25 ms all at once, 0.92 spread over the pass, 3 ahead 0.96
FLOAT, INT, LONG, BYTE, SHORT = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(8), ir.IntType(16)
WIDE, WIDE_INT, DOUBLES = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES), ir.VectorType(ir.DoubleType(), LANES)

# e^x = 2^n e^r, r = x - n ln 2 in two steps. See `EXP_ERROR` in score.cpu for what is lost.
LOG2_E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440054690583e-4
EXP_TAYLOR = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
EXP_MIN = -86.0  # below, the weight counts as zero: e^-86 is the last that is surely a normal FP32


class _Lanes:
    """An IR builder with the few vector operations that the kernels need."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def splat(self, scalar: Any, wide: Any = WIDE) -> Any:
        first = self.b.insert_element(ir.Constant(wide, ir.Undefined), scalar, ir.Constant(INT, 0))
        return self.b.shuffle_vector(first, ir.Constant(wide, ir.Undefined), ir.Constant(WIDE_INT, [0] * LANES))

    def constant(self, x: float) -> Any:
        return ir.Constant(WIDE, [x] * LANES)

    def integer(self, x: int) -> Any:
        return ir.Constant(WIDE_INT, [x] * LANES)

    def call(self, name: str, *args: Any) -> Any:
        kinds = [a.type for a in args]
        function = cgutils.get_or_insert_function(
            self.b.module, ir.FunctionType(kinds[0], kinds), f"llvm.{name}.v16f32"
        )
        return self.b.call(function, args)

    def fma(self, a: Any, x: Any, c: Any) -> Any:
        return self.call("fma", a, x, c)

    def fold(self, operation: Callable[[Any, Any], Any], vectors: list[Any]) -> Any:
        """Lane i of the result is the sum (or what `operation` does) over the lanes of vector i; 16 vectors at most. Halves the
        vectors' lanes four times, two vectors into one: a third of the instructions of as many separate reductions."""
        for width in (8, 4, 2, 1):
            vectors = vectors + vectors[-1:] * (len(vectors) % 2)
            groups = range(0, LANES, 2 * width)
            low = [base + lane for source in (0, LANES) for g in groups for base in (source + g,) for lane in range(width)]
            high = [lane + width for lane in low]
            vectors = [
                operation(*(self.b.shuffle_vector(x, y, ir.Constant(WIDE_INT, order)) for order in (low, high)))
                for x, y in zip(vectors[::2], vectors[1::2], strict=True)
            ]
        (folded,) = vectors
        return folded

    def at(self, pointer: Any, index: Any, kind: Any) -> Any:
        return self.b.bitcast(self.b.gep(pointer, [index]), kind.as_pointer())

    def load(self, pointer: Any, index: Any) -> Any:
        where = self.at(pointer, index, WIDE)
        return self.b.load(where, align=4)

    def store(self, x: Any, pointer: Any, index: Any) -> None:
        self.b.store(x, self.at(pointer, index, WIDE), align=4)

    def scalar(self, pointer: Any, index: Any) -> Any:
        return self.splat(self.b.load(self.b.gep(pointer, [index]), align=4))

    def bytes16(self, pointer: Any, index: Any) -> Any:
        return self.b.load(self.at(pointer, index, ir.VectorType(BYTE, LANES)), align=1)

    def halves(self, pointer: Any, index: Any) -> Any:
        """Sixteen finite float16 as FP32: the exponent is moved over by a product with 2^112, subnormals included."""
        bits = self.b.zext(self.b.load(self.at(pointer, index, ir.VectorType(SHORT, LANES)), align=2), WIDE_INT)
        magnitude = self.b.shl(self.b.and_(bits, self.integer(0x7FFF)), self.integer(13))
        sign = self.b.shl(self.b.and_(bits, self.integer(0x8000)), self.integer(16))
        value = self.b.fmul(self.b.bitcast(magnitude, WIDE), self.constant(2.0**112))
        return self.b.bitcast(self.b.or_(self.b.bitcast(value, WIDE_INT), sign), WIDE)

    def exp(self, x: Any) -> Any:
        """e^x of x <= 0, zero below EXP_MIN (minus infinity included)."""
        clamped = self.call("maxnum", x, self.constant(EXP_MIN))
        n = self.call("rint", self.b.fmul(clamped, self.constant(LOG2_E)))
        r = self.fma(n, self.constant(-LN2_HIGH), clamped)
        r = self.fma(n, self.constant(-LN2_LOW), r)
        y = self.constant(EXP_TAYLOR[0])
        for coefficient in EXP_TAYLOR[1:]:
            y = self.fma(y, r, self.constant(coefficient))
        power = self.b.shl(self.b.add(self.b.fptosi(n, WIDE_INT), self.integer(127)), self.integer(23))
        y = self.b.fmul(y, self.b.bitcast(power, WIDE))
        return self.b.select(self.b.fcmp_ordered(">=", x, self.constant(EXP_MIN)), y, self.constant(0.0))


def _lowered(body: Callable[..., None], kinds: tuple[Any, ...]) -> Any:
    """What `intrinsic` wants, from `body(lanes, *args)`: arrays arrive as data pointers, integers as 64-bit values."""

    def generate(target: Any, builder: Any, signature: Any, args: Any) -> Any:
        plain = [
            target.make_array(kind)(target, builder, arg).data if isinstance(kind, types.Array) else arg
            for kind, arg in zip(signature.args, args, strict=True)
        ]
        body(_Lanes(builder), *plain)
        return target.get_dummy_value()

    return types.void(*(k if isinstance(k, types.Array) else types.intp for k in kinds)), generate


def _steps(v: _Lanes, count: Any, step: int) -> Any:
    """Context manager: loops `index` over 0, step, ... below `count`."""
    return cgutils.for_range_slice(v.b, ir.Constant(LONG, 0), count, ir.Constant(LONG, step), LONG)


def _variables(v: _Lanes, number: int, start: float = 0.0) -> list[Any]:
    variables = [cgutils.alloca_once(v.b, WIDE) for _ in range(number)]
    for variable in variables:
        v.b.store(v.constant(start), variable)
    return variables


def _add(v: _Lanes, variable: Any, x: Any) -> None:
    v.b.store(v.b.fadd(v.b.load(variable), x), variable)


def _offset(v: _Lanes, base: Any, *more: Any) -> Any:
    for x in more:
        base = v.b.add(base, ir.Constant(LONG, x) if isinstance(x, int) else x)
    return base


@intrinsic
def widen_halves(_: Any, source: Any, source_at: Any, count: Any, out: Any) -> Any:
    """`count` (a multiple of 16) finite float16 at byte `source_at` of a byte array, to FP32 `out`."""

    def body(v: _Lanes, source: Any, source_at: Any, count: Any, out: Any) -> None:
        with _steps(v, count, LANES) as (i, _):
            v.store(v.halves(source, v.b.add(source_at, v.b.mul(i, ir.Constant(LONG, 2)))), out, i)

    return _lowered(body, (source, source_at, count, out))


@intrinsic
def scale_query(_: Any, q: Any, q_at: Any, d: Any, sigma: Any, offset: Any, out: Any, out_at: Any, sums: Any, sums_at: Any) -> Any:
    """Writes q sigma to `out`, and ||q sigma||_1, ||q sigma||_2^2, q . offset, sum |q offset| to four of `sums` (16 are written)."""

    def body(
        v: _Lanes, q: Any, q_at: Any, d: Any, sigma: Any, offset: Any, out: Any, out_at: Any, sums: Any, sums_at: Any
    ) -> None:
        totals = _variables(v, 4)
        with _steps(v, d, LANES) as (c, _):
            x = v.load(q, v.b.add(q_at, c))
            a = v.b.fmul(x, v.load(sigma, c))
            z = v.b.fmul(x, v.load(offset, c))
            v.store(a, out, v.b.add(out_at, c))
            _add(v, totals[0], v.call("fabs", a))
            v.b.store(v.fma(a, a, v.b.load(totals[1])), totals[1])
            _add(v, totals[2], z)
            _add(v, totals[3], v.call("fabs", z))
        v.store(v.fold(v.b.fadd, [v.b.load(total) for total in totals]), sums, sums_at)

    return _lowered(body, (q, q_at, d, sigma, offset, out, out_at, sums, sums_at))


def _prefetch(v: _Lanes, where: Any) -> None:
    signature = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT, INT, INT])
    function = cgutils.get_or_insert_function(v.b.module, signature, "llvm.prefetch.p0")
    v.b.call(function, [where, *(ir.Constant(INT, x) for x in (0, 2, 1))])  # to read, into the second-level cache, data


@intrinsic
def dot_codes(_: Any, codes: Any, codes_at: Any, later_at: Any, q: Any, d: Any, out: Any, out_at: Any, out_stride: Any) -> Any:
    """Dot products of a tile of keys with a tile of rows: codes int8 [d, 16] at a byte, `q` [ROW_TILE, d] (d a multiple of 4); row r's
    sixteen go to `out_at + r * out_stride`. Two accumulators a row: the sum of each has d / 2 terms in order. The tile at `later_at` is
    prefetched line by line on the way."""

    def body(v: _Lanes, codes: Any, codes_at: Any, later_at: Any, q: Any, d: Any, out: Any, out_at: Any, out_stride: Any) -> None:
        sums, step = _variables(v, 2 * ROW_TILE), CACHE_LINE // LANES
        with _steps(v, d, step) as (c, _):
            _prefetch(v, v.b.gep(codes, [v.b.add(later_at, v.b.mul(c, ir.Constant(LONG, LANES)))]))
            for i in range(step):
                where = _offset(v, codes_at, v.b.mul(v.b.add(c, ir.Constant(LONG, i)), ir.Constant(LONG, LANES)))
                key = v.b.sitofp(v.b.sext(v.bytes16(codes, where), WIDE_INT), WIDE)
                for r in range(ROW_TILE):
                    x, into = v.scalar(q, _offset(v, v.b.mul(d, ir.Constant(LONG, r)), c, i)), sums[2 * r + i % 2]
                    v.b.store(v.fma(x, key, v.b.load(into)), into)
        for r in range(ROW_TILE):
            at = v.b.add(out_at, v.b.mul(out_stride, ir.Constant(LONG, r)))
            v.store(v.b.fadd(v.b.load(sums[2 * r]), v.b.load(sums[2 * r + 1])), out, at)

    return _lowered(body, (codes, codes_at, later_at, q, d, out, out_at, out_stride))


# What `block_weights` leaves in its facts: sum k of row r of the tile at k * ROW_TILE + r, then the rows' top and top |score|.
NUM_SUMS = 7
FACT_TOP, FACT_TOP_ABS, NUM_FACTS = 32, 36, 48


@intrinsic
def block_weights(
    _: Any, dots: Any, size: Any, scales: Any, offsets: Any, counts: Any, norms: Any, errors: Any, out: Any, at: Any,
    stride: Any, facts: Any
) -> Any:  # fmt: skip
    """Weights e^{s - m} of a tile of rows over one block, s = scale (dot + offset), m a row's largest score, and their statistics.

    `dots` [ROW_TILE, size]; `scales`, `offsets`, `counts` [ROW_TILE]; the first counts[r] scores of row r are visible, the others
    weigh zero (a row that sees none gets facts that mean nothing). `norms` and `errors` [size] are nu_t and eta_t. Row r's
    weights go to `at + r * stride`. The sums are those of w, w^2, w nu, (w nu)^2, w eta, w (nu + eta)^2, w eta^2.
    """

    def body(
        v: _Lanes, dots: Any, size: Any, scales: Any, offsets: Any, counts: Any, norms: Any, errors: Any, out: Any, at: Any, stride: Any,
        facts: Any
    ) -> None:  # fmt: skip
        rows = [ir.Constant(LONG, r) for r in range(ROW_TILE)]
        lane, least = ir.Constant(WIDE_INT, list(range(LANES))), v.constant(float("-inf"))
        scale, offset = ([v.scalar(x, r) for r in rows] for x in (scales, offsets))
        count = [v.splat(v.b.trunc(v.b.load(v.b.gep(counts, [r])), INT), WIDE_INT) for r in rows]
        tops = _variables(v, ROW_TILE, float("-inf")) + _variables(v, ROW_TILE)

        def score(r: int, tile: Any) -> tuple[Any, Any]:
            seen = v.b.icmp_signed("<", lane, v.b.sub(count[r], v.splat(v.b.trunc(tile, INT), WIDE_INT)))
            dot = v.load(dots, _offset(v, v.b.mul(size, rows[r]), tile))
            return seen, v.b.fmul(scale[r], v.b.fadd(dot, offset[r]))

        with _steps(v, size, LANES) as (tile, _):
            for r in range(ROW_TILE):
                seen, s = score(r, tile)
                v.b.store(v.call("maxnum", v.b.load(tops[r]), v.b.select(seen, s, least)), tops[r])
                size_s = v.b.select(seen, v.call("fabs", s), v.constant(0.0))
                v.b.store(v.call("maxnum", v.b.load(tops[ROW_TILE + r]), size_s), tops[ROW_TILE + r])
        top = v.fold(lambda x, y: v.call("maxnum", x, y), [v.b.load(x) for x in tops])
        v.store(top, facts, ir.Constant(LONG, FACT_TOP))
        tops_wide = [v.b.shuffle_vector(top, top, ir.Constant(WIDE_INT, [r] * LANES)) for r in range(ROW_TILE)]
        sums = _variables(v, NUM_SUMS * ROW_TILE)
        with _steps(v, size, LANES) as (tile, _):
            nu, eta = v.load(norms, tile), v.load(errors, tile)
            used = v.b.fadd(nu, eta)
            for r in range(ROW_TILE):
                seen, s = score(r, tile)
                w = v.exp(v.b.fsub(v.b.select(seen, s, least), tops_wide[r]))
                v.store(w, out, _offset(v, at, v.b.mul(stride, rows[r]), tile))
                normed, failed = v.b.fmul(w, nu), v.b.fmul(w, eta)
                squares = {1: (w, w), 3: (normed, normed), 5: (v.b.fmul(w, used), used), 6: (failed, eta)}
                for k, x in {0: w, 2: normed, 4: failed}.items():
                    _add(v, sums[k * ROW_TILE + r], x)
                for k, (x, y) in squares.items():
                    where = sums[k * ROW_TILE + r]
                    v.b.store(v.fma(x, y, v.b.load(where)), where)
        values = [v.b.load(x) for x in sums]
        for first in range(0, len(values), LANES):
            v.store(v.fold(v.b.fadd, values[first : first + LANES]), facts, ir.Constant(LONG, first))

    return _lowered(body, (dots, size, scales, offsets, counts, norms, errors, out, at, stride, facts))


@intrinsic
def widen_values(_: Any, codes: Any, at: Any, tokens: Any, half: Any, scales: Any, offsets: Any, groups: Any, group: Any, out: Any) -> Any:
    """code * scale + offset of `tokens` value rows, FP32 [tokens, 2 half]; `half` is a multiple of 16. One rounding each."""

    def body(
        v: _Lanes, codes: Any, at: Any, tokens: Any, half: Any, scales: Any, offsets: Any, groups: Any, group: Any, out: Any
    ) -> None:
        with _steps(v, half, LANES) as (c, _):
            columns = [(x, v.b.udiv(x, group)) for x in (c, v.b.add(c, half))]
            with _steps(v, tokens, 1) as (t, _):
                both = v.b.zext(v.bytes16(codes, _offset(v, at, v.b.mul(t, half), c)), WIDE_INT)
                nibbles = v.b.and_(both, v.integer(15)), v.b.lshr(both, v.integer(4))
                row, first = v.b.mul(t, v.b.mul(half, ir.Constant(LONG, 2))), v.b.mul(t, groups)
                for code, (channel, column) in zip(nibbles, columns, strict=True):
                    which = v.b.add(first, column)
                    x = v.fma(v.b.sitofp(code, WIDE), v.scalar(scales, which), v.scalar(offsets, which))
                    v.store(x, out, v.b.add(row, channel))

    return _lowered(body, (codes, at, tokens, half, scales, offsets, groups, group, out))


@intrinsic
def weigh_values(
    _: Any, values: Any, tokens: Any, d: Any, weights: Any, at: Any, stride: Any, factors: Any, out: Any, out_at: Any, out_stride: Any
) -> Any:
    """Adds factor_r sum_t w_t values_t, for a tile of rows, to float64 `out` at `out_at + r * out_stride`.

    `values` FP32 [tokens, d], row r's weights at `at + r * stride`, `factors` float64 [ROW_TILE]. The sum is FP32, in token order; a row
    whose factor is zero is left as it is, whatever its weights.
    """

    def body(
        v: _Lanes, values: Any, tokens: Any, d: Any, weights: Any, at: Any, stride: Any, factors: Any, out: Any, out_at: Any,
        out_stride: Any
    ) -> None:  # fmt: skip
        rows = [ir.Constant(LONG, r) for r in range(ROW_TILE)]
        factor = [v.b.load(v.b.gep(factors, [r])) for r in rows]
        wide = [v.splat(x, DOUBLES) for x in factor]
        used = [v.b.fcmp_ordered(">", x, ir.Constant(DOUBLES, [0.0] * LANES)) for x in wide]

        def columns(c: Any, number: int) -> None:
            sums = _variables(v, number * ROW_TILE)
            with _steps(v, tokens, 1) as (t, _):
                row = _offset(v, v.b.mul(t, d), c)
                x = [v.load(values, _offset(v, row, LANES * i)) for i in range(number)]
                for r in range(ROW_TILE):
                    w = v.scalar(weights, _offset(v, at, v.b.mul(stride, rows[r]), t))
                    for i in range(number):
                        where = sums[r * number + i]
                        v.b.store(v.fma(w, x[i], v.b.load(where)), where)
            for r in range(ROW_TILE):
                for i in range(number):
                    where = v.at(out, _offset(v, out_at, v.b.mul(out_stride, rows[r]), c, LANES * i), DOUBLES)
                    before = v.b.load(where, align=8)
                    after = v.b.fadd(before, v.b.fmul(wide[r], v.b.fpext(v.b.load(sums[r * number + i]), DOUBLES)))
                    v.b.store(v.b.select(used[r], after, before), where, align=8)

        pairs = v.b.and_(d, ir.Constant(LONG, -2 * LANES))
        with _steps(v, pairs, 2 * LANES) as (c, _):
            columns(c, 2)
        with v.b.if_then(v.b.icmp_signed("<", pairs, d)):
            columns(pairs, 1)

    return _lowered(body, (values, tokens, d, weights, at, stride, factors, out, out_at, out_stride))


@intrinsic
def widen_norms(_: Any, source: Any, source_at: Any, count: Any, factors: Any, floor: Any, out: Any) -> Any:
    """max(x factors[0] factors[1], floor[0]) of `count` (a multiple of 16) bfloat16 x >= 0 at byte `source_at` of a byte array."""

    def body(v: _Lanes, source: Any, source_at: Any, count: Any, factors: Any, floor: Any, out: Any) -> None:
        first, second, least = (v.scalar(x, ir.Constant(LONG, i)) for x, i in ((factors, 0), (factors, 1), (floor, 0)))
        with _steps(v, count, LANES) as (i, _):
            where = v.at(source, v.b.add(source_at, v.b.mul(i, ir.Constant(LONG, 2))), ir.VectorType(SHORT, LANES))
            bits = v.b.shl(v.b.zext(v.b.load(where, align=2), WIDE_INT), v.integer(16))
            x = v.b.fmul(v.b.fmul(v.b.bitcast(bits, WIDE), first), second)
            v.store(v.call("maxnum", x, least), out, i)

    return _lowered(body, (source, source_at, count, factors, floor, out))


@intrinsic
def prefetch(_: Any, source: Any, source_at: Any, count: Any) -> Any:
    """Asks for `count` bytes of a byte array, which may lie past its end, to come into the second-level cache. Records lie pages
    apart, where hardware does not follow: without this the score pass takes 2.6 times as long at 8192 tokens."""

    def body(v: _Lanes, source: Any, source_at: Any, count: Any) -> None:
        with _steps(v, count, CACHE_LINE) as (i, _):
            _prefetch(v, v.b.gep(source, [v.b.add(source_at, i)]))

    return _lowered(body, (source, source_at, count))
