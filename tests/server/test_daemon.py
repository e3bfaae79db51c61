"""The daemon's life: its socket, its start and stop, workers that die, bytes that are no gRPC, and the standard services."""

import socket
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from urllib.request import urlopen

import grpc
import pytest
from daemon_process import (
    CALL_S,
    KV_HEADS,
    Q_HEADS,
    SMALL,
    DaemonProcess,
    Worker,
    chunks,
    environment,
    numbers,
    open_request,
    row,
    status,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from test_wire import refusal
from tierd_proto.v1 import tierd_pb2 as pb
from tierd_proto.v1 import tierd_pb2_grpc

DOOMED_WORKER = """
import sys
from daemon_process import KV_HEADS, Worker, chunks, numbers
worker = Worker(sys.argv[1])
for _ in range(3):
    worker.call("Append", chunks(worker.open(), numbers(1, KV_HEADS, 100), numbers(2, KV_HEADS, 100), size=100))
print("ready", flush=True)
sys.stdin.read()
"""


def metric_values(daemon: DaemonProcess) -> dict[str, float]:
    with urlopen(daemon.said["metrics"], timeout=CALL_S) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def test_the_socket_is_its_owners_alone(daemon: DaemonProcess) -> None:
    assert stat.S_IMODE(Path(daemon.target.removeprefix("unix://")).stat().st_mode) == 0o600


def test_garbage_on_the_socket_hurts_nobody_else(daemon: DaemonProcess, worker: Worker) -> None:
    session = worker.open()
    for garbage in (b"\x00\xff" * 5000, b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
            raw.connect(daemon.target.removeprefix("unix://"))
            raw.sendall(garbage)
            raw.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                while raw.recv(4096):
                    pass  # until the daemon hangs up
    assert list(worker.call("Lengths", pb.LengthsRequest(session_id=session)).lengths) == [0, 0]


def test_a_message_that_cannot_be_parsed_is_refused_by_name(folder: Path) -> None:
    broken = b"\xff" * 50
    with DaemonProcess(SMALL | {"listen": f"unix://{folder}/t.sock", "metrics-port": 0}) as daemon:
        with grpc.insecure_channel(daemon.target) as channel:
            hello = tierd_pb2_grpc.TierStub(channel).Handshake(pb.HandshakeRequest(protocol=1), timeout=CALL_S)
            metadata = (("tierd-worker", hello.worker),)
            requests: SimpleQueue[bytes | None] = SimpleQueue()
            replies = channel.stream_stream("/tierd.v1.Tier/Decode", response_deserializer=pb.DecodeReply.FromString)(
                iter(requests.get, None), metadata=metadata
            )
            assert next(replies) == pb.DecodeReply()
            stub = tierd_pb2_grpc.TierStub(channel)
            session = stub.OpenSession(open_request(), metadata=metadata, timeout=CALL_S).session_id
            methods = pb.DESCRIPTOR.services_by_name["Tier"].methods
            for method in methods:
                path, named = f"/tierd.v1.Tier/{method.name}", {"metadata": metadata, "timeout": CALL_S}
                if method.server_streaming:
                    requests.put(broken)
                    requests.put(pb.DecodeRequest(id=7).SerializeToString() + broken)
                    errors = [next(replies), next(replies)]
                    assert [(reply.id, reply.error.code) for reply in errors] == [(0, "invalid_argument"), (7, "invalid_argument")]
                    said = errors[1].error.message
                else:
                    call = channel.stream_unary(path) if method.client_streaming else channel.unary_unary(path)
                    code, name, said = refusal(call, iter([broken]) if method.client_streaming else broken, **named)
                    assert (code, name) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_argument")
                assert f"the message cannot be parsed as tierd.v1.{method.input_type.name}" in said
            assert list(stub.Lengths(pb.LengthsRequest(session_id=session), metadata=metadata, timeout=CALL_S).lengths) == [0, 0]
            assert metric_values(daemon)['tierd_call_errors_total{code="invalid_argument"}'] == len(methods) + 1
            requests.put(None)
            assert list(replies) == []
        assert "Traceback" not in daemon.stop()[1]


def test_a_killed_worker_leaves_nothing_behind(daemon: DaemonProcess) -> None:
    path = f"{environment()['PYTHONPATH']}:{Path(__file__).parent}"
    doomed = subprocess.Popen(
        [sys.executable, "-c", DOOMED_WORKER, daemon.target],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment() | {"PYTHONPATH": path},
    )  # fmt: skip
    with doomed, grpc.insecure_channel(daemon.target) as channel:
        assert doomed.stdout is not None
        assert doomed.stdout.readline() == "ready\n"
        stub = tierd_pb2_grpc.TierStub(channel)
        before = status(stub)
        assert (before["sessions"], before["workers_connected"]) == (3, 1)
        assert before["pools"]["originals"]["used_bytes"] > 0
        doomed.kill()
        while (after := status(stub))["workers_connected"]:
            pass
        assert after["sessions"] == 0
        assert [pool["used_bytes"] for pool in after["pools"].values()] == [0, 0, 0, 0]


def test_a_stop_lets_calls_finish_and_refuses_new_ones(folder: Path) -> None:
    path = folder / "t.sock"
    with DaemonProcess(SMALL | {"listen": f"unix://{path}"}) as daemon:
        worker = Worker(daemon.target)
        session = worker.open()
        health = health_pb2_grpc.HealthStub(worker.channel).Watch(health_pb2.HealthCheckRequest(service="tierd.v1.Tier"))
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING
        first, second = chunks(session, numbers(1, KV_HEADS, 40), numbers(2, KV_HEADS, 40), size=20)
        parts: SimpleQueue[pb.AppendRequest | None] = SimpleQueue()
        parts.put(first)
        append = worker.stub.Append.future(iter(parts.get, None), metadata=worker.metadata)
        while worker.status()["request_bytes"] == 0:
            pass  # until the first part is there
        daemon.process.terminate()
        assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
        code, name, said = refusal(worker.call, "Lengths", pb.LengthsRequest(session_id=session))
        assert (code, name) == (grpc.StatusCode.UNAVAILABLE, "unavailable")
        assert "is stopping" in said
        error = worker.ask(pb.DecodeRequest(id=1)).error
        assert (error.code, "is stopping" in error.message) == ("unavailable", True)
        parts.put(second)
        parts.put(None)
        assert append.result(timeout=CALL_S) == pb.AppendReply()
        _, errors = daemon.process.communicate(timeout=CALL_S)
        assert daemon.process.returncode == 0
        assert "Traceback" not in errors
        assert not path.exists()
        assert refusal(lambda: list(worker.replies))[0] == grpc.StatusCode.UNAVAILABLE
        worker.channel.close()


def test_a_call_that_never_ends_does_not_hold_up_a_stop_beyond_its_grace(folder: Path) -> None:
    with DaemonProcess(SMALL | {"listen": f"unix://{folder}/t.sock", "grace-s": 0}) as daemon:
        worker = Worker(daemon.target)
        session = worker.open()
        first, _ = chunks(session, numbers(1, KV_HEADS, 40), numbers(2, KV_HEADS, 40), size=20)
        parts: SimpleQueue[pb.AppendRequest | None] = SimpleQueue()
        parts.put(first)
        append = worker.stub.Append.future(iter(parts.get, None), metadata=worker.metadata)
        while worker.status()["request_bytes"] == 0:
            pass
        code, errors = daemon.stop()
        assert (code, "Traceback" in errors) == (0, False)
        assert "1 calls did not finish" in errors
        assert append.code() == grpc.StatusCode.UNAVAILABLE
        parts.put(None)
        worker.channel.close()


def test_a_second_daemon_is_refused_and_the_first_lives_on(daemon: DaemonProcess, worker: Worker) -> None:
    with pytest.raises(RuntimeError, match=r"exit 1: (?s:.*)tierd: cannot listen on .*: a daemon serves there already"):
        DaemonProcess({"listen": daemon.target})
    assert worker.status()["workers_connected"] == 1


def test_the_socket_of_a_dead_daemon_is_replaced(folder: Path) -> None:
    flags = SMALL | {"listen": f"unix://{folder}/t.sock"}
    with DaemonProcess(flags) as first:
        first.stop(number=9)
    assert (folder / "t.sock").is_socket()
    with DaemonProcess(flags) as second, Worker(second.target) as worker:
        assert worker.status()["sessions"] == 0


def test_what_is_no_socket_is_never_removed(folder: Path) -> None:
    (folder / "notes").write_text("precious")
    with pytest.raises(RuntimeError, match=r"(?s)exit 1: .*it exists and is not a socket"):
        DaemonProcess({"listen": f"unix://{folder}/notes"})
    assert (folder / "notes").read_text() == "precious"
    with pytest.raises(RuntimeError, match=r"(?s)exit 1: .*its folder does not exist"):
        DaemonProcess({"listen": f"unix://{folder}/none/t.sock"})


def test_a_loopback_port_that_is_taken_is_refused(folder: Path) -> None:
    with DaemonProcess(SMALL | {"listen": "localhost:0", "metrics-port": 0}) as daemon:
        with Worker(daemon.target) as worker:
            assert worker.status()["sessions"] == 0
        with pytest.raises(RuntimeError, match=f"(?s)exit 1: .*tierd: cannot listen on {daemon.target}: "):
            DaemonProcess({"listen": daemon.target})
        taken = daemon.said["metrics"].split(":")[2].split("/")[0]
        with pytest.raises(RuntimeError, match=f"(?s)exit 1: .*tierd: cannot serve metrics on 127.0.0.1:{taken}"):
            DaemonProcess(SMALL | {"listen": f"unix://{folder}/t.sock", "metrics-port": taken})
        assert not (folder / "t.sock").exists()


def test_health_and_reflection(worker: Worker) -> None:
    health = health_pb2_grpc.HealthStub(worker.channel)
    for service in ("", "tierd.v1.Tier"):
        reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=CALL_S)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(worker.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (reply,) = reflection.ServerReflectionInfo(iter([request]), timeout=CALL_S)
    names = {service.name for service in reply.list_services_response.service}
    assert {"tierd.v1.Tier", "grpc.health.v1.Health"} <= names


def test_metrics_tell_what_tiering_did_by_session_layer_and_cause(daemon: DaemonProcess, worker: Worker) -> None:
    session = worker.open()
    worker.call("Append", chunks(session, numbers(1, KV_HEADS, 64), numbers(2, KV_HEADS, 64), size=64))
    worker.call("Attend", pb.AttendRequest(rows=[row(session, numbers(3, Q_HEADS, 1), tolerance=pb.Tolerance(rtol=0.0))]))
    values = metric_values(daemon)
    reads = values['tierd_session_records_total{layer="0",outcome="misses",session="1"}']
    assert reads == 4 * 2 * KV_HEADS, "four blocks, keys and values of each head"
    assert values['tierd_link_bytes_total{cause="demand"}'] > 0.0 == values['tierd_link_bytes_total{cause="prefetch"}']
    assert 0.0 < values["tierd_link_share"] < 1.0


def test_metrics_tell_what_is_held_and_done(daemon: DaemonProcess, worker: Worker) -> None:
    worker.open()
    refusal(worker.call, "Lengths", pb.LengthsRequest(session_id="s-none"))
    values = metric_values(daemon)
    assert values["tierd_sessions"] == 1.0
    assert values["tierd_workers_connected"] == 1.0
    assert values['tierd_pool_bytes{pool="hot",state="free"}'] == 4 << 20
    assert values['tierd_call_errors_total{code="session_not_found"}'] >= 1.0
    assert values['tierd_call_queue_seconds_count{command="OpenSession"}'] >= 1.0
    assert values['tierd_call_compute_seconds_sum{command="OpenSession"}'] > 0.0
