"""Where all arrays of a launch lie, and views of the host's side of them: worked out once for launches of parts of the same shapes, as
those of all layers are, token after token, until a block is full. Anew with every launch it took 24 us of 94 on the host."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.bound.reference import GROUP_TOKENS
from tierd_kernels.cuda.late import Place
from tierd_kernels.cuda.launch import CALL, FIELDS, Grid, above, kernels
from tierd_kernels.cuda.memory import DeviceMemory
from tierd_kernels.cuda.plan import ANSWERS, INPUTS, LATE, SIZED, WORKSPACE, Plan, Shape, plan_of
from tierd_kernels.cuda.sources import SPLITS_MAX
from tierd_kernels.cuda.staging import Region, Staging
from tierd_kernels.in_scratch import RECORDS
from tierd_kernels.layout import NUMPY_DTYPE, Layout


class Placed(NamedTuple):
    """A part's. `per`: blocks of a split; `addresses`: of all arrays, in the order of CALL, those that are kept left open.

    Views of what a launch carries in: q raw [Hq, n, d], tickets, canaries, and what lies in scratch as `InScratch` has it; of canaries and
    copies there may be fewer. Of what comes back: output raw [Hq, n, d], fields [FIELDS, Hq, n], state [Hq, n], failures [canaries, Hkv];
    where anything was promoted reads, a bit of each record, and cold [Hq, n], of a row how many had no copy; late, the candidates."""

    splits: int
    per: int
    addresses: list[int]
    q: NDArray[Any]
    tickets: NDArray[np.int32]
    canaries: NDArray[np.int32]
    copied: NDArray[np.int64]
    copies: NDArray[np.uint32]
    output: NDArray[Any]
    fields: NDArray[np.float64]
    state: NDArray[np.int32]
    failures: NDArray[np.bool_]
    reads: NDArray[np.uint32]
    cold: NDArray[np.int32]
    late: Place


class Arrangement:
    """`at`: the address of the launch's calls; `unused`: a view of those beyond the last part, which must be empty; `inputs_end` and
    `answers_end`: of what is carried in and back; `grid`, with all canaries that there is room for; `late`: the candidates of all parts, if
    `candidates`, any are wanted."""

    def __init__(self, layout: Layout, memory: DeviceMemory, shapes: tuple[Shape, ...], split_blocks: int | None) -> None:
        """Raises ValueError for more splits than kernels take, and where all parts together need more room than there is."""
        heads, number = layout.num_kv_heads, len(shapes)
        plans = [plan_of(layout, shape, memory.processors, split_blocks) for shape in shapes]
        workspace, inputs, outputs = map(Region, (memory.workspace.nbytes, memory.inputs.host.size, memory.outputs.host.size))
        # First in the range, so that all launches find their calls at one address.
        calls_start = inputs.take(above(number, 1) * CALL.itemsize)
        self.at, calls = memory.inputs.at + calls_start, memory.inputs.view(calls_start, (above(number, 1),), CALL)
        self.unused = calls[number:].view(np.uint8)
        starts: dict[int, list[int]] = {
            place: [region.take(plan.sizes[place]) for plan in plans]
            for place, region in ((WORKSPACE, workspace), (INPUTS, inputs), (ANSWERS, outputs))
        }
        self.inputs_end, self.answers_end = inputs.used, outputs.used
        starts[LATE] = [outputs.take(plan.sizes[LATE]) for plan in plans]
        tiles = [shape.tiles(heads) for shape in shapes]
        self.parts = [
            _placed(layout, memory, shape, plan, [starts[place][i] for place in range(SIZED)], sum(tiles), split_blocks)
            for i, (shape, plan) in enumerate(zip(shapes, plans, strict=True))
        ]
        self.late, self.candidates = [x.late for x in self.parts], any(shape.candidates for shape in shapes)
        group, splits = shapes[0].group, max(x.splits for x in self.parts)
        together = max(1, GROUP_TOKENS // (max(x.per for x in self.parts) * layout.block_size))
        self.grid = Grid(
            number, splits, max(tiles), group * max(shape.n for shape in shapes), group, max(shape.canaries for shape in shapes), together
        ).rounded()  # fmt: skip


def _placed(
    layout: Layout, memory: DeviceMemory, shape: Shape, plan: Plan, starts: list[int], tiles: int, split_blocks: int | None
) -> Placed:  # fmt: skip
    """`starts`: of the plan's places; `tiles`: of all parts."""
    heads, d, full = layout.num_kv_heads, layout.head_dim, shape.full
    rows, raw = (heads * shape.group, shape.n), NUMPY_DTYPE[layout.dtype]
    per = split_blocks or kernels(layout).split_blocks(full, tiles, memory.processors)
    splits = -(-full // per)
    if splits >= SPLITS_MAX:
        raise ValueError(f"{full} blocks are {splits} splits; at most {SPLITS_MAX - 1}")
    # In the order of the plan's places. Candidates are a few KB, which their kernel writes over the link by itself.
    ranges = memory.workspace_at, memory.inputs.at, memory.outputs.at, memory.outputs.host_at
    bases = [base + start for base, start in zip(ranges, starts, strict=True)]
    bases += [memory.hot_at, memory.scratch_at, memory.originals_at, 0, 0]

    def view(staging: Staging, name: str, size: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        place, offset = plan.places[name]
        return staging.view(starts[place] + offset, size, dtype) if place < SIZED else np.empty(0, dtype)

    inputs, outputs, found = memory.inputs, memory.outputs, (2, heads, shape.candidates)
    return Placed(
        splits, per, [bases[place] + offset for place, offset in plan.pointers],
        view(inputs, "q", (*rows, d), raw), view(inputs, "tickets", (plan.tickets,), np.int32),
        view(inputs, "canaries", (shape.canaries,), np.int32),
        view(inputs, "copied", (2 * full * heads // RECORDS + 1,), np.int64), view(inputs, "copies", (shape.copies,), np.uint32),
        view(outputs, "output", (*rows, d), raw), view(outputs, "fields", (len(FIELDS), *rows), np.float64),
        view(outputs, "state", rows, np.int32), view(outputs, "failures", (shape.canaries, heads), np.bool_),
        view(outputs, "reads", (-(-2 * full * heads // RECORDS),), np.uint32), view(outputs, "cold", rows, np.int32),
        Place(view(outputs, "candidate_blocks", found, np.int32), view(outputs, "candidate_scores", found, np.float32)),
    )  # fmt: skip


def arrangement(layout: Layout, memory: DeviceMemory, shapes: tuple[Shape, ...], split_blocks: int | None) -> Arrangement:
    """As it was made for the last launch of the same shapes, or made now."""
    key = layout, shapes, split_blocks
    found: Arrangement | None = memory.arranged.find(key)
    return memory.arranged.add(key, Arrangement(layout, memory, shapes, split_blocks)) if found is None else found
