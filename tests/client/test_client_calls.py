"""Every method of the client, of both flavours, against a daemon process and against the engine in this process."""

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from daemon_process import SMALL, DaemonProcess
from numpy.typing import NDArray
from tierd_client import (
    Budget,
    CapacityExceeded,
    Coverage,
    DaemonUnavailable,
    Geometry,
    InvalidArgument,
    SessionNotFound,
    Tolerance,
    connect,
)
from tierd_client.transports import grpc_aio, grpc_sync
from tierd_kernels.layout import HEAD_DIMS
from tierd_proto.coding import CERTIFICATE_COLUMNS
from tierd_proto.v1 import tierd_pb2 as pb
from tierd_proto.v1.tierd_pb2_grpc import TierStub

GEOMETRY = Geometry(num_layers=2, num_q_heads=4, num_kv_heads=2, head_dim=64, dtype="float32")
LOOSE = Tolerance(rtol=0.1)
SMALL_INPROC = {name.replace("-", "_"): value for name, value in SMALL.items()}


def numbers(seed: int, heads: int, n: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((heads, n, 64)).astype(np.float32)


def opened(tier: Any, **changes: Any) -> Any:
    return tier.open_session(GEOMETRY, **{"tolerance": LOOSE, "max_tokens": 1000} | changes)


def filled(tier: Any, n: int = 100, **changes: Any) -> Any:
    session = opened(tier, **changes)
    for layer in (0, 1):
        session.append(layer=layer, k=numbers(layer, 2, n), v=numbers(layer + 2, 2, n))
    return session


def test_a_session_from_opening_to_closing(tier: Any) -> None:
    before = tier.status()["sessions"]
    with opened(tier) as session:
        assert tier.status()["sessions"] == before + 1
        session.append(layer=1, k=numbers(0, 2, 37), v=numbers(1, 2, 37))
        assert (session.lengths(), session.length(layer=1)) == ([0, 37], 37)
        result = session.attend(layer=1, q=numbers(2, 4, 1)[:, 0])
        assert result.output.shape == (4, 64)
        assert {vars(result.certificate)[name].shape for name in CERTIFICATE_COLUMNS} == {(4,)}
        stepped = session.step(layer=1, q=numbers(3, 4, 3), k=numbers(4, 2, 3), v=numbers(5, 2, 3))
        assert stepped.output.shape == (4, 3, 64)
        assert {vars(stepped.certificate)[name].shape for name in CERTIFICATE_COLUMNS} == {(4, 3)}
        assert session.length(layer=1) == 40
        assert not session.closed
    assert session.closed
    session.close()
    assert tier.status()["sessions"] == before


def test_certificates_are_of_the_types_that_they_say_and_read_only(tier: Any) -> None:
    with filled(tier) as session:
        for q in (numbers(5, 4, 3), numbers(5, 4, 1)[:, 0]):
            columns = vars(session.attend(layer=0, q=q).certificate)
            assert {name: column.dtype for name, column in columns.items()} == CERTIFICATE_COLUMNS
            assert not any(column.flags.writeable for column in columns.values())


def test_a_message_is_never_larger_than_was_checked(tier: Any) -> None:
    with opened(tier) as one, opened(tier) as two:
        k, rows = numbers(1, 2, 9), [(one, 1, numbers(0, 4, 1), None, None)]
        for more in ([], [(two, 0, numbers(0, 4, 9), k, k)] * 100):
            attend = tier._rows_call([*rows, *more]).request
            assert attend.message().ByteSize() <= attend.nbytes


def test_what_the_handshake_said(tier: Any) -> None:
    assert (tier.backend, tier.limits.message_bytes_max, tier.limits.max_tokens) == ("cpu", 1 << 20, 4000)
    assert tier.limits.head_dims == HEAD_DIMS
    assert tier.status()["epoch"] == tier.epoch


def test_a_fork_goes_its_own_way(tier: Any) -> None:
    with filled(tier) as session:
        session.tolerance = Tolerance(0.0)
        child = session.fork()
        assert (child.tolerance, child.geometry, child.max_tokens) == (Tolerance(0.0), GEOMETRY, 1000)
        session.truncate(41)
        assert (session.lengths(), child.lengths()) == ([41, 41], [100, 100])
        q = numbers(9, 4, 1)
        np.testing.assert_array_equal(child.attend(layer=0, q=q).certificate.exact, True)
        child.close()
        assert session.length(layer=0) == 41


def test_the_tolerance_is_that_of_the_call_else_of_the_session(tier: Any) -> None:
    q = numbers(5, 4, 1)
    with filled(tier) as session:
        assert not session.attend(layer=0, q=q).certificate.exact.any()
        assert session.attend(layer=0, q=q, tolerance=Tolerance(0.0)).certificate.exact.all()
        assert not session.attend(layer=0, q=q).certificate.exact.any()
        session.tolerance = Tolerance(0.0)
        assert session.attend(layer=0, q=q).certificate.exact.all()
        by_value = session.attend(layer=0, q=q, tolerance=Tolerance(0.0, atol=7.0)).certificate.budget
        np.testing.assert_allclose(by_value, 7.0, rtol=1e-5)
        output = session.attend(layer=0, q=q, tolerance=Tolerance(0.5, relative_to="output")).certificate
        np.testing.assert_allclose(output.budget, 0.5 * output.output_norm, rtol=1e-3)


def test_step_many_answers_ragged_rows_in_their_order(tier: Any) -> None:
    with filled(tier) as one, filled(tier, n=50) as two, filled(tier) as three:
        q = [numbers(5, 4, 1)[:, 0], numbers(6, 4, 3), numbers(7, 4, 2)]
        k, v = numbers(8, 2, 3), numbers(9, 2, 3)
        alone = three.attend(layer=1, q=q[2]).output
        results = tier.step_many([(one, 0, q[0], k[:, :1], v[:, :1]), (two, 1, q[1], k, v), (three, 1, q[2], None, None)])
        assert [result.output.shape for result in results] == [(4, 64), (4, 3, 64), (4, 2, 64)]
        np.testing.assert_allclose(results[2].output, alone, rtol=1e-5, atol=1e-6)
        assert (one.lengths(), two.lengths(), three.lengths()) == ([101, 100], [50, 53], [100, 100])


def test_step_many_stores_nothing_if_one_row_fails(tier: Any) -> None:
    with filled(tier) as one, filled(tier, max_tokens=100) as two:
        row = (0, numbers(5, 4, 1), numbers(8, 2, 1), numbers(9, 2, 1))
        with pytest.raises(InvalidArgument, match="max_tokens"):
            tier.step_many([(one, *row), (two, *row)])
        assert (one.lengths(), two.lengths()) == ([100, 100], [100, 100])
        with pytest.raises(InvalidArgument, match=r"row 1: q has shape \[4, 0, 64\]"):
            tier.step_many([(one, *row), (two, 0, numbers(5, 4, 0), None, None)])
        with pytest.raises(InvalidArgument, match="row 0 is not"):
            tier.step_many([(one, 0, numbers(5, 4, 1))])
        with pytest.raises(InvalidArgument, match="row 1 is not"):
            tier.step_many([(one, 0, numbers(5, 4, 1), None, None), 3])
        with pytest.raises(InvalidArgument, match="rows is a NoneType; it must be a sequence"):
            tier.step_many(None)


def test_an_append_larger_than_a_message(tier: Any) -> None:
    k, v = numbers(0, 2, 3000), numbers(1, 2, 3000)
    assert k.nbytes + v.nbytes > 2 * tier.limits.message_bytes_max
    with opened(tier, max_tokens=3001) as session:
        session.append(layer=0, k=k, v=v)
        q = numbers(3, 4, 1)
        reply = session.attend(layer=0, q=q, tolerance=Tolerance(0.0)).output[:, 0]
        scores = np.einsum("hd,hnd->hn", q[:, 0].astype(float), np.repeat(k, 2, axis=0)) / 8.0
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        truth = np.einsum("hn,hnd->hd", weights / weights.sum(axis=1, keepdims=True), np.repeat(v, 2, axis=0))
        np.testing.assert_allclose(reply, truth, rtol=1e-4, atol=1e-6)


def test_a_message_over_the_limit_is_refused_before_it_is_sent(tier: Any) -> None:
    with opened(tier, max_tokens=4000) as session:
        with pytest.raises(InvalidArgument, match="allowed: 1048576"):
            session.step(layer=0, q=numbers(0, 4, 2000), k=numbers(1, 2, 2000), v=numbers(2, 2, 2000))
        assert session.lengths() == [0, 0]


@pytest.mark.parametrize("policy", ["budget", "coverage", Budget(skip_share=0.0, require_rank=True), Coverage(tau_cov=0.5, k_max=4)])
def test_policies(tier: Any, policy: Any) -> None:
    with filled(tier, policy=policy) as session:
        certificate = session.attend(layer=0, q=numbers(5, 4, 1)).certificate
        assert ((certificate.bound <= certificate.budget) | certificate.exact).all()
        coverage = policy == "coverage" or isinstance(policy, Coverage)
        assert np.isnan(certificate.paper_key_bound).all() != coverage


def test_bad_input_is_named_and_changes_nothing(tier: Any) -> None:
    q, k = numbers(5, 4, 1), numbers(6, 2, 1)
    nan = k.copy()
    nan[0, 0, 3] = np.nan
    with filled(tier) as session, opened(tier) as empty:
        bad: dict[str, Callable[[], Any]] = {
            r"q has shape \[2, 1, 64\]; expected \[4, 64\] or \[4, n, 64\]": lambda: session.attend(layer=0, q=k),
            r"k has shape \[4, 1, 64\]; expected \[2, n, 64\]": lambda: session.append(layer=0, k=q, v=q),
            r"k has shape \[2, 1, 64\] and v \[2, 2, 64\]": lambda: session.append(layer=0, k=k, v=numbers(6, 2, 2)),
            "q is numpy float64; the session's geometry says float32": lambda: session.attend(layer=0, q=q.astype(float)),
            "v is float16; the session's": lambda: session.append(layer=0, k=k, v=torch.zeros(2, 1, 64, dtype=torch.float16)),
            "q is a list": lambda: session.attend(layer=0, q=[1.0]),
            "layer is 2; allowed: 0 to 1": lambda: session.attend(layer=2, q=q),
            "layer is -1": lambda: session.append(layer=-1, k=k, v=k),
            "k and v come together": lambda: session.step(layer=0, q=q, k=k, v=None),
            "not finite": lambda: session.append(layer=0, k=nan, v=k),
            "empty": lambda: empty.attend(layer=0, q=q),
            "max_tokens": lambda: session.append(layer=0, k=numbers(1, 2, 901), v=numbers(1, 2, 901)),
            "length is 101": lambda: session.truncate(101),
            "length is -1": lambda: session.truncate(-1),
            "tolerance is 0.1": lambda: session.attend(layer=0, q=q, tolerance=0.1),
            "timeout is 0": lambda: session.attend(layer=0, q=q, timeout=0),
            "timeout is 601": lambda: session.length(layer=0, timeout=601),
            "max_tokens is 0": lambda: opened(tier, max_tokens=0),
            "max_tokens is 4001|4000": lambda: opened(tier, max_tokens=4001),
            "policy is 'best'": lambda: opened(tier, policy="best"),
            "geometry is 7": lambda: tier.open_session(7, tolerance=LOOSE, max_tokens=1),
            "head_dim|head dimension": lambda: tier.open_session(Geometry(1, 1, 1, 63, "float32"), tolerance=LOOSE, max_tokens=1),
        }
        for match, call in bad.items():
            with pytest.raises(InvalidArgument, match=match):
                call()
        assert session.lengths() == [100, 100]
        assert session.attend(layer=0, q=q).output.shape == q.shape


def test_full_pools_are_named_and_nothing_is_half_stored(tier: Any) -> None:
    with opened(tier, max_tokens=4000) as one, opened(tier, max_tokens=4000) as two:
        one.append(layer=0, k=numbers(0, 2, 4000), v=numbers(1, 2, 4000))
        one.append(layer=1, k=numbers(0, 2, 3000), v=numbers(1, 2, 3000))
        with pytest.raises(CapacityExceeded, match="free"):
            two.append(layer=1, k=numbers(0, 2, 4000), v=numbers(1, 2, 4000))
        assert (one.lengths(), two.lengths()) == ([4000, 3000], [0, 0])


def test_a_closed_session_says_so(tier: Any) -> None:
    session = filled(tier)
    session.close()
    calls: list[Callable[[], Any]] = [
        lambda: session.lengths(),
        lambda: session.attend(layer=0, q=numbers(5, 4, 1)),
        lambda: session.append(layer=0, k=numbers(5, 2, 1), v=numbers(5, 2, 1)),
        lambda: session.fork(),
        lambda: session.truncate(0),
    ]
    for call in calls:
        with pytest.raises(SessionNotFound, match="closed"):
            call()


def test_a_closed_connection_says_so_and_closes_quietly_again(tier: Any) -> None:
    session = filled(tier)
    tier.close()
    tier.close()
    with pytest.raises(DaemonUnavailable, match=f"{tier.target}.*closed here"):
        session.attend(layer=0, q=numbers(5, 4, 1))
    with pytest.raises(DaemonUnavailable, match="closed here"):
        tier.status()
    session.close()


def test_the_end_of_a_connection_closes_its_sessions(connecting: Any, client_daemon: DaemonProcess) -> None:
    with connect(client_daemon.target) as watcher:
        before = watcher.status()["sessions"]
        with connecting(client_daemon.target) as tier:
            sessions = [opened(tier), opened(tier)]
            assert watcher.status()["sessions"] == before + len(sessions)
        assert watcher.status()["sessions"] == before


def engines() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "tierd-engine"}


