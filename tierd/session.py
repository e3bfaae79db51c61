"""One sequence's cache: what is stored at each layer, and how it grows, shrinks and is shared.

Legend: Hkv KV heads, n new tokens, d head dimension, B block size, G complete groups of `GROUP_TOKENS`.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tierd_kernels.layout import Layout, Memory
from tierd_kernels.policy import Budget, Coverage

from tierd.commands import Geometry, Raw, Tolerance
from tierd.notes import Looks
from tierd.residency import BlockTable, Ids, Places, Residency

GROUP_TOKENS = 1024
NO_IDS: Ids = np.empty(0, dtype=np.int64)


class Quantiser(Protocol):
    """The kernels that storing needs. Offsets are int64 byte offsets of blocks in `memory`."""

    def quantise_blocks(
        self, layout: Layout, memory: Memory, original_offsets: NDArray[np.int64], hot_offsets: NDArray[np.int64]
    ) -> None:
        """Write hot records."""
        ...

    def group_norms(
        self, layout: Layout, memory: Memory, original_offsets: NDArray[np.int64], hot_offsets: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Spectral bounds (SV, SR), float32 [G, Hkv] each, of groups' values and of their errors; offsets [G, blocks of a group]."""
        ...


@dataclass
class LayerState:
    """`ids`: the blocks in order, a tail last if `length` is not a multiple of B. Group arrays are [G, Hkv]. `calls`: attends
    answered; `looks`: tiering's at them. `hot_offsets`, `original_offsets`: of its first blocks, see `Session.offsets`."""

    group_value_norms: NDArray[np.float32]
    group_error_norms: NDArray[np.float32]
    length: int = 0
    ids: Ids = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    places: Places = field(default_factory=Places)
    calls: int = 0
    looks: Looks = field(default_factory=Looks)
    hot_offsets: Ids = field(default_factory=lambda: NO_IDS)
    original_offsets: Ids = field(default_factory=lambda: NO_IDS)


@dataclass(frozen=True)
class Savepoint:
    """A layer as it was before an append."""

    layer: int
    length: int


