"""Statistics of a block as the CUDA kernels store them: eight words a row, some of which hold two numbers from above."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tierd_kernels.cuda.sources import FOLDER

Launch = Callable[..., None]
SOURCE = """
extern "C" __global__ void pack(const float *x, const float *y, float *words, int n) {
  for (int i = threadIdx.x; i < n; i += 32) words[i] = both_above(x[i], y[i]);
}
// Statistic k of row r of a block reads the number that was written for it, or a note for all rows.
extern "C" __global__ void places(int block, float *out) {
  __shared__ float words[STATISTIC_WORDS];
  for (int i = threadIdx.x; i < STATISTIC_WORDS; i += 32) words[i] = 0.f;
  __syncthreads();
  if (threadIdx.x < 8 * ROW_TILE) {
    const int word = threadIdx.x / ROW_TILE, row = threadIdx.x % ROW_TILE;
    const float upper = 1 + word + 16 * row, lower = 128 + word + 16 * row;
    const bool both = word == SUM_SQUARES || word == SUM_ERROR || word == D_AND_NOTE;
    words[word_at(block, word) + row] = both ? __uint_as_float(__float_as_uint(upper) | __float_as_uint(lower) >> 16) : upper;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < (STATISTICS + 3) * ROW_TILE; i += 32) out[i] = statistic(words, block, i % ROW_TILE, i / ROW_TILE);
}
"""
SIZES = ("-DD=128", "-DBLOCK=16", "-DGROUP=16", "-DDTYPE=0")
NUMBERS = st.floats(0.0, 2.0**127, width=32, allow_subnormal=False) | st.sampled_from(
    [np.inf, np.nan, 2.0**-126, 1.0, 1.0 + 2.0**-23, 255.99998]
)


@pytest.fixture(scope="module")
def launch(cuda: None) -> Launch:
    import cupy

    code = "".join((FOLDER / name).read_text() for name in ("cuda/ptx.cuh", "cuda/common.cuh")) + SOURCE
    module = cupy.RawModule(code=code, options=("--std=c++17", *SIZES), backend="nvrtc")

    def run(name: str, *args: Any) -> None:
        module.get_function(name)((1,), (32,), args)

    return run


def fetched(x: Any) -> NDArray[np.float32]:
    return x.get() if hasattr(x, "get") else np.asarray(x)  # the emulator's arrays are numpy's


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=50))
def test_two_numbers_share_a_word_from_above(launch: Launch, pairs: list[tuple[float, float]]) -> None:
    import cupy

    x, y = (np.array(part, np.float32) for part in zip(*pairs, strict=True))
    flushed = [np.where(part < 2.0**-126, np.float32(0), part) for part in (x, y)]
    words = cupy.asarray(np.zeros(len(pairs), np.float32))
    launch("pack", cupy.asarray(x), cupy.asarray(y), words, np.int32(len(pairs)))
    bits = fetched(words).view(np.uint32)
    for exact, found in zip(flushed, ((bits & 0xFFFF0000).view(np.float32), (bits << 16).view(np.float32)), strict=True):
        assert np.array_equal(np.isnan(found), np.isnan(exact))
        real = ~np.isnan(exact)
        assert (found[real] >= exact[real]).all(), (found, exact)
        inside = real & (exact < 3e38)
        assert (found[inside].astype(np.float64) <= exact[inside].astype(np.float64) * 1.008).all()


@pytest.mark.parametrize("block", [0, 5, 8, 15])
def test_each_statistic_has_a_place_of_its_own(launch: Launch, block: int) -> None:
    import cupy

    out = cupy.asarray(np.zeros((13, 4), np.float32))
    launch("places", np.int32(block), out)
    found, row = fetched(out), 16.0 * np.arange(4)
    uppers, lowers = {0: 0, 1: 1, 2: 2, 4: 4, 5: 5, 7: 7, 8: 3, 9: 6}, {3: 1, 6: 4}  # of statistics: the words
    for k, word in uppers.items():
        assert found[k].tolist() == (1.0 + word + row).tolist(), k
    for k, word in lowers.items():
        assert found[k].tolist() == (128.0 + word + row).tolist(), k
    for note in range(3):
        assert found[10 + note].tolist() == [128.0 + 6 + 16 * note] * 4
