"""What is wrong with a request, said before anything is touched. Everything here raises InvalidArgument or returns.

Legend: Hq query heads, Hkv KV heads, n new tokens, d head dimension.
"""

import numpy as np
from tierd_kernels.floats import is_finite
from tierd_kernels.layout import NUMPY_DTYPE

from tierd.commands import Append, Raw, Row
from tierd.errors import InvalidArgument
from tierd.session import Session


def check_append(session: Session, request: Append | Row) -> None:
    """That `k` and `v` of `request` can be appended to its layer."""
    check_layer(session, request.layer)
    if request.k is None or request.v is None:
        raise InvalidArgument("k and v must be given together, or neither")
    geometry = session.geometry
    shape = (geometry.num_kv_heads, "n", geometry.head_dim)
    _check_tensor("k", request.k, shape, geometry.dtype)
    _check_tensor("v", request.v, shape, geometry.dtype)
    if request.k.shape != request.v.shape:
        raise InvalidArgument(f"k has shape {request.k.shape} and v {request.v.shape}; they must be the same")
    stored, new = session.layers[request.layer].length, request.k.shape[1]
    if stored + new > session.max_tokens:
        raise InvalidArgument(
            f"layer {request.layer} holds {stored} tokens and {new} more would pass the session's max_tokens, {session.max_tokens}"
        )


def check_row(session: Session, row: Row) -> None:
    """That `row` can be answered."""
    check_layer(session, row.layer)
    geometry = session.geometry
    _check_tensor("q", row.q, (geometry.num_q_heads, "n", geometry.head_dim), geometry.dtype)
    visible = session.layers[row.layer].length
    if row.k is not None or row.v is not None:
        check_append(session, row)
        assert row.k is not None
        visible += row.k.shape[1]
    if visible == 0:
        raise InvalidArgument(f"layer {row.layer} is empty: append keys and values before attending")
    if row.q.shape[1] > visible:
        raise InvalidArgument(
            f"q holds {row.q.shape[1]} tokens; layer {row.layer} has {visible}, and queries are its newest"
        )


def check_layer(session: Session, layer: int) -> None:
    """That the session has this layer."""
    if not 0 <= layer < session.geometry.num_layers:
        raise InvalidArgument(f"layer is {layer}; allowed: 0 to {session.geometry.num_layers - 1}")


def check_length(length: int, lengths: list[int]) -> None:
    """That a session of these `lengths` can be cut to `length`."""
    if not 0 <= length <= max(lengths):
        raise InvalidArgument(f"length is {length}; allowed: 0 to {max(lengths)}, what is stored")


def _check_tensor(name: str, x: Raw, shape: tuple[int, str, int], dtype: str) -> None:
    if x.ndim != 3 or (x.shape[0], x.shape[2]) != (shape[0], shape[2]) or x.shape[1] < 1:
        raise InvalidArgument(f"{name} has shape {list(x.shape)}; expected [{shape[0]}, n, {shape[2]}] with n of at least 1")
    if x.dtype != NUMPY_DTYPE[dtype]:
        raise InvalidArgument(f"{name} is {x.dtype}; this session's {dtype} travels as {np.dtype(NUMPY_DTYPE[dtype])}")
    if not is_finite(x, dtype):
        raise InvalidArgument(f"{name} holds a value that is not finite")