class Session:
    """All layers of one sequence. Every method either succeeds or leaves what is stored as it was."""

    def __init__(
        self, session_id: str, worker: str, geometry: Geometry, tolerance: Tolerance, policy: Budget | Coverage, max_tokens: int,
        residency: Residency, kernels: Quantiser, family: str = "",
    ) -> None:  # fmt: skip
        """`family`: of the session that this one is a fork of."""
        self.session_id = session_id
        self.family = family or session_id
        self.worker = worker
        self.geometry = geometry
        self.tolerance = tolerance
        self.policy = policy
        self.max_tokens = max_tokens
        self.layout = geometry.layout()
        self.table: BlockTable = residency.table(self.layout)
        self._residency = residency
        self._kernels = kernels
        heads = self.layout.num_kv_heads
        self.layers = [
            LayerState(np.zeros((0, heads), np.float32), np.zeros((0, heads), np.float32))
            for _ in range(geometry.num_layers)
        ]

    @property
    def lengths(self) -> list[int]:
        return [state.length for state in self.layers]

    def full_ids(self, layer: int) -> Ids:
        """Ids of the layer's full blocks."""
        state = self.layers[layer]
        return state.ids[: state.length // self.layout.block_size]

    def offsets(self, layer: int) -> tuple[Ids, Ids]:
        """Byte offsets of the layer's full blocks in hot, and of all its blocks in the originals; the same arrays from call to call, for
        each changes with every sixteenth token only, and not with the same; the next ones then begin in the same memory. Not to be written.
        """
        state, table = self.layers[layer], self.table
        state.hot_offsets = _extended(state.hot_offsets, table.hot_offset, self.full_ids(layer))
        state.original_offsets = _extended(state.original_offsets, table.original_offset, state.ids)
        return state.hot_offsets, state.original_offsets

    def append(self, layer: int, k: Raw, v: Raw) -> Savepoint:
        """Store `k`, `v` [Hkv, n, d] behind what the layer has; full blocks are quantised.

        Raises CapacityExceeded, or CertificateUnavailable (an original of the group that gets complete is corrupt).
        """
        state, block_size = self.layers[layer], self.layout.block_size
        saved = Savepoint(layer, state.length)
        end = state.length + k.shape[1]
        fresh = self.table.add_tails(-(-end // block_size) - len(state.ids))
        if len(fresh):  # once in a block's tokens
            state.ids = np.concatenate([state.ids, fresh])
        try:
            filling = state.ids[state.length // block_size : end // block_size]
            if len(filling):
                self.table.give_hot(filling)
            self._write(state, k, v)
            state.length = end
            if len(filling):
                self._seal(state, filling)
        except BaseException:
            self.undo(saved)
            raise
        return saved

    def undo(self, saved: Savepoint) -> None:
        """Take back the append that returned `saved`; it must be the layer's latest change."""
        state, block_size = self.layers[saved.layer], self.layout.block_size
        if saved.length % block_size:
            tail = int(state.ids[saved.length // block_size])
            if self.table.hot_offset[tail] >= 0:
                self._residency.reopen(self.table, tail)
        self._cut(state, saved.length)

    def truncate(self, length: int) -> None:
        """Cut every longer layer to `length` tokens; a full block that is cut into becomes a tail from its originals.

        Raises CapacityExceeded (a shared block must be copied) or CertificateUnavailable (its originals are corrupt).
        """
        block_size = self.layout.block_size
        index, kept = divmod(length, block_size)
        cut = [state for state in self.layers if state.length > length]
        torn = [s for s in cut if kept and self.table.hot_offset[s.ids[index]] >= 0]
        for state in torn:
            self.table.require_sound(int(state.ids[index]))
        shared = [s for s in torn if self.table.references[s.ids[index]] > 1]
        for state, fresh in zip(shared, self.table.add_tails(len(shared)), strict=True):
            old = state.ids[index : index + 1].copy()
            self._copy_tail(int(old[0]), int(fresh), kept)
            state.ids[index] = fresh
            self._residency.release(self.table, old)
        for state in cut:
            if kept and self.table.hot_offset[state.ids[index]] >= 0:
                self._residency.reopen(self.table, int(state.ids[index]))
            self._cut(state, length)

    def fork(self, session_id: str) -> "Session":
        """A session with the same contents: full blocks shared, tails copied. Raises CapacityExceeded."""
        child = Session(
            session_id,
            self.worker,
            self.geometry,
            self.tolerance,
            self.policy,
            self.max_tokens,
            self._residency,
            self._kernels,
            self.family,
        )
        block_size = self.layout.block_size
        tailed = [i for i, state in enumerate(self.layers) if state.length % block_size]
        tails = dict(zip(tailed, self.table.add_tails(len(tailed)).tolist(), strict=True))
        for layer, (mine, theirs) in enumerate(zip(self.layers, child.layers, strict=True)):
            self._residency.retain(self.table, self.full_ids(layer))
            theirs.ids, theirs.length = mine.ids.copy(), mine.length
            theirs.group_value_norms, theirs.group_error_norms = mine.group_value_norms, mine.group_error_norms
            if layer in tails:
                self._copy_tail(int(mine.ids[-1]), tails[layer], mine.length % block_size)
                theirs.ids[-1] = tails[layer]
        return child

    def close(self) -> None:
        """Give everything back."""
        for state in self.layers:
            self._cut(state, 0)

    def measure_again(self, block: int) -> None:
        """After `block` was quantised anew: renew what this session derived from it."""
        blocks_per_group = GROUP_TOKENS // self.layout.block_size
        for state in self.layers:
            for index in np.flatnonzero(state.ids == block).tolist():
                group = index // blocks_per_group
                if group < len(state.group_value_norms):
                    values, errors = self._measure_groups(state, group, group + 1, NO_IDS)
                    state.group_value_norms, state.group_error_norms = (
                        state.group_value_norms.copy(),
                        state.group_error_norms.copy(),
                    )
                    state.group_value_norms[group], state.group_error_norms[group] = values[0], errors[0]

    def _write(self, state: LayerState, k: Raw, v: Raw) -> None:
        block_size, done, n = self.layout.block_size, 0, k.shape[1]
        while done < n:
            index, start = divmod(state.length + done, block_size)
            count = min(block_size - start, n - done)
            keys, values = self.table.originals(int(state.ids[index]))
            keys[:, start : start + count] = k[:, done : done + count]
            values[:, start : start + count] = v[:, done : done + count]
            done += count

    def _seal(self, state: LayerState, filling: Ids) -> None:
        table = self.table
        memory = table.arenas.memory
        self._kernels.quantise_blocks(self.layout, memory, table.original_offset[filling], table.hot_offset[filling])
        table.seal(filling)
        measured, complete = len(state.group_value_norms), state.length // GROUP_TOKENS
        if measured < complete:
            values, errors = self._measure_groups(state, measured, complete, filling)
            state.group_value_norms = np.concatenate([state.group_value_norms, values])
            state.group_error_norms = np.concatenate([state.group_error_norms, errors])

    def _measure_groups(self, state: LayerState, start: int, stop: int, fresh: Ids) -> tuple[Any, Any]:
        """Norms of complete groups [start, stop). Their originals enter a bound here, so all but the `fresh` ones are checked first."""
        count = GROUP_TOKENS // self.layout.block_size
        ids = state.ids[start * count : stop * count].reshape(-1, count)
        for block in np.setdiff1d(ids, fresh).tolist():
            self.table.require_sound(block)
        memory = self.table.arenas.memory
        return self._kernels.group_norms(
            self.layout, memory, self.table.original_offset[ids], self.table.hot_offset[ids]
        )

    def _copy_tail(self, source: int, target: int, num_tokens: int) -> None:
        for old, new in zip(self.table.originals(source), self.table.originals(target), strict=True):
            new[:, :num_tokens] = old[:, :num_tokens]

    def _cut(self, state: LayerState, length: int) -> None:
        """Forget blocks and groups beyond `length`; the block that `length` falls into must already be a tail."""
        num_blocks = -(-length // self.layout.block_size)
        gone, state.ids = state.ids[num_blocks:], state.ids[:num_blocks].copy()
        state.hot_offsets = state.original_offsets = NO_IDS
        state.length = length
        groups = length // GROUP_TOKENS
        state.group_value_norms, state.group_error_norms = (
            state.group_value_norms[:groups],
            state.group_error_norms[:groups],
        )
        self._residency.release(self.table, gone)


def _extended(known: Ids, column: Ids, ids: Ids) -> Ids:
    """`column` at `ids`, of which `known` has the first; the same array where that is all. Else a longer one, in the same memory where that
    has room: what was found of the elements there needs no second look (`tierd_kernels/cuda/kept.py::Largest`). Earlier arrays stay."""
    count, total = len(known), len(ids)
    if count == total:
        return known
    room = known if known.base is None else known.base
    if len(room) < total:
        room = np.empty(total + total // 8 + 8, np.int64)
        room[:count] = known
    room[count:total] = column[ids[count:]]
    return room[:total]
