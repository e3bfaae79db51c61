"""The pools on a device, pinned host memory, and the buffers that calls pass through. Needs CuPy."""

import weakref
from collections.abc import Callable
from typing import Any

import cupy as cp
import numpy as np
from numpy.typing import NDArray

from tierd_kernels.cuda.graphs import Graphs
from tierd_kernels.cuda.late import Late
from tierd_kernels.cuda.launch import ANY, kernel
from tierd_kernels.cuda.self_test import verify
from tierd_kernels.cuda.start import FAULTS, empty_pools, one_line, pinned, probe, usable_device
from tierd_kernels.errors import DeviceUnavailable
from tierd_kernels.layout import Memory

WORKSPACE_BYTES = 512 << 20  # of a launch: 460 bytes a block and tile of four rows (B = 16)
STAGING_BYTES = 64 << 20  # what a launch carries in, and out
LANDING_BYTES = 1 << 20  # records on their way back from scratch
COPIES_MAX = 1024  # begun together
# Blocks are larger than this, so that the offset over it tells them apart.
BLOCK_BYTES_MIN = 1024
ALIGNMENT = 256


class Region:
    """Carves aligned arrays out of one range of bytes."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.used = nbytes, 0

    def take(self, nbytes: int) -> int:
        """The offset of `nbytes` more. Raises ValueError where they do not fit."""
        at = self.used
        if at + nbytes > self.nbytes:
            raise ValueError(f"a call needs more than the {self.nbytes} bytes that are kept for calls; send fewer rows or query tokens")
        self.used = -(-(at + nbytes) // ALIGNMENT) * ALIGNMENT
        return at


class Staging:
    """A range in pinned memory, at address `host_at`, and its twin on the device, at address `at`."""

    def __init__(self, nbytes: int) -> None:
        self.host, self.device = pinned(nbytes, "calls"), cp.empty(nbytes, cp.uint8)
        self.at, self.host_at = int(self.device.data.ptr), int(self.host.ctypes.data)
        self.region = Region(nbytes)

    def reset(self) -> Region:
        """The whole range, to be carved anew."""
        self.region = Region(len(self.host))
        return self.region

    def view(self, start: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """The host's side, from that byte of the range on."""
        return np.ndarray(shape, dtype, self.host, start)

    def upload(self, stream: Any) -> None:
        to_device = cp.cuda.runtime.memcpyHostToDevice
        cp.cuda.runtime.memcpyAsync(self.at, self.host_at, self.region.used, to_device, stream.ptr)

    def download(self, stream: Any, start: int, stop: int) -> None:
        """Bytes [start, stop) of the range."""
        to_host = cp.cuda.runtime.memcpyDeviceToHost
        cp.cuda.runtime.memcpyAsync(self.host_at + start, self.at + start, stop - start, to_host, stream.ptr)


class OfArray:
    """What `work` makes of an array, worked out once: the array must not change while it lives."""

    def __init__(self, work: Callable[[NDArray[np.int64]], int]) -> None:
        self._work = work
        self._known: dict[int, tuple[Any, int]] = {}

    def __call__(self, array: NDArray[np.int64]) -> int:
        key = id(array)
        if key not in self._known:
            # It goes with the array, before another can have its identity.
            self._known[key] = weakref.ref(array, lambda _: self._known.pop(key, None)), self._work(array)
        return self._known[key][1]


class DeviceMemory(Memory):
    """The arenas of one daemon: hot and scratch on the device, originals pinned; and what calls need besides. `exponents` int16: of the
    largest value norm of the block whose offset in hot, over BLOCK_BYTES_MIN, is the index; `exponent`: the largest of blocks at these
    offsets. `*_at`: addresses. `stream`: of steps; beside it `asked`: of copies that the host asks for once it has an answer; `copier`: of
    those to scratch. `answered`, `arrived`: events behind the copies of a step's answers and behind its candidates, which are the `late` of
    the last step. Of copies to scratch under way: `ways` int64 [3, COPIES_MAX], their offsets in originals, in scratch and in `landing`,
    where they come back to; `copied`: the event behind them. Both arrays are pinned."""

    hot_at: int
    scratch_at: int
    originals_at: int
    stream: Any
    asked: Any
    copier: Any
    workspace: Any
    workspace_at: int
    inputs: Staging
    outputs: Staging
    landing: NDArray[np.uint8]
    ways: NDArray[np.int64]
    exponents: NDArray[np.int16]
    exponent: OfArray
    processors: int
    graphs: Graphs
    answered: Any
    copied: Any
    arrived: Any
    late: Late | None


def reserve(hot_bytes: int, scratch_bytes: int, originals_bytes: int) -> DeviceMemory:
    """The arenas. Raises DeviceUnavailable, with cause and remedy; nothing is held then."""
    device = usable_device({"hot_bytes": hot_bytes, "scratch_bytes": scratch_bytes, "for calls": WORKSPACE_BYTES + 2 * STAGING_BYTES})
    try:
        probe()
        verify()
        kernel(ANY, "gather")  # compiled now, not while a copy waits
        return _reserved(device, hot_bytes, scratch_bytes, originals_bytes)
    except DeviceUnavailable as error:
        refusal = str(error)
    empty_pools()  # not from within `except`: there the error still refers to what was allocated
    raise DeviceUnavailable(refusal)


def _reserved(device: Any, hot_bytes: int, scratch_bytes: int, originals_bytes: int) -> DeviceMemory:
    try:
        hot, scratch, workspace = (cp.zeros(max(n, ALIGNMENT), cp.uint8) for n in (hot_bytes, scratch_bytes, WORKSPACE_BYTES))
        inputs, outputs = Staging(STAGING_BYTES), Staging(STAGING_BYTES)
        stream, asked, copier = (cp.cuda.Stream(non_blocking=True) for _ in range(3))
    except (cp.cuda.memory.OutOfMemoryError, *FAULTS) as error:
        raise DeviceUnavailable(
            f"the device refused memory for hot_bytes {hot_bytes}, scratch_bytes {scratch_bytes} and calls: {one_line(error)}; lower "
            f"hot_bytes or scratch_bytes, or end what else uses the device"
        ) from error
    memory = DeviceMemory(hot, scratch, pinned(originals_bytes, f"originals_bytes {originals_bytes}"))
    memory.hot_at, memory.scratch_at, memory.originals_at = int(hot.data.ptr), int(scratch.data.ptr), int(memory.originals.ctypes.data)
    memory.stream, memory.asked, memory.copier = stream, asked, copier
    memory.workspace_at = int(workspace.data.ptr)
    memory.workspace, memory.inputs, memory.outputs, memory.landing = workspace, inputs, outputs, pinned(LANDING_BYTES, "copies")
    memory.ways = pinned(3 * 8 * COPIES_MAX, "copies").view(np.int64).reshape(3, COPIES_MAX)
    memory.exponents = np.zeros(hot_bytes // BLOCK_BYTES_MIN + 1, np.int16)
    exponents = memory.exponents
    memory.exponent = OfArray(lambda hot_offsets: int(exponents[hot_offsets // BLOCK_BYTES_MIN].max()))
    memory.processors, memory.graphs = int(device.attributes["MultiProcessorCount"]), Graphs()
    memory.answered, memory.arrived, memory.copied = (cp.cuda.Event(disable_timing=True) for _ in range(3))
    memory.late = None
    return memory
