"""The CUDA device that tests run on: a real one where CuPy finds it, else the emulator beside this file."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

EMULATOR = Path(__file__).resolve().parent / "emulator"
OWN = ("cupy", "tierd_kernels.cuda")


@cache
def real() -> bool:
    """Whether there is a device. Must be asked first outside of `emulated`."""
    if importlib.util.find_spec("cupy") is None:
        return False
    import cupy

    return bool(cupy.cuda.is_available())


def _forget() -> None:
    for name in [name for name in sys.modules if name.startswith(OWN)]:
        del sys.modules[name]


def _launch(kernel: Any, grid: tuple[int, ...], threads: int, args: tuple[Any, ...], shared_bytes: int, stream: Any) -> None:
    """As `tierd_kernels.cuda.dependent`'s: here no kernel begins before the one ahead of it has ended."""
    kernel(grid, (threads,), args, shared_mem=shared_bytes, stream=stream)


@contextmanager
def emulated() -> Iterator[None]:
    """`import cupy` finds the emulator's. What was imported over it is forgotten afterwards."""
    _forget()
    sys.path.insert(0, str(EMULATOR))
    sys.modules["tierd_kernels.cuda.dependent"] = cast(ModuleType, SimpleNamespace(launch=_launch))
    try:
        yield
    finally:
        sys.path.remove(str(EMULATOR))
        _forget()
