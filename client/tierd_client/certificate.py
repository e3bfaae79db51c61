"""What a reply says of its own error."""

from dataclasses import dataclass
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from tierd_client.tensors import Tensor

Numbers = NDArray[np.float64]
Counts = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Certificate:
    """Read-only arrays, [num_q_heads] for a 2-D q and [num_q_heads, n] for a 3-D one. Errors and norms are Euclidean, of one head's output.

    The promise, for each element: the output is within `bound` of attention in exact arithmetic over the originals, and either
    `bound <= budget` or `exact`.
    """

    bound: Numbers
    """Distance from exact attention, at most."""
    budget: Numbers
    """atol + rtol * reference, what was asked for."""
    key_error: Numbers
    """Part of the bound from quantised keys; infinite where nothing could be said and the head was computed exactly."""
    value_error: Numbers
    """Part of the bound from quantised values; infinite like `key_error`."""
    skip_error: Numbers
    """Part of the bound from blocks that were not attended."""
    arith_error: Numbers
    """Part of the bound from floating-point arithmetic."""
    candidate_bound: Numbers
    """The bound before anything was promoted."""
    rung: Counts
    """How far up the ladder the head went: 0 quantised only, 1 with original keys of some blocks, 2 with original values of some
    blocks (keys too, perhaps), 3 exact, 4 exact like every other head of the layer at this query token."""
    exact: Flags
    """Computed densely from the originals: `bound` is arithmetic alone."""
    value_norm: Numbers
    """Attention-weighted mean norm of the values."""
    output_norm: Numbers
    """Norm of the returned output."""
    rank_certified: Flags
    """The heaviest block is certainly the one that the quantised scores say."""
    promoted_key_blocks: Counts
    """Blocks whose keys were read as originals."""
    promoted_value_blocks: Counts
    """Blocks whose values were read as originals."""
    skipped_blocks: Counts
    """Blocks that were not attended."""
    host_bytes: Counts
    """Bytes of originals read from host memory."""
    paper_key_bound: Numbers
    """The coverage policy's own key bound; NaN under the other policy."""


@dataclass(frozen=True, eq=False)
class Result(Generic[Tensor]):
    """`output`: of the shape, type, library and device of q. The last two are about speed, not about the answer."""

    output: Tensor
    certificate: Certificate
    late_records: int = 0
    """Originals (keys or values of one block and KV head) read from host memory although a copy was on its way to the device."""
    prefetch_wait_s: float = 0.0
    """Seconds that the call waited for such copies; those that it is batched with waited with it."""
