"""What the engine should hold, as plain lists: session -> layer -> keys and values. No offsets, no references, no undo.

Legend: Hkv KV heads, N tokens, d head dimension.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fake_kernels import GROUP, Norms, attention, group_numbers
from numpy.typing import NDArray
from tierd_kernels.layout import NUMPY_DTYPE

from tierd.commands import (
    Append,
    Attend,
    CloseSession,
    CloseWorker,
    Command,
    Fork,
    Geometry,
    Lengths,
    OpenSession,
    Row,
    Tolerance,
    Truncate,
)
from tierd.errors import InvalidArgument, SessionNotFound, TierdError

Raw = NDArray[Any]


@dataclass
class LayerModel:
    """`k`, `v` [Hkv, N, d]; `blocks`: one object per block, the same object where sessions should share one."""

    k: Raw
    v: Raw
    blocks: list[object] = field(default_factory=list)

    @property
    def length(self) -> int:
        return int(self.k.shape[1])

    def add(self, k: Raw, v: Raw, block_size: int) -> None:
        self.k, self.v = np.concatenate([self.k, k], axis=1), np.concatenate([self.v, v], axis=1)
        self.blocks += [object() for _ in range(-(-self.length // block_size) - len(self.blocks))]

    def cut(self, length: int, block_size: int) -> None:
        if length < self.length:
            self.k, self.v = self.k[:, :length], self.v[:, :length]
            self.blocks = self.blocks[: -(-length // block_size)]
            if length % block_size:
                self.blocks[-1] = object()

    def copy(self, block_size: int) -> "LayerModel":
        blocks = list(self.blocks)
        if self.length % block_size:
            blocks[-1] = object()
        return LayerModel(self.k, self.v, blocks)


@dataclass
class SessionModel:
    worker: str
    geometry: Geometry
    tolerance: Tolerance
    max_tokens: int
    layers: list[LayerModel]

    @property
    def lengths(self) -> list[int]:
        return [layer.length for layer in self.layers]


@dataclass
class Usage:
    """Blocks that should be in use, by geometry: `full` have a hot slot, `originals` are all."""

    full: Counter[Geometry] = field(default_factory=Counter)
    originals: Counter[Geometry] = field(default_factory=Counter)

    def bytes(self) -> tuple[int, int]:
        """(hot, originals), each block's size being a multiple of the pools' alignment."""
        hot = sum(count * g.layout().hot_block_bytes for g, count in self.full.items())
        return hot, sum(count * g.layout().original_block_bytes for g, count in self.originals.items())


class Model:
    """`apply` does what a command should do and checks what it gave back."""

    def __init__(self) -> None:
        self.sessions: dict[str, SessionModel] = {}

    def of_worker(self, worker: str) -> list[str]:
        return [name for name, session in self.sessions.items() if session.worker == worker]

    def refusal(self, command: Command) -> type[TierdError] | None:
        """The error that the command itself deserves, capacity aside."""
        rows = command.rows if isinstance(command, Attend) else [command]
        named = [name for name in (getattr(row, "session_id", None) for row in rows) if name is not None]
        if any(name not in self.sessions or self.sessions[name].worker != command.worker for name in named):
            return SessionNotFound
        if isinstance(command, Truncate):
            wrong = not 0 <= command.length <= max(self.sessions[command.session_id].lengths)
        elif isinstance(command, Append):
            wrong = self._is_wrong(command)
        elif isinstance(command, Attend):
            places = {(row.session_id, row.layer) for row in command.rows}
            wrong = len(places) < len(command.rows) or any(self._is_wrong(row) for row in command.rows)
        else:
            wrong = False
        return InvalidArgument if wrong else None

    def needs(self, command: Command) -> Usage:
        """Blocks that a valid command takes before it gives any back."""
        usage = Usage()
        if isinstance(command, Append | Attend):
            for row in command.rows if isinstance(command, Attend) else [command]:
                if row.k is not None:
                    session = self.sessions[row.session_id]
                    start, size = session.layers[row.layer].length, session.geometry.block_size
                    end = start + row.k.shape[1]
                    usage.originals[session.geometry] += -(-end // size) - -(-start // size)
                    usage.full[session.geometry] += end // size - start // size
        elif isinstance(command, Fork):
            session = self.sessions[command.session_id]
            usage.originals[session.geometry] += sum(length % session.geometry.block_size > 0 for length in session.lengths)
        elif isinstance(command, Truncate):
            session = self.sessions[command.session_id]
            usage.originals[session.geometry] += self._shared_and_torn(session, command.length)
        return usage

    def usage(self) -> Usage:
        """Everything stored, shared blocks counted once."""
        usage, seen = Usage(), set[int]()
        for session in self.sessions.values():
            for layer in session.layers:
                for index, block in enumerate(layer.blocks):
                    if id(block) not in seen:
                        seen.add(id(block))
                        usage.originals[session.geometry] += 1
                        usage.full[session.geometry] += (index + 1) * session.geometry.block_size <= layer.length
        return usage

    def apply(self, command: Command, outcome: Any) -> None:
        """Do what a command that succeeded should do, and check its `outcome`."""
        match command:
            case OpenSession():
                heads, d = command.geometry.num_kv_heads, command.geometry.head_dim
                empty = np.empty((heads, 0, d), NUMPY_DTYPE[command.geometry.dtype])
                layers = [LayerModel(empty, empty) for _ in range(command.geometry.num_layers)]
                self._add(outcome, SessionModel(command.worker, command.geometry, command.tolerance, command.max_tokens, layers))
            case Append():
                assert outcome == self._append(command)
            case Attend():
                for row in command.rows:
                    if row.k is not None:
                        self._append(row)
                for row, result in zip(command.rows, outcome, strict=True):
                    np.testing.assert_array_equal(result.output, self.answer(row))
            case Truncate():
                session = self.sessions[command.session_id]
                for layer in session.layers:
                    layer.cut(command.length, session.geometry.block_size)
                assert outcome == session.lengths
            case Fork():
                old = self.sessions[command.session_id]
                layers = [layer.copy(old.geometry.block_size) for layer in old.layers]
                self._add(outcome, SessionModel(old.worker, old.geometry, old.tolerance, old.max_tokens, layers))
            case Lengths():
                assert outcome == self.sessions[command.session_id].lengths
            case CloseSession():
                del self.sessions[command.session_id]
            case CloseWorker():
                assert outcome == self.close_worker(command.worker)
            case _:
                raise AssertionError(command)

    def close_worker(self, worker: str) -> int:
        names = self.of_worker(worker)
        for name in names:
            del self.sessions[name]
        return len(names)

    def answer(self, row: Row) -> Raw:
        session = self.sessions[row.session_id]
        layer = session.layers[row.layer]
        return attention(layer.k, layer.v, row.q, session.geometry.scale, session.geometry.dtype)

    def norms(self, name: str, layer: int) -> tuple[Norms, Norms]:
        """The two numbers of every complete group, [G, Hkv]."""
        session = self.sessions[name]
        geometry, v = session.geometry, session.layers[layer].v
        groups = [group_numbers(v[:, i * GROUP : (i + 1) * GROUP], geometry.dtype) for i in range(v.shape[1] // GROUP)]
        first, second = (np.array([g[i] for g in groups], np.float32).reshape(-1, geometry.num_kv_heads) for i in (0, 1))
        return first, second

    def _add(self, name: str, session: SessionModel) -> None:
        assert name not in self.sessions
        self.sessions[name] = session

    def _append(self, row: Append | Row) -> int:
        session = self.sessions[row.session_id]
        assert row.k is not None and row.v is not None
        session.layers[row.layer].add(row.k, row.v, session.geometry.block_size)
        return session.layers[row.layer].length

    def _is_wrong(self, row: Append | Row) -> bool:
        session = self.sessions[row.session_id]
        if not 0 <= row.layer < len(session.layers):
            return True
        end = session.layers[row.layer].length + (0 if row.k is None else row.k.shape[1])
        return end > session.max_tokens or (isinstance(row, Row) and not 1 <= row.q.shape[1] <= end)

    def _shared_and_torn(self, session: SessionModel, length: int) -> int:
        size, holders = session.geometry.block_size, Counter[int]()
        for other in self.sessions.values():
            holders.update(id(block) for layer in other.layers for block in layer.blocks)
        torn = [layer.blocks[length // size] for layer in session.layers if length % size and layer.length > length]
        return sum(holders[id(block)] > 1 for block in torn)
