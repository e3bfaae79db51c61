"""The backends: each is a module with `attend`, `quantise_blocks`, `group_norms` and `limit_threads`, as `ladder` has them."""

import importlib
from types import ModuleType

MODULES = {"cpu": "tierd_kernels.ladder"}


def load(backend: str) -> ModuleType:
    """The backend's module, imported only now: a backend may need packages or devices that are not there. Raises ValueError for an
    unknown name."""
    if backend not in MODULES:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(MODULES)}")
    return importlib.import_module(MODULES[backend])
