"""Where the CUDA backend cannot start: what it says then, and that it holds nothing."""

import resource
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import device
import pytest
from tierd_kernels.errors import DeviceUnavailable
from tierd_kernels.layout import Layout

pytestmark = [
    pytest.mark.gpu, pytest.mark.usefixtures("cuda"), pytest.mark.skipif(device.real(), reason="a device that is sound cannot show it")
]  # fmt: skip
SIZES = 3 << 20, 1 << 20, 5 << 20
KEPT = (512 << 20) + 2 * (64 << 20) + (128 << 20)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch, cuda: None) -> list[Any]:
    """Weak references to all that was allocated, on the device or pinned; and pools that were told to let go, by name."""
    import cupy

    seen: list[Any] = []

    def watched(allocate: Callable[..., Any]) -> Callable[..., Any]:
        def allocated(*args: Any) -> Any:
            seen.append(weakref.ref(memory := allocate(*args)))
            return memory

        return allocated

    for name in ("zeros", "empty"):
        monkeypatch.setattr(cupy, name, watched(getattr(cupy, name)), raising=False)
    monkeypatch.setattr(cupy.cuda, "alloc_pinned_memory", watched(cupy.cuda.alloc_pinned_memory))
    for name in ("get_default_memory_pool", "get_default_pinned_memory_pool"):
        monkeypatch.setattr(cupy, name, lambda name=name: FreePool(seen, name))
    return seen


class FreePool:
    def __init__(self, seen: list[Any], name: str) -> None:
        self._seen, self._name = seen, name

    def free_all_blocks(self) -> None:
        assert not any(x() is not None for x in self._seen if callable(x)), "what is still referred to cannot be let go"
        self._seen.append(self._name)


POOLS = ["get_default_memory_pool", "get_default_pinned_memory_pool"]


def refused(match: str) -> None:
    from tierd_kernels.cuda import backend

    with pytest.raises(DeviceUnavailable, match=match) as refusal:
        backend.reserve(*SIZES)
    assert "\n" not in str(refusal.value)


def let_go(held: list[Any]) -> bool:
    """Something was allocated between two emptyings of the pools, at the second of which nobody referred to it any more."""
    return held[:2] == POOLS and held[-2:] == POOLS and len(held) > 4


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def fault(text: str) -> BaseException:
    import cupy

    error: BaseException = cupy.cuda.runtime.CUDARuntimeError(text)
    return error


def test_a_driver_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    monkeypatch.setattr(cupy.cuda.runtime, "driverGetVersion", lambda: 12020)
    refused(r"driver is made for CUDA 12\.2; .* need one for 12\.3 or newer: install a newer driver, or serve with --backend cpu")


def test_a_sound_device_starts_and_a_kernel_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from tierd_kernels.cuda import backend, start

    probed: list[bool] = []
    monkeypatch.setattr("tierd_kernels.cuda.memory.probe", lambda: probed.append(start.probe() is None))
    assert [arena.nbytes for arena in backend.reserve(*SIZES)] == list(SIZES)
    assert probed == [True]


def test_memory_is_all_zeros_before_streams_that_do_not_wait_for_that_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy
    from tierd_kernels.cuda import backend

    done, zeros = list[str](), cupy.zeros
    monkeypatch.setattr(cupy, "zeros", lambda *args: [done.append("zeros"), zeros(*args)][1])
    monkeypatch.setattr(cupy.cuda.Device, "synchronize", lambda self: done.append("waited"))
    backend.reserve(*SIZES)
    assert done[-4:] == ["zeros", "zeros", "zeros", "waited"]


