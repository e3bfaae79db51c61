"""Limits and cancellation, on one event loop, over an engine that works only when the test turns it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from daemon_process import KV_HEADS, SMALL, chunks, numbers, open_request
from tierd_kernels import host
from tierd_proto.v1 import tierd_pb2 as pb
from tierd_proto.v1 import tierd_pb2_grpc

from tierd import commands
from tierd.calls import Calls
from tierd.config import load
from tierd.engine import Engine, EngineConfig, Kernels
from tierd.engine.timed import TimedFuture
from tierd.errors import CapacityExceeded, InvalidArgument, Unavailable
from tierd.metrics import Metrics
from tierd.server import Daemon
from tierd.service import ByteQuota, Converter, describe
from tierd.workers import HANDSHAKES_MAX, Workers

Attempt = Any  # a call of grpc.aio


class HeldEngine(Engine):
    """Without a thread: commands wait until `run_once`. Without kernels: nothing here is ever attended to."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, kernels=cast(Kernels, host))

    def start(self) -> None:
        pass

    @property
    def num_asked(self) -> int:
        return len(self._asked)


class Bench:
    """A daemon in this loop, and one worker of it."""

    def __init__(self, engine: HeldEngine, stub: Any, worker: str, stream: Any) -> None:
        self.engine = engine
        self.stub = stub
        self.worker = worker
        self.stream = stream

    def call(self, name: str, request: Any, **named: Any) -> Attempt:
        return getattr(self.stub, name)(request, metadata=(("tierd-worker", self.worker),), **named)

    async def until(self, reached: Callable[[dict[str, Any]], bool]) -> None:
        """Lets the loop turn until the engine's status is as wanted."""
        while not reached(self.engine.status()):
            await asyncio.sleep(0)

    async def turn(self, wanted: asyncio.Future[Any]) -> Any:
        """Runs the engine until `wanted` is there."""
        while not wanted.done():
            self.engine.run_once()
            await asyncio.sleep(0)
        return await wanted


@asynccontextmanager
async def bench(folder: Path, **settings: Any) -> AsyncIterator[Bench]:
    sizes = {name.replace("-", "_"): value for name, value in SMALL.items()}
    loaded = load(sizes | {"listen": f"unix://{folder}/t.sock"} | settings)
    engine = HeldEngine(loaded.engine())
    daemon = Daemon(loaded, engine)
    target = daemon.bind()
    await daemon.start()
    async with grpc.aio.insecure_channel(target) as channel:
        stub: Any = tierd_pb2_grpc.TierStub(channel)
        worker = (await stub.Handshake(pb.HandshakeRequest(protocol=1))).worker
        stream = stub.Decode(metadata=(("tierd-worker", worker),))
        assert (await stream.read()).id == 0
        try:
            yield Bench(engine, stub, worker, stream)
        finally:
            await daemon.stop()
    engine.check_integrity()
    assert engine.status()["sessions"] == 0


def nothing(request_id: int) -> pb.DecodeRequest:
    """A request that reaches the engine, to fail there: it names no session."""
    q = pb.Tensor(dtype=pb.FLOAT32, shape=(4, 1, 64), inline=bytes(1024))
    return pb.DecodeRequest(id=request_id, attend=pb.AttendRequest(rows=[pb.Row(session_id="none", q=q)]))


