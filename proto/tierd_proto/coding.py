"""Numpy arrays <-> wire. Floating data travels raw: bfloat16 is a uint16 array of its bits on both sides."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd_proto.v1 import tierd_pb2 as pb

DTYPES: dict[str, int] = {"float16": pb.FLOAT16, "bfloat16": pb.BFLOAT16, "float32": pb.FLOAT32}
DTYPE_NAMES: dict[int, str] = {number: name for name, number in DTYPES.items()}
RAW: dict[int, np.dtype[Any]] = {
    pb.FLOAT16: np.dtype("<f2"),
    pb.BFLOAT16: np.dtype("<u2"),
    pb.FLOAT32: np.dtype("<f4"),
}

_OF_NUMPY = {np.dtype("float16"): pb.FLOAT16, np.dtype("float32"): pb.FLOAT32, np.dtype("uint16"): pb.BFLOAT16}

_F8, _I8, _BOOL = np.dtype("<f8"), np.dtype("<i8"), np.dtype("?")
CERTIFICATE_COLUMNS: dict[str, np.dtype[Any]] = {
    "bound": _F8,
    "budget": _F8,
    "key_error": _F8,
    "value_error": _F8,
    "skip_error": _F8,
    "arith_error": _F8,
    "candidate_bound": _F8,
    "rung": _I8,
    "exact": _BOOL,
    "value_norm": _F8,
    "output_norm": _F8,
    "rank_certified": _BOOL,
    "promoted_key_blocks": _I8,
    "promoted_value_blocks": _I8,
    "skipped_blocks": _I8,
    "host_bytes": _I8,
    "paper_key_bound": _F8,
}
"""Every field of a certificate and the type of its elements."""

CERTIFICATE_ROW_BYTES = sum(dtype.itemsize for dtype in CERTIFICATE_COLUMNS.values())
"""Of one query head and one query token."""


class CodingError(ValueError):
    """A tensor whose description and bytes do not agree."""


def encode_tensor(array: NDArray[Any]) -> pb.Tensor:
    """A raw array (float16, float32, or uint16 bits of bfloat16) as a message with inline bytes. Copies once."""
    dtype = _OF_NUMPY.get(array.dtype.newbyteorder("="))
    if dtype is None:
        raise CodingError(f"arrays of {array.dtype.name} do not travel; allowed: float16, float32, uint16 (bfloat16 bits)")
    return pb.Tensor(dtype=dtype, shape=array.shape, inline=array.astype(RAW[dtype], copy=False).tobytes())


def decode_tensor(tensor: pb.Tensor, name: str, ndim: int) -> NDArray[Any]:
    """The raw, read-only array of `tensor`, without a copy. Raises CodingError, naming it `name`."""
    if tensor.dtype not in RAW:
        raise CodingError(f"{name}: type {tensor.dtype} is unknown; allowed: {', '.join(DTYPES)}")
    shape = tuple(tensor.shape)
    if len(shape) != ndim or any(size < 1 for size in shape):
        raise CodingError(f"{name}: shape is {list(shape)[:8]}; it must have {ndim} axes, each of at least 1")
    if tensor.WhichOneof("data") != "inline":
        raise CodingError(f"{name}: its data are not inline, the only plane of this connection")
    dtype = RAW[tensor.dtype]
    if math.prod(shape) * dtype.itemsize != len(tensor.inline):
        raise CodingError(f"{name}: {len(tensor.inline)} bytes for shape {list(shape)} of {DTYPE_NAMES[tensor.dtype]}")
    return np.frombuffer(tensor.inline, dtype).reshape(shape)


def encode_certificate(certificate: dict[str, NDArray[Any]]) -> pb.Certificate:
    """Columns [Hq, n] as a message. Raises KeyError for a missing one: the engine always fills all of them."""
    columns = {
        name: certificate[name].astype(dtype, copy=False).tobytes() for name, dtype in CERTIFICATE_COLUMNS.items()
    }
    return pb.Certificate(**columns)


def decode_certificate(message: pb.Certificate, shape: tuple[int, ...]) -> dict[str, NDArray[Any]]:
    """Columns of `shape`, [Hq, n] or, for n of 1, [Hq], read-only. Raises CodingError for a column of another length."""
    columns, size = {}, math.prod(shape)
    for name, dtype in CERTIFICATE_COLUMNS.items():
        data = getattr(message, name)
        if len(data) != size * dtype.itemsize:
            raise CodingError(f"certificate column {name} has {len(data)} bytes for shape {list(shape)} of {dtype}")
        columns[name] = np.ndarray(shape, dtype, data)
    return columns
