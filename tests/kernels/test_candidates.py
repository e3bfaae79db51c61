"""Candidates: the largest shares and no others, at most as many as were asked for, the same of both backends' forms."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from stored import Cache
from test_cuda import LAYOUTS, draw, in_scratch, passage, store
from tierd_kernels.call import Call, Result
from tierd_kernels.errors import DeviceLost
from tierd_kernels.layout import Layout
from tierd_kernels.policy import Budget, Coverage, Policy
from tierd_kernels.select.candidates import Candidates, joined, largest, near

TARGET, ONCE_ABOVE = 0.9, 1 + 2.0**-8 + 2.0**-16  # of threshold.cuh and common.cuh
TOLERANCE = 2e-3  # of FP32 sums with approximate exponentials
SUM, SUM_SQUARES, SUM_NORM, SUM_SQUARES_NORM, SUM_ERROR, _, _, TOP, DELTA, D_NORM, STATISTICS = range(11)


def check_form(found: Candidates, full: int, most: int) -> None:
    assert found.blocks.dtype == np.int32 and found.scores.dtype == np.float32 and found.blocks.shape == found.scores.shape
    assert found.blocks.shape[2] <= most
    real = found.blocks >= 0
    assert (found.scores[real] > 0).all() and np.isfinite(found.scores).all() and (found.scores[~real] == 0).all()
    assert (found.blocks[real] < full).all() and (found.blocks[~real] == -1).all()
    assert (np.diff(real.astype(int), axis=2) <= 0).all(), "a gap in a list"
    assert (np.diff(found.blocks, axis=2)[real[:, :, 1:]] > 0).all(), "blocks out of order, or twice"


def check_largest(found: Candidates, shares: NDArray[Any], most: int, tolerance: float) -> None:
    """Against shares [2, full, Hkv]: scores are right, and no block that is left out has a larger share."""
    full = shares.shape[1]
    check_form(found, full, most)
    for kind in range(2):
        for head in range(shares.shape[2]):
            real = found.blocks[kind, head] >= 0
            blocks, scores, want = found.blocks[kind, head][real], found.scores[kind, head][real], shares[kind, :, head]
            assert np.allclose(scores, want[blocks], rtol=tolerance, atol=0), (kind, head)
            positive = int((want > 0).sum())
            assert len(blocks) == min(most, positive), (kind, head)
            left = np.setdiff1d(np.flatnonzero(want > 0), blocks)
            if len(left):
                assert want[left].max() <= want[blocks].min() * (1 + tolerance) if len(blocks) else most == 0


@given(st.integers(1, 90), st.integers(1, 3), st.integers(0, 70), st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_the_largest_shares_of_a_dense_form(full: int, heads: int, most: int, values: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    shares = (random.integers(0, values, (2, full, heads)) / 4).astype(np.float32)  # ties, and zeros
    found = largest(shares, most)
    check_largest(found, shares, most, 0.0)
    for kind, head in np.ndindex(2, heads):
        real = found.blocks[kind, head] >= 0
        order = np.argsort(-shares[kind, :, head], kind="stable")[: real.sum()]
        assert np.array_equal(found.blocks[kind, head][real], np.sort(order)), "at a tie the first blocks are taken"
    assert np.array_equal(largest(shares, full).shares(full), shares)


@given(st.integers(1, 40), st.integers(1, 3), st.floats(0, 1), st.sampled_from((0, 1, 4)), st.integers(0, 2**32 - 1))
def test_what_comes_near_is_measured_by_what_was_promoted(full: int, heads: int, share: float, times: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    shares = random.exponential(0.3, (2, full, heads)).astype(np.float32) * (random.random((2, full, heads)) < 0.8)
    promoted = random.random(shares.shape) < share
    favour = np.where(random.random(shares.shape) < 0.5, float(times), 1.0)
    found = near(shares, promoted, favour if times else None)
    assert found.dtype == np.float32
    for kind, head in np.ndindex(2, heads):
        read = promoted[kind, :, head]
        counted = (shares * favour)[kind, read, head].tolist()
        floor = min([1.0, *(x for x in counted if x > 0)]) if times else 1.0
        assert (found[kind, read, head] == 0).all()
        np.testing.assert_allclose(found[kind, ~read, head], shares[kind, ~read, head] / floor, rtol=1e-6)


@given(st.integers(1, 90), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_parts_joined_are_as_the_whole(full: int, most: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    parts = random.random((3, 2, full, 2)).astype(np.float32)
    together = joined([largest(part, most) for part in parts], full, most)
    whole = largest(parts.max(axis=0), most)
    assert np.array_equal(together.blocks, whole.blocks) and np.array_equal(together.scores, whole.scores)


def test_a_negative_number_of_candidates_is_refused() -> None:
    with pytest.raises(ValueError, match="candidates_max is -1; at least 0"):
        largest(np.zeros((2, 4, 1), np.float32), -1)


def unstored(full: int, n: int, **asked: Any) -> Any:
    """A step of one call with two query heads a KV head over so many blocks, none of which is stored."""
    from tierd_kernels.cuda.packing import Part
    from tierd_kernels.cuda.step import Step

    layout = LAYOUTS[0]
    k, v, q = draw(layout, 40, 4, n, "diffuse", 1)
    cache, nowhere, none = store(layout, k, v), np.zeros(full, np.int64), np.zeros((0, 2), np.float32)
    call = replace(
        cache.call(q, 0.1, Budget()), num_tokens=full * layout.block_size, hot_offsets=nowhere, original_offsets=nowhere,
        group_value_norms=none, group_error_norms=none, **asked,
    )  # fmt: skip
    step = Step(layout, cache.memory, [Part(layout, call, 0, n)])  # type: ignore[arg-type]
    step.upload()
    return step


class Left:
    """What a step of one call has left on the device, in float64."""

    def __init__(self, step: Any) -> None:
        from tierd_kernels.cuda.launch import CALL

        self.call, self.memory = step.memory.inputs.view(step.at - step.memory.inputs.at, (1,), CALL)[0].copy(), step.memory
        heads, self.full = step.layout.num_kv_heads, self.call["full"]
        self.rows = step.grid.group * self.call["n"]
        tiles = -(-self.rows // 4)
        self.statistics = self._statistics(self._read("statistics", (heads, tiles, self.full + 1, 8, 4), np.uint32)[:, :, : self.full])
        self.marks = self._read("marks", (heads, tiles, self.full), np.uint32)
        self.facts = self._read("facts", (heads, self.rows, 7), np.float32).astype(np.float64)

    def _read(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        size, at = int(np.prod(shape)) * np.dtype(dtype).itemsize, self.call[name] - int(self.memory.workspace.data.ptr)
        return np.asarray(self.memory.workspace[at : at + size].get()).view(dtype).reshape(shape)

    def write(self, **left: NDArray[Any]) -> None:
        """What a step is to have left instead: there when this returns, for streams that do not wait for copies on others."""
        import cupy

        memory = self.memory
        for name, x in left.items():
            at = int(self.call[name])
            for start, held in ((memory.workspace_at, memory.workspace), (memory.outputs.at, memory.outputs.device)):
                if start <= at < start + held.nbytes:
                    held[at - start : at - start + x.nbytes].set(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
        cupy.cuda.Device().synchronize()

    def _statistics(self, words: NDArray[np.uint32]) -> NDArray[np.float64]:
        """[..., full, 44], four rows a statistic, then the block's notes, of what lies as cuda/common.cuh, `statistic`, says."""
        block = np.arange(self.full)
        word = [words[:, :, block, k ^ (block & 7)] for k in range(8)]
        upper, lower = ({k: word[k] & np.uint32(0xFFFF0000) for k in (1, 4, 6)}, {k: word[k] << np.uint32(16) for k in (1, 4, 6)})
        of = [word[0], upper[1], word[2], lower[1], upper[4], word[5], lower[4], word[7], word[3], upper[6], lower[6]]
        return np.concatenate(of, axis=-1).view(np.float32).astype(np.float64)

    def shares(self, h: int, row: int) -> NDArray[np.float64]:
        """Of keys and of values, [2, full], relative to what selection aims at (bound/bound.cuh, `block_terms`)."""
        tile, own = row // 4, row % 4
        x = [self.statistics[h, tile, :, k * 4 + own] for k in range(STATISTICS)]
        top, mass, norm, budget, _, _, limit = self.facts[h, row]
        mark = self.marks[h, tile]
        with np.errstate(all="ignore"):
            here = np.exp2(x[TOP] - top) / mass
            rho, a2, d, delta = here * x[SUM], here * np.sqrt(x[SUM_SQUARES]), x[D_NORM], x[DELTA]
            psi, cross = np.where(delta > 0, (np.expm1(delta) - delta) / delta**2, 0.5), a2 * d
            phi = 1 + delta * psi
            g = np.minimum(phi * np.minimum(rho * delta, cross), cross + psi * here * d * d)
            key = phi * np.minimum(delta * here * x[SUM_NORM] * ONCE_ABOVE, d * here * np.sqrt(x[SUM_SQUARES_NORM])) + g * norm
            value = np.minimum(a2 * self.statistics[h, tile, :, 40], here * x[SUM_ERROR])
        out = np.where((x[SUM] <= 0) | (mark & 256 != 0), 0.0, np.stack([key, value])) / (TARGET * budget)
        out = np.nan_to_num(np.minimum(out, 3e38), nan=0.0)
        if not self.call["exact_only"] and (mark >> own & 17).any():
            out /= 1.0 if self.call["coverage"] else np.clip(limit, 1e-30, 1.0)  # from which on the row promoted
            out = np.minimum(out, 3e38)
            for kind in range(2):
                out[kind] = np.where(mark >> own >> 4 * kind & 1, np.inf, out[kind])  # no row's candidate
        return np.asarray(out)


