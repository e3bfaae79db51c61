"""The CUDA kernels on a device: records against the reference, every bound against the oracle, the same bits twice."""

import importlib.util
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from oracle import attention, exact_numbers
from tierd_kernels.cuda.record import OFFSET_NORM, encode
from tierd_kernels.layout import AMP, SV, Layout
from tierd_kernels.quantise.reference import dequantise_values, quantise_block


def device() -> bool:
    if importlib.util.find_spec("cupy") is None:
        return False
    import cupy

    return bool(cupy.cuda.is_available())


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not device(), reason="needs CuPy and a CUDA device")]
Raw = NDArray[Any]
REGIMES = ("diffuse", "sharp", "sink", "outlier", "tiny", "huge", "constant", "ties")
LAYOUTS = [
    Layout(2, 128, 16, 16, "float16"), Layout(1, 80, 32, 32, "float32"), Layout(2, 96, 64, 16, "bfloat16"),
    Layout(1, 256, 16, 32, "float16"), Layout(1, 64, 64, 32, "float32"),
]  # fmt: skip


def raw(x: NDArray[np.float64], dtype: str) -> Raw:
    if dtype == "bfloat16":
        return ((x.astype(np.float32).view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
    return x.astype(dtype)


def draw(layout: Layout, tokens: int, query_heads: int, n: int, regime: str, seed: int) -> tuple[Raw, Raw, Raw]:
    random, d = np.random.default_rng(seed), layout.head_dim
    k, v = random.standard_normal((2, layout.num_kv_heads, tokens, d))
    q = random.standard_normal((query_heads, n, d))
    if regime == "sharp":
        q *= 4
    elif regime == "sink":
        k[:, 0], v[:, 0] = 1.5 * q[:: query_heads // layout.num_kv_heads, 0], 0.01 * v[:, 0]
    elif regime == "outlier":
        v[:, :, 5], k[:, :, 7] = 50 * v[:, :, 5], k[:, :, 7] + 30
    elif regime == "tiny":
        k, v, q = k * 1e-3, v * 1e-6, q * 1e-3
    elif regime == "huge":
        k, v, q = k * 30, v * 5e3, q * 2
    elif regime == "constant":
        k[:], v[:, :, ::2] = k[:, :1], 3.0
    elif regime == "ties":
        k[:, tokens // 2 :], v[:, tokens // 3 :] = k[:, : tokens - tokens // 2], v[:, : tokens - tokens // 3]
    return raw(k, layout.dtype), raw(v, layout.dtype), raw(q, layout.dtype)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_records_are_the_references(layout: Layout) -> None:
    from tierd_kernels.cuda.cache import LayerCache

    B, heads = layout.block_size, layout.num_kv_heads
    k, v, _ = draw(layout, 3 * B, heads, 1, "outlier", 1)
    if layout.dtype != "float16":
        k[0, 0, 3] = raw(np.array([1e6]), layout.dtype)[0]  # beyond FP16: the block's keys stay original
    cache = LayerCache(layout, k, v, np.array([2, 0, 1]))
    record = cache.kernels.record
    pool, at = cache.hot.get(), cache.hot_at.get()
    decoded = cache.decoded_values().get()
    for b in range(3):
        for h in range(heads):
            here = slice(b * B, (b + 1) * B)
            block = quantise_block(k[h, here], v[h, here], layout)
            want, got = encode(block, layout).copy(), pool[at[b] + h * record.nbytes :][: record.nbytes].copy()
            notes, found = (x[record.notes_at : record.score_bytes].view(np.float32).copy() for x in (want, got))
            rounded = dequantise_values(block, layout).astype(np.float16).astype(np.float64)
            error = exact_numbers(v[h, here]).astype(np.float64) - rounded
            if not block.raw_values:
                assert np.array_equal(decoded[h, here], rounded)
                eta = (got[record.norms_at : record.notes_at].view(np.uint32) & 0xFFFF0000).view(np.float32)
                norms = np.linalg.norm(error, axis=1)
                assert (norms <= eta).all() and (eta <= norms * (1 + 2.0**-7) + 1e-38).all()
                assert np.linalg.norm(error, 2) <= found[SV] <= np.linalg.norm(error, 2) * 1.1
                assert notes[AMP] <= found[AMP] <= notes[AMP] * 1.002
            if not block.raw_keys:
                offset = np.linalg.norm(block.key_offset_d.astype(np.float64))
                assert offset <= found[OFFSET_NORM] <= offset * (1 + 1e-6) + 1e-38
            same = np.setdiff1d(np.arange(8), [SV, AMP])
            assert np.allclose(found[same], notes[same], rtol=1e-6)
            for x in (want, got):  # what follows from the rounding of values, and all annotations, is compared above
                x[record.norms_at : record.score_bytes] = 0
            assert np.array_equal(got, want)


@pytest.mark.parametrize("split_blocks", [None, 4])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(
    ("layout", "query_heads", "n", "tokens"),
    [(LAYOUTS[0], 8, 1, 4096), (LAYOUTS[0], 8, 1, 7), (LAYOUTS[0], 2, 3, 2051), (LAYOUTS[1], 5, 4, 777), (LAYOUTS[2], 12, 2, 2500),
     (LAYOUTS[3], 8, 1, 1030), (LAYOUTS[4], 1, 9, 1200)],
    ids=str,
)  # fmt: skip
def test_no_bound_is_below_the_error(
    layout: Layout, query_heads: int, n: int, tokens: int, regime: str, split_blocks: int | None
) -> None:
    from tierd_kernels.cuda.cache import LayerCache, Step

    k, v, q = draw(layout, tokens, query_heads, n, regime, tokens)
    blocks = np.random.default_rng(0).permutation(-(-tokens // layout.block_size))
    cache, scale = LayerCache(layout, k, v, blocks), layout.head_dim**-0.5
    step = Step([cache], [q], scale, rtol=0.05, split_blocks=split_blocks)
    step.run()
    output, fields = step.output().get(), {name: x.get() for name, x in step.fields().items()}
    step.run()
    assert np.array_equal(step.output().get().view(np.uint8), output.view(np.uint8))
    truth = attention(k, v, q, scale)
    certified = np.isfinite(fields["bound"])
    with np.errstate(invalid="ignore"):
        error = np.sqrt(((exact_numbers(output) - truth.output) ** 2).sum(axis=2)).astype(np.float64)
    assert (error <= fields["bound"] + truth.noise)[certified].all(), f"{(error / fields['bound'])[certified].max()}"
    assert not np.isnan(fields["bound"]).any()
    assert certified.all() or regime == "huge"  # FP16 cannot hold the largest values there
    vbar = fields["value_norm"][certified]
    assert (vbar <= truth.value_norm_max[certified] * (1 + 1e-6)).all()


def test_calls_of_different_lengths_in_one_launch_answer_as_alone() -> None:
    from tierd_kernels.cuda.cache import LayerCache, Step

    layout, caches, queries = LAYOUTS[0], [], []
    for tokens, n in ((5000, 1), (3, 1), (16, 2), (1024, 5), (2047, 1)):
        k, v, q = draw(layout, tokens, 8, n, "diffuse", tokens)
        caches.append(LayerCache(layout, k, v))
        queries.append(q)
    together = Step(caches, queries, 0.088, rtol=0.05, split_blocks=16)
    together.run()
    for i, (cache, q) in enumerate(zip(caches, queries, strict=True)):
        alone = Step([cache], [q], 0.088, rtol=0.05, split_blocks=16)
        alone.run()
        assert np.array_equal(together.output(i).get(), alone.output().get())
        for name, x in alone.fields().items():
            assert np.array_equal(together.fields(i)[name].get(), x.get()), name
