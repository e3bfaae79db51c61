"""Conversions that Numba lacks: float16 and bfloat16 bits to float32 and back, and rounding up. Subnormals are kept.

Every function here can be called from compiled code and from Python. "Bits" are the raw uint16 of the format.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])
NEAREST, AWAY, TOWARDS_ZERO = 0, 1, 2
# Fraction bits and smallest normal exponent of each format.
_F16, _BF16, _F32 = (10, -14), (7, -126), (23, -126)
_INF16, _INF_BF16 = 0x7C00, 0x7F80
INFINITE = {"float16": _INF16, "bfloat16": _INF_BF16, "float32": 0x7F800000}  # bits of infinity; those of NaN are above
_MAGNITUDE: dict[int, Any] = {2: np.uint16(0x7FFF), 4: np.uint32(0x7FFFFFFF)}  # all bits but the sign's, by bytes of a number


def compiled(parallel: bool = False, reassociate: bool = False) -> Callable[[Function], Function]:
    """`numba.njit`, typed. No fastmath, for bounds rest on the order and rounding of what is written; `reassociate` lets sums be
    reordered and products be fused, where the error analysis does not depend on it. NaN and infinity are always kept."""
    # Said outright, for a function first compiled inside another inherits what it does not say.
    fastmath = {"reassoc", "contract", "nsz"} if reassociate else False
    options: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy", "parallel": parallel, "fastmath": fastmath}
    decorate: Callable[[Function], Function] = numba.njit(**options)
    return decorate


@compiled()
def _ordinal(magnitude: float, fraction: int, exponent_min: int, direction: int) -> int:
    """Bits, without sign, of a finite magnitude >= 0 in the format; may run past the format's infinity."""
    if magnitude == 0.0:
        return 0  # frexp gives zero the exponent of 0.5
    exponent = max(math.frexp(magnitude)[1] - 1, exponent_min)
    steps = math.ldexp(magnitude, fraction - exponent)
    if direction == NEAREST:
        whole = np.rint(steps)
    elif direction == AWAY:
        whole = math.ceil(steps)
    else:
        whole = math.floor(steps)
    # A carry out of the fraction moves to the next exponent by itself, and subnormals need no case of their own.
    return ((exponent - exponent_min) << fraction) + int(whole)


@compiled()
def f16_bits(x: float, direction: int) -> int:
    """float16 bits of x; `direction` is NEAREST (ties to even), AWAY or TOWARDS_ZERO. Too large: infinity; NaN: NaN."""
    sign = 0x8000 if x < 0.0 else 0
    if x != x:
        return 0x7E00
    if math.isinf(x):
        return sign | _INF16
    return sign | min(_ordinal(abs(x), _F16[0], _F16[1], direction), _INF16)


@compiled()
def bf16_bits(x: float, direction: int) -> int:
    """bfloat16 bits of x, as `f16_bits`."""
    sign = 0x8000 if x < 0.0 else 0
    if x != x:
        return 0x7FC0
    if math.isinf(x):
        return sign | _INF_BF16
    return sign | min(_ordinal(abs(x), _BF16[0], _BF16[1], direction), _INF_BF16)


@compiled()
def f16_bits_below(x: float) -> int:
    """float16 bits of the largest float16 that is at most x; infinity of the sign of x where abs(x) is too large."""
    return f16_bits(x, AWAY if x < 0.0 else TOWARDS_ZERO)


@compiled()
def bf16_bits_above(x: float) -> int:
    """bfloat16 bits of the least bfloat16 that is at least x, for x >= 0. NaN becomes infinity: "not certifiable"."""
    return _INF_BF16 if x != x else bf16_bits(x, AWAY)


@compiled()
def f32_above(x: float) -> float:
    """The least float32 (held in a float64) that is at least x, for x >= 0. NaN becomes infinity."""
    if not x < math.inf:
        return math.inf
    exponent = max(math.frexp(x)[1] - 1, _F32[1])
    rounded = math.ldexp(float(math.ceil(math.ldexp(x, _F32[0] - exponent))), exponent - _F32[0])
    return rounded if rounded <= 3.4028234663852886e38 else math.inf


