"""Every call of the service, by raw stubs against a daemon process, and what each says when the request is wrong."""

from typing import Any

import grpc
import numpy as np
import pytest
from daemon_process import CALL_S, HEAD_DIM, KV_HEADS, Q_HEADS, DaemonProcess, Worker, chunks, numbers, open_request, row
from oracle import check_reply
from tierd_proto import coding
from tierd_proto.v1 import tierd_pb2 as pb


def refusal(call: Any, *arguments: Any, **named: Any) -> tuple[grpc.StatusCode, str, str]:
    """The status, the error's code and its text."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **named)
    error: Any = caught.value
    codes = [value for key, value in error.trailing_metadata() if key == "tierd-error"]
    return error.code(), codes[0] if codes else "", error.details()


def check_result(k: Any, v: Any, q: Any, result: pb.RowResult, rtol: float) -> None:
    output = coding.decode_tensor(result.output, "output", ndim=3)
    certificate = coding.decode_certificate(result.certificate, q.shape[:2])
    check_reply(k, v, q, output, certificate, rtol, 0.0, softmax_scale=HEAD_DIM**-0.5)


def test_the_handshake_tells_the_limits(worker: Worker) -> None:
    assert worker.hello.protocol == 1
    assert worker.hello.backend == "cpu"
    assert worker.hello.epoch == worker.status()["epoch"]
    limits = worker.hello.limits
    assert (limits.message_bytes_max, limits.max_tokens, limits.stream_requests_max, limits.timeout_s_max) == (1 << 20, 4000, 256, 600.0)


def test_another_protocol_is_refused(worker: Worker) -> None:
    code, name, text = refusal(worker.stub.Handshake, pb.HandshakeRequest(protocol=7))
    assert (code, name) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_argument")
    assert "protocol 7" in text
    assert "speaks 1" in text


def test_a_session_from_opening_to_closing(worker: Worker) -> None:
    session = worker.open()
    k, v, q = numbers(1, KV_HEADS, 300), numbers(2, KV_HEADS, 300), numbers(3, Q_HEADS, 2)
    worker.call("Append", chunks(session, k, v, size=128))
    assert list(worker.call("Lengths", pb.LengthsRequest(session_id=session)).lengths) == [300, 0]

    reply = worker.call("Attend", pb.AttendRequest(rows=[row(session, q)]))
    check_result(k, v, q, reply.rows[0], rtol=0.1)
    assert reply.queue_s >= 0.0
    assert (reply.rows[0].late_records, reply.rows[0].prefetch_wait_s) == (0, 0.0), "nothing was on its way"
    assert reply.compute_s > 0.0

    child = worker.call("Fork", pb.ForkRequest(session_id=session)).session_id
    worker.call("Truncate", pb.TruncateRequest(session_id=session, length=37))
    k1, v1, q1 = numbers(4, KV_HEADS, 1), numbers(5, KV_HEADS, 1), numbers(6, Q_HEADS, 1)
    step = row(session, q1, k=coding.encode_tensor(k1), v=coding.encode_tensor(v1), tolerance=pb.Tolerance(rtol=0.0))
    reply = worker.ask(pb.DecodeRequest(id=9, attend=pb.AttendRequest(rows=[step, row(child, q)])))
    assert reply.id == 9
    check_result(np.concatenate([k[:, :37], k1], axis=1), np.concatenate([v[:, :37], v1], axis=1), q1, reply.attend.rows[0], 0.0)
    check_result(k, v, q, reply.attend.rows[1], rtol=0.1)

    assert worker.status()["sessions"] == 2
    worker.call("CloseSession", pb.CloseSessionRequest(session_id=session))
    code, name, text = refusal(worker.call, "Lengths", pb.LengthsRequest(session_id=session))
    assert (code, name) == (grpc.StatusCode.NOT_FOUND, "session_not_found")
    assert session in text


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (open_request(num_kv_heads=3), "multiple of num_kv_heads"),
        (open_request(num_layers=10**9), "num_layers is 1000000000"),
        (open_request(dtype=pb.DTYPE_UNSPECIFIED), "dtype is 0; allowed: float16"),
        (open_request(rtol=-0.5), "rtol is -0.5"),
        (open_request(rtol=float("nan")), "rtol is nan"),
        (open_request(max_tokens=4001), "max_tokens is 4001; allowed: 1 to 4000"),
        (open_request(head_dim=65), "65"),
        (pb.OpenSessionRequest(geometry=open_request().geometry, max_tokens=9), "no policy"),
        (pb.OpenSessionRequest(geometry=open_request().geometry, max_tokens=9, budget=pb.BudgetPolicy(skip_share=-1)), "skip_share"),
    ],
)
def test_a_session_that_cannot_be_meant_is_refused(worker: Worker, request_: pb.OpenSessionRequest, text: str) -> None:
    code, name, said = refusal(worker.call, "OpenSession", request_)
    assert (code, name) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_argument")
    assert text in said
    assert worker.status()["sessions"] == 0


def tensor(shape: tuple[int, ...], nbytes: int, dtype: Any = pb.FLOAT32) -> pb.Tensor:
    return pb.Tensor(dtype=dtype, shape=shape, inline=bytes(nbytes))


GOOD = tensor((Q_HEADS, 1, HEAD_DIM), Q_HEADS * HEAD_DIM * 4)


@pytest.mark.parametrize(
    ("q", "text"),
    [
        (tensor((Q_HEADS, 1, HEAD_DIM), 8), "8 bytes for shape"),
        (tensor((Q_HEADS, HEAD_DIM), Q_HEADS * HEAD_DIM * 4), "must have 3 axes"),
        (tensor((-Q_HEADS, -1, HEAD_DIM), Q_HEADS * HEAD_DIM * 4), "each of at least 1"),
        (tensor((0, 2**62, 5), 0), "each of at least 1"),
        (tensor((2**62, 2**62, 2**62), 0), "0 bytes for shape"),
        (tensor((Q_HEADS, 1, HEAD_DIM), Q_HEADS * HEAD_DIM * 4, dtype=77), "type 77 is unknown; allowed: float16"),
        (tensor((Q_HEADS, 1, HEAD_DIM), Q_HEADS * HEAD_DIM * 2, dtype=pb.FLOAT16), "q is float16"),
        (pb.Tensor(dtype=pb.FLOAT32, shape=(1, 1, 1)), "not inline"),
        (coding.encode_tensor(np.full((Q_HEADS, 1, HEAD_DIM), np.nan, np.float32)), "not finite"),
        (GOOD, "empty"),
    ],
)
def test_rows_that_cannot_be_meant_are_refused_on_both_ways(worker: Worker, q: pb.Tensor, text: str) -> None:
    attend = pb.AttendRequest(rows=[pb.Row(session_id=worker.open(), q=q)])
    code, name, said = refusal(worker.call, "Attend", attend)
    assert (code, name) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_argument")
    assert text in said
    error = worker.ask(pb.DecodeRequest(id=1, attend=attend)).error
    assert (error.code, error.message) == ("invalid_argument", said)


def test_half_a_pair_of_k_and_v_and_no_rows_are_refused(worker: Worker) -> None:
    assert "come together" in worker.ask(pb.DecodeRequest(id=1, attend=pb.AttendRequest(rows=[pb.Row(q=GOOD, k=GOOD)]))).error.message
    assert "without rows" in worker.ask(pb.DecodeRequest(id=2)).error.message


def test_a_reply_over_the_limit_is_refused_before_it_is_computed(worker: Worker) -> None:
    many = numbers(1, Q_HEADS, 700)  # 0.7 MB to send; their certificates would not fit as well
    session = worker.open()
    worker.call("Append", chunks(session, numbers(1, KV_HEADS, 700), numbers(2, KV_HEADS, 700), size=500))
    reply = worker.ask(pb.DecodeRequest(id=1, attend=pb.AttendRequest(rows=[row(session, many)])))
    assert "the reply would take" in reply.error.message
    assert "allowed: 1048576" in reply.error.message


def bad_appends(session: str) -> dict[str, list[pb.AppendRequest]]:
    k, v = numbers(1, KV_HEADS, 40), numbers(2, KV_HEADS, 40)
    good = list(chunks(session, k, v, size=20))
    without = pb.AppendRequest(k=good[0].k, v=good[0].v)
    other = coding.encode_tensor(numbers(3, KV_HEADS + 1, 20))
    huge = pb.AppendRequest(header=pb.AppendHeader(session_id=session, num_tokens=10**12), k=good[0].k, v=good[0].v)
    none = pb.AppendRequest(header=pb.AppendHeader(session_id=session, num_tokens=0), k=good[0].k, v=good[0].v)
    return {
        "must carry the header": [without],
        "a second header": [good[0], good[0]],
        "20 tokens arrived; the header announced 40": good[:1],
        "60 tokens arrived; the header announced 40": [*good, good[1]],
        "does not fit": [good[0], pb.AppendRequest(k=other, v=other)],
        "num_tokens is 0": [none],
        "without chunks": [],
        "bytes for requests under way": [huge],
        "max_tokens, 30": good,
    }


@pytest.mark.parametrize("text", bad_appends(""))
def test_an_append_that_goes_wrong_stores_nothing_and_holds_nothing(worker: Worker, text: str) -> None:
    session = worker.open(max_tokens=30)
    code, name, said = refusal(worker.call, "Append", iter(bad_appends(session)[text]))
    expected = "capacity_exceeded" if "under way" in text else "invalid_argument"
    assert (code.name, name) == ({"capacity_exceeded": "RESOURCE_EXHAUSTED"}.get(expected, "INVALID_ARGUMENT"), expected)
    assert text in said
    assert list(worker.call("Lengths", pb.LengthsRequest(session_id=session)).lengths) == [0, 0]
    assert worker.status()["request_bytes"] == 0


def test_a_full_pool_says_what_is_used_and_free(worker: Worker) -> None:
    session = worker.open(max_tokens=4000, num_layers=3)
    k, v = numbers(1, KV_HEADS, 4000), numbers(2, KV_HEADS, 4000)
    for layer in (0, 1):
        worker.call("Append", chunks(session, k, v, size=500, layer=layer))
    code, name, said = refusal(worker.call, "Append", chunks(session, k, v, size=500, layer=2))
    assert (code, name) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "capacity_exceeded")
    assert "used" in said
    assert "free" in said
    assert list(worker.call("Lengths", pb.LengthsRequest(session_id=session)).lengths) == [4000, 4000, 0]


def test_who_calls_is_checked(daemon: DaemonProcess, worker: Worker) -> None:
    session = worker.open()
    lengths = pb.LengthsRequest(session_id=session)
    assert "metadata key tierd-worker" in refusal(worker.stub.Lengths, lengths)[2]
    stranger = (("tierd-worker", "w-0"),)
    assert refusal(worker.stub.Lengths, lengths, metadata=stranger)[:2] == (grpc.StatusCode.UNAVAILABLE, "unavailable")
    greeted = (("tierd-worker", worker.stub.Handshake(pb.HandshakeRequest(protocol=1)).worker),)
    assert "open the Decode stream first" in refusal(worker.stub.Lengths, lengths, metadata=greeted)[2]
    with Worker(daemon.target) as other:
        assert refusal(other.call, "Lengths", lengths)[1] == "session_not_found"
    second = worker.stub.Decode(iter([]), metadata=worker.metadata)
    assert "one per worker" in refusal(lambda: list(second))[2]


def test_a_long_text_in_a_request_does_not_break_the_refusal(worker: Worker) -> None:
    code, name, said = refusal(worker.call, "Lengths", pb.LengthsRequest(session_id="x" * 100_000))
    assert (code, name) == (grpc.StatusCode.NOT_FOUND, "session_not_found")
    assert len(said) < 2000


def test_request_ids_are_the_clients_to_keep_apart(worker: Worker) -> None:
    assert "id is 0" in worker.ask(pb.DecodeRequest(id=0)).error.message


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan")])
def test_a_timeout_that_cannot_be_meant_is_refused(worker: Worker, timeout_s: float) -> None:
    error = worker.ask(pb.DecodeRequest(id=1, timeout_s=timeout_s, attend=pb.AttendRequest(rows=[row("s", numbers(0, 4, 1))]))).error
    assert error.code == "invalid_argument"
    assert "timeout" in error.message


def test_a_deadline_that_passed_is_said_on_the_stream(worker: Worker) -> None:
    session = worker.open()
    request = pb.DecodeRequest(id=1, timeout_s=1e-9, attend=pb.AttendRequest(rows=[row(session, numbers(0, Q_HEADS, 1))]))
    error = worker.ask(request).error
    assert error.code == "deadline_exceeded"
    assert "nothing was done" in error.message


def test_a_message_over_the_limit_leaves_the_session_usable(worker: Worker) -> None:
    session = worker.open()
    k = numbers(1, KV_HEADS, 3000)
    code, _, said = refusal(worker.call, "Append", chunks(session, k, k, size=3000))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in said
    assert list(worker.call("Lengths", pb.LengthsRequest(session_id=session), timeout=CALL_S).lengths) == [0, 0]
