"""Codes, scales and offsets of one record, compiled; x[c, t] is a channel-major float64 copy of the originals."""

import math

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.floats import AWAY as UP
from tierd_kernels.floats import NEAREST, compiled, f16_bits, f16_bits_below, f16_value, widen
from tierd_kernels.layout import KEY_TILE
from tierd_kernels.quantise.norms import Array
from tierd_kernels.quantise.reference import F16_SMALLEST_NORMAL, KEY_CODE_MAX, SUM_ROOM, VALUE_CODE_MAX

Bytes = NDArray[np.uint8]
SMALLEST_NORMAL_BITS = 0x0400


@compiled()
def load(raw: Bytes, dtype_code: int, x: Array) -> bool:
    """Bytes of an original record [B, d] into x [d, B]; whether all of it is finite."""
    flat = np.empty(x.size, np.float32)
    widen(raw, dtype_code, flat)
    finite = True
    for t in range(x.shape[1]):
        for c in range(x.shape[0]):
            x[c, t] = flat[t * x.shape[0] + c]
            finite &= abs(x[c, t]) < math.inf
    return finite


@compiled()
def quantise_keys(
    x: Array, codes: NDArray[np.int8], scales: NDArray[np.uint16], offsets: NDArray[np.uint16]
) -> tuple[bool, int]:
    """Codes of x [d, B] into a record's fields; x becomes the residual over the scale. Returns (usable, C1)."""
    code_sums = np.zeros(x.shape[1], np.int64)
    for c in range(x.shape[0]):
        least, most = x[c, 0], x[c, 0]
        for t in range(1, x.shape[1]):
            least, most = min(least, x[c, t]), max(most, x[c, t])
        offsets[c] = f16_bits(0.5 * (least + most) + 0.0, NEAREST)
        offset = f16_value(offsets[c])
        scales[c] = f16_bits(max(max(most - offset, offset - least) / KEY_CODE_MAX, F16_SMALLEST_NORMAL), UP)
        scale = f16_value(scales[c])
        if not (abs(offset) < math.inf and scale < math.inf):
            return False, 0
        for t in range(x.shape[1]):
            code = np.rint((x[c, t] - offset) / scale)
            codes[((t // KEY_TILE) * x.shape[0] + c - c % 2) * KEY_TILE + t % KEY_TILE * 2 + c % 2] = np.int8(code)
            x[c, t] = (x[c, t] - (code * scale + offset)) / scale
            code_sums[t] += np.int64(abs(code))
    return True, code_sums.max()


@compiled()
def quantise_values(
    x: Array, group: int, codes: Bytes, scales: NDArray[np.uint16], offsets: NDArray[np.uint16]
) -> tuple[bool, float]:
    """Codes of x [d, B] into a record's fields (codes zero before); x becomes the error. Returns usable, amp."""
    dim, tokens = x.shape
    groups, half = -(-dim // group), dim // 2
    amplitude = 0.0
    for t in range(tokens):
        squares = 0.0
        for g in range(groups):
            start, stop = g * group, min(dim, (g + 1) * group)
            least, most = x[start, t], x[start, t]
            for c in range(start + 1, stop):
                least, most = min(least, x[c, t]), max(most, x[c, t])
            at = g * tokens + t
            offsets[at] = f16_bits_below(least + 0.0)
            offset = f16_value(offsets[at])
            scales[at] = f16_bits(max((most - offset) / VALUE_CODE_MAX, F16_SMALLEST_NORMAL), UP)
            scale = f16_value(scales[at])
            if not (abs(offset) < math.inf and scale < math.inf):
                return False, math.inf
            for c in range(start, stop):
                code = np.rint((x[c, t] - offset) / scale)
                x[c, t] = x[c, t] - (code * scale + offset)
                if c < half:
                    codes[t * half + c] |= np.uint8(code)
                else:
                    codes[t * half + c - half] |= np.uint8(np.uint8(code) << np.uint8(4))
            squares += (stop - start) * (VALUE_CODE_MAX * scale + abs(offset)) ** 2
        amplitude = max(amplitude, squares)
    return True, math.sqrt(amplitude) * SUM_ROOM


@compiled()
def field16(record: Bytes, at: int, count: int) -> NDArray[np.uint16]:
    """`count` two-byte numbers of a record, as a view."""
    return record[at : at + 2 * count].view(np.uint16)


@compiled()
def clear(codes: Bytes, scales: NDArray[np.uint16], offsets: NDArray[np.uint16]) -> None:
    """Fields of a block that stays original: everything dequantises to zero."""
    codes[:] = 0
    scales[:] = SMALLEST_NORMAL_BITS
    offsets[:] = 0
