"""Property tests say how to replay what they found; no test depends on how fast the machine is."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import device
import pytest
from hypothesis import settings

# Each worker of a run in several processes has a cache of Numba's to itself: of two that compile a function for other types at once, one
# may read what the other wrote. All begin with a copy of one that holds what the daemon needs, which takes 90 s to compile.
CACHES = Path(__file__).parents[1] / "build" / "numba"
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["NUMBA_CACHE_DIR"] = str(CACHES / worker)
    # Threads that spin while they wait take the cores from the other workers: tests of norms took 220 s instead of 6.
    os.environ |= {"OMP_WAIT_POLICY": "passive", "OPENBLAS_NUM_THREADS": "1"}

settings.register_profile("tierd", deadline=None, print_blob=True)
settings.load_profile("tierd")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[Any]) -> None:
    """What the daemon needs is compiled once, before the workers start."""
    from daemon_process import environment  # with packages that workers must not import before the lines above

    missing = [folder for spec in specs if not (folder := CACHES / spec.id).exists()]
    if missing:
        first = CACHES / "first"
        program = "from tierd.warm import warm_up; warm_up()"
        subprocess.run([sys.executable, "-c", program], env=environment() | {"NUMBA_CACHE_DIR": str(first)}, check=True)
        for folder in missing:
            shutil.copytree(first, folder)


def pytest_report_header() -> list[str]:
    return [
        "hypothesis profile: tierd (a failure prints its blob; --hypothesis-seed=N repeats a whole run)",
        f"CUDA: {'a device' if device.real() else 'the emulator'}",
    ]


@pytest.fixture(scope="module")
def cuda() -> Iterator[None]:
    """The CUDA backend can be imported: over a device, or over the emulator."""
    if device.real():
        yield
        return
    with device.emulated():
        yield
