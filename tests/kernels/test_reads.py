"""What a call read, as a list, beside a set of records."""

from typing import Any, NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tierd_kernels.in_scratch import UNIT, InScratch
from tierd_kernels.reads import Reads, listed, united

ROWS = 4  # of a tile
Record = tuple[int, int, int]  # kind, block, head


class Drawn(NamedTuple):
    """Marks, exact heads, and which records have a copy."""

    marks: NDArray[np.uint32]
    exact: NDArray[np.bool_]
    in_scratch: InScratch | None
    copied: set[Record]

    @property
    def marked(self) -> set[tuple[Record, int]]:
        """What was read for which row, by their bits."""
        tiles = len(self.marks) // len(self.exact)
        bits = ((kind, row, tile, block) for kind, row, tile, block in np.ndindex(2, ROWS, *self.marks.shape))
        named = ((kind, row, tile, block) for kind, row, tile, block in bits if self.marks[tile, block] >> (ROWS * kind + row) & 1)
        return {((kind, block, tile // tiles), ROWS * tile + row) for kind, row, tile, block in named}

    @property
    def of_exact(self) -> set[Record]:
        blocks = range(self.marks.shape[1])
        return {(kind, block, head) for kind in (0, 1) for block in blocks for head in np.flatnonzero(self.exact).tolist()}


@st.composite
def drawn(draw: Any, heads: int, blocks: int) -> Drawn:
    """Marks from none to all, with bits above a tile's that say nothing of reads; from no copy to one of everything."""
    tiles, exact = draw(st.integers(1, 3)), np.array(draw(st.lists(st.booleans(), min_size=heads, max_size=heads)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shares = [draw(st.sampled_from([0.0, 0.03, 0.5, 1.0])) for _ in range(3)]
    marks = random.integers(0, 256, (heads * tiles, blocks)) * (random.random((heads * tiles, blocks)) < shares[0])
    marks |= (random.random(marks.shape) < shares[1]) << int(random.integers(8, 32))
    locations = np.where(random.random((2, blocks, heads)) < shares[2], random.integers(0, 9, (2, blocks, heads)) * UNIT, -1)
    copied = {(kind, block, head) for kind, block, head in np.argwhere(locations >= 0).tolist()}
    return Drawn(marks.astype(np.uint32), exact, InScratch.of(locations), copied)


def several(most: int) -> st.SearchStrategy[list[Drawn]]:
    sizes = st.tuples(st.integers(1, 9) | st.integers(16, 34), st.integers(0, 40))
    return sizes.flatmap(lambda size: st.lists(drawn(*size), min_size=1, max_size=most))


def as_list(reads: Reads) -> list[Record]:
    return [(kind, block, head) for kind, block, head in reads.records.T.tolist()]


@given(several(1))
def test_what_is_listed_is_what_was_marked_and_all_of_exact_heads(found: list[Drawn]) -> None:
    [x] = found
    reads, cold = listed(x.marks, x.exact, x.in_scratch)
    records = as_list(reads)
    assert records == sorted({record for record, _ in x.marked} | x.of_exact)
    assert reads.from_host.tolist() == [record not in x.copied or bool(x.exact[record[2]]) for record in records]
    counts = np.zeros(ROWS * len(x.marks), np.int64)
    for record, row in x.marked:
        counts[row] += record not in x.copied
    assert np.array_equal(cold, counts)


@given(several(3), st.data())
def test_parts_together_read_what_any_of_them_did(found: list[Drawn], data: st.DataObject) -> None:
    """The first parts of a call see fewer blocks than the last; the same lies in scratch for all."""
    last = found[-1]
    seen = [data.draw(st.integers(0, x.marks.shape[1])) for x in found[:-1]] + [last.marks.shape[1]]
    parts = [x._replace(marks=np.ascontiguousarray(x.marks[:, :n])) for x, n in zip(found, seen, strict=True)]
    exact = np.logical_or.reduce([x.exact for x in parts])
    reads = united([listed(x.marks, x.exact, last.in_scratch)[0] for x in parts], seen[-1], exact, last.in_scratch)
    everything = last._replace(exact=exact).of_exact
    expected = sorted({record for x in parts for record, _ in x.marked} | everything)
    assert as_list(reads) == expected
    assert reads.from_host.tolist() == [record not in last.copied or record in everything for record in expected]


def test_a_call_of_the_largest_context_is_listed() -> None:
    """8,192 blocks, 8 heads, of which one is exact: as many records as it has, and the others' marks at both ends."""
    marks, exact = np.zeros((16, 8192), np.uint32), np.arange(8) == 3
    marks[0, 0] = marks[15, 8191] = 0x88
    reads, cold = listed(marks, exact, None)
    assert reads.records.shape == (3, 2 * 8192 + 4) and reads.from_host.all()
    assert (as_list(reads)[0], as_list(reads)[-1]) == ((0, 0, 0), (1, 8191, 7)) and cold.nonzero()[0].tolist() == [3, 63]
    assert cold.sum() == 4
