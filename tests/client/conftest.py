import asyncio
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import awaited
import pytest
from daemon_process import SMALL, DaemonProcess
from fake_daemon import FakeDaemon
from tierd_client import connect

CALL_S = 120.0  # the first call may compile kernels
FLAVOURS = ("blocking", "awaitable")
Connect = Callable[..., Any]


@pytest.fixture(scope="session")
def client_daemon() -> Iterator[DaemonProcess]:
    """One daemon for all tests that leave it as they found it."""
    with (
        tempfile.TemporaryDirectory(prefix="tierd-") as folder,
        DaemonProcess(SMALL | {"listen": f"unix://{folder}/t.sock", "max-tokens": 4000}) as daemon,
    ):
        yield daemon


@pytest.fixture(params=FLAVOURS)
def connecting(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """`connect` of either flavour, with the face of the blocking one."""
    if request.param == "blocking":
        yield connect
        return
    with asyncio.Runner() as runner:
        yield lambda *arguments, **names: awaited.connect(runner, *arguments, **names)


@pytest.fixture(params=("daemon", "inproc"))
def tier(request: pytest.FixtureRequest, connecting: Connect) -> Iterator[Any]:
    """A connection of either flavour, to a daemon process or to an engine in this one."""
    if request.param == "daemon":
        target, settings = request.getfixturevalue("client_daemon").target, None
    else:
        target, settings = "inproc://", {name.replace("-", "_"): value for name, value in SMALL.items()} | {"max_tokens": 4000}
    with connecting(target, timeout=CALL_S, settings=settings) as tier:
        yield tier


@pytest.fixture
def fake() -> Iterator[FakeDaemon]:
    with tempfile.TemporaryDirectory(prefix="tierd-") as folder, FakeDaemon(str(Path(folder) / "f.sock")) as fake:
        yield fake
