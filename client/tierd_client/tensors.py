"""The caller's tensors <-> raw numpy arrays (bfloat16 as uint16 bits). Torch is imported only by who passes its tensors.

numpy has no bfloat16 of its own: its arrays hold the bits, as uint16.
"""

import sys
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, Union, cast

import numpy as np
from numpy.typing import NDArray

from tierd_client.errors import InvalidArgument

if TYPE_CHECKING:
    import torch

Raw = NDArray[Any]
NUMPY_DTYPES = {np.dtype("float16"): "float16", np.dtype("uint16"): "bfloat16", np.dtype("float32"): "float32"}
AnyTensor = Union[NDArray[Any], "torch.Tensor"]
Tensor = TypeVar("Tensor", bound="NDArray[Any] | torch.Tensor")


def to_raw(name: str, tensor: object, dtype: str) -> Raw:
    """The elements of `tensor` on the CPU, without a copy where that is possible.

    Raises InvalidArgument, naming it `name`, unless its type is `dtype`, the session's ("float16", "bfloat16" or "float32").
    """
    if _is_torch(tensor):
        given = str(tensor.dtype).removeprefix("torch.")
    elif isinstance(tensor, np.ndarray):
        given = NUMPY_DTYPES.get(tensor.dtype.newbyteorder("=")) or f"numpy {tensor.dtype.name}"
    else:
        raise InvalidArgument(f"{name} is a {type(tensor).__name__}; allowed: torch tensors and numpy arrays")
    if given != dtype:
        hint = " (as a numpy array: its bits, uint16)" if dtype == "bfloat16" else ""
        raise InvalidArgument(f"{name} is {given}; the session's geometry says {dtype}{hint}")
    return _torch_to_raw(tensor) if _is_torch(tensor) else _native(cast(Raw, tensor))


def in_one_copy(*tensors: object) -> tuple[object, ...]:
    """The same, torch's of one GPU and type on the CPU: each copy from there waits for the device, and takes an H100's host 50 us."""
    given = [tensor for tensor in tensors if _is_torch(tensor) and tensor.device.type != "cpu"]
    if len(given) < len(tensors) or len({(tensor.device, tensor.dtype) for tensor in given}) > 1:
        return tensors
    return joined(given)


def joined(tensors: "Sequence[torch.Tensor]") -> "tuple[torch.Tensor, ...]":
    """The same on the CPU, of one type and device: parts of one tensor."""
    whole = sys.modules["torch"].cat([tensor.detach().reshape(-1) for tensor in tensors]).cpu()
    ends = list(accumulate(tensor.numel() for tensor in tensors))
    return tuple(whole[end - tensor.numel() : end].view(tensor.shape) for end, tensor in zip(ends, tensors, strict=True))


def like(raw: Raw, tensor: Tensor) -> Tensor:
    """A copy of `raw` of the library, type and device of `tensor`, and of its shape but for the token axis that a 2-D one lacks."""
    copied = raw.copy()
    if tensor.ndim == 2:
        copied = copied[:, 0]
    if not _is_torch(tensor):
        return cast(Tensor, copied.astype(cast(Raw, tensor).dtype, copy=False))
    torch = sys.modules["torch"]
    whole = copied.view(np.int16) if copied.dtype == np.uint16 else copied
    return cast(Tensor, torch.from_numpy(whole).view(tensor.dtype).to(tensor.device))


def queries(q: Raw, num_q_heads: int, head_dim: int) -> Raw:
    """`q` [num_q_heads, head_dim] or [num_q_heads, n, head_dim] with its token axis. Raises InvalidArgument."""
    whole = q[:, None] if q.ndim == 2 else q
    if not _fits(whole, num_q_heads, head_dim):
        raise InvalidArgument(
            f"q has shape {list(q.shape)}; expected [{num_q_heads}, {head_dim}] or [{num_q_heads}, n, {head_dim}] with n of at least 1"
        )
    return whole


def check_pair(k: Raw, v: Raw, num_kv_heads: int, head_dim: int) -> None:
    """Raises InvalidArgument unless both are [num_kv_heads, n, head_dim] with one n of at least 1."""
    for name, array in (("k", k), ("v", v)):
        if not _fits(array, num_kv_heads, head_dim):
            raise InvalidArgument(
                f"{name} has shape {list(array.shape)}; expected [{num_kv_heads}, n, {head_dim}] with n of at least 1"
            )
    if k.shape != v.shape:
        raise InvalidArgument(f"k has shape {list(k.shape)} and v {list(v.shape)}; they must be the same")


def _fits(array: Raw, heads: int, head_dim: int) -> bool:
    return array.ndim == 3 and (array.shape[0], array.shape[2]) == (heads, head_dim) and array.shape[1] >= 1


def _native(array: Raw) -> Raw:
    """The same numbers in this machine's byte order."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _is_torch(tensor: object) -> "TypeGuard[torch.Tensor]":
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(tensor, torch.Tensor)


def _torch_to_raw(tensor: "torch.Tensor") -> Raw:
    torch = sys.modules["torch"]
    here = tensor.detach().cpu()
    if here.dtype == torch.bfloat16:
        return cast(Raw, here.view(torch.int16).numpy().view(np.uint16))
    return here.numpy()
