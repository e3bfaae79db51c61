"""How thread blocks share promotion: each open tile has its own, they agree about it, and none is idle while a tile is open."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_statistics import fetched
from tierd_kernels.cuda.sources import LANES, ROW_FACTS, ROW_TILE, source
from tierd_kernels.layout import Layout

Rows = NDArray[np.float32]
Shares = Callable[[Rows, bool], NDArray[np.int32]]
OPEN, CERTIFIED, ROW_LIMIT = 0, 1, ROW_FACTS - 1
KERNEL = """
extern "C" __global__ void share(int *state, float *facts, int heads, int rows, int coverage, int *out) {
  Call call = {};
  call.state = state, call.facts = facts, call.coverage = coverage;
  const Share share = Sharing(call, heads, rows, (rows + ROW_TILE - 1) / ROW_TILE).own();
  const int told[4] = {share.tile, share.part, share.parts, share.step};
  if (threadIdx.x < 4) out[4 * blockIdx.x + threadIdx.x] = told[threadIdx.x];
}
"""


@pytest.fixture(scope="module")
def shares(cuda: None) -> Shares:
    """Of the thresholds [Hkv, rows] of rows that are open (NaN: one that is not; infinite: nothing helps it), what each thread block of a
    split has: its tile, part, number of parts, and how far apart they are."""
    import cupy

    text, options = source(Layout(1, 64, 16, 16, "float16"), "promote")
    kernel = cupy.RawModule(code=text + KERNEL, options=options, backend="nvrtc").get_function("share")

    def run(limits: Rows, coverage: bool) -> NDArray[np.int32]:
        heads, rows = limits.shape
        tiles = -(-rows // ROW_TILE)
        state = cupy.asarray(np.where(np.isnan(limits), CERTIFIED, OPEN).astype(np.int32).ravel())
        facts = np.full((heads * rows, ROW_FACTS), np.nan, np.float32)
        facts[:, ROW_LIMIT] = np.nan_to_num(limits.ravel(), nan=1e-3, posinf=np.inf)  # what was left there
        out = cupy.zeros(4 * heads * tiles, cupy.int32)
        sizes = map(np.int32, (heads, rows, coverage))
        kernel((heads * tiles,), (LANES,), (state, cupy.asarray(facts.ravel()), *sizes, out))
        return fetched(out).reshape(-1, 4)

    return run


@given(st.integers(1, 40), st.integers(1, 9), st.booleans(), st.integers(0, 2**32 - 1))
def test_open_tiles_have_all_thread_blocks(shares: Shares, heads: int, rows: int, coverage: bool, seed: int) -> None:
    random, tiles = np.random.default_rng(seed), -(-rows // ROW_TILE)
    limits = random.choice(np.array([np.nan, np.inf, 0.01, 0.5, 0.5, 2.0, 9.0], np.float32), (heads, rows), p=random.dirichlet(np.ones(7)))
    found = shares(limits, coverage)
    padded = np.full((heads, tiles * ROW_TILE), np.nan, np.float32)
    padded[:, :rows] = limits
    of_tile = np.fmin.reduce(padded.reshape(heads * tiles, ROW_TILE), axis=1)
    is_open = ~np.isnan(of_tile) if coverage else of_tile < np.inf
    if coverage:  # whose rows have no thresholds
        assert np.array_equal(shares(np.where(np.isnan(limits), limits, np.float32(7.0)), True), found)
    if heads * tiles > LANES:
        assert [tile for tile, *_ in found] == [i if it else -1 for i, it in enumerate(is_open)] and (found[is_open, 1:3] == [0, 1]).all()
        return
    if not is_open.any():
        assert (found[:, 0] == -1).all()
        return
    assert set(found[:, 0].tolist()) == set(np.flatnonzero(is_open).tolist()), "open tiles and no others"
    count = np.bincount(found[:, 0], minlength=len(is_open))[is_open]
    assert count.max() - count.min() <= 1
    if not coverage and count.max() > count.min():
        assert of_tile[is_open][count == count.max()].max() <= of_tile[is_open][count == count.min()].min(), "lowest thresholds first"
    for tile in np.flatnonzero(is_open):
        places = np.flatnonzero(found[:, 0] == tile)
        assert found[places, 1].tolist() == list(range(len(places))) and (found[places, 2] == len(places)).all()
        assert (np.diff(places) == found[places[0], 3]).all(), "parts lie a step apart"
