"""Stands in for CuPy where there is no device: memory of the "device" is the host's, kernels run in `emulator.h`.

Only what `tierd_kernels.cuda` uses is here. Streams do everything at once; a captured stream records its launches and copies instead.
"""

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

HERE = Path(__file__).resolve().parent.parent
KERNELS = HERE.parent.parent / "kernels" / "tierd_kernels"
DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+) (\w+)\[\];")
FLAGS = (
    "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-mf16c", "-mfma", "-mavx2", "-ffp-contract=off", "-fsanitize=alignment",
    "-fsanitize-undefined-trap-on-error",
    "-fvisibility=hidden",  # else functions' statics, which stand in for shared memory, are one in all layouts' kernels
)  # fmt: skip
PROCESSORS = 132


class CUDARuntimeError(RuntimeError):
    pass


class CUDADriverError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


class Array(np.ndarray):  # type: ignore[type-arg]
    """An array "on the device"."""

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data)

    def get(self, stream: Any = None) -> Any:
        return np.array(self)

    def set(self, array: Any) -> None:
        self[...] = array


class Pool:
    """Keeps nothing."""

    def free_all_blocks(self) -> None:
        pass


get_default_memory_pool = get_default_pinned_memory_pool = Pool


def __getattr__(name: str) -> Any:
    found = getattr(np, name)
    if isinstance(found, type) or not callable(found):
        return found

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = found(*args, **kwargs)
        return result.view(Array) if isinstance(result, np.ndarray) else result

    return wrapped


class Stream:
    """`recorded`: what a graph would hold, while one is captured."""

    ptr = 0

    def __init__(self, non_blocking: bool = False) -> None:
        self.recorded: list[Callable[[], None]] | None = None
        self.waited: list[Event] = []

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        assert self.recorded is None, "a captured stream must not be waited for"

    def wait_event(self, event: "Event") -> None:
        self.waited.append(event)

    def begin_capture(self) -> None:
        self.recorded = []
        _capturing.append(self)

    def end_capture(self) -> Any:
        recorded, self.recorded = self.recorded, None
        _capturing.remove(self)
        assert recorded is not None
        return SimpleNamespace(launch=lambda stream=None: [do() for do in recorded] and None)


_capturing: list[Stream] = []


class Event:
    """Everything has been done by the time that it is recorded."""

    ptr = 0

    def __init__(self, disable_timing: bool = False) -> None:
        pass

    def record(self, stream: Stream) -> None:
        assert stream.recorded is None, "what a graph holds is told by its last kernel"

    def synchronize(self) -> None:
        pass


def _do(work: Callable[[], None]) -> None:
    """At once, or when the graph that is being captured runs. There is nothing but the first device."""
    if getattr(_threads, "device", 0):
        raise CUDARuntimeError("cudaErrorInvalidResourceHandle: the calling thread works on another device")
    if _capturing:
        recorded = _capturing[-1].recorded
        assert recorded is not None
        recorded.append(work)
    else:
        work()


class RawModule:
    """Compiled by the host's compiler; kept by the text, so that a kernel is built once."""

    def __init__(self, code: str, options: tuple[str, ...], backend: str) -> None:
        own = code.removeprefix((KERNELS / "cuda" / "ptx.cuh").read_text())
        assert own != code, "the source does not begin with ptx.cuh"
        text = (HERE / "emulator.h").read_text() + DYNAMIC.sub(r"\1 *\2 = (\1 *)emulator::dynamic;", own)
        flags = (*FLAGS, *(option for option in options if option.startswith("-D")))
        name = hashlib.sha256(repr((text, flags)).encode()).hexdigest()[:24]
        folder = Path(tempfile.gettempdir()) / f"tierd-emulator-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        self.path = folder / f"{name}.so"
        if not self.path.exists():
            self._build(text, flags)
        self._library = ctypes.CDLL(str(self.path))
        self._library.emulator_launch.restype = ctypes.c_char_p

    def _build(self, text: str, flags: tuple[str, ...]) -> None:
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
            source, built = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
            source.write_text(text)
            done = subprocess.run(["g++", *flags, "-o", built, source], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr)
            built.rename(self.path)

    def get_function(self, name: str) -> "Function":
        return Function(self._library, name)


class Function:
    """A kernel. A launch raises CUDARuntimeError where the emulator finds a fault."""

    def __init__(self, library: Any, name: str) -> None:
        self._library, self.name, self.max_dynamic_shared_size_bytes = library, name, 48 << 10
        self._at = ctypes.cast(getattr(library, name), ctypes.c_void_p)

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared_mem: int = 0, stream: Any = None
    ) -> None:
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        values = [x.data.ptr if isinstance(x, np.ndarray) else int(x) & (1 << 64) - 1 for x in args]
        passed = (ctypes.c_uint64 * 6)(*values)
        sizes = [*grid, 1, 1][:3]

        def launch(keep: Any = args) -> None:
            fault = self._library.emulator_launch(self._at, *map(ctypes.c_uint32, (*sizes, block[0], shared_mem)), passed)
            if fault:
                raise CUDARuntimeError(f"{self.name}: {fault.decode()}")

        _do(launch)


def _copy(to: int, source: int, nbytes: int, kind: int, stream: int = 0) -> None:
    _do(lambda: ctypes.memmove(to, source, nbytes) and None)


def _fill(at: int, value: int, nbytes: int, stream: int = 0) -> None:
    _do(lambda: ctypes.memset(at, value, nbytes) and None)


_threads = threading.local()  # `device`: the calling thread's own; none of theirs is anything but the first by itself


class Device:
    """While it is entered it is the calling thread's own."""

    compute_capability = "90"
    attributes: ClassVar[dict[str, int]] = {"MultiProcessorCount": PROCESSORS}
    mem_info = (80 << 30, 80 << 30)

    def __init__(self, device: int | None = None) -> None:
        self.id = getattr(_threads, "device", 0) if device is None else device
        self._before: list[int] = []

    def __enter__(self) -> "Device":
        self._before.append(Device().id)
        _threads.device = self.id
        return self

    def __exit__(self, *_: object) -> None:
        _threads.device = self._before.pop()

    def synchronize(self) -> None:
        pass


cuda = SimpleNamespace(
    Device=Device,
    Stream=Stream,
    Event=Event,
    is_available=lambda: True,
    alloc_pinned_memory=lambda nbytes: memoryview(np.zeros(nbytes, np.uint8)),
    memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
    driver=SimpleNamespace(CUDADriverError=CUDADriverError),
    runtime=SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError, memcpyAsync=_copy, memcpy=_copy, memsetAsync=_fill, memcpyHostToDevice=1,
        memcpyDeviceToHost=2, memcpyDeviceToDevice=3, eventQuery=lambda event: 0, driverGetVersion=lambda: 12080,
        runtimeGetVersion=lambda: 12090, deviceSetLimit=lambda limit, size: None,
    ),
)  # fmt: skip


def _launch(kernel: Function, grid: tuple[int, ...], threads: int, args: tuple[Any, ...], shared_bytes: int, stream: Any) -> None:
    """As `tierd_kernels.cuda.dependent` has it, over a driver that is not here: no kernel begins before the one ahead of it has ended."""
    kernel(grid, (threads,), args, shared_mem=shared_bytes, stream=stream)


dependent: Any = SimpleNamespace(launch=_launch)
sys.modules["tierd_kernels.cuda.dependent"] = dependent
