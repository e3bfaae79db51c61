"""The CUDA kernels: records against the reference, every bound against the oracle, the same bits twice.

On a device all of it, elsewhere a sample in the emulator.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from random import Random
from typing import Any

import device
import numpy as np
import pytest
from numpy.typing import NDArray
from oracle import attention, check_reply, exact_numbers
from stored import GROUP, Cache
from tierd_kernels.call import Call, Result
from tierd_kernels.copying import Copying
from tierd_kernels.cuda.record import OFFSET_NORM, Record, encode
from tierd_kernels.errors import DeviceUnavailable, ScoreOverflow
from tierd_kernels.in_scratch import UNIT, InScratch
from tierd_kernels.layout import AMP, SV, Layout
from tierd_kernels.policy import Budget, Coverage
from tierd_kernels.quantise.reference import dequantise_values, quantise_block

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]
Raw = NDArray[Any]


def at_device(x: NDArray[Any]) -> Any:
    """There, for whichever stream: the backend's do not wait for the one that copies."""
    import cupy

    copied = cupy.asarray(x)
    cupy.cuda.Device().synchronize()
    return copied


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


def store(layout: Layout, k: Raw, v: Raw, blocks: NDArray[np.int64] | None = None, memory: Any = None) -> Cache:
    """As `kernels_cache.store`, on the device; block i lies where `blocks` says. `memory`: to use again."""
    import cupy
    from tierd_kernels.cuda import backend

    B, tokens, heads = layout.block_size, k.shape[1], layout.num_kv_heads
    count, full = -(-tokens // B), tokens // B
    order = np.arange(count) if blocks is None else blocks
    size = layout.original_block_bytes
    memory = memory or backend.reserve(max(full, 1) * backend.hot_block_bytes(layout), count * size, count * size)
    memory.hot.fill(0xEE)
    cupy.cuda.Device().synchronize()  # the backend's streams do not wait for the one that fills
    originals, hot = order * size, order[:full].argsort().argsort() * backend.hot_block_bytes(layout)
    memory.originals[:] = 0xFF
    arena = memory.originals[: count * size].view(k.dtype).reshape(count, 2, heads, B, layout.head_dim)
    for part, x in enumerate((k, v)):
        whole = np.full((heads, count * B * layout.head_dim * layout.itemsize), 0xFF, np.uint8).view(k.dtype)
        whole = whole.reshape(heads, count * B, layout.head_dim)
        whole[:, :tokens] = x
        arena[order, part] = whole.reshape(heads, count, B, layout.head_dim).transpose(1, 0, 2, 3)
    backend.quantise_blocks(layout, memory, originals[:full], hot)
    complete = tokens // GROUP * (GROUP // B)
    norms = backend.group_norms(layout, memory, *(x[:complete].reshape(-1, GROUP // B) for x in (originals, hot)))
    return Cache(layout, memory, k, v, hot, originals, list(norms))


def all_in_scratch(layout: Layout, originals: NDArray[np.int64]) -> InScratch | None:
    """What is said where each record has a copy, at the offset of the original."""
    return InScratch.of(~layout.own_locations(originals))


def copy_to_scratch(cache: Cache, at: NDArray[np.int64]) -> None:
    """These records' originals, to the same offsets; asserts that they arrive."""
    from tierd_kernels.cuda import backend

    nbytes = cache.layout.original_record_bytes
    while len(at):
        copying = backend.begin_copies(cache.memory, at, at, nbytes)
        while not copying.done():
            pass
        count = len(copying.arrived)
        assert count and np.array_equal(copying.arrived, cache.memory.originals[at[:count, None] + np.arange(nbytes)])
        at = at[count:]


def in_scratch(cache: Cache, call: Call, apart: bool = False) -> Call:
    """The same call, every second record read from scratch; of values, with `apart`, the others."""

    locations = cache.layout.own_locations(call.original_offsets[: len(call.hot_offsets)])
    blocks_and_heads = np.indices(locations.shape[1:]).sum(axis=0)
    here = np.stack([(blocks_and_heads + kind * apart) % 2 == 0 for kind in range(2)])
    copy_to_scratch(cache, ~locations[here])
    locations[here] = ~locations[here]
    call.in_scratch = InScratch.of(locations)
    return call


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_records_are_the_references(layout: Layout) -> None:
    from tierd_kernels.cuda.norms import records_at, widen

    B, heads = layout.block_size, layout.num_kv_heads
    k, v, _ = draw(layout, 3 * B, heads, 1, "outlier", 1)
    if layout.dtype != "float16":
        k[0, 0, 3] = raw(np.array([1e6]), layout.dtype)[0]  # beyond FP16: the block's keys stay original
    cache, record = store(layout, k, v, np.array([2, 0, 1])), Record(layout)
    pool, at = cache.memory.hot.get(), cache.hot  # type: ignore[attr-defined]
    places = [at_device(x) for x in records_at(layout, cache.originals[None], cache.hot[None])]
    wide = at_device(np.full((heads, 2, 3 * B, layout.head_dim), np.nan))
    widen(layout, cache.memory, *(int(x.data.ptr) for x in (*places, wide)), heads, 3)  # type: ignore[arg-type]
    cache.memory.stream.synchronize()  # type: ignore[attr-defined]
    values, errors = wide.get().swapaxes(0, 1)
    assert np.array_equal(values, exact_numbers(v))
    for b in range(3):
        for h in range(heads):
            here = slice(b * B, (b + 1) * B)
            block = quantise_block(k[h, here], v[h, here], layout)
            want, got = encode(block, layout).copy(), pool[at[b] + h * record.nbytes :][: record.nbytes].copy()
            notes, found = (x[record.notes_at : record.key_codes_at].view(np.float32).copy() for x in (want, got))
            rounded = dequantise_values(block, layout).astype(np.float16).astype(np.float64)
            error = exact_numbers(v[h, here]).astype(np.float64) - rounded
            assert np.array_equal(errors[h, here], np.zeros_like(error) if block.raw_values else error)
            if not block.raw_values:
                eta = (got[record.norms_at : record.score_bytes].view(np.uint32) & 0xFFFF0000).view(np.float32)
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
                x[record.norms_at : record.score_bytes] = x[record.notes_at : record.key_codes_at] = 0
            assert np.array_equal(got, want)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_are_bounded_together_as_alone(layout: Layout) -> None:
    import cupy
    from tierd_kernels.cuda import backend

    heads, groups, per = layout.num_kv_heads, 3, GROUP // layout.block_size
    k, v, _ = draw(layout, groups * GROUP, heads, 1, "outlier", 9)
    v[:, GROUP : 2 * GROUP] = raw(1e-3 * exact_numbers(v[:, GROUP : 2 * GROUP]).astype(np.float64), layout.dtype)
    if layout.dtype != "float16":
        v[:, 3:5, 1] = raw(np.array([1e7, -3e6]), layout.dtype)  # beyond FP16: the block's values stay original
    cache = store(layout, k, v, np.random.default_rng(0).permutation(groups * per))
    places = [x.reshape(groups, per) for x in (cache.originals, cache.hot)]
    alone = [backend.group_norms(layout, cache.memory, *(x[[g]] for x in places)) for g in range(groups)]
    for kind, found in enumerate(cache.groups):
        assert found.shape == (groups, heads) and found.dtype == np.float32
        assert np.array_equal(found, np.concatenate([x[kind] for x in alone]))
    kept = cache.memory.workspace  # type: ignore[attr-defined]
    cache.memory.workspace = kept[: 16 * layout.head_dim * (GROUP + 2 * layout.head_dim) * 2]  # type: ignore[attr-defined]
    kept[:] = 0xFF  # NaN
    cupy.cuda.Device().synchronize()  # or the groups may be there first
    assert np.array_equal(backend.group_norms(layout, cache.memory, *places), cache.groups)  # two of a group and KV head at once
    assert (kept[cache.memory.workspace.nbytes :] == 0xFF).all()  # type: ignore[attr-defined]
    for g, h in product(range(groups), range(heads)):
        here = [slice(at, at + layout.block_size) for at in range(g * GROUP, (g + 1) * GROUP, layout.block_size)]
        blocks = [quantise_block(k[h, x], v[h, x], layout) for x in here]
        values = exact_numbers(v[h, g * GROUP : (g + 1) * GROUP]).astype(np.float64)
        used = np.concatenate([dequantise_values(x, layout).astype(np.float16).astype(np.float64) for x in blocks])
        errors = np.where(np.repeat([x.raw_values for x in blocks], layout.block_size)[:, None], 0, values - used)
        assert any(x.raw_values for x in blocks) == (layout.dtype != "float16" and g == 0)
        for found, matrix in zip(cache.groups, (values, errors), strict=True):
            singular = np.linalg.svd(matrix, compute_uv=False)
            schatten = np.sum((singular / singular[0]) ** 16) ** (1 / 16) * singular[0]
            assert singular[0] <= found[g, h] <= schatten * (1 + 1e-6)


def test_what_bounds_a_norm_is_rounded_up_and_infinite_where_it_is_not_known() -> None:
    from tierd_kernels.cuda.norms import _above

    trace = np.append(10.0 ** np.random.default_rng(0).uniform(-70, 70, 1000), [0.0, 1e-90, 1e80, np.inf, np.nan])
    found = _above(trace, np.append(np.full(1000, 0.5**8), [np.nan, 1.0, 1.0, np.nan, np.nan]))
    assert found.dtype == np.float32
    exact = np.sqrt(trace[:1000] / 2)
    assert (found[:1000] >= exact).all() and (found[:1000] <= exact * (1 + 2.0**-22)).all()
    assert np.array_equal(found[1000:], np.array([0, 2.0**-126, np.inf, np.inf, np.inf], np.float32))


SHAPES = [
    (LAYOUTS[0], 8, 1, 4096), (LAYOUTS[0], 8, 1, 7), (LAYOUTS[0], 2, 3, 2051), (LAYOUTS[1], 5, 4, 777), (LAYOUTS[2], 12, 2, 2500),
    (LAYOUTS[3], 8, 1, 1030), (LAYOUTS[4], 1, 9, 1200), (LAYOUTS[0], 8, 130, 300),
]  # fmt: skip


CASES = [(*shape, regime, rtol) for shape, regime, rtol in product(SHAPES, REGIMES, (0.0, 0.002, 0.02, 0.3))]
if not device.real():  # an n of 130 takes the emulator ten seconds, others one
    CASES = Random(1).sample([case for case in CASES if case[2] < 130], 40)


@pytest.mark.parametrize(("layout", "query_heads", "n", "tokens", "regime", "rtol"), CASES, ids=str)
def test_every_answer_keeps_its_promise(layout: Layout, query_heads: int, n: int, tokens: int, regime: str, rtol: float) -> None:
    from tierd_kernels.cuda import backend

    k, v, q = draw(layout, tokens, query_heads, n, regime, tokens)
    blocks = np.random.default_rng(0).permutation(-(-tokens // layout.block_size))
    cache = store(layout, k, v, blocks)
    canaries = np.arange(0, len(cache.hot), 3)
    call = in_scratch(cache, cache.call(q, rtol, Budget(), canary_blocks=canaries, relative_to="output" if tokens % 2 else "values"))
    first, second = (backend.attend(layout, cache.memory, [call], query_heads)[0] for _ in range(2))
    assert isinstance(first, Result) and isinstance(second, Result), first
    assert not first.canary_failures
    check_reply(
        k, v, q, first.output, first.certificate, rtol, 0.0, call.relative_to, softmax_scale=layout.head_dim**-0.5,
        block_size=layout.block_size,
    )  # fmt: skip
    assert np.array_equal(first.output.view(np.uint8), second.output.view(np.uint8))
    for name, x in first.certificate.items():
        assert np.array_equal(x, second.certificate[name], equal_nan=True), name
    promoted = first.certificate["promoted_key_blocks"] + first.certificate["promoted_value_blocks"]
    share = promoted.mean() / max(1, 2 * len(cache.hot))
    print(f"exact {first.certificate['exact'].mean():.2f}, promoted {share:.2f}, rungs {np.bincount(first.certificate['rung'].ravel())}")
    if rtol == 0:
        assert first.certificate["exact"].all()


def test_calls_of_different_lengths_in_one_launch_answer_as_alone() -> None:
    from tierd_kernels.cuda.packing import Part
    from tierd_kernels.cuda.step import Step

    layout = LAYOUTS[0]
    B = layout.block_size
    shapes = ((5000, 1), (3, 1), (16, 2), (1024, 5), (2047, 1))
    k, v, q = draw(layout, 5000, 8, 5, "diffuse", 5)
    cache = store(layout, k, v)
    every = ~layout.own_locations(cache.originals[: len(cache.hot)]).ravel()
    copy_to_scratch(cache, every)
    parts = []
    for i, (tokens, n) in enumerate(shapes):
        call = cache.call(q[:, :n], (0.0, 0.01, 0.05)[i % 3], Budget())
        call.num_tokens, full = tokens, tokens // B
        call.hot_offsets, call.original_offsets = call.hot_offsets[:full], call.original_offsets[: -(-tokens // B)]
        call.in_scratch = all_in_scratch(layout, call.original_offsets[:full]) if i % 2 == 0 else None
        call.group_value_norms, call.group_error_norms = (x[: tokens // GROUP] for x in (call.group_value_norms, call.group_error_norms))
        parts.append(Part(layout, call, 0, n))

    def run(parts: list[Any]) -> list[Any]:
        step = Step(layout, cache.memory, parts, split_blocks=16)  # type: ignore[arg-type]
        step.upload()
        step.launch()
        return step.answers()

    for together, part in zip(run(parts), parts, strict=True):
        (alone,) = run([part])
        assert np.array_equal(together.output, alone.output)
        assert np.array_equal(together.states, alone.states)
        for name, x in alone.fields.items():
            assert np.array_equal(together.fields[name], x, equal_nan=True), name


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2], LAYOUTS[4]], ids=str)
def test_however_blocks_are_split_rows_are_the_same_and_wider_groups_bound_no_better(layout: Layout) -> None:
    """The last split has fewer blocks than the others, in one warp or two. Every term of a group of two thousand tokens is at least the sum
    of those of its halves; the first half has values so small that only the other's norms count."""
    from tierd_kernels.cuda.packing import Part
    from tierd_kernels.cuda.step import Step

    k, v, q = draw(layout, 2724, 4 * layout.num_kv_heads, 1, "diffuse", 3)
    v[:, :GROUP] = raw(np.full((layout.num_kv_heads, GROUP, layout.head_dim), 1e-3), layout.dtype)
    cache, found = store(layout, k, v), {}
    for tokens in (2048, 1024, 256):
        call = cache.call(q, 2.0, Budget(skip_share=0.0))
        step = Step(layout, cache.memory, [Part(layout, call, 0, 1)], split_blocks=tokens // layout.block_size)  # type: ignore[arg-type]
        step.upload()
        step.launch()
        (found[tokens],) = step.answers()
    wide, narrow, least = found.values()
    for other in (narrow, least):
        outputs = [exact_numbers(x.output).astype(np.float64) for x in (wide, other)]
        assert np.abs(outputs[0] - outputs[1]).max() <= 2.0 ** (-7 if layout.dtype == "bfloat16" else -10) * np.abs(outputs[0]).max()
        for name in ("value_norm", "output_norm", "score_top"):
            np.testing.assert_allclose(wide.fields[name], other.fields[name], rtol=1e-3, err_msg=name)
    for name in ("key_error", "value_error"):
        assert (wide.fields[name] >= narrow.fields[name] * (1 - 1e-3)).all(), name
        np.testing.assert_allclose(narrow.fields[name], least.fields[name], rtol=1e-2, err_msg=name)


@pytest.mark.parametrize("rtol", [0.0, 0.02])
def test_a_step_answers_the_same_when_it_is_launched_again(rtol: float) -> None:
    """As a captured one is: what thread blocks count for one another is back where it was."""
    from tierd_kernels.cuda.launch import CERTIFIED, EXACT
    from tierd_kernels.cuda.step import Part, Step

    layout = LAYOUTS[0]
    k, v, q = draw(layout, 2051, 8, 2, "sharp", 11)
    cache = store(layout, k, v)
    step = Step(layout, cache.memory, [Part(layout, cache.call(q, rtol, Budget()), 0, 2)], split_blocks=16)  # type: ignore[arg-type]
    step.upload()
    found = []
    for _ in range(3):
        step.launch()
        found += step.answers()
    assert ((found[0].states == EXACT) if rtol == 0 else (found[0].states == CERTIFIED)).all()
    assert found[0].cold.any() == (rtol > 0), "the other promotes"
    for again in found[1:]:
        assert np.array_equal(again.output, found[0].output) and np.array_equal(again.states, found[0].states)
        assert np.array_equal(again.reads.records, found[0].reads.records)
        assert all(np.array_equal(again.fields[name], x, equal_nan=True) for name, x in found[0].fields.items())


def test_a_thread_whose_own_device_is_another_gets_the_same_answers() -> None:
    """As that of a model on the second GPU, which may take the engine's turn."""
    import cupy
    from tierd_kernels.cuda import backend

    if device.real() and cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two devices: no thread can have another")
    layout = LAYOUTS[0]
    k, v, q = draw(layout, 512, 8, 1, "sharp", 3)
    with cupy.cuda.Device(1):
        memory = backend.reserve(1 << 20, 1 << 20, 1 << 20)
    cache = store(layout, k, v, memory=memory)
    call = in_scratch(cache, cache.call(q, 0.01, Budget(), candidates_max=4))
    (here,) = backend.attend(layout, memory, [call], 8)
    with cupy.cuda.Device(1):
        backend.quantise_blocks(layout, memory, cache.originals[: len(cache.hot)], cache.hot)
        backend.group_norms(layout, memory, *(x[: GROUP // layout.block_size][None] for x in (cache.originals, cache.hot)))
        (there,) = backend.attend(layout, memory, [in_scratch(cache, call)], 8)
        assert isinstance(here, Result) and isinstance(there, Result) and np.array_equal(here.output, there.output)
        assert np.array_equal(here.candidates().blocks, there.candidates().blocks)
        assert cupy.cuda.Device().id == 1
    assert cupy.cuda.Device().id == 0


@pytest.mark.parametrize(("layout", "rtol"), [(LAYOUTS[0], 0.02), (LAYOUTS[2], 0.03), (LAYOUTS[4], 0.025)], ids=str)
def test_what_is_at_hand_is_promoted_before_what_is_not(layout: Layout, rtol: float) -> None:
    from tierd_kernels.cuda import backend

    k, v, q = draw(layout, 1500, 4 * layout.num_kv_heads, 1, "diffuse", 5)
    cache, found = store(layout, k, v), {}
    call = in_scratch(cache, cache.call(q, rtol, Budget()), apart=True)
    for call.preference in (1, 4):
        (result,) = backend.attend(layout, cache.memory, [call], len(q))
        assert isinstance(result, Result) and not result.certificate["exact"].any()
        scale = call.softmax_scale
        check_reply(k, v, q, result.output, result.certificate, rtol, 0.0, softmax_scale=scale, block_size=layout.block_size)
        found[call.preference] = [tuple(x) for x in result.reads.records.T.tolist()], result.reads.from_host
    (plain, cold), (records, fewer) = found.values()
    assert fewer.sum() < 0.75 * cold.sum(), "what is in scratch spares what is not"
    assert {x for x, far in zip(plain, cold, strict=True) if not far} < set(records), "of what is at hand nothing is left out for it"
    assert {x for x, far in zip(records, fewer, strict=True) if far} < set(plain)
    call.in_scratch, call.preference = None, 4
    (result,) = backend.attend(layout, cache.memory, [call], len(q))
    assert isinstance(result, Result)
    assert [tuple(x) for x in result.reads.records.T.tolist()] == plain, "where there is none it changes nothing"


def test_a_call_larger_than_what_is_kept_for_calls_is_answered_in_parts() -> None:
    from tierd_kernels.cuda import backend

    layout = LAYOUTS[4]
    k, v, q = draw(layout, 100, 3, 8, "diffuse", 2)
    cache = store(layout, k, v)
    calls = [cache.call(q[:, :1], 0.1, Budget()), cache.call(q, 0.1, Budget())]
    whole = backend.attend(layout, cache.memory, calls, 3)
    for staged in (cache.memory.inputs, cache.memory.outputs):  # type: ignore[attr-defined]
        kept, staged.host = staged.host, staged.host[:12500]
        results = backend.attend(layout, cache.memory, calls, 3)
        assert all(isinstance(x, Result) and np.array_equal(x.output, y.output) for x, y in zip(results, whole, strict=True))  # type: ignore[union-attr]
        staged.host = staged.host[:100]
        assert all(isinstance(x, ValueError) and "kept for calls" in str(x) for x in backend.attend(layout, cache.memory, calls, 3))
        staged.host = kept


def test_copies_that_begin_meanwhile_come_behind_all_steps_of_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """They put other records where the call's promoted blocks are read. On a device that is a race, which the copier must not win."""
    from tierd_kernels.cuda import backend

    layout = LAYOUTS[4]
    k, v, q = draw(layout, 200, 3, 8, "diffuse", 3)
    cache = store(layout, k, v)
    memory = cache.memory
    call = in_scratch(cache, cache.call(q, 1e-3, Budget()))
    before, again = backend.attend(layout, memory, [call, call], 3)
    assert call.in_scratch is not None
    at, begun = call.in_scratch.places.astype(np.int64) * UNIT, list[Copying]()

    def meanwhile() -> None:
        begun.append(backend.begin_copies(memory, np.roll(at, 1), at, layout.original_record_bytes))

    monkeypatch.setattr(backend, "_batches", lambda memory, waiting: [[x] for x in waiting])
    steps = backend.attend(layout, memory, [call, call], 3, meanwhile)
    assert isinstance(before, Result) and isinstance(again, Result) and before.reads.from_host.size
    (copying,) = begun
    assert len(copying.arrived) == len(at) and all(isinstance(x, Result) and np.array_equal(x.output, before.output) for x in steps)
    while not copying.done():
        pass
    (after,) = backend.attend(layout, memory, [call], 3)
    assert isinstance(after, Result) and not np.array_equal(after.output, before.output)
    assert device.real() or memory.copier.waited[-1] is memory.answered  # type: ignore[attr-defined]


def test_the_parts_of_a_call_are_as_small_as_the_one_that_sees_the_most_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    from tierd_kernels.cuda import backend
    from tierd_kernels.cuda.packing import Part

    layout = LAYOUTS[0]
    k, v, q = draw(layout, 100, 2, 100, "diffuse", 2)  # the first query sees one token, the last sees all
    cache = store(layout, k, v)
    call, memory = cache.call(q, 0.1, Budget()), cache.memory
    monkeypatch.setattr(backend, "ROWS_AT_ONCE", 32)
    monkeypatch.setattr(memory, "workspace", memory.workspace[: backend._needs(memory, Part(layout, call, 0, 32))[0]])  # type: ignore[attr-defined,arg-type]
    (result,) = backend.attend(layout, memory, [call], 2)
    assert isinstance(result, Result) and result.output.shape == q.shape
    assert (result.certificate["exact"] | np.less_equal(result.certificate["bound"], result.certificate["budget"])).all()


def test_a_call_in_parts_has_read_what_any_of_them_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another step has used what comes back meanwhile, and with half of the records in scratch."""
    from tierd_kernels.cuda import backend
    from tierd_kernels.cuda.step import Answer, Step

    layout = LAYOUTS[0]
    k, v, q = draw(layout, 512, 8, 4, "sharp", 3)
    cache, asked, answers = store(layout, k, v), list[Answer](), Step.answers
    call = in_scratch(cache, cache.call(q, 0.01, Budget()))
    locations = np.array(call.locations(layout))
    locations[:, ::2] = -1
    call.in_scratch = InScratch.of(locations)

    def seen(step: Step, meanwhile: Callable[[], None]) -> list[Answer]:
        asked.extend(answers(step, meanwhile))
        return asked[-1:]

    monkeypatch.setattr(backend, "ROWS_AT_ONCE", 1)
    monkeypatch.setattr(backend, "_batches", lambda memory, waiting: [[x] for x in waiting])
    monkeypatch.setattr(Step, "answers", seen)
    (result,) = backend.attend(layout, cache.memory, [call], 8)
    assert isinstance(result, Result) and not result.certificate["exact"].any() and len(asked) == 4
    parts = [{*map(tuple, answer.reads.records.T.tolist())} for answer in asked]
    kind, block, head = result.reads.records
    assert list(zip(kind, block, head, strict=True)) == sorted(set.union(*parts)) and len({*map(frozenset, parts)}) > 1
    assert np.array_equal(result.reads.from_host, locations[kind, block, head] < 0) and len({*result.reads.from_host}) == 2
    promoted = result.certificate["promoted_key_blocks"] + result.certificate["promoted_value_blocks"]
    cold = result.certificate["host_bytes"] // layout.original_record_bytes
    assert np.array_equal(cold, np.concatenate([x.cold for x in asked], axis=1)) and 0 < cold.sum() < promoted.sum()


@pytest.mark.parametrize("rtol", [0.003, 0.01])
def test_a_row_says_how_many_bytes_the_host_gave_for_it(rtol: float) -> None:
    """One query head a KV head, so that what the head read is the row's."""
    from tierd_kernels.cuda import backend

    layout = LAYOUTS[0]
    k, v, q = draw(layout, 512, layout.num_kv_heads, 1, "sharp", 3)
    cache = store(layout, k, v)
    call = in_scratch(cache, cache.call(q, rtol, Budget()))
    (result,) = backend.attend(layout, cache.memory, [call], layout.num_kv_heads)
    assert isinstance(result, Result)
    certificate, (kind, _, head) = result.certificate, result.reads.records
    assert not certificate["exact"].any()
    per_head = partial(np.bincount, minlength=layout.num_kv_heads)
    assert np.array_equal(certificate["promoted_key_blocks"][:, 0], per_head(head[kind == 0]))
    assert np.array_equal(certificate["promoted_value_blocks"][:, 0], per_head(head[kind == 1]))
    cold = per_head(head[result.reads.from_host])
    assert np.array_equal(certificate["host_bytes"][:, 0], cold * layout.original_record_bytes) and 0 < cold.sum() < len(head)


def test_a_row_that_promotion_did_not_help_had_those_originals_too() -> None:
    from tierd_kernels.cuda import backend

    layout = LAYOUTS[0]
    k, v, q = draw(layout, 512, layout.num_kv_heads, 1, "sharp", 3)
    cache = store(layout, k, v)
    (result,) = backend.attend(layout, cache.memory, [cache.call(q, 2e-5, Coverage())], layout.num_kv_heads)
    assert isinstance(result, Result) and result.certificate["exact"].all()
    promoted = result.certificate["promoted_key_blocks"] + result.certificate["promoted_value_blocks"]
    assert promoted.all()
    expected = 2 * 512 * layout.head_dim * layout.itemsize + promoted * layout.original_record_bytes
    assert np.array_equal(result.certificate["host_bytes"], expected)


@pytest.mark.parametrize("state", [0, 2, 77])  # open, due, and what no kernel writes
def test_a_row_left_between_the_rungs_is_not_answered(monkeypatch: pytest.MonkeyPatch, state: int) -> None:
    from tierd_kernels.cuda import backend
    from tierd_kernels.cuda.step import Step

    layout, answers = LAYOUTS[0], Step.answers
    k, v, q = draw(layout, 40, 2, 1, "diffuse", 3)
    cache = store(layout, k, v)

    def left(step: Step, meanwhile: Callable[[], None]) -> Any:
        found = answers(step, meanwhile)
        found[0].states[1, 0] = state
        return found

    monkeypatch.setattr(Step, "answers", left)
    with pytest.raises(RuntimeError, match=rf"^1 of 2 rows .* states are \[{state}\]$"):
        backend.attend(layout, cache.memory, [cache.call(q, 0.3, Budget())], 2)


def passage(layout: Layout, tokens: int, query_heads: int, n: int, seed: int, pull: float) -> tuple[Raw, Raw, Raw]:
    """Queries that look one way, and one passage of 80 tokens whose keys lie there: it holds the more mass the stronger the pull."""
    random, d = np.random.default_rng(seed), layout.head_dim
    k, v = random.standard_normal((2, layout.num_kv_heads, tokens, d))
    lead = random.standard_normal((layout.num_kv_heads, 1, d))
    q = np.repeat(lead, query_heads // layout.num_kv_heads, axis=0) + 0.3 * random.standard_normal((query_heads, n, d))
    start = int(random.integers(tokens - 80))
    k[:, start : start + 80] += pull * lead
    return raw(k, layout.dtype), raw(v, layout.dtype), raw(q, layout.dtype)


@pytest.mark.parametrize("relative_to", ["values", "output"])
def test_nothing_is_skipped_whatever_share_of_the_budget_may_be_spent_on_it(relative_to: str) -> None:
    from tierd_kernels.cuda import backend

    layout = LAYOUTS[0]
    k, v, q = passage(layout, 4100, 8, 1, 7, 2.0)
    cache = store(layout, k, v)
    plain, loose = (
        backend.attend(layout, cache.memory, [cache.call(q, 0.2, Budget(skip_share=share), relative_to=relative_to)], 8)[0]
        for share in (0.0, 0.9)
    )
    assert isinstance(plain, Result) and isinstance(loose, Result)
    scale, B = layout.head_dim**-0.5, layout.block_size
    check_reply(k, v, q, loose.output, loose.certificate, 0.2, 0.0, relative_to, softmax_scale=scale, block_size=B)
    assert not loose.certificate["skipped_blocks"].any() and np.array_equal(plain.output, loose.output)
    assert all(np.array_equal(x, loose.certificate[name], equal_nan=True) for name, x in plain.certificate.items())


@pytest.mark.parametrize("apart", [False, True])
def test_a_required_ranking_is_certified_or_the_head_is_exact(apart: bool) -> None:
    from tierd_kernels.cuda import backend

    layout = LAYOUTS[0]
    k, v, q = passage(layout, 1111, 8, 2, 3, 0.0)
    if apart:
        k[:, 500:507] += 6 * q[::4, :1]  # a few tokens of one block
    else:
        k = np.tile(k[:, :16], (1, 70, 1))[:, :1111]  # all blocks are alike
    cache = store(layout, k, v)
    (result,) = backend.attend(layout, cache.memory, [cache.call(q, 0.3, Budget(require_rank=True))], 8)
    assert isinstance(result, Result)
    check_reply(k, v, q, result.output, result.certificate, 0.3, 0.0, softmax_scale=layout.head_dim**-0.5, block_size=16)
    assert result.certificate["rank_certified"].all()
    assert (~result.certificate["exact"]).any() == apart


@pytest.mark.parametrize("policy", [
    Coverage(tau_cov=0.9, boundary_check=False), Coverage(tau_cov=0.5, k_max=4, key_bound_max=1e9, boundary_check=False),
    Coverage(tau_cov=0.99, k_min=3, k_max=500, v_tol=0.001, boundary_check=False), Coverage(), Coverage(k_min=0, k_max=0),
])  # fmt: skip
def test_coverage_promotes_what_the_cpu_promotes(policy: Coverage) -> None:
    from kernels_cache import store as store_on_cpu
    from tierd_kernels import ladder
    from tierd_kernels.cuda import backend

    layout = LAYOUTS[0]
    k, v, q = passage(layout, 1500, 8, 2, 5, 0.5)
    cache, other = store(layout, k, v), store_on_cpu(layout, k, v)
    (result,) = backend.attend(layout, cache.memory, [cache.call(q, 0.5, policy)], 8)
    (reference,) = ladder.attend(layout, other.memory, [other.call(q, 0.5, policy)], 8)
    assert isinstance(result, Result) and isinstance(reference, Result)
    got, want = result.certificate, reference.certificate
    check_reply(k, v, q, result.output, got, 0.5, 0.0, softmax_scale=layout.head_dim**-0.5, block_size=16)
    print({name: (got[name].ravel().tolist(), want[name].ravel().tolist()) for name in ("promoted_key_blocks", "exact", "paper_key_bound")})
    for name in ("promoted_key_blocks", "promoted_value_blocks"):
        assert (np.abs(got[name] - want[name]) <= 1).all(), name
    same = got["promoted_key_blocks"] == want["promoted_key_blocks"]
    assert same.mean() > 0.8 and (got["exact"] == want["exact"]).mean() > 0.8
    assert np.allclose(got["paper_key_bound"][same], want["paper_key_bound"][same], rtol=0.02)


@pytest.mark.parametrize("preference", [1, 24])
@pytest.mark.parametrize(("layout", "tokens", "rtol"), [
    (LAYOUTS[0], 4000, 0.1), (LAYOUTS[0], 4000, 0.02), (LAYOUTS[2], 5000, 0.05), (LAYOUTS[0], 700, 0.05),
    (LAYOUTS[4], 36000, 0.05),  # more groups than thread blocks select in
])  # fmt: skip
def test_no_more_is_promoted_than_on_the_cpu(layout: Layout, tokens: int, rtol: float, preference: int) -> None:
    from kernels_cache import store as store_on_cpu
    from tierd_kernels import ladder
    from tierd_kernels.cuda import backend

    k, v, q = draw(layout, tokens, 8, 1, "sharp", 3)
    cache, other = store(layout, k, v), store_on_cpu(layout, k, v)
    call, same = (x.call(q, rtol, Budget()) for x in (cache, other))
    if preference > 1:
        same.in_scratch = in_scratch(cache, call, apart=True).in_scratch
        call.preference = same.preference = preference
    (result,) = backend.attend(layout, cache.memory, [call], 8)
    (reference,) = ladder.attend(layout, other.memory._replace(scratch=other.memory.originals), [same], 8)
    assert isinstance(result, Result) and isinstance(reference, Result)
    got, want = ((x.certificate["promoted_key_blocks"] + x.certificate["promoted_value_blocks"]).ravel() for x in (result, reference))
    print(got, want, result.certificate["exact"].ravel(), reference.certificate["exact"].ravel())
    assert want.min() > 0 and not result.certificate["exact"].any()
    assert got.sum() <= 1.1 * want.sum() + 3  # thresholds are steps, if small ones


@pytest.mark.parametrize("tokens", [9, 16 + 9, 2 * GROUP + 15])
def test_what_the_mean_norm_counts_is_all_tokens(tokens: int) -> None:
    """Those of the trailing block too, a group of its own: what is left out makes a budget smaller and breaks no bound."""
    from tierd_kernels.cuda import backend

    layout = LAYOUTS[0]
    k, v, q = draw(layout, tokens, 8, 1, "diffuse", 3)
    k[:, -9:] = np.repeat(q[::4, 0, None], 9, axis=1)  # most of the mass
    cache = store(layout, k, v)
    (result,) = backend.attend(layout, cache.memory, [cache.call(q, 1.0, Budget(skip_share=0.0))], 8)
    assert isinstance(result, Result) and not result.certificate["exact"].any()
    np.testing.assert_allclose(result.certificate["value_norm"], attention(k, v, q, layout.head_dim**-0.5).value_norm, rtol=0.03)


def test_a_kernel_that_may_begin_early_waits_for_the_one_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    from tierd_kernels.cuda import dependent
    from tierd_kernels.cuda.launch import Grid, Kernels, Program
    from tierd_kernels.cuda.sources import source

    layout, early = LAYOUTS[0], list[str]()
    monkeypatch.setattr(dependent, "launch", lambda kernel, *_: early.append(kernel.name))
    monkeypatch.setattr(Kernels, "_launch", lambda *_: early.append(""))
    Kernels(layout).step(0, Grid(1, 1, 1, 1, 1, 1, 1), Program(certifies=True, ranks=True, covers=True), None)
    assert early == ["", "", *["rank", "finish", "pick", "cover", "promote", "rank", "finish", "dense"]]
    early.clear()
    Kernels(layout).step(0, Grid(1, 1, 1, 1, 1, 0, 1), Program(certifies=True, ranks=False, covers=False), None)
    assert early == ["", *["finish", "pick", "promote", "finish", "dense"]]
    early.clear()
    Kernels(layout).step(0, Grid(1, 1, 1, 1, 1, 0, 1), Program(certifies=False, ranks=False, covers=False), None)
    assert early == ["", "dense"]
    for name in {"rank", "finish", "pick", "cover", "promote", "dense"}:
        body = source(layout, name)[0].split('extern "C"')[1]
        assert 0 < body.index("let_next_begin();") < body.index("wait_for_previous();"), name


def test_a_context_that_grows_is_not_captured_at_each_step() -> None:
    from tierd_kernels.cuda import backend

    layout = LAYOUTS[4]
    k, v, q = draw(layout, 700, 1, 1, "diffuse", 5)
    cache, answers = store(layout, k, v), {}
    for tokens in (*range(640, 700), *range(640, 700)):
        call = cache.call(q, 0.1, Budget())
        call.num_tokens, full = tokens, tokens // layout.block_size
        call.hot_offsets = call.hot_offsets[:full]
        call.original_offsets = call.original_offsets[: -(-tokens // layout.block_size)]
        (result,) = backend.attend(layout, cache.memory, [call], 1)
        assert isinstance(result, Result)
        assert np.array_equal(answers.setdefault(tokens, result.output), result.output)  # as a graph, and as it was enqueued
    assert cache.memory.graphs.captured <= 2  # type: ignore[attr-defined]


def test_corruption_is_seen_by_the_canary_and_a_copy_in_scratch_is_read() -> None:
    from tierd_kernels.cuda import backend

    layout = LAYOUTS[0]
    k, v, q = draw(layout, 512, 8, 1, "sharp", 3)
    cache = store(layout, k, v)
    every = np.arange(len(cache.hot))
    call = cache.call(q, 0.05, Budget(), canary_blocks=every)
    at = int(cache.hot[7]) + Record(layout).nbytes
    cache.memory.hot[at + 2 * 5 + 1] ^= 0x08  # type: ignore[index]
    (result,) = backend.attend(layout, cache.memory, [call], 8)
    assert isinstance(result, Result) and result.canary_failures == [(7, 1)]
    backend.quantise_blocks(layout, cache.memory, cache.originals, cache.hot)
    good = cache.call(q, 0.01, Budget())
    (result,) = backend.attend(layout, cache.memory, [in_scratch(cache, good)], 8)
    assert isinstance(result, Result)
    assert result.reads.from_host.size and not result.certificate["exact"].all()
    certified = ~result.certificate["exact"]
    cache.memory.scratch[:] ^= 0x08  # type: ignore[index]
    (other,) = backend.attend(layout, cache.memory, [good], 8)
    assert isinstance(other, Result) and not np.array_equal(other.output[certified], result.output[certified])


@pytest.mark.parametrize(("blocks", "norms"), [(1, 1 << 14), (5, 1 << 14), (1 << 10, 7)])
def test_blocks_quantised_a_few_at_a_time_are_as_those_quantised_together(blocks: int, norms: int) -> None:
    layout = LAYOUTS[0]
    k, v, _ = draw(layout, 400, 8, 1, "outlier", 4)
    memory = store(layout, k, v).memory
    expected, exponents = memory.hot.copy(), memory.exponents.copy()  # type: ignore[attr-defined]
    memory.blocks, memory.norms = memory.blocks[:, :blocks], memory.norms[:norms]  # type: ignore[attr-defined]
    memory.exponents.fill(-1)  # type: ignore[attr-defined]
    store(layout, k, v, memory=memory)
    assert (memory.hot == expected).all() and np.array_equal(np.maximum(memory.exponents, 0), exponents)  # type: ignore[attr-defined]


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[4]], ids=str)
def test_originals_are_found_at_their_own_places(layout: Layout) -> None:
    from tierd_kernels.cuda import backend

    k, v, q = draw(layout, 500, 4 * layout.num_kv_heads, 2, "sharp", 3)
    cache = store(layout, k, v, np.random.default_rng(0).permutation(-(-500 // layout.block_size)))
    canaries = np.arange(len(cache.hot))
    wrong, right, itself = (cache.call(q, 0.01, Budget(), canary_blocks=canaries) for _ in range(3))
    wrong.in_scratch = all_in_scratch(layout, cache.originals[: len(cache.hot)])  # where they are not yet
    astray = backend.attend(layout, cache.memory, [wrong], len(q))[0]
    results = [backend.attend(layout, cache.memory, [call], len(q))[0] for call in (in_scratch(cache, right), itself)]
    assert all(isinstance(result, Result) and not result.canary_failures for result in results)
    first, second = results
    assert {*first.reads.records[0]} == {0, 1} and not first.certificate["exact"].all()  # type: ignore[union-attr]
    assert np.array_equal(first.output, second.output) and not np.array_equal(first.output, astray.output)  # type: ignore[union-attr]
    for name, x in first.certificate.items():  # type: ignore[union-attr]
        assert name == "host_bytes" or np.array_equal(x, second.certificate[name], equal_nan=True), name  # type: ignore[union-attr]


def test_arithmetic_that_bounds_do_not_allow_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tierd_kernels.cuda import backend, self_test

    self_test.verify()
    monkeypatch.setattr(self_test, "MMA_MAX", 0.1)
    with pytest.raises(DeviceUnavailable, match=r"an MMA was off by \d+\.\d units of its terms' sum \(at most 0 are allowed"):
        backend.reserve(1 << 20, 64, 1 << 20)


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2], LAYOUTS[4]], ids=str)
@pytest.mark.parametrize(("scale", "size"), [(1e30, 1e15), (1e38, 1e4), (1e300, 1e-3), (-1e30, 1.0)])
def test_a_scale_beyond_fp32_is_answered_exactly(layout: Layout, scale: float, size: float) -> None:
    """Keys of zeros have scores of zero by any scale; FP32 would make no numbers of them, and drop the blocks."""
    from tierd_kernels.cuda import backend

    k, v, q = draw(layout, 150, layout.num_kv_heads, 2, "diffuse", 4)
    q = kept(exact_numbers(q).astype(np.float64) * size, layout.dtype)
    cache = store(layout, np.zeros_like(k), v)
    (result,) = backend.attend(layout, cache.memory, [cache.call(q, 0.3, Budget(), softmax_scale=scale)], layout.num_kv_heads)
    assert isinstance(result, Result)
    check_reply(k * 0, v, q, result.output, result.certificate, 0.3, 0.0, softmax_scale=scale, block_size=layout.block_size)


def test_promoted_scores_that_are_not_finite_leave_no_bound() -> None:
    """Products that cancel, but not in FP32, where their sums are infinite on the way."""
    from tierd_kernels.cuda import backend

    layout = LAYOUTS[4]
    k, v, q = draw(layout, 200, 1, 1, "diffuse", 4)
    q *= np.float32(0.2)
    q[0, 0, [0, 8, 1, 9]] = 1.99  # nearly 1 after scaling
    k[0, 64:128, [0, 8]], k[0, 64:128, [1, 9]] = 3e38, -3e38  # a whole block; sums over every eighth channel, then of them
    cache = store(layout, k, v)
    (result,) = backend.attend(layout, cache.memory, [cache.call(q, 0.3, Budget())], 1)
    assert isinstance(result, Result)
    check_reply(k, v, q, result.output, result.certificate, 0.3, 0.0, softmax_scale=layout.head_dim**-0.5, block_size=layout.block_size)
    assert result.certificate["promoted_key_blocks"].all() and result.certificate["exact"].all()


@pytest.mark.parametrize("which", ["keys", "values", "both"])
def test_blocks_that_fp16_scales_do_not_fit_are_promoted(which: str) -> None:
    from tierd_kernels.cuda import backend

    layout = LAYOUTS[4]
    k, v, q = draw(layout, 1200, 1, 2, "diffuse", 4)
    if which != "values":
        k[0, 70, 3] = 1e6
    if which != "keys":
        v[0, 200, 5] = 1e6
    q[..., 3] = 1e-6
    cache = store(layout, k, v)
    (result,) = backend.attend(layout, cache.memory, [cache.call(q, 0.3, Budget())], 1)
    assert isinstance(result, Result)
    check_reply(k, v, q, result.output, result.certificate, 0.3, 0.0, softmax_scale=layout.head_dim**-0.5, block_size=layout.block_size)
    assert not result.certificate["exact"].any()
    assert (result.certificate["promoted_key_blocks"] > 0).all() == (which != "values")
    assert (result.certificate["promoted_value_blocks"] > 0).all() == (which != "keys")


def test_scores_beyond_any_are_refused_by_name() -> None:
    from tierd_kernels.cuda import backend

    layout = LAYOUTS[4]
    k, v, q = draw(layout, 100, 1, 1, "diffuse", 3)
    cache = store(layout, k * np.float32(1e25), v)
    (result,) = backend.attend(layout, cache.memory, [cache.call(q * np.float32(1e20), 0.1, Budget())], 1)
    assert isinstance(result, ScoreOverflow)


EXTREMES = Layout(1, 64, 64, 32, "float32"), Layout(1, 80, 32, 32, "bfloat16"), Layout(1, 128, 16, 16, "float16")


@pytest.mark.parametrize("seed", range(20 if device.real() else 2))
def test_numbers_of_any_size_are_answered_or_refused_by_name(seed: int) -> None:
    from tierd_kernels.cuda import backend

    random, memory = np.random.default_rng(seed), backend.reserve(1 << 20, 64, 1 << 22)
    for _ in range(60 if device.real() else 15):
        layout = EXTREMES[random.integers(len(EXTREMES))]
        tokens, d, group = int(random.integers(1, 250)), layout.head_dim, int(random.integers(1, 6))
        n = int(random.integers(1, min(4, tokens) + 1))
        sizes = 10.0 ** (random.uniform(-44, 38, 3) if random.random() < 0.5 else random.uniform(-6, 5, 3))
        k, v = (random.standard_normal((1, tokens, d)) * size for size in sizes[:2])
        q = random.standard_normal((group, n, d)) * sizes[2]
        if random.random() < 0.3:
            v[:] = 0
        if random.random() < 0.2:
            k[:] = k[:, :1]
        if random.random() < 0.3:
            v[:, random.integers(tokens)] *= 1e20
        if random.random() < 0.3:
            k[:, :, random.integers(d)] *= 1e6
        k, v, q = (kept(x, layout.dtype) for x in (k, v, q))
        rtol, atol = float(random.choice([0, 0.02, 0.3, 1e200])), float(random.choice([0, 0, 1e-30, 1.0]))
        scale = float(random.choice([d**-0.5, 1e-30, 1e30, -1.0, 0.0, 1e-300, 1.0]))
        cache, relative_to = store(layout, k, v, memory=memory), str(random.choice(["values", "output"]))
        canaries = np.arange(len(cache.hot))
        call = cache.call(q, rtol, Budget(), atol=atol, softmax_scale=scale, relative_to=relative_to, canary_blocks=canaries)
        (result,) = backend.attend(layout, memory, [call], group)
        if isinstance(result, ScoreOverflow):
            continue
        assert isinstance(result, Result), result
        assert not result.canary_failures
        error_max = {"softmax_scale": scale, "block_size": layout.block_size}
        check_reply(k, v, q, result.output, result.certificate, rtol, atol, relative_to, **error_max)


def kept(x: NDArray[np.float64], dtype: str) -> Raw:
    """Raw originals, kept finite."""
    limit = {"float16": 65504.0, "bfloat16": 3.3e38, "float32": 3.3e38}[dtype]
    with np.errstate(all="ignore"):
        return raw(np.clip(x, -limit, limit), dtype)
