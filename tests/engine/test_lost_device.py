"""A backend whose device is lost: the call fails, nothing is answered any more, and what needs no device still works."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from engine_calls import CONFIG, GEOMETRY, LOOSE, Bench
from tierd_kernels.errors import DeviceLost
from tierd_kernels.policy import Budget

from tierd.commands import CloseSession, CloseWorker, Fork, Lengths, OpenSession, Status, Truncate
from tierd.errors import Unavailable

WAIT_S = 30.0  # only a failing test waits this long
FAULT = DeviceLost("an illegal address was read")
NOWHERE = np.zeros(1, np.int64)


def lost(answer: Any) -> bool:
    return isinstance(answer, Unavailable) and all(text in str(answer) for text in ("device", "lost", str(FAULT), "restart the daemon"))


def during_a_launch(bench: Bench, name: str) -> Any:
    bench.kernels.faults = [FAULT]
    return bench.run(bench.attend(name))[0]


def during_an_append(bench: Bench, name: str) -> Any:
    bench.kernels.quantise_faults = [FAULT]
    return bench.run(bench.append(name, 40))[0]


def while_compiling(bench: Bench, name: str) -> Any:
    bench.kernels.prepare_faults = [FAULT]
    return bench.run(OpenSession(GEOMETRY, LOOSE, Budget(), 100, worker="w"))[0]


def during_a_copy(bench: Bench, name: str) -> Any:
    bench.kernels.copy_faults = [FAULT]
    (answer,) = bench.run(bench.attend(name))  # reads originals, which are then copied: an answer of before the fault
    assert len(answer) == 1
    return bench.run(bench.attend(name))[0]


@pytest.mark.parametrize("lose", [during_a_launch, during_an_append, while_compiling, during_a_copy])
def test_a_lost_device_ends_the_call_and_all_that_need_it(lose: Callable[[Bench, str], Any]) -> None:
    bench = Bench()
    name = bench.opened(tokens=40)
    assert lost(lose(bench, name))
    assert lost(bench.engine.lost.result(0) and Unavailable(bench.engine.lost.result(0)))
    launches = len(bench.kernels.launches)
    commands = [
        bench.attend(name), bench.append(name, 1), OpenSession(GEOMETRY, LOOSE, Budget(), 100, worker="w"), Fork(name, worker="w"),
        Truncate(name, 3, worker="w"), Lengths(name, worker="w"),
    ]  # fmt: skip
    assert all(lost(answer) for answer in bench.run(*commands))
    assert len(bench.kernels.launches) == launches
    (status,) = bench.run(Status(worker=""))
    assert (status["fault"], status["sessions"], status["events"]["device_lost"]) == (bench.engine.lost.result(0), 1, 1)
    assert bench.run(CloseSession(name, worker="w")) == [None]
    assert bench.run(CloseWorker(worker="w")) == [0]
    assert bench.engine.residency.arenas.hot.used_bytes == 0


def test_an_append_that_loses_the_device_is_taken_back() -> None:
    bench = Bench()
    name = bench.opened(tokens=40)
    assert lost(during_an_append(bench, name))
    assert bench.engine.sessions.by_id[name].lengths == [40, 0]


def test_what_waited_in_the_same_turn_is_refused_too() -> None:
    bench = Bench()
    first, second = bench.opened(tokens=40), bench.opened(tokens=20)
    bench.kernels.faults = [FAULT]
    assert all(lost(answer) for answer in bench.run(bench.attend(first), bench.attend(second), bench.append(first, 1), bench.attend(first)))
    assert len(bench.kernels.launches) == 1


def test_an_answer_that_was_computed_while_the_device_was_lost_is_withheld() -> None:
    bench = Bench()
    name = bench.opened(tokens=40)
    device = bench.engine._device

    def copy() -> None:  # as tiering does, in the midst of a launch
        bench.kernels.copy_faults = [FAULT]
        with pytest.raises(Unavailable):
            device.begin_copies(bench.engine.residency.arenas.memory, NOWHERE, NOWHERE, 64)

    bench.kernels.during = copy
    assert lost(bench.run(bench.attend(name))[0])


def test_an_engine_that_loses_the_device_over_a_copy_lives_to_say_so() -> None:
    bench = Bench()
    name = bench.opened(tokens=40)
    bench.kernels.copy_faults = [FAULT]
    bench.engine.start()
    assert len(bench.engine.submit(bench.attend(name)).result(WAIT_S)) == 1
    assert str(FAULT) in bench.engine.lost.result(WAIT_S)
    assert lost(bench.engine.submit(bench.attend(name)).exception(WAIT_S))
    bench.engine.stop(WAIT_S)
    assert bench.engine.counters.events["failed_copy"] > 0
    assert bench.engine.residency.num_copies == 0
    bench.engine.check_integrity()


def test_kernels_that_cannot_be_prepared_open_no_session_and_lose_no_device() -> None:
    bench = Bench(CONFIG)
    bench.kernels.prepare_faults = [RuntimeError("no such instruction")]
    opening = OpenSession(GEOMETRY, LOOSE, Budget(), 100, worker="w")
    refusal, name = bench.run(opening, opening)
    assert isinstance(refusal, Unavailable) and "RuntimeError: no such instruction" in str(refusal)
    assert list(bench.engine.sessions.by_id) == [name] and not bench.engine.lost.done()
