"""The daemon over the CUDA backend, on a device or the emulated one: its calls, a start that fails, and a device that faults."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import device
import grpc
import numpy as np
import pytest
from daemon_process import CALL_S, HEAD_DIM, KV_HEADS, LAYERS, Q_HEADS, SMALL, DaemonProcess, Worker, chunks, numbers, row, status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray
from oracle import check_reply
from test_wire import refusal
from tierd_client import DaemonUnavailable, Geometry, Result, Session, Tier, Tolerance, connect
from tierd_proto.v1 import tierd_pb2 as pb
from tierd_proto.v1 import tierd_pb2_grpc

from tierd.cli import main

pytestmark = pytest.mark.gpu
emulated = pytest.mark.skipif(device.real(), reason="there is a device; its faults cannot be chosen")
PATH = () if device.real() else (device.EMULATOR,)
GEOMETRY = Geometry(num_layers=LAYERS, num_q_heads=Q_HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="float32")
Raw = NDArray[np.float32]
TOLERANCES = None, Tolerance(rtol=0.0), Tolerance(rtol=0.02, atol=0.01), Tolerance(rtol=0.3, relative_to="output")


def started(folder: Path, backend: str = "cuda", prelude: str = "") -> DaemonProcess:
    flags = SMALL | {"listen": f"unix://{folder}/t.sock", "backend": backend, "metrics-port": 0, "canary-share": 0.05}
    return DaemonProcess(flags, *PATH, prelude=prelude)


def metrics(daemon: DaemonProcess) -> str:
    with urlopen(daemon.said["metrics"], timeout=CALL_S) as response:
        text: str = response.read().decode()
        return text


class Mirror:
    """A session, and what it must hold at layer 1."""

    def __init__(self, session: Session, k: Raw, v: Raw) -> None:
        self.session, self.k, self.v = session, k, v

    def grow(self, k: Raw, v: Raw) -> None:
        self.k, self.v = (np.concatenate(pair, axis=1) for pair in ((self.k, k), (self.v, v)))

    def check(self, q: Raw, result: Result[Any], rtol: float, atol: float = 0.0, relative_to: str = "values") -> None:
        columns = {name: np.asarray(x) for name, x in vars(result.certificate).items() if np.shape(x) == q.shape[:2]}
        assert len(columns) > 10
        output = np.asarray(result.output)
        check_reply(self.k, self.v, q, output, columns, rtol, atol, relative_to, softmax_scale=HEAD_DIM**-0.5)


def exercise(tier: Tier) -> None:
    """Every call of a client, over a context that completes a group of 1024 tokens; each answer is judged."""
    k, v = numbers(1, KV_HEADS, 1020), numbers(2, KV_HEADS, 1020)
    session = tier.open_session(GEOMETRY, tolerance=Tolerance(rtol=0.05), max_tokens=1100)
    session.append(layer=1, k=k, v=v)
    own = Mirror(session, k, v)
    q = numbers(3, Q_HEADS, 2)
    own.check(q, session.attend(layer=1, q=q), 0.05)
    for seed, tolerance in enumerate(TOLERANCES):
        k1, v1, q = (numbers(10 * seed + i, heads, 2) for i, heads in enumerate((KV_HEADS, KV_HEADS, Q_HEADS)))
        own.grow(k1, v1)
        result = session.step(layer=1, q=q, k=k1, v=v1, tolerance=tolerance)
        asked = tolerance or Tolerance(rtol=0.05)
        own.check(q, result, asked.rtol, asked.atol, asked.relative_to)
        assert result.certificate.exact.all() == (tolerance == Tolerance(rtol=0.0))
    child = Mirror(session.fork(), own.k, own.v)
    session.truncate(1003)
    assert session.lengths() == [0, 1003] and child.session.lengths() == [0, 1028]
    own.k, own.v = own.k[:, :1003], own.v[:, :1003]
    steps = [tuple(numbers(60 + 3 * i + j, heads, 1 + i) for j, heads in enumerate((Q_HEADS, KV_HEADS, KV_HEADS))) for i in range(2)]
    both = (own, child)
    results = tier.step_many([(mirror.session, 1, *step) for mirror, step in zip(both, steps, strict=True)])
    for mirror, (q, k1, v1), result in zip(both, steps, results, strict=True):
        mirror.grow(k1, v1)
        mirror.check(q, result, 0.05)
    assert tier.status()["sessions"] == 2


@pytest.mark.parametrize("backend", ["cuda", "auto"])
def test_all_calls_over_a_daemon_and_its_end(folder: Path, capsys: pytest.CaptureFixture[str], backend: str) -> None:
    with started(folder, backend) as daemon:
        with connect(daemon.target, timeout=CALL_S) as tier:
            assert tier.backend == "cuda"
            if backend == "cuda":
                exercise(tier)
        assert main(["status", "--listen", daemon.target, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["backend"], told["fault"], told["events"]) == ("cuda", "", {})
        assert f'tierd_info{{backend="cuda",epoch="{told["epoch"]}"}} 1.0' in metrics(daemon)
        code, errors = daemon.stop()
    assert (code, "Traceback" in errors) == (0, False)
    assert "the backend is cuda" in errors
    assert ("are ready after" in errors) == (backend == "cuda")  # kernels, compiled for the first session


def test_all_calls_in_this_process(cuda: None) -> None:
    settings = {name.replace("-", "_"): value for name, value in SMALL.items()} | {"backend": "cuda"}
    with connect("inproc://", timeout=CALL_S, settings=settings) as tier:
        assert tier.backend == "cuda"
        exercise(tier)


@emulated
def test_a_start_in_this_process_that_fails_says_the_same(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    monkeypatch.setattr(cupy.cuda.Device, "compute_capability", "80")
    with pytest.raises(DaemonUnavailable, match=r"compute capability 8\.0; the kernels need 9\.0"):
        connect("inproc://", settings={"backend": "cuda"})


@emulated
@pytest.mark.parametrize(
    ("prelude", "said"),
    [
        ("import sys; sys.modules['cupy'] = None", r"the cuda backend needs the extra `gpu`: pip install 'tierd\[gpu\]'"),
        ("import cupy; cupy.cuda.Device.compute_capability = '80'", "the device has compute capability 8.0; the kernels need 9.0"),
        ("import cupy; cupy.cuda.Device.mem_info = (9, 99)", "the device has 9 free of 99: lower hot_bytes or scratch_bytes"),
    ],
)
def test_a_start_that_fails_is_one_line_and_exit_1(folder: Path, prelude: str, said: str) -> None:
    with pytest.raises(RuntimeError, match=rf"^exit 1: tierd: [^\n]*{said}[^\n]*\n$"):
        started(folder, prelude=prelude)
    assert not list(folder.iterdir())


@emulated
def test_auto_says_why_it_is_not_cuda(folder: Path) -> None:
    with started(folder, "auto", "import cupy; cupy.cuda.Device.compute_capability = '80'") as daemon:
        with Worker(daemon.target) as worker:
            assert (worker.hello.backend, worker.status()["backend"]) == ("cpu", "cpu")
        assert 'tierd_info{backend="cpu"' in metrics(daemon)
        code, errors = daemon.stop()
    assert code == 0
    assert "WARNING tierd_kernels.registry: the backend is cpu, because cuda cannot start: the device has compute capability 8.0" in errors


FAULTY = """
import os, threading, cupy
def failing(operation):
    def checked(*args, **kwargs):
        if threading.current_thread().name == "tierd-engine" and os.path.exists("{trigger}"):
            raise cupy.cuda.runtime.CUDARuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")
        return operation(*args, **kwargs)
    return checked
