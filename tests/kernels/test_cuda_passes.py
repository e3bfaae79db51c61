"""Rung 0 by one kernel or by several, by many threads or by few: whatever a launch takes, rows come out the same."""

import numpy as np
import pytest
from oracle import exact_numbers
from test_cuda import LAYOUTS, draw, store
from tierd_kernels.layout import Layout
from tierd_kernels.policy import Budget

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]


@pytest.mark.parametrize("tokens", [5, 70, 333, 1100])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_both_passes_in_one_kernel_leave_the_same_bits(layout: Layout, tokens: int) -> None:
    """Of splits that are whole, and of fewer blocks than warps; with a trailing block and without."""
    import cupy
    from tierd_kernels.cuda.packing import Part
    from tierd_kernels.cuda.step import Step

    n, B = 2, layout.block_size
    for count in (tokens, tokens - tokens % B):
        if not count:
            continue
        k, v, q = draw(layout, count, 3 * layout.num_kv_heads, n, "sharp", tokens)
        cache = store(layout, k, v)
        call = cache.call(q, 0.3, Budget(require_rank=True))
        for split_tokens in (256, 512):
            found = []
            for joint, brief in ((False, False), (True, False), (True, True))[: 2 + (split_tokens == 256)]:
                step = Step(layout, cache.memory, [Part(layout, call, 0, n)], split_tokens // B)  # type: ignore[arg-type]
                assert step.program.joint and step.program.brief == (split_tokens == 256)
                step.upload()
                step.memory.workspace.fill(255)  # NaN, where a kernel leaves what another has left before
                cupy.cuda.Device().synchronize()
                step.kernels.step(step.at, step.grid, step.program._replace(joint=joint, brief=brief), step.memory.stream)
                found.append(step.answers()[0])
            for other in found[1:]:
                assert np.array_equal(other.output, found[0].output) and np.array_equal(other.states, found[0].states)
                assert all(np.array_equal(x, found[0].fields[name], equal_nan=True) for name, x in other.fields.items())


@pytest.mark.parametrize("tokens", [40, 2600])  # one split and the trailing block; more than are summed at once
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows_of_many_are_put_together_as_those_of_few(layout: Layout, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from tierd_kernels.cuda import dependent, launch
    from tierd_kernels.cuda.packing import Part
    from tierd_kernels.cuda.step import Step

    n, names = 2, list[str]()
    k, v, q = draw(layout, tokens, 2 * layout.num_kv_heads, n, "sharp", tokens)
    cache = store(layout, k, v)
    rows = 2 * layout.num_kv_heads * n
    real = dependent.launch
    monkeypatch.setattr(dependent, "launch", lambda kernel, *rest: names.append(kernel.name) or real(kernel, *rest))
    answers = []
    for many in (rows + 1, rows):
        monkeypatch.setattr(launch, "MANY_ROWS", many)
        step = Step(layout, cache.memory, [Part(layout, cache.call(q, 0.02, Budget()), 0, n)], 64 // layout.block_size)  # type: ignore[arg-type]
        step.upload()
        step.enqueue(step.memory.stream)
        answers.append(step.answers()[0])
    assert [name for name in names if name.startswith("finish")] == [*["finish"] * 2, *["finish_many"] * 2]
    few, of_many = answers
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


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2]], ids=str)
def test_the_naive_passes_answer_as_rung_0_does(layout: Layout, joint: bool) -> None:
    from tierd_kernels.cuda.launch import Kernels
    from tierd_kernels.cuda.packing import Part
    from tierd_kernels.cuda.step import Step

    k, v, q = draw(layout, 2048, 4 * layout.num_kv_heads, 1, "diffuse", 5)
    cache = store(layout, k, v)
    outputs = []
    for naive in (True, False):
        step = Step(layout, cache.memory, [Part(layout, cache.call(q, 0.3, Budget(skip_share=0.0)), 0, 1)])  # type: ignore[arg-type]
        step.upload()
        Kernels(layout, naive).certify(step.at, step.grid, step.program._replace(joint=joint), step.memory.stream)
        outputs.append(exact_numbers(step.answers()[0].output).astype(np.float64))
    assert np.abs(outputs[0]).max() > 0
    assert np.allclose(outputs[0], outputs[1], rtol=2e-3, atol=2e-5)  # of sums in another order, rounded to the originals' type
