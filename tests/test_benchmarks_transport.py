"""The load test's parts: its loops count what they claim to, its check notices a wrong answer, its transports work. No times."""

import queue
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tierd_kernels.policy import Budget

from tierd.commands import Append, Attend, Geometry, OpenSession, Row, Tolerance
from tierd.engine import Engine, EngineConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_transport as bench
from bench_transport_daemon import NullKernels
from bench_transport_worker import PARTS, Load, check, drive, exchange, session_under, work


class Hand:
    """A clock that only calls and sleeps move."""

    def __init__(self, call_s: float) -> None:
        self.now, self._call_s = 100.0, call_s

    def attend(self) -> tuple[float, float]:
        self.now += self._call_s
        return 0.001, 0.002

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_call_in_an_open_loop_counts_from_when_it_was_due() -> None:
    hand = Hand(call_s=0.010)
    samples = drive(hand.attend, 0.005, 1000.0, 0.0, lambda: hand.now, hand.sleep)
    late, queued, compute, wire, total = samples.seconds.T
    # Due every millisecond, each takes ten: the second call is 9 ms late. After twice the loop's length it gives up.
    assert total.tolist() == pytest.approx([0.010])
    assert samples.unsent == 4
    hand = Hand(call_s=0.0026)
    samples = drive(hand.attend, 0.005, 1000.0, 0.0, lambda: hand.now, hand.sleep)
    late, queued, compute, wire, total = samples.seconds.T
    assert late.tolist() == pytest.approx([0.0, 0.0016, 0.0032, 0.0048])
    assert total.tolist() == pytest.approx([0.0026, 0.0042, 0.0058, 0.0074])
    assert (late + queued + compute + wire).tolist() == pytest.approx(total.tolist())
    assert samples.unsent == 1


def test_an_idle_open_loop_sleeps_until_each_call_is_due() -> None:
    hand = Hand(call_s=0.003)
    samples = drive(hand.attend, 0.1, 100.0, 0.5, lambda: hand.now, hand.sleep)
    assert samples.seconds.shape == (10, len(PARTS)) and samples.unsent == 0
    assert samples.seconds[:, 0].tolist() == pytest.approx([0.0] * 10)
    assert samples.elapsed_s == pytest.approx(0.005 + 9 * 0.01 + 0.003)


def test_a_closed_loop_is_never_late_and_ends() -> None:
    hand = Hand(call_s=0.01)
    samples = drive(hand.attend, 0.095, None, 0.0, lambda: hand.now, hand.sleep)
    assert len(samples.seconds) == 10 and not samples.seconds[:, 0].any() and samples.unsent == 0


@pytest.mark.parametrize("transport", bench.TRANSPORTS)
def test_calls_of_the_null_engine_are_checked_and_timed(transport: str) -> None:
    with bench.daemon("null") as (target, pid):
        where = "inproc://" if transport == "in-process" else target
        with session_under(Load("null", transport, where, 8, 1)) as (attend, check_replies):
            check_replies()
            before = bench.cpu_seconds(pid)
            samples = drive(attend, 0.02, 500.0)
            row = bench.describe(Load("null", transport, where, 8, 1), 500.0, [samples], bench.cpu_seconds(pid) - before)
    assert row["calls"] + row["unsent"] == 10
    assert row["compute_p50_us"] > 0.0 and row["wire_p50_us"] > 0.0
    assert (row["daemon_cpu_us_per_call"] > 0.0) or transport == "in-process"


def test_the_check_turns_red_for_a_wrong_answer() -> None:
    import numpy as np
    from bench_transport_daemon import NullKernels
    from tierd_client import Geometry, Tolerance, connect

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tierd_kernels.registry.load", lambda _: NullKernels())
        tier = connect("inproc://")
    ones = np.ones((2, 1, 128), np.float16)
    with tier, tier.open_session(Geometry(1, 2, 2, 128, "float16"), tolerance=Tolerance(0.1), max_tokens=1) as session:
        session.append(layer=0, k=ones, v=ones)
        with pytest.raises(AssertionError, match="below the true error"):
            check(session, ones, ones, ones[:, 0], lambda request: tier._transport.call(request, 10.0))
        assert exchange(session, ones[:, 0], lambda request: tier._transport.call(request, 10.0))[1].certificate.exact.all()


def test_a_worker_that_cannot_connect_says_why_and_frees_the_others(tmp_path: Path) -> None:
    meet, messages = threading.Barrier(2), _Messages()
    work(Load("null", "stream", f"unix://{tmp_path}/none.sock", 8, 1), [None], 0.0, 0.1, meet, messages)
    assert "DaemonUnavailable" in messages.get_nowait() and meet.broken


class _Messages(queue.Queue[str]):
    """With what a queue between processes has besides."""

    def close(self) -> None: ...

    def join_thread(self) -> None: ...


def test_an_engine_that_does_nothing_has_no_fault_to_log_behind_its_answers() -> None:
    engine = Engine(EngineConfig(hot_bytes=1 << 20, originals_bytes=1 << 20, scratch_bytes=1 << 20), kernels=NullKernels())
    kv = np.zeros((1, 40, 64), np.float32)

    def run(command: object) -> object:
        future = engine.submit(command)  # type: ignore[arg-type]
        engine.run_once()  # raises what goes wrong behind an answer
        return future.result(timeout=0)

    session = str(run(OpenSession(Geometry(1, 1, 1, 64, "float32"), Tolerance(0.1), Budget(), 64, worker="w")))
    run(Append(session, 0, kv, kv, worker="w"))
    for _ in range(2):
        run(Attend([Row(session, 0, kv[:, :1])], worker="w"))
    assert engine.counters.launches == 2
