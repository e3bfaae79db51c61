"""Transports of both flavours against a daemon that answers late, out of order, wrongly, or never."""

import asyncio
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from fake_daemon import FakeDaemon, answer
from tierd_client import (
    CapacityExceeded,
    CertificateUnavailable,
    DaemonUnavailable,
    DeadlineExceeded,
    Geometry,
    InvalidArgument,
    SessionNotFound,
    TierdError,
    Tolerance,
    aio,
    connect,
)
from tierd_proto.v1 import tierd_pb2 as pb

GEOMETRY = Geometry(num_layers=1, num_q_heads=2, num_kv_heads=1, head_dim=64, dtype="float32")
ARRIVAL_S = 30.0  # how long the fake waits for what must come
Connect = Callable[..., Any]


def q(value: float) -> Any:
    return np.full((2, 1, 64), value, np.float32)


def opened(tier: Any) -> Any:
    return tier.open_session(GEOMETRY, tolerance=Tolerance(0.1), max_tokens=100)


def failure(request: pb.DecodeRequest, code: str, message: str) -> pb.DecodeReply:
    return pb.DecodeReply(id=request.id, error=pb.Error(code=code, message=message))


def test_a_late_reply_is_dropped_and_the_next_call_gets_its_own(connecting: Connect, fake: FakeDaemon) -> None:
    with connecting(fake.target) as tier:
        session = opened(tier)
        with pytest.raises(DeadlineExceeded, match=r"within 0.05 seconds"):
            session.attend(layer=0, q=q(1), timeout=0.05)
        late = fake.requests.get(timeout=ARRIVAL_S)
        assert late.timeout_s == 0.05
        with ThreadPoolExecutor(1) as pool:
            fake.say(answer(late))
            pool.submit(lambda: fake.say(answer(fake.requests.get(timeout=ARRIVAL_S))))
            assert session.attend(layer=0, q=q(2)).output[0, 0, 0] == 2


def test_timed_out_calls_do_not_count_as_in_flight(connecting: Connect, fake: FakeDaemon) -> None:
    with connecting(fake.target) as tier:
        session = opened(tier)
        for _ in range(5):  # one more than may be in flight
            with pytest.raises(DeadlineExceeded):
                session.attend(layer=0, q=q(1), timeout=0.01)


def test_threads_get_their_own_replies_in_any_order(fake: FakeDaemon) -> None:
    with connect(fake.target) as tier, ThreadPoolExecutor(4) as pool:
        session = opened(tier)
        results = [pool.submit(session.attend, layer=0, q=q(number)) for number in range(4)]
        requests = [fake.requests.get(timeout=ARRIVAL_S) for _ in range(4)]
        with pytest.raises(CapacityExceeded, match=r"4 attend and step calls are in flight.*allowed: 4"):
            session.attend(layer=0, q=q(9))
        for request in reversed(requests):
            fake.say(answer(request))
        assert [result.result().output[0, 0, 0] for result in results] == [0, 1, 2, 3]


async def test_tasks_get_their_own_replies_and_a_cancelled_one_leaves_the_stream_alone(fake: FakeDaemon) -> None:
    async with aio.connect(fake.target) as tier, tier.open_session(GEOMETRY, tolerance=Tolerance(0.1), max_tokens=9) as session:
        tasks = [asyncio.create_task(session.attend(layer=0, q=q(number))) for number in range(3)]
        requests = [await asyncio.to_thread(fake.requests.get, timeout=ARRIVAL_S) for _ in range(3)]
        tasks[1].cancel()
        for request in reversed(requests):
            fake.say(answer(request))
        zero, one, two = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(one, asyncio.CancelledError)
        assert [result.output[0, 0, 0] for result in (zero, two) if not isinstance(result, BaseException)] == [0, 2]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("invalid_argument", InvalidArgument),
        ("session_not_found", SessionNotFound),
        ("capacity_exceeded", CapacityExceeded),
        ("certificate_unavailable", CertificateUnavailable),
        ("unavailable", DaemonUnavailable),
        ("deadline_exceeded", DeadlineExceeded),
        ("from_the_future", DaemonUnavailable),
    ],
)
def test_codes_become_errors_and_the_connection_stays(connecting: Connect, fake: FakeDaemon, code: str, kind: type[TierdError]) -> None:
    with connecting(fake.target) as tier, ThreadPoolExecutor(1) as pool:
        session = opened(tier)
        pool.submit(lambda: fake.say(failure(fake.requests.get(timeout=ARRIVAL_S), code, "because")))
        with pytest.raises(kind, match="because") as on_stream:
            session.attend(layer=0, q=q(1))
        fake.unary["Lengths"] = (grpc.StatusCode.DATA_LOSS, "because", code)
        with pytest.raises(kind, match="because") as unary:
            session.lengths()
        assert type(on_stream.value) is type(unary.value) is kind
        assert (fake.target in str(unary.value)) == (kind is DaemonUnavailable) == (fake.target in str(on_stream.value))
        fake.unary["Lengths"] = pb.LengthsReply(lengths=[5])
        assert session.lengths() == [5]


