"""The engine without a socket: the same messages, the same refusals."""

import asyncio
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tierd_client
import tierd_client.aio
from daemon_process import HEAD_DIM, KV_HEADS, Q_HEADS, SMALL, chunks, numbers, open_request, row
from oracle import check_reply
from tierd_client.types import Tolerance
from tierd_proto import coding
from tierd_proto.v1 import tierd_pb2 as pb

from tierd.errors import InvalidArgument, SessionNotFound, TierdError, Unavailable
from tierd.inproc import InProcess

WAIT_S = 120.0


@pytest.fixture
def tier() -> Iterator[InProcess]:
    tier = InProcess({name.replace("-", "_"): value for name, value in SMALL.items()} | {"append_bytes_max": 1 << 20})
    tier.start()
    yield tier
    tier.close()


def failure(future: Any) -> TierdError:
    error = future.exception(WAIT_S)
    assert isinstance(error, TierdError)
    return error


def test_a_session_from_opening_to_the_end_of_its_worker(tier: InProcess) -> None:
    hello = tier.handshake(pb.HandshakeRequest(protocol=1))
    assert hello.limits.message_bytes_max == 1 << 20
    worker = hello.worker
    session = tier.submit(open_request(), worker, None).result(WAIT_S).session_id
    k, v, q = numbers(1, KV_HEADS, 100), numbers(2, KV_HEADS, 100), numbers(3, Q_HEADS, 1)
    assert tier.append(chunks(session, k, v, size=30), worker, 60.0).result(WAIT_S) == pb.AppendReply()
    reply = tier.submit(pb.AttendRequest(rows=[row(session, q)]), worker, 60.0).result(WAIT_S)
    output = coding.decode_tensor(reply.rows[0].output, "output", ndim=3)
    certificate = coding.decode_certificate(reply.rows[0].certificate, q.shape[:2])
    check_reply(k, v, q, output, certificate, 0.1, 0.0, softmax_scale=HEAD_DIM**-0.5)
    assert reply.compute_s > 0.0

    other = tier.handshake(pb.HandshakeRequest(protocol=1)).worker
    lengths = pb.LengthsRequest(session_id=session)
    assert isinstance(failure(tier.submit(lengths, other, None)), SessionNotFound)
    assert list(tier.submit(lengths, worker, None).result(WAIT_S).lengths) == [100, 0]
    tier.close_worker(worker)
    assert isinstance(failure(tier.submit(lengths, worker, None)), Unavailable)
    assert '"sessions": 0' in tier.submit(pb.StatusRequest(), other, None).result(WAIT_S).json


