"""Which blocks are drawn as canaries: each with the same probability, whatever the calls."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tierd.engine.canaries import Canaries

SEED = 7


@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 0.5, 1e-2, 1e-4, 1e-30]), st.lists(st.integers(0, 5000), max_size=8))
def test_how_blocks_are_shared_out_among_calls_changes_nothing(seed: int, share: float, sizes: list[int]) -> None:
    parted, whole = Canaries(share, seed), Canaries(share, seed)
    starts = np.cumsum([0, *sizes])
    calls = [parted.draw(size) for size in sizes]
    for drawn, size in zip(calls, sizes, strict=True):
        assert drawn.dtype == np.int64 and (np.diff(drawn) > 0).all() and ((drawn >= 0) & (drawn < size)).all()
    found = np.concatenate([np.empty(0, np.int64), *(drawn + start for drawn, start in zip(calls, starts[:-1], strict=True))])
    assert found.tolist() == whole.draw(int(starts[-1])).tolist()


@pytest.mark.parametrize(("share", "blocks", "calls"), [(1e-3, 8192, 400), (0.05, 64, 2000), (0.5, 3, 4000)])
def test_each_block_is_drawn_with_the_probability_asked_for(share: float, blocks: int, calls: int) -> None:
    print(f"seed {SEED}")
    canaries = Canaries(share, SEED)
    drawn = [canaries.draw(blocks) for _ in range(calls)]
    total = sum(map(len, drawn))
    assert stats.binomtest(total, blocks * calls, share).pvalue > 1e-3
    places = np.histogram(np.concatenate(drawn), min(blocks, 16), (0, blocks))[0]
    assert stats.chisquare(places).pvalue > 1e-3  # the first of a call and the last alike
    assert stats.ks_2samp(list(map(len, drawn)), stats.binom(blocks, share).rvs(10 * calls, random_state=SEED)).pvalue > 1e-3


def test_all_or_none() -> None:
    assert Canaries(1.0, SEED).draw(5).tolist() == [0, 1, 2, 3, 4]
    assert Canaries(0.0, SEED).draw(5).tolist() == Canaries(1.0, SEED).draw(0).tolist() == []
