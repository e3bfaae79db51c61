"""A part of a call as kernels want it: its numbers, addresses and arrays, written where a launch carries them in from."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.call import Call
from tierd_kernels.cuda.launch import CALL, PACKED, kernels
from tierd_kernels.cuda.memory import DeviceMemory
from tierd_kernels.cuda.plan import INPUTS, Plan, Shape, plan, terms_of
from tierd_kernels.cuda.sources import SPLITS_MAX
from tierd_kernels.floats import largest_bits, least_bits
from tierd_kernels.in_scratch import RECORDS
from tierd_kernels.layout import Layout

# Dot products with quantised keys stay below 2^32, half of them offsets: 256 channels of 127 * 65504 at most, q within [-1, 1].
SCALE_MAX = 2.0**90
UNIT_MIN, UNIT_MAX = -60, 120  # from below: what FP32 flushes to zero stays far under 2^-40 of a unit


@dataclass
class Part:
    """Query tokens [start, stop) of a call; `tokens`, `full`: what the newest of them sees, the last block perhaps in part."""

    call: Call
    start: int
    stop: int
    n: int = field(init=False)
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.n = self.stop - self.start
        self.tokens = self.call.num_tokens - self.call.q.shape[1] + self.stop

    def full(self, layout: Layout) -> int:
        return min(len(self.call.hot_offsets), -(-self.tokens // layout.block_size))

    def canaries(self, full: int) -> NDArray[np.int64]:
        """The call's canaries among its `full` blocks; those of the first part alone."""
        drawn = self.call.canary_blocks
        if self.start:
            return drawn[:0]
        return drawn if full == len(self.call.hot_offsets) else drawn[drawn < full]


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


def plan_of(layout: Layout, part: Part, per: int) -> Plan:
    """What a part takes, a split being `per` blocks."""
    call, full = part.call, part.full(layout)
    shape = Shape(
        len(call.q) // layout.num_kv_heads, part.n, full, -(-part.tokens // layout.block_size), len(call.group_value_norms), per,
        len(part.canaries(full)), min(call.candidates_max, full),
        0 if call.in_scratch is None else len(call.in_scratch.places),
    )  # fmt: skip
    return plan(layout, shape.rounded())


class Packed:
    """A part with its plan. `splits`; `canaries`; `exact_only`; after `write`, `bases`: where each place of the plan begins."""

    bases: tuple[int, ...]

    def __init__(self, layout: Layout, memory: DeviceMemory, part: Part, tiles: int, split_blocks: int | None) -> None:
        """`tiles`: of all parts of the launch. Raises ValueError for more splits than kernels take."""
        self._layout, self._memory, self.part = layout, memory, part
        self.full = full = part.full(layout)
        self.per = split_blocks or kernels(layout).split_blocks(full, tiles, memory.processors)
        self.splits = -(-full // self.per)
        if self.splits >= SPLITS_MAX:
            raise ValueError(f"{full} blocks are {self.splits} splits; at most {SPLITS_MAX - 1}")
        self.plan, self.exact_only = plan_of(layout, part, self.per), needs_exact(part.call)
        self.canaries = part.canaries(full)
        self.candidates = min(part.call.candidates_max, full)

    def at(self, name: str) -> int:
        """The address of one of CALL's arrays."""
        place, offset = self.plan.places[name]
        return self.bases[place] + offset

    def write(self, bases: tuple[int, ...], number: int) -> None:
        """What the launch carries in, of its part of that number."""
        self.bases = bases
        part, call, full, memory = self.part, self.part.call, self.full, self._memory
        host, start, at = memory.inputs.host, bases[INPUTS] - memory.inputs.at, self.plan.places

        def put(name: str, array: NDArray[Any]) -> None:
            np.ndarray(array.shape, array.dtype, host, start + at[name][1])[...] = array

        blocks = -(-part.tokens // self._layout.block_size)
        put("q", call.q[:, part.start : part.stop])
        put("hot", call.hot_offsets[:full])
        put("original", call.original_offsets[:blocks])
        put("group_values", call.group_value_norms)
        put("group_errors", call.group_error_norms)
        tickets = start + at["tickets"][1]
        host[tickets : tickets + 4 * self.plan.tickets] = 0
        if len(self.canaries):
            put("canaries", self.canaries.astype(np.int32))
        if call.in_scratch is not None:
            put("copied", call.in_scratch.words[: 2 * full * self._layout.num_kv_heads // RECORDS + 1])
            put("copies", call.in_scratch.places)
        terms = terms_of(call.policy, call.relative_to)
        PACKED.pack_into(
            host.data, CALL.itemsize * number,
            part.n, part.tokens, full, self.splits, self.per, len(call.group_value_norms), self._unit(), call.relative_to == "output",
            self.exact_only, len(self.canaries), *terms.numbers, self.candidates, call.softmax_scale,
            *[bases[place] + offset for place, offset in self.plan.pointers], call.rtol, call.atol, *terms.reals,
        )  # fmt: skip

    def _unit(self) -> int:
        """A power of two near the largest norm of a value; no bound depends on it, but FP32's range does."""
        call, layout = self.part.call, self._layout
        if self.full:
            return self._memory.exponent(call.hot_offsets)
        start, size = int(call.original_offsets[0]), layout.original_block_bytes
        raw = self._memory.originals[start + size // 2 : start + size].view(call.q.dtype)
        values = raw.reshape(layout.num_kv_heads, layout.block_size, -1)[:, : self.part.tokens]
        wide = (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values
        largest = float(np.max(np.abs(wide))) * layout.head_dim**0.5
        return int(np.clip(np.frexp(largest)[1], UNIT_MIN, UNIT_MAX)) if largest > 0 else UNIT_MIN