def test_statuses_without_a_code(connecting: Connect, fake: FakeDaemon) -> None:
    with connecting(fake.target) as tier:
        session = opened(tier)
        fake.unary["Lengths"] = (grpc.StatusCode.INTERNAL, "broken", "")
        with pytest.raises(DaemonUnavailable, match=f"{fake.target} answered INTERNAL: broken"):
            session.lengths()
        fake.unary["Lengths"] = (grpc.StatusCode.DEADLINE_EXCEEDED, "too late", "")
        with pytest.raises(DeadlineExceeded, match="within 7 seconds"):
            session.lengths(timeout=7)


def test_the_end_of_the_stream_fails_what_waits_and_all_that_comes(connecting: Connect, fake: FakeDaemon) -> None:
    with connecting(fake.target) as tier, ThreadPoolExecutor(1) as pool:
        session = opened(tier)
        pool.submit(fake.requests.get, timeout=ARRIVAL_S).add_done_callback(lambda _: fake.end())
        calls: list[Callable[[], Any]] = [lambda: session.attend(layer=0, q=q(1)), lambda: session.lengths(), lambda: opened(tier)]
        for call in calls:
            with pytest.raises(DaemonUnavailable, match=f"connection to {fake.target} has ended, and its sessions with it.*Connect again"):
                call()
        session.close()


def test_a_close_that_fails_can_be_repeated(connecting: Connect, fake: FakeDaemon) -> None:
    with connecting(fake.target) as tier:
        session = opened(tier)
        closed, fake.unary["CloseSession"] = fake.unary["CloseSession"], (grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "capacity_exceeded")
        with pytest.raises(CapacityExceeded, match="full"):
            session.close()
        assert not session.closed
        fake.unary["CloseSession"] = closed
        session.close()
        assert session.closed


def test_close_waits_until_the_daemon_has_let_go(connecting: Connect, fake: FakeDaemon) -> None:
    tier = connecting(fake.target)
    fake.may_end.clear()
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(tier.close)
        fake.half_closed.get(timeout=ARRIVAL_S)
        assert not closing.done()
        fake.may_end.set()
        closing.result(timeout=ARRIVAL_S)


def test_a_refused_stream_fails_the_connect_with_the_daemons_own_word(connecting: Connect, fake: FakeDaemon) -> None:
    fake.refusal = (grpc.StatusCode.RESOURCE_EXHAUSTED, "64 workers are connected", "capacity_exceeded")
    with pytest.raises(CapacityExceeded, match="64 workers"):
        connecting(fake.target)


def test_another_protocol_is_refused(connecting: Connect, fake: FakeDaemon) -> None:
    fake.welcome = pb.HandshakeReply(protocol=2, worker="w", limits=fake.welcome.limits)
    with pytest.raises(DaemonUnavailable, match="speaks protocol 2; this client speaks 1"):
        connecting(fake.target)


def test_nothing_listens(connecting: Connect, fake: FakeDaemon) -> None:
    with pytest.raises(DaemonUnavailable, match=f"{fake.target}-not"):
        connecting(f"{fake.target}-not")


def test_a_result_says_what_of_its_originals_came_late(fake: FakeDaemon) -> None:
    with connect(fake.target) as tier, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(opened(tier).attend, layer=0, q=q(1))
        reply = answer(fake.requests.get(timeout=ARRIVAL_S))
        reply.attend.rows[0].late_records, reply.attend.rows[0].prefetch_wait_s = 3, 2e-5
        fake.say(reply)
        result = waiting.result(ARRIVAL_S)
        assert (result.late_records, result.prefetch_wait_s) == (3, 2e-5)


