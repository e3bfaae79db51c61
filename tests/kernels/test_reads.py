"""What a call read, as a list, beside a set of records."""

from typing import Any, NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tierd_kernels.in_scratch import UNIT, InScratch
from tierd_kernels.reads import Reads, listed, united, words_of

Record = tuple[int, int, int]  # kind, block, head


class Drawn(NamedTuple):
    """What was read, [2, Hkv, m], exact heads, and which records have a copy."""

    read: NDArray[np.bool_]
    exact: NDArray[np.bool_]
    in_scratch: InScratch | None
    copied: set[Record]

    @property
    def named(self) -> set[Record]:
        return {(kind, block, head) for kind, head, block in np.argwhere(self.read).tolist()}

    @property
    def of_exact(self) -> set[Record]:
        blocks = range(self.read.shape[2])
        return {(kind, block, head) for kind in (0, 1) for block in blocks for head in np.flatnonzero(self.exact).tolist()}

    def listed(self, in_scratch: InScratch | None) -> Reads:
        return listed(words_of(self.read), self.read.shape[2], self.exact, in_scratch)


@st.composite
def drawn(draw: Any, heads: int, blocks: int) -> Drawn:
    """From nothing to all read; from no copy to one of everything."""
    exact = np.array(draw(st.lists(st.booleans(), min_size=heads, max_size=heads)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shares = [draw(st.sampled_from([0.0, 0.03, 0.5, 1.0])) for _ in range(2)]
    locations = np.where(random.random((2, blocks, heads)) < shares[1], random.integers(0, 9, (2, blocks, heads)) * UNIT, -1)
    copied = {(kind, block, head) for kind, block, head in np.argwhere(locations >= 0).tolist()}
    return Drawn(random.random((2, heads, blocks)) < shares[0], exact, InScratch.of(locations), copied)


def several(most: int) -> st.SearchStrategy[list[Drawn]]:
    sizes = st.tuples(st.integers(1, 9) | st.integers(16, 34), st.integers(0, 40))
    return sizes.flatmap(lambda size: st.lists(drawn(*size), min_size=1, max_size=most))


def as_list(reads: Reads) -> list[Record]:
    return [(kind, block, head) for kind, block, head in reads.records.T.tolist()]


@given(several(1))
def test_what_is_listed_is_what_was_read_and_all_of_exact_heads(found: list[Drawn]) -> None:
    [x] = found
    reads = x.listed(x.in_scratch)
    records = as_list(reads)
    assert records == sorted(x.named | x.of_exact)
    assert reads.from_host.tolist() == [record not in x.copied or bool(x.exact[record[2]]) for record in records]


@given(several(1))
def test_a_record_has_the_bit_that_tells_of_its_copy(found: list[Drawn]) -> None:
    [x] = found
    copied = InScratch.of(np.where(x.read.transpose(0, 2, 1), UNIT, -1))
    words = words_of(x.read)
    assert words.dtype == np.uint32 and len(words) == -(-x.read.size // 32)
    assert np.array_equal(words, np.zeros_like(words) if copied is None else copied.words[: len(words)].astype(np.uint32))


@given(several(3), st.data())
def test_parts_together_read_what_any_of_them_did(found: list[Drawn], data: st.DataObject) -> None:
    """The first parts of a call see fewer blocks than the last; the same lies in scratch for all."""
    last = found[-1]
    seen = [data.draw(st.integers(0, x.read.shape[2])) for x in found[:-1]] + [last.read.shape[2]]
    parts = [x._replace(read=x.read[:, :, :n]) for x, n in zip(found, seen, strict=True)]
    exact = np.logical_or.reduce([x.exact for x in parts])
    reads = united([x.listed(last.in_scratch) for x in parts], seen[-1], exact, last.in_scratch)
    everything = last._replace(exact=exact).of_exact
    expected = sorted({record for x in parts for record in x.named} | everything)
    assert as_list(reads) == expected
    assert reads.from_host.tolist() == [record not in last.copied or record in everything for record in expected]


def test_a_call_of_the_largest_context_is_listed() -> None:
    """8,192 blocks, 8 heads, of which one is exact: as many records as it has, and the others' at both ends."""
    read, exact = np.zeros((2, 8, 8192), np.bool_), np.arange(8) == 3
    read[:, 0, 0] = read[:, 7, 8191] = True
    reads = listed(words_of(read), 8192, exact, None)
    assert reads.records.shape == (3, 2 * 8192 + 4) and reads.from_host.all()
    assert (as_list(reads)[0], as_list(reads)[-1]) == ((0, 0, 0), (1, 8191, 7))