async def test_a_full_queue_refuses_at_once(folder: Path) -> None:
    async with bench(folder, queue_max=2) as b:
        waiting = [b.call("OpenSession", open_request()) for _ in range(2)]
        await b.until(lambda status: status["queue"] == 2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await b.call("OpenSession", open_request())
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(caught.value.trailing_metadata() or ())["tierd-error"] == "capacity_exceeded"
        assert "2 commands are waiting, 0 free" in str(caught.value.details())
        await b.turn(asyncio.gather(*waiting))
        assert b.engine.status()["sessions"] == 2
        b.stream.cancel()
        await b.until(lambda status: status["queue"] == 1)  # the closing of the worker
        b.engine.run_once()


async def status_of(b: Bench) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((await b.turn(asyncio.ensure_future(b.stub.Status(pb.StatusRequest())))).json)
    return told


async def test_a_full_queue_still_takes_what_asks_for_the_status(folder: Path) -> None:
    async with bench(folder, queue_max=1) as b:
        waiting = b.call("OpenSession", open_request())
        await b.until(lambda status: status["queue"] == 1)
        asked = asyncio.ensure_future(b.stub.Status(pb.StatusRequest()))
        while not (asked.done() or b.engine.num_asked):
            await asyncio.sleep(0)
        await b.turn(asyncio.gather(asked, waiting))
        b.stream.cancel()
        await b.until(lambda status: status["queue"] == 1)  # the closing of the worker
        b.engine.run_once()


async def test_calls_over_the_limit_are_refused_by_name_and_the_status_is_told(folder: Path) -> None:
    async with bench(folder, queue_max=1) as b:
        appends = [b.stub.Append(metadata=(("tierd-worker", b.worker),)) for _ in range(2)]
        for append in appends:
            await append.wait_for_connection()
        while (await status_of(b))["calls_under_way"] < 2:
            pass
        with pytest.raises(grpc.aio.AioRpcError, match="2 calls are under way, 0 free; allowed: 2, twice queue_max"):
            await b.call("OpenSession", open_request())
        assert (await status_of(b))["calls_under_way"] == 2
        for append in appends:
            append.cancel()


async def test_a_worker_is_heard_with_each_part_of_an_append(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(folder) as b:
        heard: list[str] = []
        monkeypatch.setattr(b.engine, "hear", heard.append)
        append = b.stub.Append(metadata=(("tierd-worker", b.worker),))
        for number, part in enumerate(chunks("some", numbers(1, KV_HEADS, 60), numbers(2, KV_HEADS, 60), size=20)):
            assert heard == [b.worker] * number
            await append.write(part)
            while len(heard) == number:
                await asyncio.sleep(0)
        append.cancel()


async def test_a_worker_is_not_greeted_once_the_device_is_lost(folder: Path) -> None:
    async with bench(folder) as b:
        b.engine.lost.set_result("the device is lost; restart the daemon")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await b.stub.Handshake(pb.HandshakeRequest(protocol=1))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert caught.value.details() == "the device is lost; restart the daemon"


async def test_a_stream_holds_no_more_requests_than_allowed(folder: Path) -> None:
    async with bench(folder, stream_requests_max=2) as b:
        for request_id in (1, 2, 2, 3):
            await b.stream.write(nothing(request_id))
        twice, over = await b.stream.read(), await b.stream.read()
        assert (twice.id, twice.error.code) == (2, "invalid_argument")
        assert "of no request in flight" in twice.error.message
        assert (over.id, over.error.code) == (3, "capacity_exceeded")
        assert "2 requests are in flight on this stream, 0 free" in over.error.message
        b.engine.run_once()
        assert {(await b.stream.read()).id for _ in range(2)} == {1, 2}
        await b.stream.write(nothing(3))
        await b.until(lambda status: status["queue"] == 1)
        b.engine.run_once()
        assert (await b.stream.read()).error.code == "session_not_found"


async def test_requests_that_hold_too_many_bytes_are_refused(folder: Path) -> None:
    async with bench(folder, append_bytes_max=1 << 20) as b:
        big = pb.AppendHeader(session_id="s", num_tokens=1 << 20)
        part = pb.Tensor(dtype=pb.FLOAT32, shape=(1, 1, 1), inline=bytes(4))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await b.call("Append", iter([pb.AppendRequest(header=big, k=part, v=part)]))
        assert "a request of 8388608 bytes; of 1048576" in str(caught.value.details())


async def test_a_half_closed_stream_is_answered_to_the_end(folder: Path) -> None:
    async with bench(folder) as b:
        for request_id in (1, 2):
            await b.stream.write(nothing(request_id))
        await b.stream.done_writing()
        await b.until(lambda status: status["queue"] == 2)
        b.engine.run_once()
        assert {(await b.stream.read()).id for _ in range(2)} == {1, 2}
        assert await b.turn(asyncio.ensure_future(b.stream.read())) is grpc.aio.EOF
        assert await b.stream.code() == grpc.StatusCode.OK


async def test_the_end_of_a_stream_closes_sessions_and_forgets_requests(folder: Path) -> None:
    async with bench(folder) as b:
        await b.turn(asyncio.ensure_future(b.call("OpenSession", open_request())))
        await b.stream.write(nothing(1))
        await b.until(lambda status: status["queue"] == 1)
        b.stream.cancel()
        await b.until(lambda status: status["queue"] == 2)
        assert b.engine.run_once() == 2
        assert b.engine.status()["sessions"] == 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await b.call("OpenSession", open_request())
        assert "does not know the worker" in str(caught.value.details())


async def test_a_full_queue_still_takes_the_closing_of_a_worker(folder: Path) -> None:
    async with bench(folder, queue_max=1) as b:
        await b.turn(asyncio.ensure_future(b.call("OpenSession", open_request())))
        waiting = b.call("OpenSession", open_request())
        await b.until(lambda status: status["queue"] == 1)
        b.stream.cancel()
        async with asyncio.timeout(10.0):
            await b.until(lambda status: status["queue"] == 2)
        b.engine.run_once()
        await waiting
        assert b.engine.status()["sessions"] == 0


async def test_a_call_that_expires_in_the_queue_is_not_carried_out(folder: Path) -> None:
    async with bench(folder) as b:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await b.call("OpenSession", open_request(), timeout=0.05)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        while b.engine.counters.commands == 0:
            b.engine.run_once()
        assert b.engine.status()["sessions"] == 0


async def test_workers_over_the_limit_are_refused_until_one_has_gone(folder: Path) -> None:
    async with bench(folder, workers_max=1) as b:

        async def another() -> Any:
            name = (await b.stub.Handshake(pb.HandshakeRequest(protocol=1))).worker
            stream = b.stub.Decode(metadata=(("tierd-worker", name),))
            await stream.read()
            return stream

        with pytest.raises(grpc.aio.AioRpcError, match="1 workers are connected, 0 free"):
            await another()
        b.stream.cancel()
        await b.until(lambda status: status["queue"] == 1)
        with pytest.raises(grpc.aio.AioRpcError, match="1 workers are connected, 0 free"):
            await another()
        b.engine.run_once()
        await another()


class OneCommandEngine:
    """Keeps what is submitted; the test answers."""

    def __init__(self) -> None:
        self.submitted: list[tuple[commands.Command, TimedFuture]] = []

    def submit(self, command: commands.Command, wake: bool = True) -> TimedFuture:
        self.submitted.append((command, TimedFuture()))
        return self.submitted[-1][1]

    def help(self) -> None:
        pass


async def test_a_session_that_opens_after_its_call_was_cancelled_is_closed() -> None:
    engine: Any = OneCommandEngine()
    converter = Converter(1 << 20, 600.0, dict)
    call = asyncio.ensure_future(Calls(engine, converter, Metrics(dict)).answer(open_request(), "w", None))
    while not engine.submitted:
        await asyncio.sleep(0)
    future = engine.submitted[0][1]
    assert future.set_running_or_notify_cancel()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert len(engine.submitted) == 1
    future.set_result("s-1")
    assert engine.submitted[1][0] == commands.CloseSession("s-1", worker="w")


def test_a_quota_gives_and_takes() -> None:
    quota = ByteQuota(10)
    with quota.held(6):
        with pytest.raises(CapacityExceeded, match="6 are used, 4 free"):
            quota.take(5)
        assert quota.used_bytes == 6
    assert quota.used_bytes == 0


def test_workers_are_known_from_greeting_to_leaving() -> None:
    workers = Workers(2)
    first = workers.greet()
    with pytest.raises(InvalidArgument, match="open the Decode stream first"):
        workers.check(first)
    workers.begin(first)
    workers.check(first)
    workers.leave(first)
    with pytest.raises(Unavailable):
        workers.check(first)
    oldest = workers.greet()
    for _ in range(HANDSHAKES_MAX):
        workers.greet()
    with pytest.raises(Unavailable):
        workers.begin(oldest)


def test_a_fault_of_ours_is_told_as_one() -> None:
    message = describe(ZeroDivisionError("oops"))
    assert (message.code, message.message) == ("unavailable", "a fault in the daemon, ZeroDivisionError: oops")
