import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_process import SMALL, DaemonProcess, Worker


@pytest.fixture(scope="session")
def daemon() -> Iterator[DaemonProcess]:
    """One daemon for all tests that leave it as they found it; its stop is checked too."""
    with tempfile.TemporaryDirectory(prefix="tierd-") as folder:
        path = Path(folder) / "t.sock"
        with DaemonProcess(SMALL | {"listen": f"unix://{path}", "metrics-port": 0, "max-tokens": 4000}) as daemon:
            yield daemon
            assert daemon.stop()[0] == 0
        assert not path.exists()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: a socket's has at most 107 bytes, and pytest's own folders are long."""
    with tempfile.TemporaryDirectory(prefix="tierd-") as folder:
        yield Path(folder)


@pytest.fixture
def worker(daemon: DaemonProcess) -> Iterator[Worker]:
    with Worker(daemon.target) as worker:
        yield worker
