"""float16 and bfloat16 conversions against NumPy, every bit pattern, and rounding up."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tierd_kernels import floats

ALL_BITS = np.arange(2**16, dtype=np.uint16)


def test_every_float16_widens_exactly() -> None:
    expected = ALL_BITS.view(np.float16).astype(np.float32)
    out = np.empty(2**16, np.float32)
    floats.widen_f16(ALL_BITS, out)
    np.testing.assert_array_equal(out, expected)
    assert (np.signbit(out) == np.signbit(expected)).all()
    np.testing.assert_array_equal([floats.f16_value(int(bits)) for bits in ALL_BITS], expected)


def test_every_bfloat16_widens_exactly() -> None:
    out = np.empty(2**16, np.float32)
    floats.widen_bf16(ALL_BITS, out)
    assert (out.view(np.uint32) == ALL_BITS.astype(np.uint32) << 16).all()


def test_every_finite_float16_and_bfloat16_narrows_to_itself() -> None:
    for bits in ALL_BITS[ALL_BITS < 0x7C00]:
        assert floats.f16_bits(floats.f16_value(int(bits)), floats.NEAREST) == bits
        assert floats.f16_bits(floats.f16_value(int(bits)), floats.AWAY) == bits
    for bits in ALL_BITS[ALL_BITS < 0x7F80]:
        assert floats.bf16_bits_above(float(floats.as_float64(np.array([bits]))[0])) == bits


numbers = (
    st.floats(width=64) | st.floats(-7e4, 7e4) | st.floats(-1e-4, 1e-4) | st.floats(width=16) | st.floats(width=32)
)


@given(numbers)
def test_float16_rounds_to_nearest_even_as_numpy(x: float) -> None:
    with np.errstate(over="ignore"):
        expected = np.float64(x).astype(np.float16)
    actual = np.array([floats.f16_bits(x, floats.NEAREST)], np.uint16).view(np.float16)[0]
    assert (math.isnan(x) and np.isnan(actual)) or actual == expected


@given(numbers)
def test_rounding_up_is_tight(x: float) -> None:
    x = abs(x)
    single = floats.f32_above(x)
    brain = floats.bf16_bits_above(x)
    if not math.isfinite(x):
        assert single == math.inf and brain == 0x7F80
        return
    assert single >= x and np.float32(single) == single
    assert x == 0.0 or float(np.nextafter(np.float32(single), np.float32(0))) < x
    value, below = floats.as_float64(np.array([brain, max(brain, 1) - 1], np.uint16))
    assert value >= x and (x == 0.0 or below < x)


@given(numbers.filter(math.isfinite))
def test_float16_below_is_tight(x: float) -> None:
    below = np.array([floats.f16_bits_below(x)], np.uint16).view(np.float16)
    above = np.nextafter(below, np.float16(np.inf))
    # As Python floats: NumPy would round x to float16 before comparing.
    assert float(below[0]) <= x < float(above[0]) or (abs(x) > 65504.0 and abs(below[0]) >= 65504.0)


RAW = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32}


@given(st.sampled_from(list(RAW)), st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_the_least_and_the_largest_magnitude_are_found_by_their_bits(dtype: str, seed: int, special: bool, strided: bool) -> None:
    rng, raw = np.random.default_rng(seed), RAW[dtype]
    every = rng.integers(0, np.iinfo(raw).max, (3, 4, 5), raw, endpoint=True)
    if not special:  # no exponent of ones: all are finite
        every &= ~raw(floats.INFINITE[dtype] & -floats.INFINITE[dtype])
    every[rng.random(every.shape) < 0.3] = 0
    x = every[:, 1:3] if strided else every
    values = np.abs(floats.as_float64(x.view({"float16": np.float16, "float32": np.float32}.get(dtype, np.uint16))))
    magnitudes = x & raw(np.iinfo(raw).max >> 1)
    assert floats.is_finite(x, dtype) == np.isfinite(values).all()
    if np.isfinite(values).all():
        assert floats.largest_bits(x) == magnitudes.flat[values.argmax()]
        above = np.where(values > 0, values, np.inf)
        if np.isfinite(above).any():
            assert floats.least_bits(x) == magnitudes.flat[above.argmin()]


@pytest.mark.parametrize("dtype", list(RAW))
def test_neither_infinity_nor_nan_is_finite_but_the_largest_number_is(dtype: str) -> None:
    infinite = floats.INFINITE[dtype]
    for bits, finite in ((infinite - 1, True), (infinite, False), (infinite + 1, False)):
        for sign in (0, np.iinfo(RAW[dtype]).max // 2 + 1):
            assert floats.is_finite(np.array([0, bits | sign, 1], RAW[dtype]), dtype) == finite


def test_bits_of_what_must_not_be_written_and_of_zeros() -> None:
    assert floats.largest_bits(np.frombuffer(b"\0\0\0\xbc", np.float16)) == 0x3C00
    zeros = np.zeros((2, 3), np.float32)
    assert floats.largest_bits(zeros) == 0 and floats.least_bits(zeros) == 0x7FFFFFFF
