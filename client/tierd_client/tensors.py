"""The caller's tensors <-> raw numpy arrays (bfloat16 as uint16 bits). Torch is imported only by who passes its tensors.

numpy has no bfloat16 of its own: its arrays hold the bits, as uint16.
"""

import sys
from collections.abc import Mapping, Sequence
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
    return _raw(_checked(name, tensor, dtype))


def all_raw(named: Mapping[str, object], dtype: str) -> list[Raw]:
    """As `to_raw`, of tensors by name. Those of one GPU come in one copy: each waits for the device, and takes an H100's host 50 us."""
    tensors = [_checked(name, tensor, dtype) for name, tensor in named.items()]
    far = [tensor.device for tensor in tensors if _is_torch(tensor) and tensor.device.type != "cpu"]
    return joined(tensors) if len(far) == len(tensors) and len(set(far)) == 1 else [_raw(tensor) for tensor in tensors]


def joined(tensors: "Sequence[torch.Tensor]") -> list[Raw]:
    """Of one type and device: parts of one array."""
    whole = _raw(sys.modules["torch"].cat([tensor.reshape(-1) for tensor in tensors]))
    ends = accumulate(tensor.numel() for tensor in tensors)
    return [whole[end - tensor.numel() : end].reshape(tensor.shape) for end, tensor in zip(ends, tensors, strict=True)]


def like(raw: Raw, tensor: Tensor) -> Tensor:
    """A copy of `raw` of the library, type and device of `tensor`, and of its shape but for the token axis that a 2-D one lacks."""
    copied = raw.copy()
    if tensor.ndim == 2:
        copied = copied[:, 0]
    if not _is_torch(tensor):
        return cast(Tensor, copied.astype(cast(Raw, tensor).dtype, copy=False))
    torch = sys.modules["torch"]
    bits = copied.dtype == np.uint16
    whole = torch.from_numpy(copied.view(np.int16)).view(torch.bfloat16) if bits else torch.from_numpy(copied)
    return cast(Tensor, whole.to(tensor.device))


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


def _checked(name: str, tensor: object, dtype: str) -> Any:
    """The tensor. Raises InvalidArgument unless it is one, of `dtype`."""
    if _is_torch(tensor):
        given = str(tensor.dtype).removeprefix("torch.")
    elif isinstance(tensor, np.ndarray):
        given = NUMPY_DTYPES.get(tensor.dtype.newbyteorder("=")) or f"numpy {tensor.dtype.name}"
    else:
        raise InvalidArgument(f"{name} is a {type(tensor).__name__}; allowed: torch tensors and numpy arrays")
    if given != dtype:
        hint = " (as a numpy array: its bits, uint16)" if dtype == "bfloat16" else ""
        raise InvalidArgument(f"{name} is {given}; the session's geometry says {dtype}{hint}")
    return tensor


def _is_torch(tensor: object) -> "TypeGuard[torch.Tensor]":
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(tensor, torch.Tensor)


def _raw(tensor: Any) -> Raw:
    """Of numpy's: the same numbers in this machine's byte order."""
    if not _is_torch(tensor):
        return cast(Raw, tensor.astype(tensor.dtype.newbyteorder("="), copy=False))
    torch = sys.modules["torch"]
    here = tensor.detach().cpu()
    if here.dtype == torch.bfloat16:
        return cast(Raw, here.view(torch.int16).numpy().view(np.uint16))
    return here.numpy()
