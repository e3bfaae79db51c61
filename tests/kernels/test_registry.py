"""Backends by name: which one starts, and what is said where one cannot."""

import sys
from pathlib import Path

import pytest
from tierd_kernels import host, ladder, registry
from tierd_kernels.errors import DeviceUnavailable
from tierd_kernels.layout import ALIGNMENT

from tierd.config import Settings

OPERATIONS = ("reserve", "prepare", "hot_block_bytes", "begin_copies", "quantise_blocks", "group_norms", "attend", "limit_threads")
SIZES = (1 << 12, 1 << 11, 1 << 13)


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str) -> None:
    """The cuda backend is a module of this source."""
    (folder / "stand_in_backend.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "stand_in_backend", raising=False)
    monkeypatch.setitem(registry.MODULES, "cuda", "stand_in_backend")


WITHOUT_CUPY = "raise ModuleNotFoundError(\"No module named 'cupy'\", name='cupy')"
UNLOADABLE = "raise ImportError('====\\nFailed to import CuPy.\\nOriginal error:\\n  libcuda.so.1: no such file\\n====')"
WITHOUT_DEVICE = """
from tierd_kernels.errors import DeviceUnavailable
def reserve(*sizes):
    raise DeviceUnavailable("no CUDA device was found; install its driver")
"""
WORKING = "from tierd_kernels.ladder import *"


def test_a_backend_is_found_by_name() -> None:
    assert registry.load("cpu") is ladder


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="backend is 'abacus'; allowed: cpu, cuda"):
        registry.load("abacus")


def test_the_cpu_has_what_the_engine_calls() -> None:
    assert all(callable(getattr(registry.load("cpu"), name)) for name in OPERATIONS)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_cuda_has_what_the_engine_calls() -> None:
    assert all(callable(getattr(registry.load("cuda"), name)) for name in OPERATIONS)


@pytest.mark.parametrize("name", [*registry.MODULES, registry.AUTO])
def test_every_backend_can_be_configured(name: str) -> None:
    assert Settings(backend=name).backend == name  # type: ignore[arg-type]


def test_cuda_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, tmp_path, WITHOUT_CUPY)
    expected = r"the cuda backend needs the extra `gpu`: pip install 'tierd\[gpu\]' \(No module named 'cupy'\)"
    with pytest.raises(DeviceUnavailable, match=expected):
        registry.resolve("cuda", *SIZES)


def test_a_cupy_that_does_not_load_is_not_said_to_be_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, tmp_path, UNLOADABLE)
    with pytest.raises(DeviceUnavailable, match=r"^CuPy is installed and cannot be loaded, .*libcuda.so.1: no such file$"):
        registry.resolve("cuda", *SIZES)


def test_a_broken_module_of_ours_is_not_blamed_on_a_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, tmp_path, "from tierd_kernels.call import nothing")
    for name in ("cuda", "auto"):
        with pytest.raises(ImportError, match="nothing"):
            registry.resolve(name, *SIZES)


@pytest.mark.parametrize(
    ("source", "name", "reason"), [(WORKING, "cuda", None), (WITHOUT_CUPY, "cpu", "extra `gpu`"), (WITHOUT_DEVICE, "cpu", "no CUDA device")]
)
def test_auto_is_cuda_where_it_can_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, source: str, name: str, reason: str | None
) -> None:
    stand_in(monkeypatch, tmp_path, source)
    with caplog.at_level("INFO"):
        started = registry.resolve("auto", *SIZES)
    assert started.name == name
    assert (started.kernels is ladder) == (name == "cpu")
    assert [arena.nbytes for arena in started.memory] == list(SIZES)
    assert f"the backend is {name}" in caplog.text
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.startswith("the backend is cpu, because cuda cannot start: ") for text in warnings] == [True] * (reason is not None)
    assert (reason or "") in caplog.text


def test_cuda_is_never_replaced_unasked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, tmp_path, WITHOUT_DEVICE)
    with pytest.raises(DeviceUnavailable, match="no CUDA device was found"):
        registry.resolve("cuda", *SIZES)


def test_host_arenas_are_aligned_zeros_of_their_sizes() -> None:
    for arena, size in zip(host.reserve(100, 0, 4096), (100, 0, 4096), strict=True):
        assert arena.nbytes == size
        assert not arena.any()
        assert size == 0 or arena.ctypes.data % ALIGNMENT == 0  # numpy says of an empty array whatever it likes


@pytest.mark.parametrize("size", [1 << 60, 1 << 63])
def test_more_memory_than_there_is_is_refused_by_name(size: int) -> None:
    with pytest.raises(DeviceUnavailable, match=rf"cannot reserve pools of {size} \(hot\), 0 \(scratch\)"):
        host.reserve(size, 0, 0)
