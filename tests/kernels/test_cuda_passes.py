"""Rung 0 in short splits and in long ones, by many threads or by few: whatever a launch takes, rows come out the same."""

import numpy as np
import pytest
from numpy.typing import NDArray
from oracle import attention, exact_numbers
from test_cuda import LAYOUTS, draw, raw, store
from tierd_kernels.cuda.sources import WARPS
from tierd_kernels.layout import Layout
from tierd_kernels.policy import Budget

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]


def rising(layout: Layout, tokens: int, heads: int, n: int, gain: float) -> tuple[NDArray[np.generic], ...]:
    """Tokens each of which is liked better than those before it, by `gain` in natural units over all; a negative one: worse."""
    random, d = np.random.default_rng(tokens), layout.head_dim
    q = random.standard_normal((heads * layout.num_kv_heads, n, d))
    lead = q.reshape(layout.num_kv_heads, -1, d).mean(axis=1)
    lead /= np.linalg.norm(lead, axis=1, keepdims=True)
    q += 4 * np.repeat(lead, heads, axis=0)[:, None]
    k, v = (random.standard_normal((layout.num_kv_heads, tokens, d)) for _ in range(2))
    k = 0.1 * k + np.linspace(0, gain / 4 * d**0.5, tokens)[:, None] * lead[:, None]
    return raw(k, layout.dtype), raw(v, layout.dtype), raw(q, layout.dtype)


@pytest.mark.parametrize("gain", [40.0, -40.0, 400.0, -1500.0])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_warp_of_many_blocks_finds_what_many_warps_of_one_find(layout: Layout, gain: float) -> None:
    """Where every block has a larger score than all before it, what was added up is scaled down again and again; of one block never."""
    import cupy
    from tierd_kernels.cuda.launch import CERTIFIED
    from tierd_kernels.cuda.packing import Part
    from tierd_kernels.cuda.step import Step

    for tokens in (2048 + 5, 4096 + 64 + layout.block_size):  # whole splits, and one with few blocks; a trailing block and none
        k, v, q = rising(layout, tokens, 3, 2, gain)
        cache = store(layout, k, v)
        found = []
        for split_tokens in (4 * layout.block_size, 2048):
            step = Step(layout, cache.memory, [Part(layout, cache.call(q, 10.0, Budget()), 0, 2)], split_tokens // layout.block_size)  # type: ignore[arg-type]
            step.upload()
            step.memory.workspace.fill(255)  # NaN, where a kernel takes what none has left
            cupy.cuda.Device().synchronize()
            step.enqueue(step.memory.stream)
            found.append(step.answers()[0])
        few, many = (exact_numbers(x.output).astype(np.float64) for x in found)
        off = 1e-5 if layout.dtype == "float32" else 1e-2 if layout.dtype == "bfloat16" else 2e-3  # that type's rounding
        assert all((x.states == CERTIFIED).any() for x in found)
        size = found[0].fields["value_norm"][..., None]
        assert np.abs(few).max() > 0 and (np.abs(few - many) <= off * np.abs(few) + 1e-5 * size).all()
        for name in ("bound", "key_error", "value_error", "value_norm"):
            assert np.allclose(found[0].fields[name], found[1].fields[name], rtol=0.3 if name != "value_norm" else 1e-4), name


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.dtype == "float32"], ids=str)
def test_values_that_are_all_alike_come_back(layout: Layout) -> None:
    """Weights of values are those of the mass, not rounded to eleven bits."""
    from tierd_kernels.cuda import backend

    k, v, q = draw(layout, layout.block_size, 4 * layout.num_kv_heads, 3, "diffuse", 3)
    v[:] = 1.5  # no more than an offset of its codes
    cache = store(layout, k, v)
    (result,) = backend.attend(layout, cache.memory, [cache.call(q, 0.5, Budget())], 4 * layout.num_kv_heads)
    assert not isinstance(result, Exception) and not result.certificate["exact"].any()
    assert np.abs(result.output - 1.5).max() < 1e-5


