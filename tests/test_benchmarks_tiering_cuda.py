"""The tiering benchmark for a GPU, on the CPU backend and small shapes: its trace, its accounts and what it refuses. No times."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "tiering"))
import bench_tiering_cuda as bench
from engine_steps import Setting, check, driven
from needle_trace import Shape, Trace
from needs import figures, made

from tierd.commands import RowResult

SETTINGS = [setting for settings in bench.SETTINGS for setting in settings]
TINY = Shape(layers=2, tokens=1024, q_heads=4, kv_heads=2, head_dim=64, steps=48)


def rows(**changes: float) -> list[dict[str, Any]]:
    """One row of each setting, and `changes` to the first of them."""
    gaps = {("predictive", False): 0.1, ("predictive", True): 0.25, ("reactive", False): 0.4, ("none", False): 0.8}
    made: list[dict[str, Any]] = []
    for number, s in enumerate(SETTINGS):
        gap = 0.0 if s.replayed else gaps[s.policy, s.stress] + number // len(bench.SETTINGS[0])
        hits = 1.0 if s.replayed else 0.9
        times = {"p50_us": 110.0, "resident_gap": gap, "exposed_us": 100.0 * gap}
        made.append({"name": s.name, "needed_per_step": 9.0, "hit_rate": hits, **times})
    made[0] |= changes
    return made


def test_resident_has_all_at_hand_and_the_others_read_the_host() -> None:
    trace = Trace(TINY, seed=1)
    resident, ours, none = bench.measure(trace, SETTINGS[:3], "cpu")
    assert [row["name"] for row in (resident, ours, none)] == ["resident", "predictive", "none"]
    assert resident["hit_rate"] > bench.RESIDENT_HITS_MIN > ours["hit_rate"] > none["hit_rate"] == 0.0
    assert min(row["needed_per_step"] for row in (resident, ours, none)) > 1, "needles are promoted"
    assert max(row["error_over_bound"] for row in (resident, ours, none)) <= 1.0
    assert ours["stages_us"]["begin"] > 0 and sum(ours["stages_us"].values()) > 0
    assert resident["host_bytes_per_step"] < none["host_bytes_per_step"] and none["exact_share"] < 0.5


def test_an_answer_further_off_than_its_bound_is_not_reported() -> None:
    trace = Trace(TINY, seed=2)
    with driven(trace, Setting("none", "none", 0.0), "cpu") as run:
        _, results = run.step(0)
    assert check(trace, 0, results) <= 1.0
    moved = [RowResult(x.output + np.float16(1.0), x.certificate) for x in results]
    with pytest.raises(SystemExit, match="times its bound"):
        check(trace, 0, moved)
    missed = [RowResult(x.output, {**x.certificate, "bound": 2.0 * x.certificate["budget"]}) for x in results]
    with pytest.raises(SystemExit, match="a budget was missed"):
        check(trace, 0, missed)


def test_the_headline_is_held_against_resident_or_refused() -> None:
    figures = bench.headline(rows())
    assert figures["resident_gap_at_12_5pct"] == pytest.approx(0.1), "of the first group"
    assert figures["none_gap"] == pytest.approx(0.8) and figures["exposed_vs_reactive"] == pytest.approx(0.25)
    assert figures["resident_gap_at_12_5pct_stress"] == pytest.approx(1.25)
    assert "resident_gap_at_12_5pct_stress" not in bench.headline(rows()[: len(bench.SETTINGS[0])])
    with pytest.raises(SystemExit, match="promoted nothing"):
        bench.headline(rows(needed_per_step=0.0))
    with pytest.raises(SystemExit, match=r"resident had 0\.500"):
        bench.headline(rows(hit_rate=0.5))


def test_steps_are_held_against_those_of_the_same_turns() -> None:
    held = bench.held_against([80.0, 120.0, 100.0], [90.0, 120.0, 120.0])
    assert held == {"exposed_us": pytest.approx(10.0), "resident_gap": pytest.approx(0.1)}
    assert bench.held_against([100.0], [90.0])["exposed_us"] == 0.0, "nothing is exposed by less than nothing"
    assert all(settings[0].replayed and not any(s.replayed for s in settings[1:]) for settings in bench.SETTINGS)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), min_size=1))
def test_time_that_several_kernels_share_counts_once(pairs: list[tuple[int, int]]) -> None:
    ranges = sorted((float(start), float(start + length)) for start, length in pairs)
    assert bench.busy(ranges) == len({at for start, length in pairs for at in range(start, start + length)})


def test_needles_come_and_go() -> None:
    q = Trace(TINY, seed=3, stress=True).q.astype(np.float64)[..., 0, :]
    norms = np.linalg.norm(q, axis=-1)
    assert q.shape == (TINY.steps, 2, 4, 64) and norms.max() > 2 * np.median(norms[norms < norms.mean()])
    near, far = (np.mean(np.sum(q[lag:] * q[: len(q) - lag], -1) / (norms[lag:] * norms[: len(q) - lag])) for lag in (1, 24))
    assert near > 0.5 > far, "the next step looks at nearly the same, a far one does not"


def test_a_cluster_has_the_attention_and_its_members_take_turns() -> None:
    trace = Trace(replace(TINY, tokens=4096), seed=3)
    shape = TINY.steps, TINY.layers, TINY.kv_heads, 2, TINY.head_dim
    q = trace.q[..., 0, :].astype(np.float64).reshape(shape)
    scores = np.einsum("tlhgd,hnd->tlhgn", q, trace.k_raw[:, :4096].astype(np.float64)) / np.sqrt(TINY.head_dim)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    top = np.sort(weights.mean(axis=0), axis=-1)[..., -4096 // 16 :].sum(axis=-1)
    assert top.min() > 0.8, "a sixteenth of the tokens has nearly all of it"
    first = weights.argmax(axis=-1)
    again = (first[1:] == first[:-1]).mean()
    assert 0.1 < again < 0.95


def test_what_is_read_again_is_counted() -> None:
    needed = np.zeros((12, 5, 1), bool)
    needed[:, 0] = True  # always
    needed[::4, 1] = True  # every fourth step
    needed[5, 2] = True  # once
    found = figures(needed)
    assert found["mean"] == pytest.approx((12 + 3 + 1) / 12) and found["p50"] == 1
    assert found["again in 1"] == pytest.approx(11 / (11 + 2 + 1)) and found["again"] == pytest.approx(13 / 14)
    assert found["again in 8"] == pytest.approx(5 / 5)


def test_needs_of_made_traces_are_seen_as_the_engine_sees_them() -> None:
    needed = made(tokens=2048, stress=False)
    assert needed.shape[1:] == (2, 128, 2) and 0 < needed.mean() < 0.9
    assert 0.3 < figures(needed[:, 1])["again in 1"] < 1.0


@pytest.mark.gpu
def test_it_runs_over_the_cuda_backend(cuda: None) -> None:
    trace = Trace(Shape(layers=1, tokens=256, q_heads=2, kv_heads=1, head_dim=64, steps=bench.PROFILED + bench.STAGED + 4), seed=4)
    (row,) = bench.measure(trace, [Setting("reactive", "reactive", 0.5)], "cuda")
    assert row["needed_per_step"] > 0
