"""One turn of the engine: what runs together, in which order, for whom, and what is refused."""

from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engine_calls import CONFIG, GEOMETRY, LOOSE, Bench
from fake_kernels import attention
from scratch_copies import original_at
from tierd_kernels.layout import Layout, Memory
from tierd_kernels.policy import Budget
from tierd_kernels.reads import Reads

from tierd.commands import (
    Append,
    Attend,
    CloseSession,
    CloseWorker,
    Command,
    Fork,
    Lengths,
    OpenSession,
    Row,
    Status,
    Truncate,
)
from tierd.engine import STATUS_WAITING_MAX
from tierd.errors import (
    CapacityExceeded,
    CertificateUnavailable,
    DeadlineExceeded,
    InvalidArgument,
    SessionNotFound,
    Unavailable,
)
from tierd.residency import Ids

WIDE = replace(GEOMETRY, num_kv_heads=4)


def test_calls_that_wait_together_are_one_launch() -> None:
    bench = Bench()
    names = [bench.opened(worker, tokens=20) for worker in "abc"]
    results = bench.run(*(bench.attend(name, worker=worker) for name, worker in zip(names, "abc", strict=True)))
    assert [len(rows) for rows in results] == [1, 1, 1]
    assert bench.kernels.launches == [3] and bench.engine.counters.launches == 1


def test_one_geometry_is_one_launch() -> None:
    bench = Bench()
    one, other = bench.opened(tokens=20), bench.opened(tokens=20, geometry=WIDE)
    bench.run(bench.attend(one), bench.attend(other, geometry=WIDE))
    assert bench.kernels.launches == [1, 1] and bench.engine.counters.launches == 2


def test_a_batch_holds_a_session_once_and_no_more_rows_than_allowed() -> None:
    bench = Bench(replace(CONFIG, batch_rows_max=2))
    a, b, c = (bench.opened(tokens=20) for _ in range(3))
    bench.run(bench.attend(a), bench.attend(a))
    assert bench.kernels.launches == [1, 1]
    bench.kernels.launches.clear()
    bench.run(bench.attend(a), bench.attend(b), bench.attend(c))
    assert bench.kernels.launches == [2, 1]
    for rows in ([a, b, c], []):
        (refused,) = bench.run(bench.attend(*rows))
        assert type(refused) is InvalidArgument and f"has {len(rows)} rows; allowed: 1 to 2" in str(refused)


@pytest.mark.parametrize(("breaks", "launches"), [("append", [2]), ("append to a batched session", [1, 1]), ("lengths", [1, 1])])
def test_what_could_see_the_waiting_batch_lets_it_run_first(breaks: str, launches: list[int]) -> None:
    bench = Bench()
    a, b, c = (bench.opened(tokens=20) for _ in range(3))
    between = {
        "append": bench.append(c, 3), "append to a batched session": bench.append(a, 3), "lengths": Lengths(c, worker="w"),
    }[breaks]  # fmt: skip
    bench.run(bench.attend(a), between, bench.attend(b))
    assert bench.kernels.launches == launches


def test_commands_of_one_session_take_effect_in_order() -> None:
    bench = Bench()
    name = bench.opened()
    k, v = bench.numbers(2, 40), bench.numbers(2, 40)
    q = [bench.numbers(4, 1) for _ in range(3)]
    _, first, _, second, lengths, _, third = bench.run(
        Append(name, 0, k, v, worker="w"),
        Attend([Row(name, 0, q[0])], worker="w"),
        Truncate(name, 18, worker="w"),
        Attend([Row(name, 0, q[1], k[:, 30:], v[:, 30:])], worker="w"),
        Lengths(name, worker="w"),
        Append(name, 0, k[:, :1], v[:, :1], worker="w"),
        Attend([Row(name, 0, q[2])], worker="w"),
    )
    cut = [np.concatenate([x[:, :18], x[:, 30:]], axis=1) for x in (k, v)]
    last = [np.concatenate([now, x[:, :1]], axis=1) for now, x in zip(cut, (k, v), strict=True)]
    assert lengths == [28, 0]
    for (row,), stored, query in zip((first, second, third), ([k, v], cut, last), q, strict=True):
        np.testing.assert_array_equal(row.output, attention(stored[0], stored[1], query, GEOMETRY.scale, "float32"))


