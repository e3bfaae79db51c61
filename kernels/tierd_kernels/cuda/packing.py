"""A part of a call as kernels want it: its numbers, addresses and arrays, written where a launch carries them in from."""

import math

import numpy as np

from tierd_kernels.call import Call
from tierd_kernels.cuda.arrangement import Placed
from tierd_kernels.cuda.launch import CALL, PACKED, POINTERS, above
from tierd_kernels.cuda.memory import DeviceMemory
from tierd_kernels.cuda.plan import KEPT_ARRAYS, Shape, terms_of
from tierd_kernels.floats import largest_bits, least_bits
from tierd_kernels.layout import Layout

# Dot products with quantised keys stay below 2^32, half of them offsets: 256 channels of 127 * 65504 at most, q within [-1, 1].
SCALE_MAX = 2.0**90
# Canaries that each call has room for, at least. With room for just those that it draws, or none, calls one after another would seldom have
# the same shape, and those of eight sessions at once hardly ever: it took their host 0.2 ms more a call.
CANARIES_ROOM = 16
UNIT_MIN, UNIT_MAX = -60, 120  # from below: what FP32 flushes to zero stays far under 2^-40 of a unit
HOT, ORIGINAL, GROUP_VALUES, GROUP_ERRORS = map(POINTERS.index, KEPT_ARRAYS)


class Part:
    """Query tokens [start, stop) of a call. `n` of them, of which the newest sees `tokens`, in `full` blocks and perhaps one more, or the
    last one in part; `canaries`: the call's among these blocks, int64, with its first part alone; `exact_only`: see `needs_exact`; `terms`
    of its policy; `kept`: the arrays that stay on the device, in the order of KEPT_ARRAYS, whole also where a part needs less of them."""

    def __init__(self, layout: Layout, call: Call, start: int, stop: int) -> None:
        self.layout, self.call, self.start, self.n = layout, call, start, stop - start
        self.tokens = call.num_tokens - call.q.shape[1] + stop
        self.full = full = min(len(call.hot_offsets), -(-self.tokens // layout.block_size))
        drawn = call.canary_blocks
        self.canaries = drawn[:0] if start else drawn if full == len(call.hot_offsets) else drawn[drawn < full]
        self.exact_only, self.terms = needs_exact(call), terms_of(call.policy)
        self.shape = Shape(
            len(call.q) // layout.num_kv_heads, self.n, full, min(call.candidates_max, full),
            above(max(CANARIES_ROOM, len(self.canaries)), 1),
            above(len(call.in_scratch.places), 3) if call.in_scratch is not None else 0,
        )  # fmt: skip
        self.kept = call.lasting

    def write(self, memory: DeviceMemory, placed: Placed, kept_at: list[int], number: int) -> None:
        """What the launch carries in, of its part of that number; `kept_at`: where `kept` lies."""
        call, canaries = self.call, self.canaries
        placed.q[...] = call.q[:, self.start : self.start + self.n]
        placed.tickets.fill(0)
        if len(canaries):
            placed.canaries[: len(canaries)] = canaries
        if call.in_scratch is not None:
            placed.copied[...] = call.in_scratch.words[: len(placed.copied)]
            placed.copies[: len(call.in_scratch.places)] = call.in_scratch.places
        addresses, terms = placed.addresses.copy(), self.terms
        addresses[HOT], addresses[ORIGINAL], addresses[GROUP_VALUES], addresses[GROUP_ERRORS] = kept_at
        PACKED.pack_into(
            memory.inputs.host.data, CALL.itemsize * number,
            self.n, self.tokens, self.full, placed.splits, placed.per, len(call.group_value_norms), self._unit(memory),
            call.relative_to == "output", self.exact_only, len(canaries), terms.ranks, terms.covers, *terms.numbers, call.preference,
            self.shape.candidates, call.softmax_scale, *addresses, call.rtol, call.atol, *terms.reals,
        )  # fmt: skip

    def _unit(self, memory: DeviceMemory) -> int:
        """A power of two near the largest norm of a value; no bound depends on it, but FP32's range does."""
        call, layout = self.call, self.layout
        if self.full:
            return memory.exponent(call.hot_offsets)
        start, size = int(call.original_offsets[0]), layout.original_block_bytes
        raw = memory.originals[start + size // 2 : start + size].view(call.q.dtype)
        values = raw.reshape(layout.num_kv_heads, layout.block_size, -1)[:, : self.tokens]
        wide = (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values
        largest = float(np.max(np.abs(wide))) * layout.head_dim**0.5
        return int(np.clip(np.frexp(largest)[1], UNIT_MIN, UNIT_MAX)) if largest > 0 else UNIT_MIN


def needs_exact(call: Call) -> bool:
    """Whether a call goes to the exact rungs at once: nothing else would do, FP32 flushes numbers of its queries to zero, or its scores may
    lie beyond FP32 (the queries' power of two joins the scale)."""
    if call.rtol == 0 and call.atol == 0:
        return True
    half = call.q.dtype == np.float16
    if half and abs(call.softmax_scale) * 2.0**16 <= SCALE_MAX:  # which no half reaches
        return False
    fraction = 10 if half else 23 if call.q.dtype == np.float32 else 7  # bits
    if not half and least_bits(call.q) < 1 << fraction:
        return True
    largest = largest_bits(call.q)
    top = np.uint16(largest).view(np.float16) if half else np.uint32(largest << 23 - fraction).view(np.float32)
    return abs(call.softmax_scale) * 2.0 ** math.frexp(top)[1] > SCALE_MAX