def test_a_worker_is_heard_with_each_part_of_an_append(tier: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, heard = tier.handshake(pb.HandshakeRequest(protocol=1)).worker, list[str]()
    monkeypatch.setattr(tier._engine, "hear", heard.append)
    session = tier.submit(open_request(), worker, None).result(WAIT_S).session_id
    k, v = numbers(1, KV_HEADS, 60), numbers(2, KV_HEADS, 60)
    assert tier.append(chunks(session, k, v, size=20), worker, 60.0).result(WAIT_S) == pb.AppendReply()
    assert heard == [worker] * 3


def test_an_attend_of_arrays_takes_copies_of_them() -> None:
    tier = InProcess({name.replace("-", "_"): value for name, value in SMALL.items()})
    worker = tier.handshake(pb.HandshakeRequest(protocol=1)).worker
    opening = tier.submit(open_request(), worker, None)
    tier._engine.run_once()
    q, k, v = numbers(1, Q_HEADS, 1), numbers(2, KV_HEADS, 1), numbers(3, KV_HEADS, 1)
    own = [x.copy() for x in (q, k, v)]
    row = SimpleNamespace(session_id=opening.result().session_id, layer=0, q=q, k=k, v=v, tolerance=Tolerance(0.0))
    reply = tier.submit([row], worker, None)
    for x in (q, k, v):
        x.fill(np.nan)  # as who gave up waiting may
    tier._engine.run_once()
    answer = reply.result().rows[0]
    check_reply(own[1], own[2], own[0], answer.output, answer.certificate, 0.0, 0.0, softmax_scale=HEAD_DIM**-0.5)
    assert reply.result().compute_s > 0.0
    assert failure(tier.submit([], worker, None)).code == "invalid_argument"
    tier.close()


def test_what_is_wrong_fails_the_future(tier: InProcess) -> None:
    worker = tier.handshake(pb.HandshakeRequest(protocol=1)).worker
    error = failure(tier.submit(open_request(rtol=-1.0), worker, None))
    assert (error.code, "rtol is -1.0" in str(error)) == ("invalid_argument", True)
    assert failure(tier.submit(open_request(), worker, -1.0)).code == "invalid_argument"
    session = tier.submit(open_request(), worker, None).result(WAIT_S).session_id
    part = list(chunks(session, numbers(1, KV_HEADS, 40), numbers(1, KV_HEADS, 40), size=20))[:1]
    for _ in range(60):  # of 40 KiB each: more than the quota, were it not given back
        assert "announced 40" in str(failure(tier.append(part, worker, None)))
    with pytest.raises(InvalidArgument, match="protocol 2"):
        tier.handshake(pb.HandshakeRequest(protocol=2))


def test_a_worker_is_not_greeted_once_the_device_is_lost(tier: InProcess) -> None:
    tier._engine.lost.set_result("the device is lost")
    with pytest.raises(Unavailable, match="the device is lost"):
        tier.handshake(pb.HandshakeRequest(protocol=1))


def test_a_stopped_engine_says_so() -> None:
    tier = InProcess({name.replace("-", "_"): value for name, value in SMALL.items()})
    tier.start()
    worker = tier.handshake(pb.HandshakeRequest(protocol=1)).worker
    tier.close()
    assert "is stopping" in str(failure(tier.submit(open_request(), worker, None)))


def test_who_waits_takes_the_turn_and_an_interrupt_waits_for_its_end(tier: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, helped, help_engine = tier.handshake(pb.HandshakeRequest(protocol=1)).worker, list[threading.Thread](), tier._engine.help

    def told() -> None:
        signal.raise_signal(signal.SIGINT)
        help_engine()
        helped.append(threading.current_thread())

    monkeypatch.setattr(tier._engine, "help", told)
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            tier.call(pb.StatusRequest(), worker, WAIT_S)
    finally:
        signal.signal(signal.SIGINT, found)
    assert helped == [threading.current_thread()]
    assert tier.submit(pb.StatusRequest(), worker, None).result(WAIT_S).json and len(helped) == 1


def test_of_the_clients_the_blocking_one_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    def told(name: str) -> Any:
        real = getattr(InProcess, name)
        return lambda *arguments: asked.append(name) or real(*arguments)

    for name in ("call", "submit"):
        monkeypatch.setattr(InProcess, name, told(name))
    settings = {name.replace("-", "_"): value for name, value in SMALL.items()}

    async def awaited() -> None:
        async with await tierd_client.aio.connect("inproc://", settings=settings) as tier:
            await tier.status()

    with tierd_client.connect("inproc://", settings=settings) as tier:
        tier.status()
    asyncio.run(awaited())
    assert asked == ["call", "submit"]


def test_a_call_that_is_given_up_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = InProcess({name.replace("-", "_"): value for name, value in SMALL.items()})
    worker, engine = tier.handshake(pb.HandshakeRequest(protocol=1)).worker, tier._engine

    def interrupted() -> None:
        assert engine.run_once() == 1 and len(engine.sessions.by_id) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "help", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tier.call(open_request(), worker, WAIT_S)
    assert engine.run_once() == 1 and not engine.sessions.by_id, "it had been done"
    monkeypatch.setattr(engine, "help", lambda: None)
    with pytest.raises(TimeoutError):
        tier.call(open_request(), worker, 0.01)
    assert engine.run_once() == 1 and not engine.sessions.by_id, "it had not been begun"
    tier.close()
