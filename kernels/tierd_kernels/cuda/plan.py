"""Where everything of a part lies in the room for calls, worked out once for all parts of a shape: laying it out anew took the host
0.2 ms a call.

Legend: a tile is `ROW_TILE` rows (query tokens times query heads of a KV head); a split, blocks that one thread block goes through.
"""

from functools import lru_cache
from typing import NamedTuple

from tierd_kernels.cuda.launch import CALL, FIELDS, NUMBERS, POINTERS, above, kernels
from tierd_kernels.cuda.sources import (
    DENSE_FACTS,
    LANES,
    PARTIALS,
    PICK_BINS,
    PICK_PARTS,
    ROW_FACTS,
    ROW_TILE,
    STATISTIC_WORDS,
    WARPS,
)
from tierd_kernels.cuda.staging import ALIGNMENT, aligned
from tierd_kernels.in_scratch import RECORDS
from tierd_kernels.layout import Layout
from tierd_kernels.policy import Coverage, Policy

# Where an address may lie: in the workspace; in what a launch carries in; in what comes back with the answers; in the host's part of that;
# in a pool; where an array is kept, which each has for itself.
WORKSPACE, INPUTS, ANSWERS, LATE, HOT, SCRATCH, ORIGINALS, KEPT, NOWHERE = range(9)
SIZED = 4  # the first of these hold arrays of calls
KEPT_ARRAYS = "hot", "original", "group_values", "group_errors"
CALL_ROOM = 2 * CALL.itemsize + ALIGNMENT  # of a call's numbers, of which a launch may carry twice as many as it has calls
PLANS_MAX, POLICIES_MAX = 4096, 256
COUNT_MAX = 2**31 - 1


class Shape(NamedTuple):
    """What decides how much room a part takes: query heads of a KV head, query tokens, full blocks, candidates; canaries and `copies`,
    records that lie in scratch, which differ from call to call: up to numbers that many calls share."""

    group: int
    n: int
    full: int
    candidates: int
    canaries: int
    copies: int

    def rounded(self) -> "Shape":
        """Up to one that many parts share, so that a context that grows has few plans: a sixteenth more, at most."""
        return self._replace(full=above(self.full, 5))

    def tiles(self, heads: int) -> int:
        """Of all KV heads."""
        return heads * -(-self.group * self.n // ROW_TILE)


class Plan(NamedTuple):
    """`sizes`: bytes that a part takes of each of the SIZED first places; `needs`: of the workspace, of what is carried in (with its CALL)
    and of what comes back; `places`: of every address of CALL, where it lies and its offset there; `pointers`: the same in the order of
    CALL; `tickets`, which a call begins with as zeros."""

    sizes: tuple[int, ...]
    needs: tuple[int, int, int]
    places: dict[str, tuple[int, int]]
    pointers: tuple[tuple[int, int], ...]
    tickets: int


@lru_cache(PLANS_MAX)
def plan_of(layout: Layout, shape: Shape, processors: int, split_blocks: int | None = None) -> Plan:
    """Of a part of that shape. Launched with others it has fewer splits than alone, and fits too: they are more tiles."""
    per = split_blocks or kernels(layout).split_blocks(shape.full, shape.tiles(layout.num_kv_heads), processors)
    return plan(layout, shape.rounded(), per)


@lru_cache(PLANS_MAX)
def plan(layout: Layout, shape: Shape, per: int) -> Plan:
    """Of a part of that shape, or of less, whose splits are of `per` blocks, or more: a multiple of the warps that share them."""
    assert per % WARPS == 0, f"splits of {per} blocks, of which {WARPS} warps would not have as many each: a multiple of {WARPS} is wanted"
    heads, d, full = layout.num_kv_heads, layout.head_dim, shape.full
    rows, tiles, splits = heads * shape.group * shape.n, shape.tiles(heads), -(-full // per)
    tickets = 2 * (heads + tiles) + (tiles * splits if tiles <= LANES else 0)
    outputs, of_candidates = rows * d * layout.itemsize, 4 * 2 * heads * shape.candidates
    in_scratch = {"copied": 8 * (2 * full * heads // RECORDS + 1), "copies": 4 * shape.copies} if shape.copies else {}
    wanted: dict[int, dict[str, int]] = {
        WORKSPACE: {
            "statistics": 4 * tiles * (full + 1) * STATISTIC_WORDS,
            "partials": 4 * tiles * (splits + 1) * PARTIALS * ROW_TILE, "sums": 4 * tiles * (splits + 1) * ROW_TILE * d,
            "dense": 8 * tiles * (splits + 1) * ROW_TILE * (DENSE_FACTS + d),
            "facts": 4 * rows * ROW_FACTS, "dots": 4 * rows * (splits + 1), "counts": 8 * rows, "marks": 4 * tiles * full,
            "picks": tiles * 4 * 2 * min(PICK_PARTS, splits + 1) * ROW_TILE * PICK_BINS, "shares": 8 * heads * full,
            "row_weights": 8 * tiles * full * ROW_TILE,
        },
        INPUTS: {"q": outputs, "canaries": 4 * shape.canaries, "tickets": 4 * tickets, **in_scratch},
        ANSWERS: {
            "fields": 8 * len(FIELDS) * rows, "state": 4 * rows, "output": outputs, "failures": shape.canaries * heads,
            "reads": 4 * -(-2 * full * heads // RECORDS), "cold": 4 * rows,
        },
        LATE: {"candidate_blocks": of_candidates, "candidate_scores": of_candidates},
    }  # fmt: skip
    places = {"pool": (HOT, 0), "scratch": (SCRATCH, 0), "originals": (ORIGINALS, 0), **dict.fromkeys(KEPT_ARRAYS, (KEPT, 0))}
    if not shape.copies:
        places |= {"copied": (NOWHERE, 0), "copies": (NOWHERE, 0)}
    sizes = []
    for place in range(SIZED):
        used = 0
        for name, nbytes in wanted[place].items():
            places[name] = place, used
            used += aligned(nbytes)
        sizes.append(used)
    needs = sizes[WORKSPACE], sizes[INPUTS] + CALL_ROOM, sizes[ANSWERS] + sizes[LATE]
    return Plan(tuple(sizes), needs, places, tuple(places[name] for name in POINTERS), tickets)


class Terms(NamedTuple):
    """What CALL says of a policy, in its order: `ranks`, whether it requires a ranking; `covers`, 0 unless it is of coverage, else 1, or 2
    where the boundary is checked; numbers of blocks."""

    ranks: bool
    covers: int
    numbers: tuple[int, int]
    reals: tuple[float, float, float]


@lru_cache(POLICIES_MAX)
def terms_of(policy: Policy) -> Terms:
    """Nothing is skipped on the device: `skip_share` says nothing there."""
    if isinstance(policy, Coverage):
        numbers = min(policy.k_min, COUNT_MAX), min(policy.k_max, COUNT_MAX)
        return Terms(False, 1 + policy.boundary_check, numbers, (policy.tau_cov, policy.key_bound_max, policy.v_tol))
    return Terms(policy.require_rank, 0, (0, 0), (0.0, 0.0, 0.0))


assert NUMBERS[10:14] == ("require_rank", "coverage", "k_min", "k_max")
