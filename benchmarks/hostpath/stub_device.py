"""A CUDA device that does nothing: the emulator's, but kernels only leave behind what the host looks at afterwards.

The backend, its packing, its answers and its copies are the real ones; what a call's kernels would have found is told beforehand
(`Script`), and its output is its queries, so that an answer to another call is noticed.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from device import emulated

QUIET = ("attend", "finish", "finish_many", "pick", "promote", "cover", "rank", "canary", "widen")


@dataclass
class Script:
    """What the next call finds: `promoted` int64 [n, 2] of (KV head, block), read by the head's first row, keys and values; `near` int32
    [Hkv, c], blocks in rising order that are candidates besides. `q_bytes`: of a call's queries."""

    q_bytes: int
    promoted: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))
    near: NDArray[np.int32] = field(default_factory=lambda: np.empty((0, 0), np.int32))


def at(address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """The stub's memory at an address."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(int(address)), np.uint8).view(dtype).reshape(shape)


def answer(script: Script, calls: int, heads: int, group: int) -> None:
    """The last kernel of a step: the only call is certified, and its output is its queries."""
    from tierd_kernels.cuda.launch import CALL, CERTIFIED, FIELDS
    from tierd_kernels.reads import words_of

    call = at(calls, (1,), CALL)[0]
    assert call["n"] == 1, "one token a call"
    rows, full = heads * group, int(call["full"])
    fields = at(call["fields"], (len(FIELDS), rows), np.float64)
    fields[...] = 0.0
    fields[FIELDS.index("bound")], fields[FIELDS.index("budget")] = 0.5, 1.0
    at(call["state"], (rows,), np.int32)[...] = CERTIFIED
    ctypes.memmove(int(call["output"]), int(call["q"]), script.q_bytes)
    at(call["failures"], (int(call["num_canaries"]) * heads,), np.uint8)[...] = 0
    if len(script.promoted):
        head, block = script.promoted.T
        read = np.zeros((2, heads, full), np.bool_)
        read[:, head, block] = True
        words = words_of(read)
        at(call["reads"], words.shape, np.uint32)[...] = words
        at(call["cold"], (rows,), np.int32)[...] = 0
        for name in ("promoted_key_blocks", "promoted_value_blocks"):
            fields[FIELDS.index(name), ::group] = np.bincount(head, minlength=heads)


def tell_candidates(script: Script, calls: int, heads: int, group: int) -> None:
    """A score of 1 for what was promoted, of a twentieth for the others, which no policy copies."""
    from tierd_kernels.cuda.launch import CALL

    call = at(calls, (1,), CALL)[0]
    most = int(call["candidates_max"])
    blocks = at(call["candidate_blocks"], (2, heads, most), np.int32)
    scores = at(call["candidate_scores"], (2, heads, most), np.float32)
    blocks[...], scores[...] = -1, 0.0
    for head in range(heads):
        promoted = script.promoted[script.promoted[:, 0] == head, 1][:most]
        # A device names no block twice.
        others = np.setdiff1d(script.near[head], promoted)[: most - len(promoted)] if len(script.near) else promoted[:0]
        both = np.concatenate([promoted, others])
        order = np.argsort(both)
        blocks[:, head, : len(both)] = both[order]
        scores[:, head, : len(both)] = np.where(order < len(promoted), 1.0, 0.05)


def gather(count: int, source: int, target: int, back: int, source_at: int, target_at: int, nbytes: int) -> None:
    """Copies records, as the kernel of that name."""
    offsets, size = [at(address, (count,), np.int64) for address in (source_at, target_at)], int(nbytes)
    offsets.append(np.arange(count) * size)
    places = [at(base, (int(own.max()) + size,), np.uint8) for base, own in zip((source, target, back), offsets, strict=True)]
    for way in (0, 1):
        _gather(*places[way : way + 2], *offsets[way : way + 2], size)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _gather(
    source: NDArray[np.uint8], target: NDArray[np.uint8], source_at: NDArray[np.int64], target_at: NDArray[np.int64], nbytes: int
) -> None:
    for i in range(len(source_at)):
        target[target_at[i] : target_at[i] + nbytes] = source[source_at[i] : source_at[i] + nbytes]


class Kernels:
    """Stands for CuPy's RawModule class: modules whose kernels are these. `device`: wraps what the device would do, for a stopwatch."""

    def __init__(self, script: Script, real: Any, device: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
        self._real = real
        self._known: dict[str, Callable[..., None]] = dict.fromkeys(QUIET, lambda *args: None) | {
            "dense": lambda grid, *args: answer(script, *map(int, args[:3])),
            "candidates": lambda grid, *args: tell_candidates(script, *map(int, args[:3])),
            "gather": lambda grid, *args: gather(grid[0], *args),
            "quantise": lambda grid, *args: at(args[4], grid[:2], np.float32).fill(1.0),
            "gram": lambda grid, source, before, out, facts, rows: at(facts, (2 * grid[0] * grid[1],), np.float64).fill(0.0),
        }
        self._known = {name: device(do) for name, do in self._known.items()}

    def __call__(self, code: str, options: tuple[str, ...], backend: str) -> "Module":
        return Module(self._known, lambda: self._real(code=code, options=options, backend=backend))


class Module:
    def __init__(self, known: dict[str, Callable[..., None]], compiled: Callable[[], Any]) -> None:
        self._known, self._compiled = known, compiled

    def get_function(self, name: str) -> Any:
        return Function(self._known[name]) if name in self._known else self._compiled().get_function(name)


class Function:
    """A kernel that is not compiled. Recorded where a graph is captured, as the emulator's own."""

    max_dynamic_shared_size_bytes = 0

    def __init__(self, do: Callable[..., None]) -> None:
        self._do = do

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared_mem: int = 0, stream: Any = None
    ) -> None:
        import cupy

        cupy._do(lambda: self._do(grid, *args))


def _touched(pinned: Any) -> Any:
    """With all of its pages there, as those of pinned memory are: else the host would wait for each where it first writes."""
    np.frombuffer(pinned, np.uint8).fill(0)
    return pinned


@contextmanager
def stubbed(script: Script, device: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """The CUDA backend can be imported, and its kernels are those above. Copies to and from the device are the device's time too."""
    with emulated():
        import cupy

        cupy.RawModule = Kernels(script, cupy.RawModule, device)
        runtime = cupy.cuda.runtime
        _gather(np.zeros(8, np.uint8), np.zeros(8, np.uint8), np.zeros(1, np.int64), np.zeros(1, np.int64), 8)  # compiled now
        runtime.memcpyAsync, runtime.memcpy = device(runtime.memcpyAsync), device(runtime.memcpy)
        allocate = cupy.cuda.alloc_pinned_memory
        cupy.cuda.alloc_pinned_memory = lambda nbytes: _touched(allocate(nbytes))
        yield
