"""The small parts: who has a lease, names and clocks."""

import pytest

from tierd.clock import ManualClock, SystemClock
from tierd.ids import new_epoch, new_session_id
from tierd.leases import Leases


def test_leases() -> None:
    clock = ManualClock()
    leases = Leases(clock, 10.0)
    leases.touch("stranger")
    leases.bind("a", "s2")
    leases.bind("a", "s1")
    clock.advance(4.0)
    leases.bind("b", "s3")
    assert (leases.num_workers, leases.sessions_of("a"), leases.sessions_of("stranger")) == (2, ["s1", "s2"], [])
    clock.advance(6.0)
    assert leases.expired() == []
    clock.advance(0.1)
    assert leases.expired() == ["a"]
    leases.touch("a")
    clock.advance(5.0)
    assert leases.expired() == ["b"]
    leases.unbind("b", "s3")
    leases.unbind("a", "s1")
    assert (leases.expired(), leases.num_workers, leases.sessions_of("a")) == ([], 1, ["s2"])
    with pytest.raises(KeyError):
        leases.unbind("b", "s3")


def test_names_are_never_the_same() -> None:
    assert len({new_session_id() for _ in range(1000)} | {new_epoch() for _ in range(1000)}) == 2000
    assert all(name.startswith("s-") and len(name) == 18 for name in (new_session_id() for _ in range(10)))


def test_clocks_do_not_run_backwards() -> None:
    clock = SystemClock()
    assert clock.now() <= clock.now()
    with pytest.raises(AssertionError):
        ManualClock().advance(-1.0)