def test_part_of_the_l2_is_set_aside_where_it_is_to_be_had(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import cupy
    from tierd_kernels.cuda import backend

    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(cupy.cuda.runtime, "deviceSetLimit", lambda *limit: asked.append(limit))
    backend.reserve(*SIZES)
    assert asked == [(6, 25 << 20)]
    monkeypatch.setattr(cupy.cuda.runtime, "deviceSetLimit", raising(fault("cudaErrorUnsupportedLimit: limit is not supported")))
    with caplog.at_level("INFO"):
        backend.reserve(*SIZES)
    assert "no 26214400 bytes of its L2" in caplog.text and "cudaErrorUnsupportedLimit" in caplog.text


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    monkeypatch.setattr(cupy.cuda, "Device", raising(fault("cudaErrorNoDevice: no CUDA-capable device is detected")))
    refused(r"^no usable CUDA device: .*cudaErrorNoDevice.*nvidia-smi.*CUDA_VISIBLE_DEVICES.*--backend cpu$")


@pytest.mark.parametrize(
    ("driver", "found"), [(12040, "the NVIDIA driver is made for CUDA 12.4, CuPy for CUDA 12.9"), (0, "there is no NVIDIA driver")]
)
@pytest.mark.parametrize("name", ["cudaErrorInsufficientDriver", "cudaErrorSystemDriverMismatch"])
def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch, name: str, driver: int, found: str) -> None:
    import cupy

    monkeypatch.setattr(cupy.cuda, "Device", raising(fault(f"{name}: CUDA driver version is insufficient for CUDA runtime version")))
    monkeypatch.setattr(cupy.cuda.runtime, "driverGetVersion", lambda: driver)
    refused(f"^{found}.*{name}.*install a newer driver, or a CuPy for an older CUDA")


def test_a_device_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    monkeypatch.setattr(cupy.cuda.Device, "compute_capability", "89")
    refused("^the device has compute capability 8.9; the kernels need 9.0 or more")


def test_too_little_device_memory(monkeypatch: pytest.MonkeyPatch, held: list[Any]) -> None:
    import cupy

    free = sum(SIZES[:2]) + KEPT - 1
    monkeypatch.setattr(cupy.cuda.Device, "mem_info", (free, 80 << 30))
    refused(
        rf"^hot_bytes {SIZES[0]} \+ scratch_bytes {SIZES[1]} \+ for calls {KEPT} are {free + 1} bytes; the device has {free} free of "
        rf"{80 << 30}: lower hot_bytes or scratch_bytes"
    )
    assert held == POOLS  # emptied first: what they keep is free


def test_what_is_counted_is_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy
    from tierd_kernels.cuda import backend

    taken: list[int] = []

    def noted(allocate: Any) -> Any:
        def noting(*args: Any) -> Any:
            taken.append(allocate(*args).nbytes)
            return allocate(*args)

        return noting

    for name in ("zeros", "empty"):
        monkeypatch.setattr(cupy, name, noted(getattr(cupy, name)))
    backend.reserve(3 << 20, 2 << 20, 0)
    assert sum(nbytes for nbytes in taken if nbytes >= 1 << 20) == (5 << 20) + KEPT


@pytest.mark.parametrize("refuses", ["zeros", "empty"])
def test_device_memory_that_is_refused_all_the_same(monkeypatch: pytest.MonkeyPatch, held: list[Any], refuses: str) -> None:
    import cupy

    allocate, left = getattr(cupy, refuses), [1]  # the first is given, the second is not

    def second(*args: Any) -> Any:
        if not left:
            raise cupy.cuda.memory.OutOfMemoryError("Out of memory allocating 1 bytes\n(allocated so far: 0 bytes).")
        return left.pop() and allocate(*args)

    monkeypatch.setattr(cupy, refuses, second)
    refused(rf"^the device refused memory for hot_bytes {SIZES[0]}, scratch_bytes {SIZES[1]} and calls: OutOfMemoryError: .*; lower")
    assert let_go(held)


@pytest.mark.parametrize(
    ("refuses", "what"),
    [(4, "a first kernel"), (64 << 20, "calls"), (128 << 20, "calls"), (SIZES[2], f"originals_bytes {SIZES[2]}"), (1 << 20, "copies")],
)
def test_pinned_memory_that_is_refused(monkeypatch: pytest.MonkeyPatch, held: list[Any], refuses: int, what: str) -> None:
    import cupy

    allocate = cupy.cuda.alloc_pinned_memory

    def pinned(nbytes: int) -> Any:
        if nbytes == refuses:
            raise fault("cudaErrorMemoryAllocation: out of memory")
        return allocate(nbytes)

    monkeypatch.setattr(cupy.cuda, "alloc_pinned_memory", pinned)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    refused(
        f"^no {refuses} bytes of pinned host memory for {what}: .*cudaErrorMemoryAllocation.*; lower originals_bytes, or give the "
        rf"container more memory, or raise the limit on locked memory \(`ulimit -l`\), now {8 << 20} bytes$"
    )
    assert refuses == 4 or let_go(held)


