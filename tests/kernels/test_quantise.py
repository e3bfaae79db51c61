"""Hot records: the compiled quantiser against the float64 reference, and the annotations of both against the truth."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tierd_kernels import floats
from tierd_kernels.layout import AMP, C1, KEY_NORM_MAX, RK, SK, SV, VALUE_NORM_MAX, H, Layout, Memory
from tierd_kernels.quantise import cpu, norms, reference

Raw = NDArray[Any]
HEADS = 2
POISON = 0xFF
REGIMES = ("random", "constant", "outliers", "tiny", "huge", "zeros", "mixed", "offset", "infinite", "nan")
GEOMETRIES = [(16, 64, 16), (32, 80, 32), (64, 96, 32), (16, 128, 16), (32, 256, 16), (16, 80, 16), (64, 256, 32)]


def draw(rng: np.random.Generator, regime: str, shape: tuple[int, ...], dtype: str) -> Raw:
    """Raw originals [..., tokens, channels] of one regime."""
    x = rng.standard_normal(shape)
    if regime == "constant":
        x[..., ::3] = np.round(x[..., :1, ::3], 3) * 7
    elif regime == "outliers":
        x[..., ::5, 3] *= 1e4
    elif regime == "tiny":
        x *= 1e-20
    elif regime == "huge":
        x *= 1e30
    elif regime == "zeros":
        x[:] = np.where(rng.random(shape) < 0.5, 0.0, -0.0)
    elif regime == "mixed":
        x *= 10.0 ** rng.uniform(-8, 4.5, shape)
    elif regime == "offset":
        x = 100.0 + 0.01 * x
    elif regime in ("infinite", "nan"):
        x[..., 5, 7] = float(regime[:3])
    if dtype == "float16":
        return x.clip(-65504, 65504).astype(np.float16) if regime != "infinite" else x.astype(np.float16)
    single = x.astype(np.float32)
    return (single.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else single


class Arena:
    """Poisoned arenas with `n` blocks at scattered offsets, and gaps between them."""

    def __init__(self, layout: Layout, n: int, regime: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.layout, self.n = layout, n
        hot_step, original_step = layout.hot_block_bytes + 64, layout.original_block_bytes + 128
        self.memory = Memory(
            np.full(64 + n * hot_step, POISON, np.uint8),
            np.full(64, POISON, np.uint8),
            np.full(64 + n * original_step, POISON, np.uint8),
        )
        self.hot_offsets = 64 + rng.permutation(n).astype(np.int64) * hot_step
        self.original_offsets = 64 + rng.permutation(n).astype(np.int64) * original_step
        shape = (n, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
        self.x = draw(rng, regime, shape, layout.dtype)
        for i, at in enumerate(self.original_offsets):
            self.memory.originals[at : at + layout.original_block_bytes] = self.x[i].reshape(-1).view(np.uint8)

    def quantise(self) -> None:
        cpu.quantise_blocks(self.layout, self.memory, self.original_offsets, self.hot_offsets)

    def record(self, block: int, head: int) -> NDArray[np.uint8]:
        at = self.hot_offsets[block] + head * self.layout.hot_record_bytes
        return self.memory.hot[at : at + self.layout.hot_record_bytes]

    def expected(self, block: int, head: int) -> reference.QuantisedBlock:
        return reference.quantise_block(self.x[block, 0, head], self.x[block, 1, head], self.layout)


def bf16(bits: Raw) -> NDArray[np.float64]:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def long_norm(x: NDArray[np.float64]) -> NDArray[np.longdouble]:
    wide = x.astype(np.longdouble)
    norms: NDArray[np.longdouble] = np.sqrt((wide * wide).sum(axis=1))
    return norms


def assert_annotations_dominate(block: reference.QuantisedBlock, k: Raw, v: Raw, layout: Layout) -> None:
    """Every annotation is at least the truth in float64 (extended precision for norms)."""
    keys, values = floats.as_float64(k), floats.as_float64(v)
    stored = block.annotations.astype(np.float64)
    assert not np.isnan(stored).any()
    with np.errstate(all="ignore"):
        true_norms = np.where(np.isfinite(values).all(axis=1), long_norm(values), np.inf)
        true_key_norms = np.where(np.isfinite(keys).all(axis=1), long_norm(keys), np.inf)
    assert (bf16(block.value_norm_B) >= true_norms).all()
    assert stored[VALUE_NORM_MAX] >= true_norms.max() and stored[KEY_NORM_MAX] >= true_key_norms.max()
    if block.raw_keys:
        assert np.isinf(stored[[H, RK, SK, C1]]).all() and not reference.dequantise_keys(block).any()
    else:
        residual = (keys - reference.dequantise_keys(block)) / block.key_scale_d.astype(np.float64)
        assert stored[H] >= np.abs(residual).max() and stored[H] <= 0.5001
        assert stored[RK] >= long_norm(residual).max()
        assert stored[SK] >= np.linalg.norm(residual, 2) and stored[SK] <= 1.3 * np.linalg.norm(residual, 2) + 1e-30
        assert stored[C1] == np.abs(block.key_codes_Bd.astype(int)).sum(axis=1).max()
        assert block.key_scale_d.min() >= 2.0**-14 and block.key_codes_Bd.min() >= -127
    if block.raw_values:
        assert np.isinf(stored[[SV, AMP]]).all() and np.isinf(bf16(block.value_error_B)).all()
        assert not reference.dequantise_values(block, layout).any()
    else:
        error = values - reference.dequantise_values(block, layout)
        assert (bf16(block.value_error_B) >= long_norm(error)).all()
        assert stored[SV] >= np.linalg.norm(error, 2) and stored[SV] <= 1.3 * np.linalg.norm(error, 2) + 1e-30
        widest = 15 * block.value_scale_BG.astype(np.float64) + np.abs(block.value_offset_BG.astype(np.float64))
        per_channel = np.repeat(widest, layout.value_group, axis=1)[:, : layout.head_dim]
        assert stored[AMP] >= long_norm(per_channel).max() and block.value_scale_BG.min() >= 2.0**-14


def assert_same(actual: reference.QuantisedBlock, expected: reference.QuantisedBlock) -> None:
    """Codes, scales, offsets, flags bit for bit; annotations within float64 noise, so one storage step at most."""
    for name in ("key_codes_Bd", "key_scale_d", "key_offset_d", "value_codes_Bd", "value_scale_BG", "value_offset_BG"):
        assert getattr(actual, name).tobytes() == getattr(expected, name).tobytes(), name
    assert actual.flags == expected.flags
    for name in ("value_error_B", "value_norm_B"):
        assert np.abs(getattr(actual, name).astype(int) - getattr(expected, name).astype(int)).max() <= 1, name
    np.testing.assert_allclose(actual.annotations, expected.annotations, rtol=3e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_compiled_equals_reference_and_annotations_hold(
    dtype: str, geometry: tuple[int, int, int], regime: str
) -> None:
    tokens, channels, group = geometry
    layout = Layout(HEADS, channels, tokens, group, dtype)
    arena = Arena(layout, 3, regime, seed=tokens + channels)
    arena.quantise()
    for block in range(arena.n):
        for head in range(HEADS):
            actual = reference.decode(arena.record(block, head), layout)
            expected = arena.expected(block, head)
            assert_same(actual, expected)
            for quantised in (actual, expected):
                assert_annotations_dominate(quantised, arena.x[block, 0, head], arena.x[block, 1, head], layout)
            assert reference.encode(actual, layout).tobytes() == arena.record(block, head).tobytes()
            if regime in ("random", "constant", "tiny", "zeros", "offset"):
                assert actual.flags == 0
            if regime == "nan" or (regime == "huge" and dtype != "float16"):
                assert actual.raw_keys and actual.raw_values


def test_nothing_outside_the_records_is_written() -> None:
    layout = Layout(HEADS, 80, 32, 32, "bfloat16")
    arena = Arena(layout, 4, "random", seed=5)
    originals = arena.memory.originals.copy()
    arena.quantise()
    outside = np.ones(arena.memory.hot.size, bool)
    for at in arena.hot_offsets:
        outside[at : at + layout.hot_block_bytes] = False
    assert (arena.memory.hot[outside] == POISON).all() and (arena.memory.scratch == POISON).all()
    assert (arena.memory.originals == originals).all()


def test_a_record_does_not_depend_on_what_was_there_before() -> None:
    layout = Layout(HEADS, 96, 16, 16, "float16")
    arena = Arena(layout, 2, "random", seed=6)
    arena.quantise()
    first = arena.memory.hot.copy()
    arena.memory.hot[arena.hot_offsets[0] : arena.hot_offsets[0] + layout.hot_block_bytes] = 0x5A
    arena.quantise()
    assert (arena.memory.hot == first).all()


@pytest.mark.parametrize("regime", ["random", "outliers", "tiny", "constant", "zeros"])
@pytest.mark.parametrize("geometry", [(16, 64, 16, 1), (32, 80, 32, 5), (64, 256, 32, 16), (16, 128, 16, 64)], ids=str)
def test_group_norms_dominate_the_truth(geometry: tuple[int, int, int, int], regime: str) -> None:
    tokens, channels, group, n = geometry
    layout = Layout(HEADS, channels, tokens, group, "float32")
    arena = Arena(layout, n, regime, seed=n)
    arena.quantise()
    (values_norm,), (errors_norm,) = cpu.group_norms(layout, arena.memory, arena.original_offsets[None], arena.hot_offsets[None])
    for head in range(HEADS):
        values = floats.as_float64(arena.x[:, 1, head]).reshape(-1, channels)
        used = [reference.decode(arena.record(block, head), layout) for block in range(n)]
        raw = np.repeat([block.raw_values for block in used], tokens)
        dequantised = np.concatenate([reference.dequantise_values(block, layout) for block in used])
        errors = np.where(raw[:, None], 0.0, values - dequantised)
        for stored, matrix in ((values_norm[head], values), (errors_norm[head], errors)):
            true = np.linalg.norm(matrix, 2)
            assert true <= stored <= 1.42 * true + 1e-30
        np.testing.assert_allclose(
            (values_norm[head], errors_norm[head]), reference.group_norms(values, errors), rtol=3e-7
        )


def test_blocks_that_stay_original_have_no_error_in_the_group() -> None:
    layout = Layout(1, 64, 16, 16, "float32")
    arena = Arena(layout, 2, "huge", seed=1)
    arena.quantise()
    values_norm, errors_norm = cpu.group_norms(layout, arena.memory, arena.original_offsets[None], arena.hot_offsets[None])
    assert values_norm[0, 0] > 1e30 and errors_norm[0, 0] == 0.0


def test_groups_are_measured_together_as_alone() -> None:
    layout = Layout(HEADS, 64, 32, 16, "bfloat16")
    arena = Arena(layout, 12, "mixed", seed=4)
    arena.quantise()
    places = arena.original_offsets.reshape(3, 4), arena.hot_offsets.reshape(3, 4)
    together = cpu.group_norms(layout, arena.memory, *places)
    alone = [cpu.group_norms(layout, arena.memory, *(x[[g]] for x in places)) for g in range(3)]
    for kind in range(2):
        assert together[kind].shape == (3, HEADS) and len(np.unique(together[kind])) == 3 * HEADS
        assert np.array_equal(together[kind], np.concatenate([x[kind] for x in alone]))
    nothing = cpu.group_norms(layout, arena.memory, *(x[:0] for x in places))
    assert [x.shape for x in nothing] == [(0, HEADS)] * 2


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 5),
    st.sampled_from([1e-25, 1.0, 1e38]),
)
@settings(max_examples=200, deadline=None)
def test_spectral_norm_is_bounded_from_above(seed: int, n: int, m: int, rank: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, m)) * scale
    true = np.linalg.norm(matrix, 2)
    assert true <= reference.spectral_norm_above(matrix) <= 1.26 * true
    gram = np.zeros((m, m))
    norms.add_gram(matrix, gram)
    assert true <= norms.spectral_norm_above(gram) <= 1.26 * true


@given(st.integers(0, 2**32 - 1), st.sampled_from(["float16", "bfloat16", "float32"]))
@settings(max_examples=60, deadline=None)
def test_any_bits_give_a_sound_record(seed: int, dtype: str) -> None:
    """Originals of random bits, one exponent range at a time: subnormals, infinities and NaN included."""
    layout = Layout(1, 64, 16, 16, dtype)
    arena = Arena(layout, 1, "zeros", seed)
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**16, arena.x.size * layout.itemsize // 2, dtype=np.uint16)
    bits &= np.uint16(rng.choice([0xFFFF, 0x9FFF, 0x87FF, 0x83FF, 0xBFFF]))
    arena.x = bits.view(arena.x.dtype).reshape(arena.x.shape)
    at = arena.original_offsets[0]
    arena.memory.originals[at : at + layout.original_block_bytes] = arena.x.reshape(-1).view(np.uint8)
    arena.quantise()
    actual = reference.decode(arena.record(0, 0), layout)
    assert_same(actual, arena.expected(0, 0))
    assert_annotations_dominate(actual, arena.x[0, 0, 0], arena.x[0, 1, 0], layout)


def test_offsets_outside_the_arenas_are_refused() -> None:
    layout = Layout(1, 64, 16, 16, "float16")
    arena = Arena(layout, 1, "random", seed=0)
    good = arena.original_offsets
    for bad in (np.array([-64]), np.array([65]), np.array([10**9 // 64 * 64])):
        with pytest.raises(ValueError, match=r"hot_offsets has .* allowed: multiples of 64"):
            cpu.quantise_blocks(layout, arena.memory, good, bad)
        with pytest.raises(ValueError, match="original_offsets has"):
            cpu.group_norms(layout, arena.memory, bad[None], arena.hot_offsets[None])
    with pytest.raises(ValueError, match="as many"):
        cpu.quantise_blocks(layout, arena.memory, good, np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="at most 1024"):
        cpu.group_norms(layout, arena.memory, *(np.repeat(x, 65)[None] for x in (good, arena.hot_offsets)))
    with pytest.raises(ValueError, match=r"groups of \(1,\) and \(1,\) blocks of 16; allowed: both \[groups, blocks\]"):
        cpu.group_norms(layout, arena.memory, good, arena.hot_offsets)
    with pytest.raises(ValueError, match="block_size, head_dim"):
        reference.quantise_block(np.zeros((16, 63), np.float16), np.zeros((16, 64), np.float16), layout)
    before = arena.memory.hot.copy()
    cpu.quantise_blocks(layout, arena.memory, good[:0], good[:0])
    np.testing.assert_array_equal(arena.memory.hot, before)
