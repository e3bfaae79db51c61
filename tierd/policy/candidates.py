"""The few blocks of a call that are near needing their originals, and the reduction of all shares to them.

Legend: m full blocks, Hkv KV heads, c candidates.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])
compiled: Callable[[Function], Function] = numba.njit(cache=True)


UNKNOWN = np.float32(1e-30)  # the share of a block that was needed and of which no share is known


class Candidates(NamedTuple):
    """`blocks` int32, `scores` float32, both [2, Hkv, c], kind first: a block's index in its call and the share of the bound's budget that
    promoting its keys or values would remove. -1 ends a shorter list."""

    blocks: NDArray[np.int32]
    scores: NDArray[np.float32]


def largest(shares: NDArray[np.float32], needed: NDArray[np.bool_], limit: int) -> Candidates:
    """The at most `limit` (> 0) largest positive `shares` [2, m, Hkv] of each kind and head, in no order; infinite ones go first, NaN
    never. What was `needed` (same shape) without a share, as under the paper's policy, counts as UNKNOWN."""
    assert limit > 0 and shares.shape == needed.shape
    _, _, heads = shares.shape
    blocks, scores = np.full((2, heads, limit), -1, np.int32), np.zeros((2, heads, limit), np.float32)
    _largest(shares, needed, blocks, scores)
    return Candidates(blocks, scores)


@compiled
def _largest(shares: NDArray[np.float32], needed: NDArray[np.bool_], blocks: NDArray[np.int32], scores: NDArray[np.float32]) -> None:
    kinds, m, heads = shares.shape
    limit = blocks.shape[2]
    filled, lowest = np.zeros(heads, np.int64), np.zeros(heads, np.int64)
    for kind in range(kinds):
        filled[:] = 0
        for b in range(m):
            for h in range(heads):
                share = shares[kind, b, h]
                if not share > 0.0:
                    if not needed[kind, b, h]:
                        continue
                    share = UNKNOWN
                at = filled[h]
                if at == limit:
                    at = lowest[h]
                    if share <= scores[kind, h, at]:
                        continue
                else:
                    filled[h] += 1
                blocks[kind, h, at], scores[kind, h, at] = b, share
                if filled[h] == limit:
                    lowest[h] = np.argmin(scores[kind, h])
