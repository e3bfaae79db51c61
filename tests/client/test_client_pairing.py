"""Replies find their promises, whatever the order, and the end of a stream reaches every one."""

from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tierd_client.errors import CapacityExceeded, DaemonUnavailable, SessionNotFound
from tierd_client.pairing import Pairing
from tierd_proto.v1 import tierd_pb2 as pb


def new_pairing(in_flight_max: int = 100) -> Pairing["Future[Any]"]:
    pairing = Pairing[Any]("t", in_flight_max, Future)
    pairing.deliver(pb.DecodeReply())
    assert pairing.ready.done()
    return pairing


def reply(number: int, mark: int) -> pb.DecodeReply:
    output = pb.Tensor(shape=[mark])
    return pb.DecodeReply(id=number, attend=pb.AttendReply(rows=[pb.RowResult(output=output)]))


@given(st.data())
def test_each_request_gets_its_own_reply_at_most_once(data: st.DataObject) -> None:
    pairing = new_pairing()
    begun = [pairing.begin(pb.AttendRequest(), 1.0) for _ in range(data.draw(st.integers(1, 12)))]
    assert len({request.id for request, _ in begun} | {0}) == len(begun) + 1
    forgotten = data.draw(st.sets(st.integers(0, len(begun) - 1)))
    for number in forgotten:
        pairing.forget(begun[number][0])
    said = data.draw(st.lists(st.integers(-2, len(begun) - 1)))
    first: dict[int, int] = {}
    for mark, number in enumerate(said):
        pairing.deliver(reply(begun[number][0].id if number >= 0 else 1000 - number, mark))
        first.setdefault(number, mark)
    for number, (_, promise) in enumerate(begun):
        assert promise.done() == (number in first and number not in forgotten)
        if promise.done():
            assert promise.result().rows[0].output.shape == [first[number]]
    assert pairing.num_waiting == sum(not promise.done() for _, promise in begun) - len(forgotten)


def test_the_end_fails_all_that_wait_and_all_to_come_with_the_first_reason() -> None:
    pairing = new_pairing()
    waiting = [pairing.begin(pb.AttendRequest(), 1.0)[1] for _ in range(3)]
    pairing.lose(SessionNotFound("power cut"))
    pairing.lose(SessionNotFound("something else"))
    for promise in waiting:
        with pytest.raises(DaemonUnavailable, match=r"connection to t has ended.*power cut"):
            promise.result(0)
    for call in (pairing.check, lambda: pairing.begin(pb.AttendRequest(), 1.0)):
        with pytest.raises(DaemonUnavailable, match="power cut"):
            call()
    assert pairing.num_waiting == 0


def test_a_stream_that_never_opened_fails_with_the_reason_itself() -> None:
    pairing = Pairing[Any]("t", 1, Future)
    pairing.lose(CapacityExceeded("full"))
    with pytest.raises(CapacityExceeded, match="full"):
        pairing.ready.result(0)


def test_nobody_waits_for_a_stream_that_ends_while_the_call_begins() -> None:
    def lose_first() -> "Future[Any]":
        if pairings:
            pairings[0].lose(DaemonUnavailable("cut"))
        return Future()

    pairings: list[Pairing[Future[Any]]] = []
    pairings.append(Pairing[Any]("t", 10, lose_first))
    with pytest.raises(DaemonUnavailable, match="cut"):
        pairings[0].begin(pb.AttendRequest(), 1.0)
    assert pairings[0].num_waiting == 0