def test_one_rows_failure_takes_back_all_appends_of_its_command_and_no_others() -> None:
    bench = Bench()
    a, b, c = (bench.opened(tokens=15) for _ in range(3))
    rows = [Row(name, 0, bench.numbers(4, 1), bench.numbers(2, 2), bench.numbers(2, 2)) for name in (a, b, c)]
    bench.kernels.faults = [ValueError("a score is above 3e+38")]
    failed, done = bench.run(Attend(rows[:2], worker="w"), Attend(rows[2:], worker="w"))
    assert type(failed) is InvalidArgument and "3e+38" in str(failed) and len(done) == 1
    assert bench.run(*(Lengths(name, worker="w") for name in (a, b, c))) == [[15, 0], [15, 0], [17, 0]]
    assert bench.engine.counters.events["undone"] == 2


def test_an_append_that_finds_no_room_stores_nothing_and_says_what_is_free() -> None:
    block = GEOMETRY.layout().original_block_bytes
    bench = Bench(replace(CONFIG, originals_bytes=3 * block))
    name = bench.opened(tokens=30)
    (refused,) = bench.run(bench.append(name, 60))
    assert type(refused) is CapacityExceeded
    assert str(refused) == f"the originals pool cannot hold {4 * block} more bytes: {2 * block} used, {block} free of {3 * block}"
    assert bench.run(Lengths(name, worker="w"), bench.append(name, 18)) == [[30, 0], 48]


def test_a_group_is_not_measured_over_corrupt_originals() -> None:
    bench = Bench()
    name = bench.opened(tokens=1020)
    session = bench.engine.sessions.by_id[name]
    at = original_at(session.table, 1, int(session.layers[0].ids[5]), 1)
    bench.engine.residency.arenas.memory.originals[at + 3] ^= 0x40
    (refused,) = bench.run(bench.append(name, 5))
    assert type(refused) is CertificateUnavailable and "values of block" in str(refused)
    bench.engine.residency.arenas.memory.originals[at + 3] ^= 0x40
    assert bench.run(Lengths(name, worker="w"), bench.append(name, 5)) == [[1020, 0], 1025]


