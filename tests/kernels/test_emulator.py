"""The emulator that stands in for a device: what it is trusted for."""

from collections.abc import Callable
from functools import partial
from typing import Any

import device
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tierd_kernels.cuda.sources import FOLDER
from tierd_kernels.kvview import narrow, widen

pytestmark = pytest.mark.skipif(device.real(), reason="there is a device; nothing is emulated")
Launch = Callable[..., None]
SOURCE = """
extern "C" __global__ void to_half(const double *x, unsigned short *out, int n) {
  for (int i = threadIdx.x; i < n; i += 32) out[i] = __double2half(x[i]).bits;
}
extern "C" __global__ void to_bf16(const double *x, unsigned short *out, int n) {
  for (int i = threadIdx.x; i < n; i += 32) out[i] = __double2bfloat16(x[i]).bits;
}
extern "C" __global__ void mma(const u32 *a, const u32 *b, float *d, int bf16) {  // a [4][lane], b [2][lane], d [lane][4]
  float own[4] = {0.f, 0.f, 0.f, 0.f};
  const int l = threadIdx.x;
  if (bf16) mma_bf16(own, a[l], a[32 + l], a[64 + l], a[96 + l], b[l], b[32 + l]);
  else mma_f16(own, a[l], a[32 + l], a[64 + l], a[96 + l], b[l], b[32 + l]);
  for (int i = 0; i < 4; i++) d[4 * l + i] = own[i];
}
extern "C" __global__ void pairs(const float *x, const float *y, u32 *out) {  // a pair a lane, products, the larger ones; transposed
  const int l = threadIdx.x;
  const u32 pair = bf16_pair(x[l], x[32 + l]), other = bf16_pair(y[l], y[32 + l]);
  out[l] = pair, out[32 + l] = bf16_products(pair, other), out[64 + l] = bf16_largest(pair, other), out[96 + l] = transposed(pair);
}
extern "C" __global__ void reverse(const float *x, float *out, int wait) {  // through shared memory, by a bulk copy
  extern __shared__ __align__(128) float stage[];
  __shared__ u64 bar;
  if (threadIdx.x == 0) barrier_init(&bar);
  __syncthreads();
  if (threadIdx.x == 0) barrier_expect(&bar, 512), bulk_copy(stage, x, 512, &bar);
  __syncthreads();
  if (wait) barrier_wait(&bar, 0);
  out[threadIdx.x] = stage[127 - threadIdx.x];
}
extern "C" __global__ void unready(const float *x, float *out, int meet) {  // a barrier of the first warp's, on which all wait
  extern __shared__ __align__(128) float stage[];
  __shared__ u64 bar;
  if (threadIdx.x == 0) barrier_init(&bar);
  barriers_ready();
  if (meet) __syncthreads();
  if (threadIdx.x == 0) barrier_expect(&bar, 512), bulk_copy(stage, x, 512, &bar);
  barrier_wait(&bar, 0);
  out[threadIdx.x] = stage[threadIdx.x];
}
extern "C" __global__ void sum(const int *x, int *out) {  // whose last warp has left by the second barrier
  __shared__ int parts[4];
  int own = x[threadIdx.x];
  for (int bit = 1; bit < 32; bit <<= 1) own += __shfl_xor_sync(~0u, own, bit);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x >= 96) return;
  __syncthreads();
  if (threadIdx.x == 0) *out = parts[0] + parts[1] + parts[2] + parts[3];
}
extern "C" __global__ void stuck(int *out) {
  if (threadIdx.x < 7) __syncwarp();
  __syncthreads();
  if (threadIdx.x < 7) __syncthreads();
  if (threadIdx.x >= 7) __syncwarp();
}
"""


def built(text: str, *options: str) -> Any:
    import cupy

    return cupy.RawModule(code=(FOLDER / "cuda" / "ptx.cuh").read_text() + text, options=options, backend="nvrtc")


@pytest.fixture(scope="module")
def launch(cuda: None) -> Launch:
    module = built(SOURCE)

    def run(name: str, threads: int, *args: Any) -> None:
        module.get_function(name)((1,), (threads,), args, shared_mem=512)

    return run


def on_device(x: Any) -> Any:
    import cupy

    return cupy.asarray(x)


DOUBLES = st.lists(st.floats(allow_nan=False) | st.floats(-70000, 70000) | st.floats(-1e-4, 1e-4), min_size=1, max_size=200)


