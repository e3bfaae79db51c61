"""The host path's benchmark: its stopwatch, its script, and that it notices wrong answers. No times of this machine."""

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "hostpath"))
import bench_host_path as bench
import stopwatch
import stub_device
from bench_host_path import Driven, Setting, script
from stopwatch import Stopwatch
from stub_device import Script, stubbed

SMALL = Setting(tokens=1024, policy="reactive", share=0.02)


class Hand:
    """A clock that only `work` moves."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds

    def nested(self, own: float, inner: float) -> None:
        self.now += own
        self.work(inner)

    def fails(self, seconds: float) -> None:
        self.now += seconds
        raise RuntimeError("on purpose")


def test_a_stage_counts_its_own_time_also_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand()
    monkeypatch.setattr(stopwatch, "time", hand)
    watch = Stopwatch(threading.current_thread().name)
    with watch.over([("outer", hand, "nested"), ("inner", hand, "work"), ("outer", hand, "fails")]):
        hand.nested(2.0, 3.0)
        with pytest.raises(RuntimeError, match="on purpose"):
            hand.fails(1.0)
        hand.work(0.5)
        other = threading.Thread(target=hand.nested, args=(7.0, 8.0))
        other.start()
        other.join()
    hand.nested(9.0, 9.0)
    assert watch.taken_s == {"outer": 3.0, "inner": 3.5}


def test_a_tenth_of_a_script_changes_from_step_to_step() -> None:
    setting = Setting(tokens=65536, policy="none", share=0.01)
    found = script(setting, np.random.default_rng(5), 6)
    for (before, _), (after, near) in zip(found, found[bench.LAYERS :], strict=False):
        same = {*map(tuple, before.tolist())} & {*map(tuple, after.tolist())}
        assert len(np.unique(after, axis=0)) == len(after) == setting.wanted
        assert 0.88 < len(same) / setting.wanted < 0.93
        assert near.shape == (bench.KV_HEADS, bench.NEAR) and (np.diff(near) > 0).all()


def driven(calls: int) -> None:
    told = Script(bench.Q_HEADS * bench.HEAD_DIM * 2)
    with stubbed(told, lambda do: do):
        with Driven(SMALL, told, seed=3) as run:
            for number in range(calls):
                run.call(number)
        run.check(calls)
        counters = run.engine.counters
        assert counters.misses > 0 and counters.prefetched > 0


def test_all_that_was_marked_is_counted() -> None:
    driven(12)


def test_an_answer_to_another_call_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(script: Script, *where: int) -> None:
        answer(script, *where)
        script.q_bytes = 2 * bench.HEAD_DIM  # from now on only the first head's queries come back

    answer = stub_device.answer
    monkeypatch.setattr(stub_device, "answer", wrong)
    with pytest.raises(SystemExit, match="not the call's own"):
        driven(3)


def test_reads_that_are_lost_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(self: Any, work: Any) -> int:
        return 0

    monkeypatch.setattr(bench.ScratchCache, "_count", deaf)
    with pytest.raises(SystemExit, match="0 originals were counted as read"):
        driven(3)


def test_the_headline_is_of_the_largest_size() -> None:
    rows = [{"tokens": tokens, "policy": policy, "promoted_records": records, "host_us_p50": float(tokens + records + (policy == "none"))}
            for tokens in (100, 200) for policy, records in (("none", 5), ("predictive", 0), ("predictive", 5))]  # fmt: skip
    assert bench.headline(rows) == {"host_us_per_call_128k": 200.0, "host_us_per_call_128k_promoting_1pct": 205.0}