@compiled()
def f16_value(bits: int) -> float:
    """The value, as float64, of one float16."""
    fraction, exponent = bits & 0x3FF, (bits >> 10) & 0x1F
    if exponent == 0x1F:
        magnitude = math.nan if fraction else math.inf
    elif exponent == 0:
        magnitude = math.ldexp(float(fraction), -24)
    else:
        magnitude = math.ldexp(float(fraction + 1024), exponent - 25)
    return -magnitude if bits & 0x8000 else magnitude


@compiled()
def widen_f16(bits: NDArray[np.uint16], out: NDArray[np.float32]) -> None:
    """float16 bits [n] to float32 [n], exact. Written to vectorise: one shift and one product by a power of two."""
    raw = out.view(np.uint32)
    for i in range(bits.size):
        raw[i] = np.uint32(bits[i] & 0x7FFF) << np.uint32(13)
    for i in range(bits.size):
        out[i] = out[i] * np.float32(2.0**112)
    for i in range(bits.size):
        special = np.uint32(0x7F800000) if (bits[i] & 0x7C00) == 0x7C00 else np.uint32(0)
        raw[i] = raw[i] | special | (np.uint32(bits[i] & 0x8000) << np.uint32(16))


@compiled()
def widen_bf16(bits: NDArray[np.uint16], out: NDArray[np.float32]) -> None:
    """bfloat16 bits [n] to float32 [n], exact."""
    raw = out.view(np.uint32)
    for i in range(bits.size):
        raw[i] = np.uint32(bits[i]) << np.uint32(16)


@compiled()
def widen(raw: NDArray[np.uint8], dtype_code: int, out: NDArray[np.float32]) -> None:
    """Bytes of `out.size` numbers of the type (`layout.DTYPE_CODE`) to float32 [n], exact."""
    if dtype_code == 0:
        widen_f16(raw.view(np.uint16), out)
    elif dtype_code == 1:
        widen_bf16(raw.view(np.uint16), out)
    else:
        out[:] = raw.view(np.float32)


@compiled()
def _largest(bits: NDArray[Any], magnitude: Any) -> Any:
    most = bits.dtype.type(0)
    for i in range(len(bits)):
        most = max(most, bits[i] & magnitude)
    return most


@compiled()
def _least(bits: NDArray[Any], magnitude: Any) -> Any:
    least = magnitude
    for i in range(len(bits)):
        if bits[i] & magnitude:
            least = min(least, bits[i] & magnitude)
    return least


def largest_bits(raw: NDArray[Any]) -> int:
    """Bits, without sign, of the largest magnitude among raw originals (as for `as_float64`) of any shape; zero for none. Numpy's own two
    passes over 4096 halves took a call of decoding 6 us, this 2."""
    return _over_bits(_largest, raw)


def least_bits(raw: NDArray[Any]) -> int:
    """The same of the least magnitude that is not zero; the largest there is where all are."""
    return _over_bits(_least, raw)


def _over_bits(find: Callable[..., Any], raw: NDArray[Any]) -> int:
    magnitude = _MAGNITUDE[raw.itemsize]
    return int(find(raw.reshape(-1).view(magnitude.dtype), magnitude))


def is_finite(raw: NDArray[Any], dtype: str) -> bool:
    """Whether every raw original is; `dtype` names their type."""
    return largest_bits(raw) < INFINITE[dtype]


def prepare() -> None:
    """Compiles what looks at bits, or loads it: also for memory that must not be written, which is another type to the compiler."""
    for dtype in (np.uint16, np.uint32):
        for raw in (np.zeros(1, dtype), np.frombuffer(bytes(4), dtype)):
            largest_bits(raw)
            least_bits(raw)


def as_float64(raw: NDArray[Any]) -> NDArray[np.float64]:
    """Raw originals (float16, float32, or uint16 holding bfloat16 bits), any shape, as float64, exact."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        if raw.dtype == np.uint16:
            return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
        return raw.astype(np.float64)
