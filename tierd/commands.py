"""What the engine can be asked to do. Tensors are raw numpy arrays (bfloat16 as uint16 bits); see each field for its shape.

Legend: Hq query heads, Hkv KV heads, n new tokens, d head dimension.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tierd_kernels.layout import Layout
from tierd_kernels.policy import Budget, Coverage

from tierd.errors import InvalidArgument

Raw = NDArray[Any]
COUNT_MAX = 4096  # layers, heads: some state is kept for each from the moment a session opens
RELATIVE_TO = ("values", "output")


@dataclass(frozen=True)
class Geometry:
    """Shape of one model's attention. `softmax_scale` None means `head_dim ** -0.5`.

    Raises InvalidArgument for counts below 1 or above COUNT_MAX, query heads that KV heads do not divide, a scale that is not finite, and
    whatever the storage layout refuses.
    """

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    softmax_scale: float | None = None
    block_size: int = 16
    value_group: int = 16

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_q_heads", "num_kv_heads"):
            if not 1 <= getattr(self, name) <= COUNT_MAX:
                raise InvalidArgument(f"{name} is {getattr(self, name)}; allowed: 1 to {COUNT_MAX}")
        if self.num_q_heads % self.num_kv_heads:
            raise InvalidArgument(
                f"num_q_heads is {self.num_q_heads}; it must be a multiple of num_kv_heads, {self.num_kv_heads}"
            )
        if self.softmax_scale is not None and not math.isfinite(self.softmax_scale):
            raise InvalidArgument(f"softmax_scale is {self.softmax_scale}; it must be finite")
        try:
            self.layout()
        except ValueError as error:
            raise InvalidArgument(str(error)) from None

    def layout(self) -> Layout:
        """How one layer's blocks are stored."""
        return Layout(self.num_kv_heads, self.head_dim, self.block_size, self.value_group, self.dtype)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale


@dataclass(frozen=True)
class Tolerance:
    """budget = atol + rtol * (mean value norm, or norm of the output). Both zero: exact. Raises InvalidArgument."""

    rtol: float
    atol: float = 0.0
    relative_to: str = "values"

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise InvalidArgument(f"{name} is {value}; it must be a finite number of at least 0")
        if self.relative_to not in RELATIVE_TO:
            raise InvalidArgument(f"relative_to is {self.relative_to!r}; allowed: {', '.join(RELATIVE_TO)}")


EXACT = Tolerance(0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Command:
    """`worker`: who asks. `deadline`: on the engine's clock, seconds; a command whose turn comes later fails, undone."""

    worker: str
    deadline: float | None = None


@dataclass(frozen=True)
class OpenSession(Command):
    """-> str, the session's name. `max_tokens` limits every layer and reserves nothing."""

    geometry: Geometry
    tolerance: Tolerance
    policy: Budget | Coverage
    max_tokens: int


@dataclass(frozen=True)
class CloseSession(Command):
    """-> None."""

    session_id: str


@dataclass(frozen=True)
class CloseWorker(Command):
    """-> int, how many of the worker's sessions were closed."""


@dataclass(frozen=True, eq=False)
class Append(Command):
    """-> int, the layer's new length. `k`, `v`: [Hkv, n, d]."""

    session_id: str
    layer: int
    k: Raw
    v: Raw


@dataclass(frozen=True, eq=False)
class Row:
    """One session's queries at one layer: `q` [Hq, n, d]; `k`, `v` [Hkv, m, d] are appended first, or both None.

    The queries are the newest n tokens after that. `tolerance` None: the session's own.
    """

    session_id: str
    layer: int
    q: Raw
    k: Raw | None = None
    v: Raw | None = None
    tolerance: Tolerance | None = None


@dataclass(frozen=True, eq=False)
class Attend(Command):
    """-> list[RowResult], one a row. All rows succeed, or the command fails and nothing stored has changed."""

    rows: list[Row]


@dataclass(eq=False)
class RowResult:
    """`output` like the row's q; `certificate`: name -> array [Hq, n]. `late_records`: originals read from the host while their copy to
    scratch was under way; `prefetch_wait_s`: how long the row's batch had waited for such copies."""

    output: Raw
    certificate: dict[str, NDArray[np.generic]]
    late_records: int = 0
    prefetch_wait_s: float = 0.0


@dataclass(frozen=True)
class Truncate(Command):
    """-> list[int], lengths. Layers longer than `length` tokens are cut to it."""

    session_id: str
    length: int


@dataclass(frozen=True)
class Fork(Command):
    """-> str, a new session of the same worker with the same contents, tolerance and policy."""

    session_id: str


@dataclass(frozen=True)
class Lengths(Command):
    """-> list[int], tokens stored per layer."""

    session_id: str


@dataclass(frozen=True)
class Status(Command):
    """-> dict of numbers and nested dicts, ready for JSON."""