def test_the_engine_in_this_process_ends_with_its_connection(connecting: Any) -> None:
    before = engines()
    with connecting("inproc://", settings=SMALL_INPROC):
        assert len(engines()) > len(before)
    assert engines() == before


def test_the_engine_in_this_process_ends_when_its_connection_is_collected(connecting: Any) -> None:
    before = engines()
    tier = connecting("inproc://", settings=SMALL_INPROC)
    own = engines() - before
    assert own
    del tier
    gc.collect()
    for thread in own:
        thread.join(30.0)
    assert engines() == before


class BrokenStub(TierStub):
    """What it sends of Lengths and Attend cannot be parsed."""

    def __init__(self, channel: Any) -> None:
        super().__init__(channel)  # type: ignore[no-untyped-call]

        def broken(request: Any) -> bytes:
            return bytes(request.SerializeToString() + b"\xff")

        self.Lengths = channel.unary_unary("/tierd.v1.Tier/Lengths", broken, pb.LengthsReply.FromString)
        self.Decode = channel.stream_stream("/tierd.v1.Tier/Decode", broken, pb.DecodeReply.FromString)


def test_what_the_daemon_cannot_parse_is_an_invalid_argument(
    connecting: Any, client_daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (grpc_sync, grpc_aio):
        monkeypatch.setattr(module, "TierStub", BrokenStub)
    with connecting(client_daemon.target, timeout=120) as tier:
        session = filled(tier)
        with pytest.raises(InvalidArgument, match=r"cannot be parsed as tierd\.v1\.LengthsRequest"):
            session.lengths()
        with pytest.raises(InvalidArgument, match=r"cannot be parsed as tierd\.v1\.DecodeRequest"):
            session.attend(layer=0, q=numbers(1, 4, 1))
        session.truncate(3)


def test_sessions_of_another_connection_are_refused(connecting: Any, client_daemon: DaemonProcess) -> None:
    with (
        connecting(client_daemon.target) as one,
        connecting(client_daemon.target) as two,
        pytest.raises(InvalidArgument, match="another connection"),
    ):
        two.step_many([(opened(one), 0, numbers(5, 4, 1), None, None)])


def test_threads_share_a_connection(client_daemon: DaemonProcess) -> None:
    with connect(client_daemon.target, timeout=120) as tier, ThreadPoolExecutor(6) as pool:
        sessions = [filled(tier, n=20 + number) for number in range(6)]
        alone = [[session.attend(layer=0, q=numbers(seed, 4, 1)).output for seed in range(8)] for session in sessions]

        def work(session: Any) -> list[Any]:
            return [session.attend(layer=0, q=numbers(seed, 4, 1)).output for seed in range(8)]

        for expected, got in zip(alone, pool.map(work, sessions), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_killed_daemon_is_named_and_a_new_one_has_another_epoch(connecting: Any, client_daemon: DaemonProcess) -> None:
    with DaemonProcess({"listen": "127.0.0.1:0"}) as daemon:
        tier = connecting(daemon.target)
        with connecting(client_daemon.target) as other:
            assert tier.epoch != other.epoch
        session = opened(tier)
        daemon.process.kill()
        daemon.process.wait()
        calls: list[Callable[[], Any]] = [lambda: session.lengths(), lambda: session.attend(layer=0, q=numbers(5, 4, 1))]
        for call in calls:
            with pytest.raises(DaemonUnavailable, match=daemon.target):
                call()
        session.close()
        tier.close()
        with pytest.raises(DaemonUnavailable, match=daemon.target):
            connecting(daemon.target)
