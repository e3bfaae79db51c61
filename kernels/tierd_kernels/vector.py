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
DOUBLE = ir.DoubleType()
WIDE, WIDE_INT, DOUBLES = (ir.VectorType(kind, LANES) for kind in (FLOAT, INT, DOUBLE))

# e^x = 2^n e^r, r = x - n ln 2 in two steps. See `EXP_ERROR` in score.cpu for what is lost.
LOG2_E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440054690583e-4
EXP_TAYLOR = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
EXP_MIN = -86.0  # below, the weight counts as zero: e^-86 is the last that is surely a normal FP32


class Lanes:
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
        element = "f64" if kinds[0].element == DOUBLE else "f32"
        name = f"llvm.{name}.v{kinds[0].count}{element}"
        function = cgutils.get_or_insert_function(self.b.module, ir.FunctionType(kinds[0], kinds), name)
        return self.b.call(function, args)

    def fma(self, a: Any, x: Any, c: Any) -> Any:
        return self.call("fma", a, x, c)

    def larger(self, x: Any, y: Any) -> Any:
        """The larger of x and y, y where x is no number: one instruction, where `maxnum` takes three."""
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

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
        clamped = self.larger(x, self.constant(EXP_MIN))
        n = self.call("rint", self.b.fmul(clamped, self.constant(LOG2_E)))
        r = self.fma(n, self.constant(-LN2_HIGH), clamped)
        r = self.fma(n, self.constant(-LN2_LOW), r)
        y = self.constant(EXP_TAYLOR[0])
        for coefficient in EXP_TAYLOR[1:]:
            y = self.fma(y, r, self.constant(coefficient))
        power = self.b.shl(self.b.add(self.b.fptosi(n, WIDE_INT), self.integer(127)), self.integer(23))
        y = self.b.fmul(y, self.b.bitcast(power, WIDE))
        return self.b.select(self.b.fcmp_ordered(">=", x, self.constant(EXP_MIN)), y, self.constant(0.0))


def lowered(body: Callable[..., None], kinds: tuple[Any, ...]) -> Any:
    """What `intrinsic` wants, from `body(lanes, *args)`: arrays arrive as data pointers, integers as 64-bit values."""

    def generate(target: Any, builder: Any, signature: Any, args: Any) -> Any:
        plain = [
            target.make_array(kind)(target, builder, arg).data if isinstance(kind, types.Array) else arg
            for kind, arg in zip(signature.args, args, strict=True)
        ]
        body(Lanes(builder), *plain)
        return target.get_dummy_value()

    return types.void(*(k if isinstance(k, types.Array) else types.intp for k in kinds)), generate


def steps(v: Lanes, count: Any, step: int) -> Any:
    """Context manager: loops `index` over 0, step, ... below `count`."""
    return cgutils.for_range_slice(v.b, ir.Constant(LONG, 0), count, ir.Constant(LONG, step), LONG)


def variables(v: Lanes, number: int, start: float = 0.0) -> list[Any]:
    """Sixteen-lane variables, all lanes `start`."""
    made = [cgutils.alloca_once(v.b, WIDE) for _ in range(number)]
    for variable in made:
        v.b.store(v.constant(start), variable)
    return made


def add(v: Lanes, variable: Any, x: Any) -> None:
    v.b.store(v.b.fadd(v.b.load(variable), x), variable)


def plus(v: Lanes, base: Any, *more: Any) -> Any:
    """The sum of an index and of more, values or Python integers."""
    for x in more:
        base = v.b.add(base, ir.Constant(LONG, x) if isinstance(x, int) else x)
    return base


@intrinsic
def widen_halves(_: Any, source: Any, source_at: Any, count: Any, out: Any) -> Any:
    """`count` (a multiple of 16) finite float16 at byte `source_at` of a byte array, to FP32 `out`."""

    def body(v: Lanes, source: Any, source_at: Any, count: Any, out: Any) -> None:
        with steps(v, count, LANES) as (i, _):
            v.store(v.halves(source, v.b.add(source_at, v.b.mul(i, ir.Constant(LONG, 2)))), out, i)

    return lowered(body, (source, source_at, count, out))


def prefetch_line(v: Lanes, where: Any) -> None:
    signature = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT, INT, INT])
    function = cgutils.get_or_insert_function(v.b.module, signature, "llvm.prefetch.p0")
    v.b.call(function, [where, *(ir.Constant(INT, x) for x in (0, 2, 1))])  # to read, into the second-level cache, data


@intrinsic
def widen_norms(_: Any, source: Any, source_at: Any, count: Any, factors: Any, floor: Any, out: Any) -> Any:
    """max(x factors[0] factors[1], floor[0]) of `count` (a multiple of 16) bfloat16 x >= 0 at byte `source_at` of a byte array."""

    def body(v: Lanes, source: Any, source_at: Any, count: Any, factors: Any, floor: Any, out: Any) -> None:
        first, second, least = (v.scalar(x, ir.Constant(LONG, i)) for x, i in ((factors, 0), (factors, 1), (floor, 0)))
        with steps(v, count, LANES) as (i, _):
            where = v.at(source, v.b.add(source_at, v.b.mul(i, ir.Constant(LONG, 2))), ir.VectorType(SHORT, LANES))
            bits = v.b.shl(v.b.zext(v.b.load(where, align=2), WIDE_INT), v.integer(16))
            x = v.b.fmul(v.b.fmul(v.b.bitcast(bits, WIDE), first), second)
            v.store(v.larger(x, least), out, i)

    return lowered(body, (source, source_at, count, factors, floor, out))


@intrinsic
def copy_line(_: Any, source: Any, source_at: Any, out: Any) -> Any:
    """Sixteen FP32 numbers, or their bits, at byte `source_at` of a byte array. A slice's view costs thirty times as much."""

    def body(v: Lanes, source: Any, source_at: Any, out: Any) -> None:
        v.store(v.b.load(v.at(source, source_at, WIDE), align=4), out, ir.Constant(LONG, 0))

    return lowered(body, (source, source_at, out))


@intrinsic
def prefetch(_: Any, source: Any, source_at: Any, count: Any) -> Any:
    """Asks for `count` bytes of a byte array, which may lie past its end, to come into the second-level cache. Records lie pages
    apart, where hardware does not follow: without this the score pass takes 2.6 times as long at 8192 tokens."""

    def body(v: Lanes, source: Any, source_at: Any, count: Any) -> None:
        with steps(v, count, CACHE_LINE) as (i, _):
            prefetch_line(v, v.b.gep(source, [v.b.add(source_at, i)]))

    return lowered(body, (source, source_at, count))