@pytest.mark.parametrize("splits", [1, 41])  # besides the trailing block; more than are summed at once
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows_of_many_are_put_together_as_those_of_few(layout: Layout, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from tierd_kernels.cuda import dependent, launch
    from tierd_kernels.cuda.packing import Part
    from tierd_kernels.cuda.step import Step

    n, names, tokens = 2, list[str](), splits * WARPS * layout.block_size - 24
    k, v, q = draw(layout, tokens, 2 * layout.num_kv_heads, n, "sharp", splits)
    cache = store(layout, k, v)
    rows = 2 * layout.num_kv_heads * n
    real = dependent.launch
    monkeypatch.setattr(dependent, "launch", lambda kernel, *rest: names.append(kernel.name) or real(kernel, *rest))
    answers = []
    for many in (rows + 1, rows):
        monkeypatch.setattr(launch, "MANY_ROWS", many)
        step = Step(layout, cache.memory, [Part(layout, cache.call(q, 0.02, Budget()), 0, n)], WARPS)  # type: ignore[arg-type]
        step.upload()
        step.enqueue(step.memory.stream)
        answers.append(step.answers()[0])
    assert [name for name in names if name.startswith("finish")] == [*["finish"] * 2, *["finish_many"] * 2]
    few, of_many = answers
    difference = exact_numbers(few.output) - attention(k, v, q, layout.head_dim**-0.5).output
    assert (np.sqrt((difference**2).sum(axis=2)).reshape(few.states.shape) <= few.fields["bound"].reshape(few.states.shape)).all()
    assert np.array_equal(few.states, of_many.states)
    assert np.allclose(exact_numbers(few.output), exact_numbers(of_many.output), rtol=1e-2, atol=1e-5)  # rounded to the originals' type
    for name, x in few.fields.items():
        assert np.allclose(x, of_many.fields[name], rtol=1e-3, atol=1e-6 * np.abs(few.fields["value_norm"]).max(), equal_nan=True), name
    assert np.array_equal(few.reads.records, of_many.reads.records)


@pytest.mark.parametrize(("tokens", "rtol"), [(2300, 0.028), (9700, 0.015)])
def test_few_thread_blocks_choose_and_tell_what_many_do(tokens: int, rtol: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of many calls in one launch: a thread block of selection has all groups of its tile, and one tells all that a KV head has read."""
    from tierd_kernels.cuda import launch
    from tierd_kernels.cuda.packing import Part
    from tierd_kernels.cuda.step import Step

    layout = LAYOUTS[0]
    k, v, q = draw(layout, tokens, 8, 1, "diffuse", tokens)
    cache, answers = store(layout, k, v), []
    for blocks, readers in ((256, 8), (1, 1), (3 * layout.num_kv_heads, 2)):
        monkeypatch.setattr(launch, "PICK_BLOCKS", blocks)
        monkeypatch.setattr(launch, "READERS", readers)
        step = Step(layout, cache.memory, [Part(layout, cache.call(q, rtol, Budget()), 0, 1)])  # type: ignore[arg-type]
        step.upload()
        step.enqueue(step.memory.stream)
        answers.append(step.answers()[0])
    promoted = answers[0].fields["promoted_key_blocks"] + answers[0].fields["promoted_value_blocks"]
    assert (answers[0].states == launch.CERTIFIED).all() and np.count_nonzero(promoted) > 2
    for other in answers[1:]:
        assert all(np.array_equal(x, other.fields[name], equal_nan=True) for name, x in answers[0].fields.items())
        assert np.array_equal(answers[0].reads.records, other.reads.records) and np.array_equal(answers[0].cold, other.cold)


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2]], ids=str)
def test_naive_kernels_answer_as_rung_0_does(layout: Layout) -> None:
    from tierd_kernels.cuda.launch import Kernels
    from tierd_kernels.cuda.packing import Part
    from tierd_kernels.cuda.step import Step

    k, v, q = draw(layout, 2048, 4 * layout.num_kv_heads, 1, "diffuse", 5)
    cache = store(layout, k, v)
    outputs = []
    for naive in (True, False):
        step = Step(layout, cache.memory, [Part(layout, cache.call(q, 0.3, Budget(skip_share=0.0)), 0, 1)])  # type: ignore[arg-type]
        step.upload()
        Kernels(layout, naive).certify(step.at, step.grid, False, step.memory.stream)
        outputs.append(exact_numbers(step.answers()[0].output).astype(np.float64))
    assert np.abs(outputs[0]).max() > 0
    assert np.allclose(outputs[0], outputs[1], rtol=2e-3, atol=2e-5)  # of sums in another order, rounded to the originals' type
