"""What must hold before the CUDA backend starts. Every check raises DeviceUnavailable with the cause and a remedy. Needs CuPy."""

import logging
import resource
from pathlib import Path
from typing import Any

import cupy as cp
import numpy as np
from numpy.typing import NDArray

from tierd_kernels.cuda.sources import FOLDER
from tierd_kernels.errors import DeviceUnavailable

log = logging.getLogger(__name__)
CAPABILITY = (9, 0)  # bulk copies to shared memory
DRIVER_MIN = 12030  # captures kernels that begin before the one ahead has ended
LIMIT_PERSISTING_L2 = 6  # of cudaLimit
# Of the L2, for what rung 0 leaves for later kernels (`keep_policy` of ptx.cuh): half of an H100's, and three times what it leaves of
# 131,072 tokens, 8 KV heads, blocks of 16. Rung 0 of those and of eight sessions of 32,768 takes an H200 78.4 and 151.7 us with 17 MiB,
# 78.3 and 149.5 with 21, 78.9 and 149.1 with 25; another 81.7 and 160.1 with none, 80.9 and 159.2 with 12, 82.2 and 154.6 with 24, 83.9
# and 158.3 with 30.
L2_KEPT_BYTES = 25 << 20
FAULTS = (cp.cuda.runtime.CUDARuntimeError, cp.cuda.driver.CUDADriverError)
# How CUDA says that the driver and what runs over it are not of one age; the first also where there is no driver at all.
DRIVER_FAULTS = (
    "cudaErrorInsufficientDriver", "cudaErrorSystemDriverMismatch", "cudaErrorCompatNotSupportedOnDevice", "cudaErrorStubLibrary",
    "cudaErrorCallRequiresNewerDriver", "cudaErrorUnsupportedPtxVersion", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
)  # fmt: skip
PROBE = 'extern "C" __global__ void probe(int *out) { *out = 90; }'
OTHERWISE = "or serve with --backend cpu"
TEXT_MAX = 300  # of a text that is not ours: compilers say more


def usable_device(needed: dict[str, int]) -> Any:
    """The first device of those that the process sees, if it is new enough and has room for what is `needed`, bytes by name. Whichever is a
    thread's own: calls come from threads of the process, kernels are loaded by others, and a model may have a device besides."""
    try:
        device = cp.cuda.Device(0)
        major, minor = divmod(int(device.compute_capability), 10)
        driver = cp.cuda.runtime.driverGetVersion()
        with device:
            empty_pools()
        free, total = device.mem_info
    except FAULTS as error:
        raise DeviceUnavailable(_no_device(error)) from error
    if (major, minor) < CAPABILITY:
        raise DeviceUnavailable(
            f"the device has compute capability {major}.{minor}; the kernels need {CAPABILITY[0]}.{CAPABILITY[1]} or more: use another "
            f"device, {OTHERWISE}"
        )
    if driver < DRIVER_MIN:
        raise DeviceUnavailable(
            f"the NVIDIA driver is made for CUDA {_version(driver)}; the kernels' graphs need one for {_version(DRIVER_MIN)} or newer: "
            f"install a newer driver, {OTHERWISE}"
        )
    asked = sum(needed.values())
    if asked > free:
        parts = " + ".join(f"{name} {size}" for name, size in needed.items())
        raise DeviceUnavailable(
            f"{parts} are {asked} bytes; the device has {free} free of {total}: lower hot_bytes or scratch_bytes, or end what else uses "
            f"the device"
        )
    return device


def set_l2_aside() -> None:
    """L2_KEPT_BYTES, for this process. Where they are not to be had, as for clients of an MPS daemon, which decides that for them, kernels
    are a little slower."""
    try:
        cp.cuda.runtime.deviceSetLimit(LIMIT_PERSISTING_L2, L2_KEPT_BYTES)
    except FAULTS as error:
        log.info("the device sets no %d bytes of its L2 aside, and large calls take up to 4 %% longer: %s", L2_KEPT_BYTES, one_line(error))


