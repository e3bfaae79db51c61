"""The pools on a device, pinned host memory, and the buffers that calls pass through. Needs CuPy."""

from typing import Any

import cupy as cp
import numpy as np
from numpy.typing import NDArray

from tierd_kernels.cuda.graphs import Graphs
from tierd_kernels.cuda.kept import Kept, Largest, OfArray
from tierd_kernels.cuda.late import Late
from tierd_kernels.cuda.launch import ANY, kernel
from tierd_kernels.cuda.recent import Recent
from tierd_kernels.cuda.self_test import verify
from tierd_kernels.cuda.staging import ALIGNMENT, Staging
from tierd_kernels.cuda.start import FAULTS, empty_pools, one_line, pinned, probe, set_l2_aside, usable_device
from tierd_kernels.errors import DeviceUnavailable
from tierd_kernels.layout import Memory

WORKSPACE_BYTES = 512 << 20  # of a launch: 460 bytes a block and tile of four rows (B = 16)
STAGING_BYTES = 64 << 20  # what a launch carries in, and out
# Of all blocks that an H200's 140 GB hold, with 8 KV heads of 128 channels, offsets take 80 MB.
KEPT_BYTES = 128 << 20
ARRANGED_MAX = 256  # of about 5 KB each
LANDING_BYTES = 1 << 20  # records on their way back from scratch
COPIES_MAX = 1024  # begun together
BLOCKS_MAX, NORMS_MAX = 1024, 16384  # quantised together, and their KV heads
# Blocks are larger than this, so that the offset over it tells them apart.
BLOCK_BYTES_MIN = 1024


class DeviceMemory(Memory):
    """The arenas of one daemon: hot and scratch on the device, originals pinned; and what calls need besides. `exponents` int16: of the
    largest value norm of the block whose offset in hot, over BLOCK_BYTES_MIN, is the index; `exponent`: the largest of blocks at these
    offsets. `*_at`: addresses. `device`: where it lies, which a thread that works on it makes its own meanwhile. `stream`: of steps; beside
    it `copier`: of copies to scratch. `kept`: what stays on the device from call to call. `arranged`: the `Arrangement`s of the latest
    launches. `answered`, `arrived`: events behind the copies of a step's answers and behind candidates, which are the `late` of the last
    step that named any. Of copies to scratch under way: `ways` int64 [2, COPIES_MAX], their offsets in originals and scratch; `landing`,
    where they come back to; `copied`: the event behind them. Of blocks that are quantised together: `blocks` int64 [2, BLOCKS_MAX], their
    offsets in originals and hot, and `norms` float32 [NORMS_MAX], which come back. These four arrays are pinned."""

    hot_at: int
    scratch_at: int
    originals_at: int
    device: Any
    stream: Any
    copier: Any
    workspace: Any
    workspace_at: int
    inputs: Staging
    outputs: Staging
    kept: Kept
    arranged: Recent[Any]
    landing: NDArray[np.uint8]
    landing_at: int
    ways: NDArray[np.int64]
    ways_at: tuple[int, int]
    blocks: NDArray[np.int64]
    blocks_at: tuple[int, int]
    norms: NDArray[np.float32]
    norms_at: int
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
    for_calls = WORKSPACE_BYTES + 2 * STAGING_BYTES + KEPT_BYTES
    device = usable_device({"hot_bytes": hot_bytes, "scratch_bytes": scratch_bytes, "for calls": for_calls})
    with device:
        try:
            probe()
            verify()
            set_l2_aside()
            kernel(ANY, "gather")  # compiled now, not while a copy waits
            return _reserved(device, hot_bytes, scratch_bytes, originals_bytes)
        except DeviceUnavailable as error:
            refusal = str(error)
        empty_pools()  # not from within `except`: there the error still refers to what was allocated
    raise DeviceUnavailable(refusal)


def _reserved(device: Any, hot_bytes: int, scratch_bytes: int, originals_bytes: int) -> DeviceMemory:
    try:
        hot, scratch, workspace = (cp.zeros(max(n, ALIGNMENT), cp.uint8) for n in (hot_bytes, scratch_bytes, WORKSPACE_BYTES))
        inputs, outputs, kept = Staging(STAGING_BYTES), Staging(STAGING_BYTES), Kept(KEPT_BYTES)
        stream, copier = (cp.cuda.Stream(non_blocking=True) for _ in range(2))
        device.synchronize()  # zeros are written on a stream that those two do not wait for: late ones would take what these have written
    except (cp.cuda.memory.OutOfMemoryError, *FAULTS) as error:
        raise DeviceUnavailable(
            f"the device refused memory for hot_bytes {hot_bytes}, scratch_bytes {scratch_bytes} and calls: {one_line(error)}; lower "
            f"hot_bytes or scratch_bytes, or end what else uses the device"
        ) from error
    memory = DeviceMemory(hot, scratch, pinned(originals_bytes, f"originals_bytes {originals_bytes}"))
    memory.hot_at, memory.scratch_at, memory.originals_at = int(hot.data.ptr), int(scratch.data.ptr), int(memory.originals.ctypes.data)
    memory.device, memory.stream, memory.copier = device, stream, copier
    memory.workspace_at = int(workspace.data.ptr)
    memory.workspace, memory.inputs, memory.outputs, memory.kept = workspace, inputs, outputs, kept
    memory.arranged, memory.landing = Recent(ARRANGED_MAX), pinned(LANDING_BYTES, "copies")
    memory.ways, memory.blocks = (pinned(2 * 8 * n, "offsets").view(np.int64).reshape(2, n) for n in (COPIES_MAX, BLOCKS_MAX))
    memory.norms = pinned(4 * NORMS_MAX, "norms").view(np.float32)
    memory.landing_at, memory.norms_at = int(memory.landing.ctypes.data), int(memory.norms.ctypes.data)
    memory.ways_at, memory.blocks_at = ((int(x[0].ctypes.data), int(x[1].ctypes.data)) for x in (memory.ways, memory.blocks))
    memory.exponents = np.zeros(hot_bytes // BLOCK_BYTES_MIN + 1, np.int16)
    exponents = memory.exponents
    memory.exponent = OfArray(Largest(lambda hot_offsets: exponents[hot_offsets // BLOCK_BYTES_MIN]))
    memory.processors, memory.graphs = int(device.attributes["MultiProcessorCount"]), Graphs()
    memory.answered, memory.arrived, memory.copied = (cp.cuda.Event(disable_timing=True) for _ in range(3))
    memory.late = None
    return memory
