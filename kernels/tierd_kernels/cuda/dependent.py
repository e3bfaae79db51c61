"""Launches of kernels that may begin before the kernel ahead of them on the stream has ended, for which they wait themselves
(`wait_for_previous` in ptx.cuh). CuPy has no such launch, the driver has."""

import ctypes
from functools import cache
from typing import Any

import cupy as cp
import numpy as np

PROGRAMMATIC_STREAM_SERIALIZATION = 6  # of CUlaunchAttributeID


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("to_eight_bytes", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_byte * 60))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint), ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)), ("num_attributes", ctypes.c_uint),
    )  # fmt: skip


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def launch(kernel: Any, grid: tuple[int, ...], threads: int, args: tuple[Any, ...], shared_bytes: int, stream: Any) -> None:
    """A CuPy kernel, with numpy scalars. Raises CUDADriverError."""
    attribute = _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
    config = _Config((*grid, 1, 1)[:3], (threads, 1, 1), shared_bytes, stream.ptr, ctypes.pointer(attribute), 1)
    values = [np.ascontiguousarray(x) for x in args]
    pointers = (ctypes.c_void_p * len(values))(*(x.ctypes.data for x in values))
    status = _driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(kernel.kernel.ptr), pointers, None)
    if status:
        raise cp.cuda.driver.CUDADriverError(status)
