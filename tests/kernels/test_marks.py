"""What kernels marked, counted record by record."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tierd_kernels.in_scratch import NOTHING, InScratch


@pytest.mark.usefixtures("cuda")
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 9), st.booleans(), st.integers(0, 2**32 - 1))
def test_reads_are_those_of_the_marks(heads: int, tiles: int, full: int, located: bool, seed: int) -> None:
    from tierd_kernels.cuda.marks import count_reads

    random = np.random.default_rng(seed)
    marks = random.integers(0, 512, (heads * tiles, full), dtype=np.uint32) * random.integers(0, 2, (heads * tiles, full), dtype=np.uint32)
    at = random.integers(-2, 2, (2, full, heads)) if located else np.full((2, full, heads), -1)
    in_scratch = InScratch.of(at)
    reads, cold = np.zeros((2, full, heads), np.bool_), np.full(heads * tiles * 4, 7)
    count_reads(marks, heads, NOTHING if in_scratch is None else in_scratch.words, reads, cold)
    expected: set[tuple[Any, ...]] = set()
    counts = np.full(heads * tiles * 4, 7)
    for tile, block, kind, row in np.ndindex(heads * tiles, full, 2, 4):
        if marks[tile, block] >> (4 * kind + row) & 1:
            head = tile // tiles
            expected.add((kind, block, head))
            counts[4 * tile + row] += at[kind, block, head] < 0
    assert {tuple(x) for x in np.argwhere(reads).tolist()} == expected and np.array_equal(cold, counts)
