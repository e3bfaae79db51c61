"""Random commands for a model's sessions: mostly sensible ones, some that must be refused.

Legend: Hq query heads, Hkv KV heads, n tokens, d head dimension.
"""

import random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from session_model import Model
from tierd_kernels.policy import Budget

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

# Original blocks of both have 16 KiB; hot blocks do not.
NARROW = Geometry(2, 4, 2, 64, "float32")
WIDE = Geometry(1, 2, 1, 64, "float16", block_size=64)
EXACT, LOOSE = Tolerance(0.0), Tolerance(0.1)
WORKERS = ("a", "b")
SIZES = (1, 1, 2, 5, 15, 16, 17, 33, 64, 1030)
WEIGHTS: dict[type[Command], int] = {
    OpenSession: 4, Append: 8, Attend: 24, Truncate: 8, Fork: 5, Lengths: 2, CloseSession: 2, CloseWorker: 1,
}  # fmt: skip


class CommandFuzz:
    """Draws commands from `seed` for the sessions that `model` holds. `mixed`: two storage layouts, not one."""

    def __init__(self, seed: int, model: Model, mixed: bool) -> None:
        self.random, self.tensors = random.Random(seed), np.random.default_rng(seed)
        self.model, self.geometries = model, [NARROW, WIDE] if mixed else [NARROW]

    def one_in(self, n: int) -> bool:
        return self.random.randrange(n) == 0

    def command(self, *kinds: type[Command], tolerance: Tolerance | None = None) -> Command:
        """One of `kinds`, or of any kind. `tolerance`: of an attend's rows."""
        wanted = kinds or tuple(WEIGHTS)
        kind = self.random.choices(wanted, [WEIGHTS[each] for each in wanted])[0]
        if not self.model.sessions:
            kind = OpenSession
        name = "s-none" if self.one_in(25) or not self.model.sessions else self.random.choice(list(self.model.sessions))
        owner = self.model.sessions[name].worker if name in self.model.sessions else "a"
        worker = "stranger" if self.one_in(25) else owner
        if kind is OpenSession:
            max_tokens = self.random.choice([100, 2200, 2200, 2201])
            return OpenSession(self.random.choice(self.geometries), LOOSE, Budget(), max_tokens, worker=self.random.choice(WORKERS))
        if kind is Append:
            k, v = self._new(self._geometry(name))
            return Append(name, self._layer(name), k, v, worker=worker)
        if kind is Attend:
            return self._attend(name, worker, tolerance)
        if kind is Truncate:
            return Truncate(name, self._cut(name), worker=worker)
        if kind is CloseWorker:
            return CloseWorker(worker=worker)
        assert kind in (Fork, Lengths, CloseSession)
        return kind(session_id=name, worker=worker)

    def row(self, name: str, layer: int, tolerance: Tolerance | None) -> Row:
        """A row with or without keys and values of its own; `tolerance` None: any."""
        geometry = self._geometry(name)
        k, v = self._new(geometry) if self.one_in(2) else (None, None)
        q = self.numbers(geometry.num_q_heads, self.random.choice([1, 1, 2, 3]), geometry)
        return Row(name, layer, q, k, v, tolerance or self.random.choice([None, EXACT, LOOSE]))

    def numbers(self, heads: int, n: int, geometry: Geometry) -> NDArray[Any]:
        return self.tensors.standard_normal((heads, n, geometry.head_dim)).astype(geometry.dtype)

    def full_block(self) -> tuple[str, int, int] | None:
        """(session, layer, index) of some full block, if there is one."""
        filled = [(name, layer, length // session.geometry.block_size) for name, session in self.model.sessions.items()
                  for layer, length in enumerate(session.lengths) if length >= session.geometry.block_size]  # fmt: skip
        if not filled:
            return None
        name, layer, count = self.random.choice(filled)
        return name, layer, self.random.randrange(count)

    def _attend(self, name: str, worker: str, tolerance: Tolerance | None) -> Attend:
        places = [(each, layer) for each in self.model.of_worker(worker) for layer, length in enumerate(self.model.sessions[each].lengths)
                  if length or self.one_in(8)]  # fmt: skip
        picked = self.random.sample(places, min(len(places), self.random.randint(1, 4))) or [(name, self._layer(name))]
        if self.one_in(25):
            picked.append(picked[0])
        return Attend([self.row(*place, tolerance) for place in picked], worker=worker)

    def _cut(self, name: str) -> int:
        """Often within a block of the end, or of a layer that is not the longest."""
        lengths = self.model.sessions[name].lengths if name in self.model.sessions else [0]
        near = max(0, self.random.choice(lengths) - self.random.randrange(40))
        return self.random.choice([near, near, self.random.randint(0, max(lengths) + 1)])

    def _layer(self, name: str) -> int:
        return self._geometry(name).num_layers if self.one_in(25) else self.random.randrange(self._geometry(name).num_layers)

    def _new(self, geometry: Geometry) -> tuple[NDArray[Any], NDArray[Any]]:
        n = self.random.choice(SIZES)
        return self.numbers(geometry.num_kv_heads, n, geometry), self.numbers(geometry.num_kv_heads, n, geometry)

    def _geometry(self, name: str) -> Geometry:
        return self.model.sessions[name].geometry if name in self.model.sessions else NARROW