cupy.{owner}.{name} = failing(cupy.{owner}.{name})
"""


@emulated
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("Function", "__call__"), ("cuda.Stream", "synchronize"), ("cuda.runtime", "eventQuery"),
    ],
)  # fmt: skip
def test_a_fault_of_the_device_ends_service_and_not_the_process(folder: Path, owner: str, name: str) -> None:
    trigger, in_a_copy = folder / "trigger", name == "eventQuery"
    prelude = FAULTY.format(trigger=trigger, owner=owner, name=name)
    with started(folder, prelude=prelude) as daemon, closing(grpc.insecure_channel(daemon.target)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=CALL_S) for service in ("tierd.v1.Tier", "")]
        assert [next(watch).status for watch in watches] == [health_pb2.HealthCheckResponse.SERVING] * 2
        with Worker(daemon.target) as worker:
            session = worker.open()
            worker.call("Append", chunks(session, numbers(1, KV_HEADS, 40), numbers(2, KV_HEADS, 40), size=40))
            attend = pb.AttendRequest(rows=[row(session, numbers(3, Q_HEADS, 1), tolerance=pb.Tolerance(rtol=0.02))])
            trigger.touch()
            if in_a_copy:  # an answer from before the fault, which asks for copies
                assert len(worker.call("Attend", attend).rows) == 1
                assert [next(watch).status for watch in watches] == [health_pb2.HealthCheckResponse.NOT_SERVING] * 2
            refusals = [refusal(worker.call, "Attend", attend)]
            if not in_a_copy:
                assert [next(watch).status for watch in watches] == [health_pb2.HealthCheckResponse.NOT_SERVING] * 2
            refusals += [refusal(worker.call, "Lengths", pb.LengthsRequest(session_id=session)), refusal(worker.open)]
            refusals.append(refusal(worker.stub.Handshake, pb.HandshakeRequest(protocol=1)))
            for code, error, said in refusals:
                assert (code, error) == (grpc.StatusCode.UNAVAILABLE, "unavailable")
                assert "cudaErrorIllegalAddress" in said and "restart the daemon" in said
            with pytest.raises(DaemonUnavailable, match="cudaErrorIllegalAddress"):
                connect(daemon.target)
            streamed = worker.ask(pb.DecodeRequest(id=1, attend=attend)).error
            assert (streamed.code, "cudaErrorIllegalAddress" in streamed.message) == ("unavailable", True)
            told = worker.status()
            assert "cudaErrorIllegalAddress" in told["fault"] and told["events"]["device_lost"] == 1
            assert 'tierd_events_total{event="device_lost"} 1.0' in metrics(daemon)
        assert status(tierd_pb2_grpc.TierStub(channel))["sessions"] == 0  # whoever leaves gives back
        for watch in watches:
            watch.cancel()
        code, errors = daemon.stop()
    assert code == 0
    assert "CRITICAL tierd.engine.device: the device of the cuda backend is lost" in errors
