"""Kernels that answer exactly, from whatever bytes they are told to read: a wrong or stale place gives a wrong answer.

Legend: Hq query heads, Hkv KV heads, N tokens, n new tokens, d head dimension, B block size, m full blocks.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from tierd_kernels import host
from tierd_kernels.call import Call, Result
from tierd_kernels.copying import Copying
from tierd_kernels.kvview import narrow, widen
from tierd_kernels.layout import NUMPY_DTYPE, Layout, Memory
from tierd_kernels.reads import listed, words_of
from tierd_kernels.select.candidates import largest

Raw = NDArray[Any]
Offsets = NDArray[np.int64]
Norms = NDArray[np.float32]
GROUP = 1024
KEY, VALUE = 0, 1


def attention(k: Raw, v: Raw, q: Raw, scale: float, dtype: str) -> Raw:
    """Softmax attention of the newest n queries [Hq, n, d] over `k`, `v` [Hkv, N, d], all raw, computed in float64."""
    keys, values, queries = (widen(x, dtype) for x in (k, v, q))
    group, n, tokens = len(q) // len(k), q.shape[1], k.shape[1]
    keys, values = np.repeat(keys, group, axis=0), np.repeat(values, group, axis=0)
    hidden = np.arange(tokens)[None, :] > (tokens - n + np.arange(n))[:, None]
    scores = np.where(hidden, -np.inf, scale * queries @ keys.transpose(0, 2, 1))
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    return narrow(weights @ values / weights.sum(axis=2, keepdims=True), dtype)


def group_numbers(v: Raw, dtype: str) -> tuple[Norms, Norms]:
    """Two numbers per head that depend on every value of a group, `v` [Hkv, 1024, d]."""
    wide = widen(v, dtype)
    return np.abs(wide).sum(axis=(1, 2)).astype(np.float32), wide.sum(axis=(1, 2)).astype(np.float32)


class FakeKernels:
    """A hot record starts with the digests of the two original records that it stands for; that is all there is in it.

    Calls with a tolerance read block i of head h from where `Call.locations` says if (i + h) % `promote_every` is 0, and
    report it; what remains they read from the originals, unreported, as real kernels read their codes. Without a tolerance they
    are exact, read originals alone and draw no canaries.

    `faults` are raised, one a launch; a ValueError is returned for the launch's first call instead. `quantise_faults` are raised
    after the hot records were written, `copy_faults` after the copies were, `prepare_faults` before anything is. `unkept` returns a bound
    above its budget. A hot block is `hot_padding` bytes larger than the CPU's.
    """

    def __init__(self, promote_every: int = 1) -> None:
        self.promote_every = promote_every
        self.faults: list[Exception] = []
        self.quantise_faults: list[Exception] = []
        self.copy_faults: list[Exception] = []
        self.prepare_faults: list[Exception] = []
        self.hot_padding = 0
        self.unkept = False
        self.launches: list[int] = []  # calls in each
        self.has_device = False  # which computes while the engine's thread does something else
        self.during: Callable[[], None] = lambda: None  # runs inside every attend

    def reserve(self, hot_bytes: int, scratch_bytes: int, originals_bytes: int) -> Memory:
        return host.reserve(hot_bytes, scratch_bytes, originals_bytes)

    def prepare(self, layout: Layout) -> None:
        if self.prepare_faults:
            raise self.prepare_faults.pop()

    def hot_block_bytes(self, layout: Layout) -> int:
        return layout.hot_block_bytes + self.hot_padding

    def begin_copies(self, memory: Memory, sources: Offsets, targets: Offsets, nbytes: int) -> Copying:
        copying = host.begin_copies(memory, sources, targets, nbytes)
        if self.copy_faults:
            raise self.copy_faults.pop()
        return copying

    def limit_threads(self, count: int) -> None:
        pass

    def quantise_blocks(self, layout: Layout, memory: Memory, original_offsets: Offsets, hot_offsets: Offsets) -> None:
        for original, hot in zip(original_offsets.tolist(), hot_offsets.tolist(), strict=True):
            for head in range(layout.num_kv_heads):
                at = hot + head * layout.hot_record_bytes
                memory.hot[at : at + layout.hot_record_bytes] = 0
                memory.hot[at : at + 16] = self._tags(layout, memory, original, head)
        if self.quantise_faults:
            raise self.quantise_faults.pop()

    def group_norms(
        self, layout: Layout, memory: Memory, original_offsets: Offsets, hot_offsets: Offsets
    ) -> tuple[Norms, Norms]:
        assert original_offsets.shape == hot_offsets.shape == (len(hot_offsets), GROUP // layout.block_size)
        for original, hot in zip(original_offsets.ravel().tolist(), hot_offsets.ravel().tolist(), strict=True):
            assert not self._stale_heads(layout, memory, original, hot), "a group is measured before its blocks are quantised"
        groups = [[_block(layout, memory, at)[VALUE] for at in group] for group in original_offsets.tolist()]
        values, errors = zip(*(group_numbers(np.concatenate(blocks, axis=1), layout.dtype) for blocks in groups), strict=True)
        return np.stack(values), np.stack(errors)

    def attend(
        self, layout: Layout, memory: Memory, calls: list[Call], num_q_heads: int, meanwhile: Callable[[], None]
    ) -> list[Result | Exception]:  # fmt: skip
        self.launches.append(len(calls))
        self.during()
        fault = self.faults.pop() if self.faults else None
        if fault is not None and not isinstance(fault, ValueError):
            raise fault
        answers: list[Result | Exception] = [self._answer(layout, memory, call) for call in calls]
        if self.has_device:
            meanwhile()
        return answers if fault is None else [fault, *answers[1:]]

    def _answer(self, layout: Layout, memory: Memory, call: Call) -> Result:
        for array in call.lasting:
            array.flags.writeable = False  # who writes it all the same is found out
        full = len(call.hot_offsets)
        assert full == call.num_tokens // layout.block_size and len(call.original_offsets) == -(-call.num_tokens // layout.block_size)
        exact = call.rtol == 0.0 and call.atol == 0.0
        heads = layout.num_kv_heads
        promoted = (np.arange(full)[:, None] + np.arange(heads)) % self.promote_every == 0
        both = np.concatenate([np.empty((2, heads, 0, layout.head_dim), NUMPY_DTYPE[layout.dtype])]
                              + [_block(layout, memory, at) for at in call.original_offsets.tolist()], axis=2)  # fmt: skip
        if not exact:
            for kind, locations in enumerate(call.locations(layout)):
                for block, head in np.argwhere(promoted).tolist():
                    tokens = slice(block * layout.block_size, (block + 1) * layout.block_size)
                    both[kind, head, tokens] = _record(layout, memory, int(locations[block, head]))
        k, v = both[:, :, : call.num_tokens]
        return Result(
            attention(k, v, call.q, call.softmax_scale, layout.dtype),
            self._certificate(call, exact, promoted, layout),
            listed(words_of(np.stack([promoted.T, promoted.T])), len(promoted), np.full(heads, exact), call.in_scratch),
            candidates=lambda: largest(np.stack([promoted, promoted]).astype(np.float32) * (not exact), call.candidates_max),
            canary_failures=[] if exact else self._canary_failures(layout, memory, call),
        )

    def _certificate(self, call: Call, exact: bool, promoted: NDArray[np.bool_], layout: Layout) -> dict[str, NDArray[np.generic]]:
        shape = call.q.shape[:2]
        per_head = np.repeat(promoted.sum(axis=0), shape[0] // layout.num_kv_heads)[:, None]
        numbers = {"promoted_key_blocks": per_head, "promoted_value_blocks": per_head, "skipped_blocks": 1, "host_bytes": 10}
        certificate: dict[str, NDArray[np.generic]] = {name: np.full(shape, x) for name, x in numbers.items()}
        certificate["bound"] = np.full(shape, call.rtol * (2.0 if self.unkept else 0.5))
        certificate["budget"] = np.full(shape, call.rtol)
        certificate["exact"] = np.full(shape, exact)
        return certificate

    def _canary_failures(self, layout: Layout, memory: Memory, call: Call) -> list[tuple[int, int]]:
        failures: list[tuple[int, int]] = []
        for block in call.canary_blocks.tolist():
            original, hot = int(call.original_offsets[block]), int(call.hot_offsets[block])
            failures += [(block, head) for head in self._stale_heads(layout, memory, original, hot)]
        return failures

    def _stale_heads(self, layout: Layout, memory: Memory, original: int, hot: int) -> list[int]:
        starts = [hot + head * layout.hot_record_bytes for head in range(layout.num_kv_heads)]
        return [h for h, at in enumerate(starts) if (memory.hot[at : at + 16] != self._tags(layout, memory, original, h)).any()]

    def _tags(self, layout: Layout, memory: Memory, original: int, head: int) -> NDArray[np.uint8]:
        records = (np.ascontiguousarray(_block(layout, memory, original)[kind, head]) for kind in (KEY, VALUE))
        return np.array([xxhash.xxh3_64_intdigest(record.data) for record in records], np.uint64).view(np.uint8)


def _block(layout: Layout, memory: Memory, offset: int) -> Raw:
    """An original block, [2, Hkv, B, d]."""
    raw = memory.originals[offset : offset + layout.original_block_bytes].view(NUMPY_DTYPE[layout.dtype])
    return raw.reshape(2, layout.num_kv_heads, layout.block_size, layout.head_dim)


def _record(layout: Layout, memory: Memory, location: int) -> Raw:
    """One record [B, d], from scratch or from the originals as `location` says."""
    arena, offset = (memory.scratch, location) if location >= 0 else (memory.originals, ~location)
    return arena[offset : offset + layout.original_record_bytes].view(NUMPY_DTYPE[layout.dtype]).reshape(layout.block_size, layout.head_dim)
