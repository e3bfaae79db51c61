"""The CUDA device that tests run on: a real one where CuPy finds it, else the emulator beside this file."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

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


@contextmanager
def emulated() -> Iterator[None]:
    """`import cupy` finds the emulator's. What was imported over it is forgotten afterwards."""
    _forget()
    sys.path.insert(0, str(EMULATOR))
    try:
        yield
    finally:
        sys.path.remove(str(EMULATOR))
        _forget()