@given(DOUBLES)
def test_doubles_are_rounded_once(launch: Launch, numbers: list[float]) -> None:
    x = on_device(np.array(numbers))
    halves, bf16 = (on_device(np.zeros(len(numbers), np.uint16)) for _ in range(2))
    launch("to_half", 32, x, halves, np.int32(len(numbers)))
    launch("to_bf16", 32, x, bf16, np.int32(len(numbers)))
    with np.errstate(over="ignore"):
        assert np.array_equal(halves.view(np.float16), np.array(numbers).astype(np.float16))
    normal = (np.abs(x) > 1.2e-38) & (np.abs(x) < 3e38)
    found = (bf16.astype(np.uint32) << 16).view(np.float32).astype(np.float64)[normal]
    exact = np.asarray(x)[normal]
    unit = np.ldexp(1.0, np.frexp(exact)[1] - 8)
    assert (np.abs(found - exact) <= unit / 2).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_mma_multiplies(launch: Launch, dtype: str) -> None:
    random = np.random.default_rng(0)
    a, b = narrow(random.standard_normal((16, 16)), dtype), narrow(random.standard_normal((16, 8)), dtype)
    lane = np.arange(32)
    r, c = lane // 4, lane % 4
    rows, columns = (r, r + 8, r, r + 8), (2 * c, 2 * c, 2 * c + 8, 2 * c + 8)
    of_a = [np.stack([a[x, y], a[x, y + 1]], axis=1).view(np.uint32)[:, 0] for x, y in zip(rows, columns, strict=True)]
    of_b = [np.stack([b[y, r], b[y + 1, r]], axis=1).view(np.uint32)[:, 0] for y in (2 * c, 2 * c + 8)]
    d = on_device(np.zeros((32, 4), np.float32))
    launch("mma", 32, on_device(np.stack(of_a)), on_device(np.stack(of_b)), d, np.int32(dtype == "bfloat16"))
    exact = widen(a, dtype) @ widen(b, dtype)
    for i in range(4):
        assert np.allclose(np.asarray(d)[:, i], exact[r + 8 * (i // 2), 2 * c + i % 2], rtol=2.0**-22, atol=2.0**-22)


def test_pairs_are_multiplied_compared_and_transposed(launch: Launch) -> None:
    random = np.random.default_rng(1)
    x, y = (np.ldexp(random.standard_normal((2, 32)), random.integers(-60, 60, (2, 32))).astype(np.float32) for _ in range(2))
    to, of = partial(narrow, dtype="bfloat16"), partial(widen, dtype="bfloat16")
    y[0, 3] = np.inf
    out = on_device(np.zeros((4, 2 * 32), np.uint16))
    launch("pairs", 32, on_device(x), on_device(y), out)
    found = np.asarray(out).reshape(4, 32, 2)
    pair, other = to(x).T, to(y).T  # [lane, half]
    assert np.array_equal(found[0], pair)
    assert np.array_equal(found[1], to(of(pair) * of(other)))
    assert np.array_equal(of(found[2]), np.maximum(of(pair), of(other)))
    assert np.array_equal(found[3].reshape(8, 8), pair.reshape(8, 8).T)


def test_a_copy_has_arrived_only_after_the_wait(launch: Launch) -> None:
    x, out = on_device(np.arange(128, dtype=np.float32)), on_device(np.zeros(128, np.float32))
    launch("reverse", 128, x, out, np.int32(1))
    assert np.array_equal(out, np.arange(128)[::-1])
    launch("reverse", 128, x, out, np.int32(0))
    assert np.isnan(out).all()


def test_a_wait_on_a_barrier_that_may_not_be_there_is_an_error(launch: Launch) -> None:
    x, out = on_device(np.arange(128, dtype=np.float32)), on_device(np.zeros(128, np.float32))
    launch("unready", 128, x, out, np.int32(1))
    assert np.array_equal(out, x)
    with pytest.raises(RuntimeError, match="may not be initialised yet"):
        launch("unready", 128, x, out, np.int32(0))


def test_threads_that_left_are_not_waited_for(launch: Launch) -> None:
    out = on_device(np.zeros(1, np.int32))
    launch("sum", 128, on_device(np.arange(128, dtype=np.int32)), out)
    assert out[0] == 127 * 64


def test_a_barrier_that_some_never_reach_is_an_error(launch: Launch) -> None:
    import cupy

    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match=r"stuck: threads of block \(0, 0, 0\) wait for others that never come"):
        launch("stuck", 64, on_device(np.zeros(1, np.int32)))


def test_shared_memory_is_the_kernels_own_whatever_another_build_of_it_has(cuda: None) -> None:
    """Arrays of an inline function in two builds, the first of which has less room."""
    text = """
__device__ __forceinline__ void through(int *out) {
  __shared__ int before[4], between[D], after[4];
  if (threadIdx.x < 4) before[threadIdx.x] = after[threadIdx.x] = 7;
  __syncthreads();
  for (int i = threadIdx.x; i < D; i += 32) between[i] = i;
  __syncthreads();
  if (threadIdx.x < 4) out[threadIdx.x] = before[threadIdx.x], out[4 + threadIdx.x] = after[threadIdx.x];
}
extern "C" __global__ void all(int *out) { through(out); }
"""
    found = []
    for size in (4, 40):
        out = on_device(np.zeros(8, np.int32))
        built(text, f"-DD={size}").get_function("all")((1,), (32,), (out,), shared_mem=0)
        found.append(np.asarray(out).tolist())
    assert found == [[7] * 8, [7] * 8]