def test_more_pinned_memory_than_the_container_has_is_not_even_asked_for(monkeypatch: pytest.MonkeyPatch, held: list[Any]) -> None:
    monkeypatch.setattr("tierd_kernels.cuda.start.container_free_bytes", lambda: 100.0)
    refused(rf"^no {64 << 20} bytes of pinned host memory for calls: its control group \(container\) leaves 100; lower originals_b")
    assert let_go(held)


@pytest.mark.parametrize(
    ("limits", "free"),
    [
        ({}, float("inf")),
        ({"pod/tierd": ("max", "50000"), "pod": ("max", "90000")}, float("inf")),
        ({"pod/tierd": ("max", "50000"), "pod": ("100000", "60000")}, 40023),
        ({"pod/tierd": ("70000", "50000"), "pod": ("100000", "60000")}, 20023),
        ({"pod/tierd": ("70000", "90000")}, 0),
        ({"": ("9000", "5000")}, 4023),
    ],
)
def test_what_the_control_groups_leave(tmp_path: Path, limits: dict[str, tuple[str, str]], free: float) -> None:
    from tierd_kernels.cuda.start import container_free_bytes

    assert container_free_bytes(tmp_path) == float("inf")  # a system without control groups
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("1:name=systemd:/\n0::/pod/tierd\n")
    for name, (limit, used) in limits.items():
        group = tmp_path / "sys/fs/cgroup" / name
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text("anon 7\nactive_file 20\ninactive_file 3\n")
    assert container_free_bytes(tmp_path) == free


@pytest.mark.parametrize("said", ["CuPy failed to load libnvrtc.so.12: OSError", "x.cu 2: error:\n no source file cuda_fp16.h"])
def test_a_compiler_that_is_missing_or_lacks_headers(monkeypatch: pytest.MonkeyPatch, held: list[Any], said: str) -> None:
    import cupy

    monkeypatch.setattr(cupy, "RawModule", raising(RuntimeError(said)))
    refused(f"^no kernel can be compiled: RuntimeError: {' '.join(said.split())}; NVRTC and CUDA's headers are needed.*CUDA_PATH")
    assert let_go(held)


def test_what_the_compiler_makes_is_too_new_for_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    error = cupy.cuda.driver.CUDADriverError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION: compiled with an unsupported toolchain")
    monkeypatch.setattr(cupy.RawModule, "get_function", raising(error))
    refused("^the NVIDIA driver is made for CUDA 12.8, CuPy for CUDA 12.9.*UNSUPPORTED_PTX_VERSION.*install a newer driver")


def test_a_device_that_cannot_write_to_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    monkeypatch.setattr(cupy.RawModule, "get_function", lambda *_: lambda *_: None)
    refused("^the device does not write to pinned host memory")


def test_what_no_check_foresaw_is_a_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy
    from tierd_kernels import registry

    monkeypatch.setattr(cupy.cuda, "Stream", raising(TypeError("ours")))
    for name in ("cuda", "auto"):
        with pytest.raises(TypeError, match="ours"):
            registry.resolve(name, *SIZES)


def test_preparing_compiles_every_kernel_once_on_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from tierd_kernels.cuda import backend, launch
    from tierd_kernels.cuda.sources import PARTS

    together, compiled = threading.Barrier(2), []

    def kernel(layout: Layout, name: str) -> None:
        if name in ("quantise", "attend"):
            together.wait(30)  # neither returns before the other has begun
        compiled.append(name)

    monkeypatch.setattr(launch, "kernel", kernel)
    for _ in range(2):
        backend.prepare(Layout(3, 64, 16, 16, "float32"))
    assert sorted(compiled) == sorted(set(PARTS) - set(launch.OF_ANY_LAYOUT))


def test_what_failed_to_compile_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from tierd_kernels.cuda import backend, launch

    monkeypatch.setattr(launch, "kernel", raising(RuntimeError("no such instruction")))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such instruction"):
            backend.prepare(Layout(4, 64, 16, 16, "float32"))
