"""Property tests say how to replay what they found; no test depends on how fast the machine is."""

from collections.abc import Iterator

import device
import pytest
from hypothesis import settings

settings.register_profile("tierd", deadline=None, print_blob=True)
settings.load_profile("tierd")


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