def empty_pools() -> None:
    """CuPy gives back what it keeps of memory that nobody refers to any more."""
    cp.get_default_memory_pool().free_all_blocks()
    cp.get_default_pinned_memory_pool().free_all_blocks()


def pinned(nbytes: int, what: str) -> NDArray[np.uint8]:
    """Pinned host memory, whose addresses the device reads too."""
    free = container_free_bytes()
    if nbytes > free:  # not even asked for: whoever takes more is killed instead of refused
        said = f"its control group (container) leaves {free:.0f}"
    else:
        try:
            return np.frombuffer(cp.cuda.alloc_pinned_memory(max(nbytes, 1)), np.uint8, nbytes)
        except (*FAULTS, MemoryError) as error:
            said = one_line(error)
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    locked = "no limit" if limit == resource.RLIM_INFINITY else f"{limit} bytes"
    raise DeviceUnavailable(
        f"no {nbytes} bytes of pinned host memory for {what}: {said}; lower originals_bytes, or give the container more memory, or raise "
        f"the limit on locked memory (`ulimit -l`), now {locked}"
    )


def probe() -> None:
    """Compiles a kernel with what the others include, and has it write to pinned memory."""
    out = pinned(4, "a first kernel").view(np.int32)
    text = (FOLDER / "cuda" / "ptx.cuh").read_text() + PROBE
    try:
        kernel = cp.RawModule(code=text, options=("--std=c++17",), backend="nvrtc").get_function("probe")
        kernel((1,), (1,), (np.uint64(out.ctypes.data),))
        cp.cuda.Device().synchronize()
    except FAULTS as error:
        raise DeviceUnavailable(_no_device(error)) from error
    except Exception as error:  # a library or header that is missing has many names
        raise DeviceUnavailable(
            f"no kernel can be compiled: {one_line(error)}; NVRTC and CUDA's headers are needed, of the CUDA that CuPy was built for: "
            f"install the CUDA toolkit and set CUDA_PATH, {OTHERWISE}"
        ) from error
    if out[0] != 90:
        raise DeviceUnavailable(f"the device does not write to pinned host memory; use another device, {OTHERWISE}")


def container_free_bytes(root: Path = Path("/")) -> float:
    """What the control groups (v2) of this process still let it take of the host's memory; infinite where they set no limit. What the host
    itself has is not looked at: virtual machines may be given more when they take more."""
    top, left = root / "sys/fs/cgroup", float("inf")
    for line in _lines(root / "proc/self/cgroup"):
        if line.startswith("0::"):
            own = top / line.removeprefix("0::").strip("/")
            left = min(_left(group) for group in (own, *own.parents) if group == top or top in group.parents)
    return left


def one_line(error: BaseException) -> str:
    """What an error says, with its type, on one line and not too much of it."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= TEXT_MAX else f"{text[:TEXT_MAX]}..."


def _no_device(error: Exception) -> str:
    if not any(name in str(error) for name in DRIVER_FAULTS):
        check = "see that `nvidia-smi` lists one and CUDA_VISIBLE_DEVICES does not hide it"
        return f"no usable CUDA device: {one_line(error)}; {check}, {OTHERWISE}"
    runtime = cp.cuda.runtime
    driver, built = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    found = f"the NVIDIA driver is made for CUDA {_version(driver)}" if driver else "there is no NVIDIA driver"
    return f"{found}, CuPy for CUDA {_version(built)}: {one_line(error)}; install a newer driver, or a CuPy for an older CUDA, {OTHERWISE}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _left(group: Path) -> float:
    """Bytes that a control group still gives: its files in memory make room."""
    limit, used = (" ".join(_lines(group / f"memory.{name}")) for name in ("max", "current"))
    if not (limit.isdecimal() and used.isdecimal()):
        return float("inf")
    stat = dict(line.split() for line in _lines(group / "memory.stat"))
    return max(0, int(limit) - int(used) + sum(int(stat.get(name, 0)) for name in ("active_file", "inactive_file")))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
