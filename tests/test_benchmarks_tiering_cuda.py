"""The tiering benchmark for a GPU, on the CPU backend and small shapes: its trace, its accounts and what it refuses. No times."""

import sys
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

from tierd.commands import RowResult

TINY = Shape(layers=2, tokens=1024, q_heads=4, kv_heads=2, head_dim=64, steps=20)


def rows(**changes: float) -> list[dict[str, Any]]:
    """One row of each setting of the headline, all alike but for `changes` to resident's."""
    made = [{"name": s.name, "policy": s.policy, "p50_us": 110.0, "needed_per_step": 9.0, "hit_rate": 0.9} for s in bench.SETTINGS]
    made[0] |= {"p50_us": 100.0, "hit_rate": 1.0} | changes
    return made


def test_resident_has_all_at_hand_and_the_others_read_the_host() -> None:
    trace = Trace(TINY, seed=1)
    resident, ours, none = (bench.measure(trace, setting, "cpu") for setting in (bench.SETTINGS[0], bench.SETTINGS[1], bench.SETTINGS[3]))
    assert resident["hit_rate"] > bench.RESIDENT_HITS_MIN > ours["hit_rate"] > none["hit_rate"] == 0.0
    assert min(row["needed_per_step"] for row in (resident, ours, none)) > 1, "needles are promoted"
    assert max(row["error_over_bound"] for row in (resident, ours, none)) <= 1.0
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
    assert figures["resident_gap_at_12_5pct"] == pytest.approx(0.1) and figures["none_gap"] == pytest.approx(0.1)
    with pytest.raises(SystemExit, match="promoted nothing"):
        bench.headline(rows(needed_per_step=0.0))
    with pytest.raises(SystemExit, match=r"resident had 0\.500"):
        bench.headline(rows(hit_rate=0.5))


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), min_size=1))
def test_time_that_several_kernels_share_counts_once(pairs: list[tuple[int, int]]) -> None:
    ranges = sorted((float(start), float(start + length)) for start, length in pairs)
    assert bench.busy(ranges) == len({at for start, length in pairs for at in range(start, start + length)})


def test_needles_come_and_go() -> None:
    q = Trace(TINY, seed=3).q.astype(np.float64)[..., 0, :]
    norms = np.linalg.norm(q, axis=-1)
    assert q.shape == (20, 2, 4, 64) and norms.max() > 2 * np.median(norms[norms < norms.mean()])
    near, far = (np.mean(np.sum(q[lag:] * q[: len(q) - lag], -1) / (norms[lag:] * norms[: len(q) - lag])) for lag in (1, 10))
    assert near > 0.5 > far, "the next step looks at nearly the same, the tenth does not"


@pytest.mark.gpu
def test_it_runs_over_the_cuda_backend(cuda: None) -> None:
    trace = Trace(Shape(layers=1, tokens=256, q_heads=2, kv_heads=1, head_dim=64, steps=bench.PROFILED + 4), seed=4)
    assert bench.measure(trace, Setting("reactive", "reactive", 0.5), "cuda")["needed_per_step"] > 0
