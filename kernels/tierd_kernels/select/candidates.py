"""The few blocks of a call that come near needing their originals: what a prefetcher is shown.

Legend: m full blocks, Hkv KV heads, c candidates of a head at most, kind 0 keys and 1 values.
"""

from typing import NamedTuple

import numpy as np
from numba import prange
from numpy.typing import NDArray

from tierd_kernels.arrays import Singles
from tierd_kernels.floats import compiled

CANDIDATES_MAX = 64  # of a KV head and kind


class Candidates(NamedTuple):
    """`blocks` int32 [2, Hkv, c], indices of full blocks of the call in rising order; `scores` float32 [2, Hkv, c], positive and finite: a
    block's share of the bound, the largest over the KV head's rows, relative to the share from which on originals were promoted, or to the
    whole where none were. Shorter lists end in -1 and 0. At a tie the first blocks are taken.

    A promoted block is no candidate, for it is known that it was read, nor is one that the CPU skipped. The CPU's shares are of the budget
    and before promotion, and promotion begins at the least that one of the KV head's counted for that was promoted; on the device they are
    shares of what selection aims at, after promotion, and it begins at a row's own threshold (under the coverage policy, for both, at the
    whole)."""

    blocks: NDArray[np.int32]
    scores: NDArray[np.float32]

    @staticmethod
    def none(heads: int) -> "Candidates":
        return Candidates(np.empty((2, heads, 0), np.int32), np.empty((2, heads, 0), np.float32))

    def shares(self, full: int) -> NDArray[np.float32]:
        """Scores by block, [2, m, Hkv]; zero where a block is no candidate."""
        shares = np.zeros((2, full, self.blocks.shape[1]), np.float32)
        kind, head, place = np.nonzero(self.blocks >= 0)
        shares[kind, self.blocks[kind, head, place], head] = self.scores[kind, head, place]
        return shares


def near(shares: NDArray[np.float32], promoted: NDArray[np.bool_], favour: NDArray[np.float64] | None) -> NDArray[np.float32]:
    """Shares [2, m, Hkv] of what was not `promoted` [2, m, Hkv], relative to the least of its kind and head that was, if that is below 1:
    of what they counted for, `favour` times their shares. None: nothing was promoted for its share."""
    outside = np.where(promoted, np.float32(0.0), shares)
    if favour is None:
        return outside
    least = np.min(shares * favour, axis=1, keepdims=True, where=promoted & (shares > 0.0), initial=1.0)
    return np.asarray(np.minimum(outside / least, np.finfo(np.float32).max), np.float32)


def largest(shares: NDArray[np.float32], most: int) -> Candidates:
    """Those with the largest positive `shares` [2, m, Hkv], at most `most` of a head and kind. Raises ValueError for a negative `most`."""
    if most < 0:
        raise ValueError(f"candidates_max is {most}; at least 0 is allowed")
    _, full, heads = shares.shape
    most = min(most, full)
    blocks, scores = np.full((2, heads, most), -1, np.int32), np.zeros((2, heads, most), np.float32)
    if most:
        _largest(np.ascontiguousarray(shares.transpose(0, 2, 1)).reshape(2 * heads, full), blocks, scores)
    return Candidates(blocks, scores)


@compiled(parallel=True)
def _largest(shares_ib: Singles, blocks: NDArray[np.int32], scores: NDArray[np.float32]) -> None:
    most = blocks.shape[2]
    for i in prange(len(shares_ib)):
        share_b = shares_ib[i]
        into, values = blocks[i // blocks.shape[1], i % blocks.shape[1]], scores[i // blocks.shape[1], i % blocks.shape[1]]
        cut = np.partition(share_b, len(share_b) - most)[len(share_b) - most]
        ties = most
        for b in range(len(share_b)):
            ties -= share_b[b] > cut
        filled = 0
        for b in range(len(share_b)):
            if share_b[b] > 0.0 and (share_b[b] > cut or (share_b[b] == cut and ties > 0)):
                ties -= share_b[b] == cut
                into[filled], values[filled] = b, share_b[b]
                filled += 1


def joined(parts: list[Candidates], full: int, most: int) -> Candidates:
    """Of runs of query tokens of one call together: a block that is among the largest of all is among those of its run."""
    if len(parts) == 1:
        return parts[0]
    return largest(np.maximum.reduce([part.shares(full) for part in parts]), most)