@pytest.mark.parametrize("break_it", ["no rows", "shape", "certificate", "dtype"])
def test_an_answer_that_cannot_be_read_is_no_answer(connecting: Connect, fake: FakeDaemon, break_it: str) -> None:
    def broken(request: pb.DecodeRequest) -> pb.DecodeReply:
        reply = answer(request)
        row = reply.attend.rows[0]
        if break_it == "no rows":
            del reply.attend.rows[:]
        elif break_it == "shape":
            row.output.shape[:] = [1, 2, 64]
        elif break_it == "certificate":
            row.certificate.bound = b""
        else:
            row.output.CopyFrom(pb.Tensor(dtype=pb.FLOAT16, shape=[2, 1, 64], inline=bytes(256)))
        return reply

    with connecting(fake.target) as tier, ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: fake.say(broken(fake.requests.get(timeout=ARRIVAL_S))))
        with pytest.raises(DaemonUnavailable, match="cannot be read"):
            opened(tier).attend(layer=0, q=q(1))


def test_an_append_travels_in_chunks_below_the_limit(connecting: Connect, fake: FakeDaemon) -> None:
    k = np.arange(500 * 64, dtype=np.float32).reshape(1, 500, 64)
    with connecting(fake.target) as tier:
        opened(tier).append(layer=0, k=k, v=-k)
    assert len(fake.chunks) == -(-2 * k.nbytes // ((64 << 10) - 1024))
    assert max(chunk.ByteSize() for chunk in fake.chunks) <= 64 << 10
    assert [chunk.HasField("header") for chunk in fake.chunks] == [True] + [False] * (len(fake.chunks) - 1)
    assert fake.chunks[0].header == pb.AppendHeader(session_id="s1", layer=0, num_tokens=500)
    assert b"".join(chunk.k.inline for chunk in fake.chunks) == k.tobytes()
    assert b"".join(chunk.v.inline for chunk in fake.chunks) == (-k).tobytes()


def test_a_forgotten_session_is_closed_while_the_connection_lives(fake: FakeDaemon) -> None:
    with connect(fake.target) as tier:
        session = opened(tier)
        fake.calls.get(timeout=ARRIVAL_S)
        del session
        gc.collect()
        assert fake.calls.get(timeout=ARRIVAL_S) == pb.CloseSessionRequest(session_id="s1")


async def test_a_forgotten_awaitable_session_is_closed_while_the_connection_lives(fake: FakeDaemon) -> None:
    async with aio.connect(fake.target) as tier:
        session = await tier.open_session(GEOMETRY, tolerance=Tolerance(0.1), max_tokens=9)
        fake.calls.get(timeout=ARRIVAL_S)
        del session
        gc.collect()
        assert await asyncio.to_thread(fake.calls.get, timeout=ARRIVAL_S) == pb.CloseSessionRequest(session_id="s1")


def test_a_forgotten_connection_ends(fake: FakeDaemon) -> None:
    tier = connect(fake.target)
    session = opened(tier)
    reader = tier._transport._reader  # type: ignore[attr-defined]
    del tier, session
    gc.collect()
    reader.join(ARRIVAL_S)
    assert not reader.is_alive()


def test_a_process_that_leaves_without_closing_ends_quietly(fake: FakeDaemon) -> None:
    script = f"""
from tierd_client import Geometry, Tolerance, connect
session = connect({fake.target!r}).open_session(Geometry(1, 2, 1, 64, "float32"), tolerance=Tolerance(0.1), max_tokens=9)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_fork_of_the_process_is_told_to_connect_again(fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(fake.target) as tier:
        session, parent = opened(tier), os.getpid()
        with monkeypatch.context() as child:
            child.setattr(os, "getpid", lambda: parent + 1)
            with pytest.raises(DaemonUnavailable, match=f"belongs to process {parent}; connect again"):
                session.lengths()
            tier.close()  # the parent's connection stays
        fake.unary["Lengths"] = pb.LengthsReply(lengths=[5])
        assert session.lengths() == [5]
