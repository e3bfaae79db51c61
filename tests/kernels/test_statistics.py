"""Statistics of a block as the CUDA kernels store them: eight words a row, some of which hold two numbers from above."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from coded_weights import coded_weights
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracle import exact_numbers
from test_candidates import Left
from test_cuda import LAYOUTS, draw, raw, store
from tierd_kernels.cuda.record import NOTES, Record
from tierd_kernels.cuda.sources import FOLDER
from tierd_kernels.layout import C1, RK, H, Layout
from tierd_kernels.policy import Budget

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


def sum_of(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Over the last axis, in the order of a warp's lanes: tokens t and t + 8 of each tile, then neighbours, pairs and fours of lanes."""
    of_lane = np.zeros((*weights.shape[:-1], 8), np.float32)
    for half in np.split(weights, weights.shape[-1] // 8, axis=-1):
        of_lane += half
    for _ in range(3):
        of_lane = of_lane[..., ::2] + of_lane[..., 1::2]
    return of_lane[..., 0]


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(("layout", "tokens", "n", "regime"), [
    (LAYOUTS[0], 1100, 1, "diffuse"), (LAYOUTS[0], 700, 1, "sharp"), (LAYOUTS[1], 777, 1, "outlier"), (LAYOUTS[2], 700, 1, "diffuse"),
    (LAYOUTS[4], 900, 1, "sink"), (LAYOUTS[2], 704, 40, "diffuse"),
], ids=str)  # fmt: skip
def test_sums_over_a_blocks_tokens_are_from_above(layout: Layout, tokens: int, n: int, regime: str) -> None:
    """Of the weights and norms that the score pass had, and hardly more; of 40 query tokens the first see a part of the last block."""
    from tierd_kernels.cuda.packing import Part
    from tierd_kernels.cuda.step import Step

    k, v, q = draw(layout, tokens, 4 * layout.num_kv_heads, n, regime, 5)
    cache, record, B, heads = store(layout, k, v), Record(layout), layout.block_size, layout.num_kv_heads
    step = Step(layout, cache.memory, [Part(layout, cache.call(q, 0.5, Budget(skip_share=0.0)), 0, n)])  # type: ignore[arg-type]
    step.upload()
    step.launch()
    assert all(answer.reads.from_host.size == 0 for answer in step.answers()), "statistics are the score pass's"
    left, full = Left(step), len(cache.hot)
    hot = np.asarray(fetched(cache.memory.hot)).view(np.uint8)
    at = cache.hot[:, None] + np.arange(heads) * record.nbytes + record.norms_at
    words = hot[at[..., None] + np.arange(4 * B)].view(np.uint32)  # [full, Hkv, B]
    nu, eta = (x.view(np.float32).astype(np.float64) for x in (words << np.uint32(16), words & np.uint32(0xFFFF0000)))
    nu, eta = (np.maximum(np.ldexp(x, -left.call["unit"]), 2.0**-50).transpose(1, 0, 2)[:, :, None] for x in (nu, eta))
    w = coded_weights(step)[::n]  # [Hkv, full, 4, B], of the first tile of rows
    kept = left.statistics[:, 0].reshape(heads, full, -1, 4)[:, :, :7]  # in the order of common.cuh
    assert np.array_equal(sum_of(w), kept[:, :, 0]), "what promotion takes back is what was summed, to the bit"
    w = w.astype(np.float64)
    terms = w, w**2, w * nu, (w * nu) ** 2, w * eta, w * nu**2, w * eta**2
    exact = np.stack([x.sum(-1) for x in terms], axis=2)
    ratio = kept / exact
    least, most = ratio.min(axis=(0, 1, 3)), ratio.max(axis=(0, 1, 3))
    print(np.round(least, 5), np.round(most, 5))
    one, two, shared = 2.0**-8, 2.0**-7, 2.0**-7  # a rounding to BF16, two, and the upper half of a word
    assert (least >= [1 - 1e-6, 1, 1 - one - 1e-5, 1, 1, 1, 1]).all()
    above = np.array([0.0, 2 * one + shared, one, 2 * two + shared, 2 * one + shared, 2 * two, 2 * two + shared])
    assert (most <= 1 + above + 1e-4).all()


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2]], ids=str)
def test_a_blocks_scores_err_by_its_own_codes_and_limbs(layout: Layout) -> None:
    """Delta of blocks whose keys are now a hundred times as large and now a hundredth: of the block's own step, not of a neighbour's."""
    from tierd_kernels.cuda.packing import Part
    from tierd_kernels.cuda.step import Step

    B, heads, d, full = layout.block_size, layout.num_kv_heads, layout.head_dim, 75
    k, v, q = draw(layout, full * B, 4 * heads, 1, "diffuse", 5)
    size = 10.0 ** (2 * (np.arange(full) % 3 - 1))
    k = raw(exact_numbers(k).astype(np.float64) * np.repeat(size, B)[:, None], layout.dtype)
    cache, record = store(layout, k, v), Record(layout)
    step = Step(layout, cache.memory, [Part(layout, cache.call(q, 1e-6, Budget()), 0, 1)], 2048 // B)  # type: ignore[arg-type]
    step.upload()
    step.kernels.certify(step.at, step.grid, False, step.memory.stream)
    step.memory.stream.synchronize()
    found = Left(step).statistics[:, 0].reshape(heads, full, -1, 4)[:, :, 8]  # [Hkv, full, 4]
    hot = np.asarray(fetched(cache.memory.hot)).view(np.uint8)
    at = cache.hot[:, None] + np.arange(heads) * record.nbytes
    scales = hot[at[..., None] + np.arange(2 * d)].view(np.float16).astype(np.float64).transpose(1, 0, 2)  # [Hkv, full, d]
    notes = hot[at[..., None] + record.notes_at + np.arange(4 * NOTES)].view(np.float32).astype(np.float64).transpose(1, 0, 2)[:, :, None]
    x = np.abs(exact_numbers(q).astype(np.float64).reshape(heads, 1, 4, d) * scales[:, :, None])
    of_codes = np.minimum(notes[..., H] * x.sum(-1), notes[..., RK] * np.sqrt((x**2).sum(-1)))
    least = d**-0.5 * (of_codes + notes[..., C1] * x.max(-1) / 32512 / 2)
    ratio = found / least
    print(ratio.min(), ratio.max())
    rounding = 1e-6 + 1e-5 * size[:, None] * np.abs(exact_numbers(q).astype(np.float64)).max() * d**0.5
    assert ratio.min() >= 1 - 1e-6 and (found <= 1.005 * least + rounding).all()
