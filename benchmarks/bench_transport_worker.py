"""One worker of the load test: a connection with one session, its replies checked, then calls in a closed or an open loop."""

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import numpy as np
from bench_transport_daemon import NullKernels
from numpy.typing import NDArray
from tierd_client import Geometry, Tolerance, connect
from tierd_client.session import Session
from tierd_client.transports.grpc_shared import CHANNEL_OPTIONS
from tierd_proto.v1.tierd_pb2_grpc import TierStub

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracle

HEAD_DIM, RTOL, CALL_S, MEET_S = 128, 0.1, 60.0, 120.0
WARM_UP_S = 0.2
CHECKED_REPLIES = 2
LATE_WINDOWS = 2  # an open loop that is behind gives up after so many times its length
PARTS = ("late", "queue", "compute", "wire", "total")
Array = NDArray[Any]
Seconds = tuple[float, float]  # queue, compute, as the engine measured them
Attend = Callable[[], Seconds]


@dataclass(frozen=True)
class Load:
    """What one worker does. `engine`: "null" (8 query heads, one token stored) or "cpu" (32 query heads, `tokens` stored)."""

    engine: str
    transport: str  # "in-process", "unary" or "stream"
    target: str
    num_q_heads: int
    tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Samples:
    """Of one worker's loop. `seconds` [calls, PARTS]; `elapsed_s` from the first start to the last end."""

    seconds: Array
    elapsed_s: float
    cpu_s: float
    unsent: int


@contextmanager
def session_under(load: Load) -> Iterator[tuple[Attend, Callable[[], None]]]:
    """A session filled as `load` says; yields a call of it, encoding and decoding included, and the check of such calls."""
    null = load.engine == "null"
    inproc = load.transport == "in-process"
    # The in-process connection has no argument for other kernels; only a load test wants them.
    kernels = mock.patch("tierd_kernels.registry.load", return_value=NullKernels()) if null and inproc else nullcontext()
    rng = np.random.default_rng(load.seed)
    k, v = rng.standard_normal((2, 8, load.tokens, HEAD_DIM)).astype(np.float16)
    v = np.zeros_like(v) if null else v
    q = rng.standard_normal((load.num_q_heads, HEAD_DIM)).astype(np.float16)
    geometry = Geometry(num_layers=1, num_q_heads=load.num_q_heads, num_kv_heads=8, head_dim=HEAD_DIM, dtype="float16")
    with kernels:
        tier = connect(load.target, timeout=CALL_S)
    with tier, tier.open_session(geometry, tolerance=Tolerance(RTOL), max_tokens=load.tokens) as session, sender(load, tier) as send:
        session.append(layer=0, k=k, v=v)

        def attend() -> Seconds:
            reply, _ = exchange(session, q, send)
            return reply.queue_s, reply.compute_s

        yield attend, lambda: check(session, k, v, q, send)


@contextmanager
def sender(load: Load, tier: Any) -> Iterator[Callable[[Any], Any]]:
    """Attend's request to its reply, by the transport of `load`; the client itself only has the stream and the in-process one."""
    if load.transport != "unary":
        yield lambda request: tier._transport.call(request, CALL_S)
        return
    metadata = (("tierd-worker", tier._transport.welcome.worker),)
    with grpc.insecure_channel(load.target, CHANNEL_OPTIONS) as channel:
        method: Any = TierStub(channel).Attend
        yield lambda request: method(request.message(), timeout=CALL_S, metadata=metadata)


def exchange(session: Session, q: Array, send: Callable[[Any], Any]) -> tuple[Any, Any]:
    """One call as a user makes it; the reply, which carries the engine's times, and the Result."""
    call = session._step_call(0, q, None, None, None)
    reply = send(call.request)
    return reply, call.read(reply)


def check(session: Session, k: Array, v: Array, q: Array, send: Callable[[Any], Any]) -> None:
    """Hold replies to their certificates. Raises AssertionError."""
    for _ in range(CHECKED_REPLIES):
        _, result = exchange(session, q[:, None], send)
        oracle.check_reply(k, v, q[:, None], result.output, vars(result.certificate), RTOL, 0.0, softmax_scale=HEAD_DIM**-0.5)


def drive(
    attend: Attend, seconds: float, rate: float | None, phase: float = 0.0, clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Samples:  # fmt: skip
    """Call for `seconds`: each as the one before ends (`rate` None), or at fixed times, `rate` a second.

    `phase`: the first fixed time, in parts of the time between two; workers in step would queue behind each other at any rate.
    A call at fixed times counts from when it was due, not from when the loop came to it: `late` is the difference.
    """
    rows: list[tuple[float, ...]] = []
    planned = None if rate is None else int(seconds * rate)
    begin, cpu_s = clock(), time.process_time()
    while planned is None or len(rows) < planned:
        start = clock()
        if start - begin >= seconds * (1 if planned is None else LATE_WINDOWS):
            break
        due = start if rate is None else begin + (len(rows) + phase) / rate
        if due > start:
            sleep(due - start)
            start = clock()
        queue, compute = attend()
        end = clock()
        rows.append((start - due, queue, compute, end - start - queue - compute, end - due))
    unsent = 0 if planned is None else planned - len(rows)
    return Samples(np.array(rows), clock() - begin, time.process_time() - cpu_s, unsent)


def work(load: Load, rates: list[float | None], phase: float, seconds: float, meet: Any, messages: Any) -> None:
    """A process's whole life: check, then one loop for each of `rates`, all workers from meeting to meeting. Sends Samples, or a text."""
    try:
        with session_under(load) as (attend, check_replies):
            check_replies()
            for rate in rates:
                drive(attend, WARM_UP_S, None)
                meet.wait(MEET_S)
                samples = drive(attend, seconds, rate, phase)
                meet.wait(MEET_S)
                messages.put(samples)
            meet.wait(MEET_S)  # the end of a connection would disturb who still measures
    except threading.BrokenBarrierError:
        pass  # another worker failed, and says why
    except Exception:
        messages.put(traceback.format_exc())
        messages.close()
        messages.join_thread()  # the text is on its way before the others learn of it
        meet.abort()
