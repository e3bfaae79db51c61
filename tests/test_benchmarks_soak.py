"""The soak's parts, and that it bites: a wrong answer, one that is missing, a session lost, a byte that is not given back."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "soak"))
import bench_soak as bench
import crew
import daemon
import draws
import life
import samples
from judging import attention, judge
from mirror import Mirror
from tally import Tally, together
from tierd_client import Certificate, Geometry, Result, Tolerance

LEASE_S = 3600.0
Row = dict[str, float]

# Each runs in the daemon, before it serves.
SABOTAGE = {
    "an answer of zeros": (
        """
from tierd.engine.batch import Batch
check = Batch._check_promise
def wrong(self, work):
    check(self, work)
    work.result.output[0] = 0
Batch._check_promise = wrong
""",
        "the bound is below the true error",
    ),
    "an answer that is withheld": (
        """
from itertools import count
from tierd.engine.batch import Batch
from tierd.errors import CertificateUnavailable
check, calls = Batch._check_promise, count(1)
def withheld(self, work):
    if next(calls) % 40 == 0:
        raise CertificateUnavailable("withheld")
    check(self, work)
Batch._check_promise = withheld
""",
        "CertificateUnavailable: withheld",
    ),
    "a lease that runs out too soon": (
        """
from itertools import count
from tierd.leases import Leases
turns = count(1)
Leases.expired = lambda self: sorted(self._sessions) if next(turns) % 200 == 0 else []
""",
        "a session was gone, and every call came within half a lease of the last",
    ),
    "a block that is not given back": (
        """
from itertools import count
from tierd.pools.ranges import RangeAllocator
give, times = RangeAllocator.release_many, count(1)
def keep_one(self, offsets):
    give(self, offsets[:-1] if self.name == "originals" and len(offsets) and next(times) == 5 else offsets)
