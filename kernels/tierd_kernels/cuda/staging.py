"""Ranges of bytes that calls pass through, and how they are carved. Needs CuPy."""

from typing import Any

import cupy as cp
import numpy as np
from numpy.typing import NDArray

from tierd_kernels.cuda.start import pinned

ALIGNMENT = 256


def aligned(nbytes: int) -> int:
    """What so many bytes take of a region."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Region:
    """Carves aligned arrays out of one range of bytes."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.used = nbytes, 0

    def take(self, nbytes: int) -> int:
        """The offset of `nbytes` more. Raises ValueError where they do not fit."""
        at, end = self.used, self.used + aligned(nbytes)
        if end > self.nbytes:
            raise ValueError(f"a call needs more than the {self.nbytes} bytes that are kept for calls; send fewer rows or query tokens")
        self.used = end
        return at


class Staging:
    """A range in pinned memory, at address `host_at`, and its twin on the device, at address `at`."""

    def __init__(self, nbytes: int) -> None:
        self.host, self.device = pinned(nbytes, "calls"), cp.empty(nbytes, cp.uint8)
        self.at, self.host_at = int(self.device.data.ptr), int(self.host.ctypes.data)

    def view(self, start: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """The host's side, from that byte of the range on."""
        return np.ndarray(shape, dtype, self.host, start)

    def upload(self, stream: Any, start: int, stop: int) -> None:
        """Bytes [start, stop) of the range."""
        to_device = cp.cuda.runtime.memcpyHostToDevice
        cp.cuda.runtime.memcpyAsync(self.at + start, self.host_at + start, stop - start, to_device, stream.ptr)

    def download(self, stream: Any, start: int, stop: int) -> None:
        """Bytes [start, stop) of the range."""
        to_host = cp.cuda.runtime.memcpyDeviceToHost
        cp.cuda.runtime.memcpyAsync(self.host_at + start, self.at + start, stop - start, to_host, stream.ptr)
