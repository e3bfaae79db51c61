"""The backends: modules with `reserve`, `prepare`, `hot_block_bytes`, `begin_copies`, `quantise_blocks`, `group_norms`, `attend` and
`limit_threads`, as `ladder` has them."""

import importlib
import logging
from types import ModuleType
from typing import NamedTuple

from tierd_kernels.errors import DeviceUnavailable
from tierd_kernels.layout import Memory

log = logging.getLogger(__name__)
MODULES = {"cpu": "tierd_kernels.ladder", "cuda": "tierd_kernels.cuda.backend"}
AUTO = "auto"


class Started(NamedTuple):
    """A backend that runs: its name, its module and its arenas."""

    name: str
    kernels: ModuleType
    memory: Memory


def resolve(backend: str, hot_bytes: int, scratch_bytes: int, originals_bytes: int) -> Started:
    """Start the backend of that name; "auto" is cuda where it can start with arenas of these sizes, and cpu elsewhere.

    Raises DeviceUnavailable with the cause and a remedy, ValueError for an unknown name.
    """
    sizes = hot_bytes, scratch_bytes, originals_bytes
    if backend != AUTO:
        return _start(backend, *sizes)
    try:
        return _start("cuda", *sizes)
    except DeviceUnavailable as error:
        reason = str(error)
    log.warning("the backend is cpu, because cuda cannot start: %s", reason)
    return _start("cpu", *sizes)


def load(backend: str) -> ModuleType:
    """The backend's module, imported only now: a backend may need packages that are not there, then this raises DeviceUnavailable.
    Raises ValueError for an unknown name."""
    if backend not in MODULES:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(MODULES)}")
    try:
        return importlib.import_module(MODULES[backend])
    except ImportError as error:
        if backend != "cuda" or (error.name or "").startswith("tierd_kernels"):  # ours: a fault, not a package to install
            raise
        raise DeviceUnavailable(_without_cupy(error)) from error


def _without_cupy(error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"the cuda backend needs the extra `gpu`: pip install 'tierd[gpu]' ({error})"
    said = " ".join(str(error).replace("=", " ").split())  # CuPy frames what it says
    return f"CuPy is installed and cannot be loaded, as without an NVIDIA driver or with another CUDA than its own: {said}"


def _start(backend: str, *sizes: int) -> Started:
    kernels = load(backend)
    started = Started(backend, kernels, kernels.reserve(*sizes))
    log.info("the backend is %s", backend)
    return started