RangeAllocator.release_many = keep_one
""",
        "all workers have left, and the daemon still holds",
    ),
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SMOKE_S", 5.0)
    monkeypatch.setattr(crew, "KILL_EVERY_S", 2.0)
    monkeypatch.setattr(samples, "GIVEN_BACK_S", 3.0)


@pytest.mark.usefixtures("short")
def test_a_sound_daemon_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--smoke", "--seed", "3"]) == 0
    said = capsys.readouterr().out
    assert "seed 3" in said and "'violations': 0" in said and "'pools_left_bytes': 0" in said


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", SABOTAGE)
def test_it_refuses_to_report(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prelude, expected = SABOTAGE[name]
    monkeypatch.setattr(daemon, "PROGRAM", ["-c", f"{prelude}\nfrom tierd.cli import main\nraise SystemExit(main())"])
    assert bench.main(["--smoke"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "no report" in said and expected in said and "headline" not in said


@given(st.integers(0, 2**32 - 1), st.sampled_from(draws.DTYPES), st.integers(1, 6), st.sampled_from([(1, 1), (4, 2), (6, 1)]))
@settings(max_examples=25)
def test_attention_in_float64_is_the_oracles(seed: int, dtype: str, n: int, heads: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    geometry = Geometry(1, *heads, 64, dtype)
    like = draws.flavour(rng)
    k, v = draws.keys_values(rng, geometry, like, n + 30)
    q = draws.queries(rng, geometry, like, oracle.exact_numbers(k[:, 7]).astype(np.float32), n)
    mine, truth = attention(k, v, q, 0.125), oracle.attention(k, v, q, 0.125)
    off = np.sqrt(((mine.output - truth.output) ** 2).sum(axis=2)).astype(float)
    assert (off <= mine.noise + truth.noise).all()
    assert (mine.noise < 1e-9 * truth.value_norm_max).all()
    for name in ("value_norm", "value_norm_min", "value_norm_max"):
        np.testing.assert_allclose(getattr(mine, name), getattr(truth, name), rtol=1e-9)


def answered(seed: int, tolerance: Tolerance) -> tuple[Mirror, Any, Result[Any]]:
    """A mirror of some tokens, a question, and an honest answer whose errors are three quarters of their bounds."""
    rng = np.random.default_rng(seed)
    mirror = Mirror(Geometry(1, 4, 2, 64, "float32"))
    like = draws.Flavour(1.0, 1.0, 1.0, 0.3)
    mirror.append(0, *draws.keys_values(rng, mirror.geometry, like, 40))
    q = draws.queries(rng, mirror.geometry, like, mirror.key(0, 5), 2)
    truth = oracle.attention(mirror.keys[0], mirror.values[0], q, 0.125)
    output = (truth.output + 0.75e-3 * np.eye(1, 64)).astype(np.float32)
    rows: dict[str, Any] = {name: np.zeros((4, 2)) for name in Certificate.__annotations__}
    rows |= {"bound": np.full((4, 2), 1e-3), "budget": tolerance.rtol * truth.value_norm, "exact": np.zeros((4, 2), bool)}
    return mirror, q, Result(output, Certificate(**rows))


def test_a_verdict_counts_and_measures() -> None:
    tolerance = Tolerance(0.05)
    mirror, q, result = answered(1, tolerance)
    result.certificate.exact[2] = True
    verdict = judge(mirror, 0, q, result, tolerance)
    assert (verdict.rows, verdict.exact) == (8, 2)
    assert verdict.worst == verdict.worst_certified == pytest.approx(0.75, rel=1e-3)
    result.certificate.exact[:] = True
    assert judge(mirror, 0, q, result, tolerance).worst_certified == 0.0


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda result: np.copyto(result.output[1, 1], result.output[1, 1] + 1e-3), "the bound is below the true error in 1 of 8"),
        (lambda result: result.certificate.budget.fill(1e-4), "the bound is above the budget and the head is not exact"),
        (lambda result: result.certificate.budget.fill(1.0), "the budget is above what was asked for"),
        (lambda result: result.output.fill(np.nan), "the output is not finite"),
        (lambda result: result.certificate.bound.fill(np.nan), "bound is NaN"),
    ],
)
def test_an_answer_beyond_its_bound_is_seen(spoil: Callable[[Result[Any]], None], expected: str) -> None:
    tolerance = Tolerance(0.05)
    mirror, q, result = answered(2, tolerance)
    spoil(result)
    with pytest.raises(AssertionError, match=expected):
        judge(mirror, 0, q, result, tolerance)


def test_an_answer_to_what_was_stored_before_is_seen() -> None:
    tolerance = Tolerance(0.05)
    mirror, q, result = answered(4, tolerance)
    mirror.truncate(38)
    with pytest.raises(AssertionError, match="the bound is below the true error"):
        judge(mirror, 0, q, result, tolerance)


def test_a_mirror_and_its_fork_go_their_own_ways() -> None:
    rng = np.random.default_rng(5)
    mirror = Mirror(Geometry(2, 1, 1, 64, "bfloat16"))
    k, v = draws.keys_values(rng, mirror.geometry, draws.Flavour(1.0, 1.0, 1.0, 0.0), 9)
    mirror.append(0, k, v)
    child = mirror.fork()
    mirror.append(1, k, v)
    child.append(0, v, k)
    mirror.truncate(4)
    assert (mirror.lengths, child.lengths) == ([4, 4], [18, 0])
    assert (child.keys[0] == np.concatenate([k, v], axis=1)).all() and (mirror.keys[0] == k[:, :4]).all()


def test_the_palette_has_every_type_and_size_and_follows_the_seed() -> None:
    drawn = draws.palette(1)
    assert {(geometry.dtype, geometry.head_dim) for geometry in drawn} == {(dtype, d) for dtype in draws.DTYPES for d in draws.HEAD_DIMS}
    assert drawn == draws.palette(1) != draws.palette(2)


def test_a_worker_lives_and_its_draws_follow_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In process, where a connection cannot be cut."""
    monkeypatch.setattr(life, "ACTIONS", {name: share for name, share in life.ACTIONS.items() if name != "cut"})
    tallies = []
    for _ in range(2):
        one = life.Life("inproc://", (9,), draws.palette(9), LEASE_S)
        for _ in range(80):
            one.turn()
        one.end()
        tallies.append(one.tally)
    assert tallies[0] == tallies[1]
    tally = tallies[0]
    assert min(tally.head_steps, tally.opened, tally.forked, tally.truncated, tally.exact) > 0
    assert 0.0 < tally.worst <= 1.0 and tally.expired == tally.refused == 0


