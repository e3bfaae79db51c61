"""Quotients of integers by way of floats are those of integers, of all numbers that kernels divide."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_statistics import fetched
from tierd_kernels.cuda.sources import source
from tierd_kernels.layout import Layout

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]
MOST = 1 << 20
KERNEL = """
extern "C" __global__ void divide(const int *x, const int *y, int count, int *to) {
  for (int i = threadIdx.x; i < count; i += 32) to[i] = quotient(x[i], y[i]);
}
"""


@given(st.lists(st.tuples(st.integers(0, MOST - 1), st.integers(1, MOST - 1)), max_size=20))
def test_a_quotient_is_that_of_integers(drawn: list[tuple[int, int]]) -> None:
    import cupy

    text, options = source(Layout(1, 64, 16, 16, "float16"), "candidates")
    kernel = cupy.RawModule(code=text + KERNEL, options=options, backend="nvrtc").get_function("divide")
    below = np.array([(k * y - 1, y) for y in (1, 2, 3, 7, 127, 1023, 4097) for k in (1, 2, MOST // y)])  # just before the next one
    at, own = below + np.array([1, 0]), np.array(drawn, np.int64).reshape(-1, 2)
    x, y = np.concatenate([below, at, own]).T.astype(np.int32, order="C")
    to = cupy.zeros(len(x), cupy.int32)
    kernel((1,), (32,), (cupy.asarray(x), cupy.asarray(y), np.int32(len(x)), to))
    assert np.array_equal(np.asarray(fetched(to)).view(np.int32), x // y)
