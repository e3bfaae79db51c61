"""Backends by name."""

import pytest
from tierd_kernels import ladder, registry

from tierd.config import Settings


def test_a_backend_is_found_by_name() -> None:
    assert registry.load("cpu") is ladder


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="backend is 'abacus'; allowed: cpu"):
        registry.load("abacus")


@pytest.mark.parametrize("name", registry.MODULES)
def test_every_backend_has_what_the_engine_calls(name: str) -> None:
    assert all(callable(getattr(registry.load(name), op)) for op in ("attend", "quantise_blocks", "group_norms", "limit_threads"))
    assert Settings(backend=name).backend == name  # type: ignore[arg-type]
