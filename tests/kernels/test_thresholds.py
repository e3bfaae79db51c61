"""Thresholds of selection: each share lies in the bin whose edges are around it, and bins are as narrow as they are said to be."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_statistics import fetched
from tierd_kernels.cuda.sources import PICK_BINS, source
from tierd_kernels.layout import Layout

Shares = NDArray[np.float32]
Binned = Callable[[int, Shares], tuple[NDArray[np.int32], Shares]]
KERNEL = """
extern "C" __global__ void bins(int blocks, const float *x, int count, int *of, float *edges) {
  const Bins scale(blocks);
  for (int i = threadIdx.x; i < count; i += 32) of[i] = scale.of(x[i]);
  for (int i = threadIdx.x; i < BINS; i += 32) edges[i] = scale.edge(i);
}
"""


@pytest.fixture(scope="module")
def binned(cuda: None) -> Binned:
    """Of a context's number of blocks and shares, which bins these are in, and all bins' upper edges."""
    import cupy

    text, options = source(Layout(1, 64, 16, 16, "float16"), "pick")
    kernel = cupy.RawModule(code=text + KERNEL, options=options, backend="nvrtc").get_function("bins")

    def run(blocks: int, shares: Shares) -> tuple[NDArray[np.int32], Shares]:
        of, edges = cupy.zeros(len(shares), cupy.int32), cupy.zeros(PICK_BINS, cupy.float32)
        kernel((1,), (32,), (np.int32(blocks), cupy.asarray(shares), np.int32(len(shares)), of, edges))
        return fetched(of), fetched(edges)

    return run


@pytest.mark.parametrize("blocks", [1, 63, 64, 512, 8192, 16383, 65536, 1 << 22])
@given(shares=st.lists(st.floats(0, 2.0**60, width=32, allow_subnormal=False), max_size=40))
def test_a_share_lies_between_the_edges_of_its_bin(binned: Binned, blocks: int, shares: list[float]) -> None:
    _, edges = binned(blocks, np.zeros(1, np.float32))
    x = np.concatenate([np.array(shares, np.float32), np.nextafter(edges, np.float32(0)), edges])  # on either side of each
    of, again = binned(blocks, x)
    assert np.array_equal(edges, again)
    upper, lower = np.append(edges, np.inf), np.append(0.0, edges)
    assert (x < upper[of]).all() and (x >= lower[of]).all()
    steps, high = edges[1:] / edges[:-1], edges[:-1] >= 0.25
    assert (steps > 1).all() and steps.max() <= 4 and steps[high].max() <= 1.5 and steps[~high & (edges[:-1] >= 2.0**-14)].max() <= 1.25
    assert blocks * edges[0] <= 1 / 32 and edges[-1] >= 4