@pytest.mark.parametrize("corrupt", [0, 1])
@pytest.mark.parametrize("kind", [0, 1])
def test_an_answer_that_read_one_kind_of_originals_has_those_checked(kind: int, corrupt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    name = bench.opened(tokens=100)
    session, attend = bench.engine.sessions.by_id[name], bench.kernels.attend

    def of_one_kind(*args: Any) -> Any:
        return [replace(x, reads=Reads(*(y[..., x.reads.records[0] == kind] for y in x.reads))) for x in attend(*args)]

    monkeypatch.setattr(bench.kernels, "attend", of_one_kind)
    at = original_at(session.table, corrupt, int(session.layers[0].ids[5]), 1)
    bench.engine.residency.arenas.memory.originals[at] ^= 1  # the answer stays finite
    (answer,) = bench.run(bench.attend(name))
    assert (type(answer) is CertificateUnavailable) == (corrupt == kind), answer
    assert corrupt != kind or f"the original {('keys', 'values')[kind]} of block" in str(answer)


def test_all_groups_that_an_append_completes_are_measured_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, shapes = Bench(), []
    measure = bench.kernels.group_norms

    def seen(layout: Layout, memory: Memory, original_offsets: Ids, hot_offsets: Ids) -> Any:
        shapes.append(hot_offsets.shape)
        return measure(layout, memory, original_offsets, hot_offsets)

    monkeypatch.setattr(bench.kernels, "group_norms", seen)
    name = bench.opened(tokens=1000)
    assert bench.run(bench.append(name, 2080)) == [3080]
    assert shapes == [(3, 1024 // GEOMETRY.block_size)]
    state = bench.engine.sessions.by_id[name].layers[0]
    assert state.group_value_norms.shape == state.group_error_norms.shape == (3, GEOMETRY.num_kv_heads)
    assert len(np.unique(state.group_value_norms)) == 3 * GEOMETRY.num_kv_heads


def test_a_full_queue_says_so_and_still_lets_a_worker_leave() -> None:
    bench = Bench(replace(CONFIG, queue_max=2))
    name = bench.opened()
    waiting = [bench.engine.submit(Lengths(name, worker="w")) for _ in range(2)]
    with pytest.raises(CapacityExceeded, match="2 commands are waiting, 0 free: queue_max is 2"):
        bench.engine.submit(Lengths(name, worker="w"))
    leaving = bench.engine.submit(CloseWorker(worker="w"))
    assert bench.engine.run_once() == 3
    assert [future.result(timeout=0) for future in waiting] == [[0, 0]] * 2 and leaving.result(timeout=0) == 1
    assert type(bench.run(Lengths(name, worker="w"))[0]) is SessionNotFound


def test_the_status_has_room_in_a_full_queue_and_takes_none_of_it() -> None:
    bench = Bench(replace(CONFIG, queue_max=2))
    name = bench.opened()
    asked = [bench.engine.submit(Status(worker="")) for _ in range(STATUS_WAITING_MAX)]
    waiting = [bench.engine.submit(Lengths(name, worker="w")) for _ in range(2)]
    with pytest.raises(CapacityExceeded, match=f"{STATUS_WAITING_MAX} requests for the status are waiting, 0 free"):
        bench.engine.submit(Status(worker=""))
    assert bench.engine.run_once() == STATUS_WAITING_MAX + 2
    assert {future.result(timeout=0)["sessions"] for future in asked} == {1}
    assert [future.result(timeout=0) for future in waiting] == [[0, 0]] * 2
    assert bench.run(Status(worker=""))[0]["commands"] == STATUS_WAITING_MAX + 3


def test_the_status_is_told_as_soon_as_a_launch_is_over_and_splits_no_batch() -> None:
    bench = Bench()
    first, second, third = (bench.opened(tokens=20) for _ in range(3))
    status: list[Future[Any]] = []
    bench.kernels.during = lambda: None if status else status.append(bench.engine.submit(Status(worker="")))
    lengths = [bench.engine.submit(command) for command in (bench.attend(first), Lengths(first, worker="w"), bench.attend(second))]
    early, last = bench.engine.submit(Status(worker="")), bench.engine.submit(bench.attend(third))
    order: list[str] = []
    lengths[2].add_done_callback(lambda _: order.append(f"a batch after {len(status) and status[0].done()}"))
    assert bench.engine.run_once() == 6
    assert early.result(timeout=0)["launches"] == 0 and status[0].result(timeout=0)["launches"] == 1
    assert order == ["a batch after True"] and len(last.result(timeout=0)) == 1 and bench.kernels.launches == [1, 2]


def test_too_many_sessions_are_refused_opened_or_forked() -> None:
    bench = Bench(replace(CONFIG, sessions_max=1))
    name = bench.opened(tokens=3)
    again = OpenSession(GEOMETRY, LOOSE, Budget(), 10, worker="other")
    for refused in bench.run(again, Fork(name, worker="w")):
        assert type(refused) is CapacityExceeded and str(refused) == "1 sessions are open, 0 free: sessions_max is 1"


@pytest.mark.parametrize("max_tokens", [0, -1, CONFIG.max_tokens + 1])
def test_max_tokens_has_limits(max_tokens: int) -> None:
    (refused,) = Bench().run(OpenSession(GEOMETRY, LOOSE, Budget(), max_tokens, worker="w"))
    assert type(refused) is InvalidArgument and f"max_tokens is {max_tokens}; allowed: 1 to {CONFIG.max_tokens}" in str(refused)


def test_a_call_whose_deadline_passed_is_not_begun() -> None:
    bench = Bench()
    name = bench.opened(tokens=20)
    in_time = replace(bench.append(name, 1), deadline=bench.clock.now() + 5.0)
    late = [replace(x, deadline=bench.clock.now() + 4.5) for x in (bench.append(name, 1), bench.attend(name), Fork(name, worker="w"))]
    futures = [bench.engine.submit(command) for command in (*late, in_time)]
    bench.clock.advance(5.0)
    bench.engine.run_once()
    for future in futures[:3]:
        with pytest.raises(DeadlineExceeded, match=r"0\.500 s before this call's turn; nothing was done"):
            future.result(timeout=0)
    assert futures[3].result(timeout=0) == 21 and bench.kernels.launches == []
    assert bench.engine.counters.events["deadline_exceeded"] == 3 and len(bench.engine.sessions.by_id) == 1


def test_a_cancelled_call_is_not_begun() -> None:
    bench = Bench()
    name = bench.opened(tokens=20)
    futures = [bench.engine.submit(command) for command in (bench.append(name, 1), bench.attend(name))]
    assert all(future.cancel() for future in futures)
    assert bench.run(Lengths(name, worker="w")) == [[20, 0]] and bench.kernels.launches == []


def test_a_silent_workers_sessions_are_closed() -> None:
    bench = Bench(replace(CONFIG, lease_s=10.0))
    silent, alive = bench.opened("silent", tokens=20), bench.opened("alive", tokens=20)
    bench.clock.advance(6.0)
    bench.run(Status(worker="alive"))
    bench.clock.advance(4.0)
    bench.engine.run_once()
    assert bench.engine.sessions.by_id.keys() == {silent, alive}
    bench.clock.advance(0.5)
    bench.engine.run_once()
    assert bench.engine.sessions.by_id.keys() == {alive} and bench.engine.counters.events["lease_expired"] == 1
    assert type(bench.run(Lengths(silent, worker="silent"))[0]) is SessionNotFound
    bench.clock.advance(20.0)
    assert bench.run(Lengths(alive, worker="alive")) == [[20, 0]], "a command renews the lease even if it comes late"


def test_who_waited_for_the_engine_was_not_silent() -> None:
    """The turn is longer than a lease: a large append, an exact head, a compiler."""
    bench = Bench(replace(CONFIG, lease_s=10.0))
    slow, behind = bench.opened("slow", tokens=20), bench.opened("behind", tokens=20)
    bench.kernels.during = lambda: bench.clock.advance(11.0)
    bench.run(bench.attend(slow, worker="slow"), Lengths(behind, worker="behind"))
    bench.engine.run_once()  # before the next call of either is there
    assert bench.engine.sessions.by_id.keys() == {slow, behind}
    bench.clock.advance(10.5)
    bench.engine.run_once()
    assert not bench.engine.sessions.by_id, "now they were"


def test_who_sends_a_long_command_in_parts_is_not_silent() -> None:
    bench = Bench(replace(CONFIG, lease_s=10.0))
    sending, silent = bench.opened("sending", tokens=20), bench.opened("silent", tokens=20)
    for number in range(4):
        bench.clock.advance(6.0)
        bench.engine.hear("sending")
        bench.engine.hear("nobody")
        bench.engine.run_once()
        assert bench.engine.sessions.by_id.keys() == ({sending, silent} if number == 0 else {sending})
    bench.clock.advance(10.5)
    bench.engine.run_once()
    assert not bench.engine.sessions.by_id, "nothing more has come"


def test_without_a_lease_nothing_expires() -> None:
    bench = Bench()
    name = bench.opened()
    bench.clock.advance(1e9)
    assert bench.run(Lengths(name, worker="w")) == [[0, 0]]


def test_a_worker_sees_its_own_sessions_only() -> None:
    bench = Bench()
    name = bench.opened("owner", tokens=20)
    mine = bench.opened("thief", tokens=20)
    commands: list[Command] = [
        bench.append(name, 1, worker="thief"), bench.attend(name, worker="thief"), bench.attend(mine, name, worker="thief"),
        Truncate(name, 3, worker="thief"), Fork(name, worker="thief"),
        Lengths(name, worker="thief"), CloseSession(name, worker="thief"),
    ]  # fmt: skip
    for refused in bench.run(*commands):
        assert type(refused) is SessionNotFound and name in str(refused)
    assert bench.run(CloseWorker(worker="nobody"), CloseWorker(worker="thief")) == [0, 1]
    assert bench.run(Lengths(name, worker="owner")) == [[20, 0]]
    assert bench.engine.sessions.by_id[name].tolerance == LOOSE


def test_status_is_ready_for_json() -> None:
    bench = Bench()
    name = bench.opened(tokens=40)
    bench.run(Fork(name, worker="w"), bench.attend(name))
    (status,) = bench.run(Status(worker="anyone"))
    layout = GEOMETRY.layout()
    assert (status["sessions"], status["workers"], status["tokens"], status["blocks"]) == (2, 1, 80, 4)
    assert status["pools"]["hot"]["used_bytes"] == 2 * layout.hot_block_bytes
    assert status["pools"]["originals"]["free_bytes"] == CONFIG.originals_bytes - 4 * layout.original_block_bytes
    assert (status["launches"], status["head_steps"], status["copies"]) == (1, 4, 8)


def test_an_engine_that_stops_answers_what_waits_and_takes_nothing_new() -> None:
    bench = Bench()
    waiting = bench.engine.submit(OpenSession(GEOMETRY, LOOSE, Budget(), 10, worker="w"))
    bench.engine.stop(0.0)
    assert waiting.result(timeout=0)
    with pytest.raises(Unavailable, match="stopping and takes no new calls"):
        bench.engine.submit(Status(worker="w"))
