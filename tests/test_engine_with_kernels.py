"""The engine over each backend's kernels, held against the oracle: growth token by token, fork, truncate, atomicity, corruption."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from oracle import check_reply
from tierd_kernels.policy import Budget

from tierd.commands import Append, Attend, CloseWorker, Fork, Geometry, Lengths, OpenSession, Row, RowResult, Tolerance, Truncate
from tierd.engine import Engine, EngineConfig
from tierd.errors import CapacityExceeded, CertificateUnavailable, InvalidArgument
from tierd.policy.weighing import weigh
from tierd.residency import CopyState
from tierd.warm import warm_policy

CONFIG = EngineConfig(hot_bytes=4 << 20, originals_bytes=8 << 20, scratch_bytes=1 << 20, canary_share=0.05)
Start = Callable[..., Engine]
GEOMETRY = Geometry(num_layers=2, num_q_heads=4, num_kv_heads=2, head_dim=64, dtype="float32")
Floats = NDArray[np.float32]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def start(request: pytest.FixtureRequest) -> Start:
    """An engine over the backend, with changes to CONFIG."""
    if request.param == "cuda":
        request.getfixturevalue("cuda")
    return lambda **changes: Engine(replace(CONFIG, backend=request.param, **changes))


def run(engine: Engine, command: Any) -> Any:
    future = engine.submit(command)
    engine.run_once()
    engine.check_integrity()
    return future.result(timeout=0)


def numbers(rng: np.random.Generator, heads: int, n: int) -> Floats:
    return rng.standard_normal((heads, n, 64)).astype(np.float32)


def opened(engine: Engine, rtol: float = 0.1) -> str:
    return str(run(engine, OpenSession(GEOMETRY, Tolerance(rtol), Budget(), 2000, worker="w")))


def check(k: Floats, v: Floats, q: Floats, reply: RowResult, rtol: float) -> None:
    check_reply(k, v, q, reply.output, reply.certificate, rtol, 0.0, softmax_scale=64**-0.5)


def test_a_session_that_grows_forks_and_is_cut_keeps_the_promise(start: Start) -> None:
    rng, engine = np.random.default_rng(0), start()
    session = opened(engine)
    k, v = numbers(rng, 2, 1100), numbers(rng, 2, 1100)
    run(engine, Append(session, 0, k, v, worker="w"))
    for step in range(24):
        q, k1, v1 = numbers(rng, 4, 1), numbers(rng, 2, 1), numbers(rng, 2, 1)
        k, v = np.concatenate([k, k1], axis=1), np.concatenate([v, v1], axis=1)
        rtol = (0.3, 0.1, 0.03, 0.0)[step % 4]
        (reply,) = run(engine, Attend([Row(session, 0, q, k1, v1, Tolerance(rtol))], worker="w"))
        check(k, v, q, reply, rtol)
    child = run(engine, Fork(session, worker="w"))
    run(engine, Truncate(session, 1003, worker="w"))
    assert run(engine, Lengths(session, worker="w")) == [1003, 0]
    q, k1, v1 = numbers(rng, 4, 3), numbers(rng, 2, 3), numbers(rng, 2, 3)
    cut_k, cut_v = (np.concatenate([x[:, :1003], y], axis=1) for x, y in ((k, k1), (v, v1)))
    parent, forked = run(engine, Attend([Row(session, 0, q, k1, v1), Row(child, 0, q)], worker="w"))
    check(cut_k, cut_v, q, parent, 0.1)
    check(k, v, q, forked, 0.1)
    run(engine, CloseWorker(worker="w"))
    arenas = engine.residency.arenas
    assert (arenas.hot.used_bytes, arenas.originals.used_bytes) == (0, 0)


def test_a_step_that_fails_stores_nothing(start: Start) -> None:
    rng, engine = np.random.default_rng(1), start()
    session = opened(engine)
    k, v = numbers(rng, 2, 31), numbers(rng, 2, 31)
    run(engine, Append(session, 0, k, v, worker="w"))
    huge = np.full((2, 1, 64), 3e19, np.float32)
    with pytest.raises(InvalidArgument, match=r"3e\+38"):
        run(engine, Attend([Row(session, 0, np.full((4, 1, 64), 3e19, np.float32), huge, huge)], worker="w"))
    bad = numbers(rng, 2, 1)
    bad[0, 0, 0] = np.nan
    with pytest.raises(InvalidArgument, match="finite"):
        run(engine, Append(session, 0, bad, bad, worker="w"))
    assert run(engine, Lengths(session, worker="w")) == [31, 0]
    q = numbers(rng, 4, 1)
    check(k, v, q, run(engine, Attend([Row(session, 0, q)], worker="w"))[0], 0.1)


def test_a_full_pool_refuses_at_once_and_keeps_what_is_stored(start: Start) -> None:
    rng, engine = np.random.default_rng(2), start(originals_bytes=1 << 20)
    session = opened(engine)
    k, v = numbers(rng, 2, 500), numbers(rng, 2, 500)
    run(engine, Append(session, 0, k, v, worker="w"))
    with pytest.raises(CapacityExceeded, match=r"used.*free"):
        run(engine, Append(session, 1, numbers(rng, 2, 1200), numbers(rng, 2, 1200), worker="w"))
    assert run(engine, Lengths(session, worker="w")) == [500, 0]
    q = numbers(rng, 4, 1)
    check(k, v, q, run(engine, Attend([Row(session, 0, q)], worker="w"))[0], 0.1)


def test_a_corrupt_original_is_never_answered_from(start: Start) -> None:
    rng, engine = np.random.default_rng(3), start()
    session = opened(engine)
    k, v = numbers(rng, 2, 160), numbers(rng, 2, 160)
    run(engine, Append(session, 0, k, v, worker="w"))
    engine.residency.arenas.memory.originals[64] ^= 0xFF
    with pytest.raises(CertificateUnavailable, match="checksum"):
        run(engine, Attend([Row(session, 0, numbers(rng, 4, 1), tolerance=Tolerance(0.0))], worker="w"))


def test_an_exact_head_trusts_no_original_because_scratch_has_a_copy(start: Start) -> None:
    rng, engine = np.random.default_rng(5), start(canary_share=0.0)
    session = opened(engine)
    k, v, q = numbers(rng, 2, 160), numbers(rng, 2, 160), numbers(rng, 4, 1)
    run(engine, Append(session, 0, k, v, worker="w"))
    run(engine, Attend([Row(session, 0, q, tolerance=Tolerance(0.01))], worker="w"))
    (copy, *_) = engine.residency.copies()
    assert copy.state is CopyState.RESIDENT
    engine.residency.arenas.memory.originals[copy.source + 3] ^= 0x40
    with pytest.raises(CertificateUnavailable, match="checksum"):
        run(engine, Attend([Row(session, 0, q, tolerance=Tolerance(0.0))], worker="w"))


def test_corrupt_codes_are_found_and_rebuilt(start: Start) -> None:
    rng, engine = np.random.default_rng(4), start(canary_share=1.0)
    session = opened(engine)
    k, v = numbers(rng, 2, 160), numbers(rng, 2, 160)
    run(engine, Append(session, 0, k, v, worker="w"))
    engine.residency.arenas.memory.hot[384:896] ^= 0x3C  # of the first record, codes in either backend's layout
    q = numbers(rng, 4, 1)
    (reply,) = run(engine, Attend([Row(session, 0, q)], worker="w"))
    check(k, v, q, reply, 0.1)
    assert reply.certificate["exact"].all()
    (again,) = run(engine, Attend([Row(session, 0, q)], worker="w"))
    check(k, v, q, again, 0.1)
    assert not again.certificate["exact"].all()


def test_no_call_waits_for_the_policy_to_be_compiled(start: Start) -> None:
    """What is compiled at the daemon's start is what each backend's calls need, with copies and without."""
    warm_policy()
    ready = list(weigh.signatures)  # type: ignore[attr-defined]
    rng, engine = np.random.default_rng(2), start()
    session = opened(engine)
    run(engine, Append(session, 0, numbers(rng, 2, 70), numbers(rng, 2, 70), worker="w"))
    for n in (1, 1, 1, 3):
        run(engine, Attend([Row(session, 0, numbers(rng, 4, n), tolerance=Tolerance(1e-3))], worker="w"))
    assert engine.counters.prefetched and weigh.signatures == ready  # type: ignore[attr-defined]