def test_a_session_that_outlives_its_lease_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "LEASE_SLACK_S", 0.0)
    one = life.Life("inproc://", (1,), draws.palette(1), 0.0)  # whose engine knows no lease
    one._forget()
    with pytest.raises(AssertionError, match="outlived its lease"):
        one._collect()
    one.end()


def test_a_worker_that_cannot_connect_is_a_problem(tmp_path: Path) -> None:
    crewed = crew.Crew(f"unix://{tmp_path}/none.sock", 0, draws.palette(0), LEASE_S, 1)
    crewed.dismiss()
    assert len(crewed.problems) == 1 and "DaemonUnavailable" in crewed.problems[0]


def test_a_killed_worker_is_replaced_and_what_it_did_counts() -> None:
    with daemon.running("cpu") as one:
        crewed = crew.Crew(one.target, 7, draws.palette(7), daemon.LEASE_S, 1)
        for _ in range(2):
            before = crewed.tally.calls
            while crewed.tally.calls == before and not crewed.problems:
                crewed.run(time.monotonic() + 0.05)
            crewed._kill_one()
        assert crewed.killed == 2 and crewed.tally.calls > before > 0
        crewed.dismiss()
        assert crewed.problems == [] and samples.leaks(samples.given_back(one)) == []


def test_what_a_daemon_logs_as_an_error_is_seen(tmp_path: Path) -> None:
    log = tmp_path / "log"
    nobody: Any = None
    log.write_text("12:00 WARNING tierd.engine.loop: a worker was silent\n12:01 ERROR tierd.engine.loop: a turn failed\nTraceback ...\n")
    assert daemon.Daemon("", nobody, nobody, log).faults() == ["12:01 ERROR tierd.engine.loop: a turn failed", "Traceback ..."]


def status(**changes: Any) -> dict[str, Any]:
    """That of a daemon which holds nothing."""
    zero = dict.fromkeys(samples.MUST_BE_ZERO, 0)
    return zero | {"pools": {"hot": {"used_bytes": 0}}, "workers_connected": 1, "events": {"lease_expired": 3}} | changes


@pytest.mark.parametrize("name", samples.MUST_BE_ZERO)
def test_whatever_is_left_is_a_leak(name: str) -> None:
    assert samples.leaks(status()) == []
    (problem,) = samples.leaks(status(**{name: 2}))
    assert problem == f"all workers have left, and the daemon still holds 2 {name.replace('_', ' ')}"


def test_bytes_connections_and_faults_are_leaks_too() -> None:
    assert "64 bytes of the pool hot" in samples.leaks(status(pools={"hot": {"used_bytes": 64}}))[0]
    assert samples.leaks(status(workers_connected=3)) == ["all workers have left, and 2 are connected"]
    assert samples.leaks(status(events={"canary_repaired": 1})) == ["the daemon counts 1 of canary_repaired"]


def grown(mib: Callable[[float], float], count: int = 80) -> list[Row]:
    return [{"calls": 50.0 * i, "rss_mib": mib(i / count)} for i in range(count)]


def test_memory_that_grows_is_seen_and_memory_that_settles_is_not() -> None:
    assert samples.growth(grown(lambda t: 200.0 + min(40.0, 160.0 * t))) == []
    (problem,) = samples.growth(grown(lambda t: 200.0 + 40.0 * t))
    assert problem.startswith("resident memory grew from 21")
    assert samples.rss_mb_per_1000_calls(grown(lambda t: 100.0 + 4.0 * t)) == pytest.approx(1.048576)


def test_tallies_together() -> None:
    total = together([Tally(calls=2, worst=0.5, left=1), Tally(calls=3, worst=0.25, worst_certified=0.1)])
    assert total == Tally(calls=5, worst=0.5, worst_certified=0.1, left=1)


def test_a_soak_that_met_nothing_is_no_evidence() -> None:
    full: Any = SimpleNamespace(killed=1, status={"events": {"lease_expired": 1}, "evicted": 1, "hits": 1})
    full.tally = Tally(head_steps=2, exact=1, forked=1, truncated=1, dropped=1, left=1, refused=1)
    assert bench.unseen(full) == []
    full.tally.exact = 2
    assert bench.unseen(full) == ["there was no certified head: the soak did not meet what it is about"]