def run(cache: Cache, call: Call) -> tuple[Any, Candidates]:
    from tierd_kernels.cuda.packing import Part
    from tierd_kernels.cuda.step import Step

    step = Step(cache.layout, cache.memory, [Part(cache.layout, call, 0, call.q.shape[1])])  # type: ignore[arg-type]
    step.upload()
    step.launch()
    return step, step.answers()[0].candidates()


CASES = [
    (LAYOUTS[0], 8, 1, 2000, "diffuse", 0.3, 64), (LAYOUTS[0], 8, 1, 2000, "sharp", 0.02, 64), (LAYOUTS[0], 10, 3, 1500, "sink", 0.05, 5),
    (LAYOUTS[1], 5, 2, 777, "outlier", 0.1, 64), (LAYOUTS[2], 12, 1, 1500, "ties", 0.02, 7), (LAYOUTS[4], 1, 9, 1200, "diffuse", 0.02, 3),
    (LAYOUTS[0], 8, 1, 40, "huge", 0.01, 64), (LAYOUTS[0], 2, 1, 10, "diffuse", 0.1, 64), (LAYOUTS[4], 3, 1, 1100, "ties", 0.3, 0),
    (LAYOUTS[0], 8, 1, 9000, "sharp", 0.1, 200), (LAYOUTS[2], 8, 1, 4100, "passage", 0.2, 30),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("policy", [Budget(), Coverage(tau_cov=0.7, k_max=20, boundary_check=False)], ids=str)
@pytest.mark.parametrize(("layout", "query_heads", "n", "tokens", "regime", "rtol", "most"), CASES, ids=str)
def test_the_devices_candidates_are_the_largest_shares(
    layout: Layout, query_heads: int, n: int, tokens: int, regime: str, rtol: float, most: int, policy: Policy
) -> None:
    whole = passage(layout, tokens, query_heads, n, 7, 2.0) if regime == "passage" else draw(layout, tokens, query_heads, n, regime, tokens)
    k, v, q = whole
    cache = store(layout, k, v)
    call = cache.call(q, rtol, policy, candidates_max=most)
    step, found = run(cache, call)
    left, heads = Left(step), layout.num_kv_heads
    shares = np.stack([np.stack([left.shares(h, row) for row in range(left.rows)]).max(axis=0) for h in range(heads)], axis=2)
    check_largest(found, np.where(np.isinf(shares), 0.0, shares), most, TOLERANCE)
    print(f"{left.full} blocks, {np.count_nonzero(left.marks)} promoted of {left.marks.size}")
    cache.memory.outputs.host[step.answers_end :] = 0xFF  # type: ignore[attr-defined]
    # The same again, whose tickets have been handed back; another step.
    for other in (step.answers()[0].candidates(), run(cache, call)[1]):
        assert np.array_equal(found.blocks, other.blocks) and np.array_equal(found.scores.view(np.uint32), other.scores.view(np.uint32))


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("most", [40, 9000])
def test_the_largest_are_chosen_from_more_blocks_than_are_held_at_once(most: int) -> None:
    """What the passes would leave of 131,680 tokens is drawn, many of it alike, instead of worked out."""
    full, rng = 8230, np.random.default_rng(most)
    step = unstored(full, 1, candidates_max=most)
    kinds = rng.lognormal(-3, 2, (2, 300, 8, 4)).astype(np.float32).view(np.uint32)  # of blocks
    block = np.arange(full + 1)[:, None]
    words = ((kinds[0] & np.uint32(0xFFFF0000)) | kinds[1] >> np.uint32(16))[rng.integers(0, 300, (2, full + 1))]
    Left(step).write(
        statistics=words[:, block, np.arange(8) ^ (block & 7)], facts=np.tile(np.float32([0, 1e4, 1, 0.1, 0.01, 0, 1]), (2, 2, 1)),
        state=np.ones((2, 2), np.int32), counts=np.zeros((2, 2, 2), np.int32), marks=np.zeros((2, 1, full), np.uint32),
    )  # fmt: skip
    step.kernels.candidates(step.at, step.grid, step.memory.stream)
    step.memory.stream.synchronize()
    found, left = Candidates(*(x.copy() for x in step.arranged.late[0])), Left(step)
    shares = np.stack([np.stack([left.shares(h, row) for row in range(left.rows)]).max(axis=0) for h in range(2)], axis=2)
    assert shares.all() and len(np.unique(shares)) <= 2 * 2 * 300
    check_largest(found, shares, most, TOLERANCE)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_of_exact_calls_and_of_several_at_once_everyone_has_his_own() -> None:
    from tierd_kernels.cuda import backend

    layout = LAYOUTS[0]
    k, v, q = draw(layout, 1100, 8, 66, "diffuse", 3)
    cache = store(layout, k, v)
    calls = [cache.call(q[:, :1], 0.0, Budget()), cache.call(q[:, 1:2], 0.1, Budget(), candidates_max=9), cache.call(q, 0.1, Budget())]
    results = backend.attend(layout, cache.memory, calls, 8)
    assert all(isinstance(x, Result) for x in results)
    exact, few, many = (x.candidates() for x in results if isinstance(x, Result))
    assert (exact.blocks == -1).all() and (exact.scores == 0).all()
    for found, call in ((few, calls[1]), (many, calls[2])):  # the last in two parts, and another step
        check_form(found, len(cache.hot), call.candidates_max)
        # In other splits, whose sums are rounded otherwise.
        (alone,) = backend.attend(layout, cache.memory, [replace(call, candidates_max=len(cache.hot))], 8)
        assert isinstance(alone, Result)
        check_largest(found, alone.candidates().shares(len(cache.hot)), call.candidates_max, TOLERANCE)
    assert few.blocks.shape == (2, 2, 9) and many.blocks.shape == (2, 2, 64)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_candidates_are_worked_out_only_where_some_call_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who decides is asked before anything was read, and then, if that does not settle it, told what each call has read; of what is
    launched together all calls name theirs."""
    from tierd_kernels.cuda import backend
    from tierd_kernels.cuda.step import Step

    layout = LAYOUTS[0]
    k, v, q = draw(layout, 600, 8, 3, "sharp", 3)
    cache, launched, begin = store(layout, k, v), list[int](), Step._begin_late
    monkeypatch.setattr(Step, "_begin_late", lambda step: [launched.append(1), begin(step)][1])
    none, all_read = (0, 0), (4 * len(cache.hot), 4 * len(cache.hot))
    rules: dict[str, Callable[[int, int], bool]] = {
        "never": lambda needs, misses: False,
        "some copies read": lambda needs, misses: needs > misses,
        "always": lambda needs, misses: True,
    }
    for rule, answer in rules.items():
        told: list[tuple[int, int]] = []

        def decide(needs: int, misses: int, told: list[Any] = told, answer: Callable[[int, int], bool] = answer) -> bool:
            told.append((needs, misses))
            return answer(needs, misses)

        calls = [cache.call(q[:, i : i + 1], rtol, Budget(), is_looked_at=decide) for i, rtol in enumerate((0.5, 0.02, 0.0))]
        calls[1] = in_scratch(cache, calls[1])
        results = [x for x in backend.attend(layout, cache.memory, calls, 8) if isinstance(x, Result)]
        read = [(x.reads.from_host.size, int(x.reads.from_host.sum())) for x in results]
        assert len(results) == 3 and told == [none] * 3 + (read if rule != "always" else [])
        assert read[0] == none and read[1][0] > read[1][1] and read[2] == all_read, "none, some, all"
        named = [x.candidates().blocks.size > 0 for x in results]
        assert named == [rule != "never"] * 3 and len(launched) == (rule != "never"), rule
        launched.clear()


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_answers_do_not_wait_for_candidates_and_those_of_a_step_survive_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    from tierd_kernels.cuda import backend
    from tierd_kernels.cuda.launch import Program

    layout = LAYOUTS[0]
    k, v, q = draw(layout, 600, 8, 2, "diffuse", 3)
    cache, events = store(layout, k, v), []
    answered, arrived, begin = cache.memory.answered, cache.memory.arrived, cache.memory.graphs.launch  # type: ignore[attr-defined]

    class Told:
        def __init__(self, event: Any, name: str) -> None:
            self._event, self._name = event, name

        def record(self, stream: Any) -> None:
            events.append(f"{self._name} recorded")
            self._event.record(stream)

        def synchronize(self) -> None:
            events.append(f"{self._name} awaited")
            self._event.synchronize()

    def launch(shape: tuple[Any, ...], *args: Any) -> None:
        events.append("step launched" if isinstance(shape[-1], Program) else "candidates launched")
        begin(shape, *args)

    monkeypatch.setattr(cache.memory, "answered", Told(answered, "answers"))
    monkeypatch.setattr(cache.memory, "arrived", Told(arrived, "candidates"))
    monkeypatch.setattr(cache.memory.graphs, "launch", launch)  # type: ignore[attr-defined]
    begun, said = ["candidates launched", "candidates recorded"], iter([False, True])
    late = cache.call(q[:, :1], 0.1, Budget(), is_looked_at=lambda needs, misses: next(said))
    (first,) = backend.attend(layout, cache.memory, [late], 8)
    assert events == ["step launched", "answers recorded", "answers awaited", *begun]
    (second,) = backend.attend(layout, cache.memory, [cache.call(q[:, 1:], 0.1, Budget())], 8)
    assert events[5:] == ["step launched", "candidates awaited", "answers recorded", *begun, "answers awaited"]
    assert isinstance(first, Result) and isinstance(second, Result)
    assert not np.array_equal(first.candidates().scores, second.candidates().scores)
    (again,) = backend.attend(layout, cache.memory, [cache.call(q[:, :1], 0.1, Budget())], 8)
    assert isinstance(again, Result) and np.array_equal(first.candidates().scores, again.candidates().scores)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_a_device_lost_behind_its_answers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy
    from tierd_kernels.cuda import backend

    layout = LAYOUTS[0]
    k, v, q = draw(layout, 100, 2, 1, "diffuse", 3)
    cache = store(layout, k, v)
    (result,) = backend.attend(layout, cache.memory, [cache.call(q, 0.1, Budget())], 2)

    class Failed:
        def synchronize(self) -> None:
            raise cupy.cuda.runtime.CUDARuntimeError(700)

    monkeypatch.setattr(cache.memory.late, "_arrived", Failed())  # type: ignore[attr-defined]
    assert isinstance(result, Result)
    with pytest.raises(DeviceLost, match="restart the daemon"):
        result.candidates()
