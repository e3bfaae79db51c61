"""Who makes room for whom: the shelf beside a plain dict, every eviction held against the rule, for each record and victim anew."""

from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from numpy.typing import NDArray

from tierd.policy import Shelf

OWNERS = "abcd"
CAPACITIES = 60, 20  # of two regions
REGIONS = st.sampled_from(range(len(CAPACITIES)))
SIZES = 1, 2, 3
WORTHS = st.integers(1, 12).map(float)


def ids(*copies: int) -> NDArray[np.int64]:
    return np.array(copies, np.int64)


@dataclass
class Copy:
    region: int
    owner: str
    nbytes: int
    worth: float
    arrived: bool = False


class Machine(RuleBasedStateMachine):
    """`copies`: what the shelf should know, by id; ids are used again."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf, self.copies = Shelf(*CAPACITIES), dict[int, Copy]()

    @rule(
        region=REGIONS, owner=st.sampled_from(OWNERS), nbytes=st.sampled_from(SIZES), worths=st.lists(WORTHS, max_size=8),
        arrived=st.booleans(),
    )  # fmt: skip
    def put(self, region: int, owner: str, nbytes: int, worths: list[float], arrived: bool) -> None:
        worths = worths[: self.free(region) // nbytes]
        fresh = [copy_id for copy_id in range(sum(CAPACITIES) + 8) if copy_id not in self.copies][: len(worths)]
        self.shelf.put(np.full(len(fresh), region), ids(*fresh), owner, nbytes, np.array(worths))
        if arrived:
            self.shelf.arrive(ids(*fresh))
        self.copies |= {copy_id: Copy(region, owner, nbytes, worth, arrived) for copy_id, worth in zip(fresh, worths, strict=True)}

    @precondition(lambda self: any(not copy.arrived for copy in self.copies.values()))
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sets(st.sampled_from([i for i, copy in self.copies.items() if not copy.arrived])))
        self.shelf.arrive(ids(*chosen))
        for copy_id in chosen:
            self.copies[copy_id].arrived = True

    @precondition(lambda self: self.copies)
    @rule(data=st.data(), more=st.integers(0, 9))
    def gain(self, data: st.DataObject, more: int) -> None:
        chosen = sorted(data.draw(st.sets(st.sampled_from(sorted(self.copies)))))
        for copy_id in chosen:
            self.copies[copy_id].worth += more
        self.shelf.gain(ids(*chosen), np.array([self.copies[copy_id].worth for copy_id in chosen]))

    @precondition(lambda self: self.copies)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.forget(sorted(data.draw(st.sets(st.sampled_from(sorted(self.copies))))))

    @rule()
    def rescale(self) -> None:
        self.shelf.rescale(0.5)
        for copy in self.copies.values():
            copy.worth *= 0.5

    @rule(
        region=REGIONS, owner=st.sampled_from(OWNERS), nbytes=st.sampled_from(SIZES), bids=st.lists(WORTHS, max_size=12),
        active=st.sets(st.sampled_from(OWNERS)), pieces=st.booleans(),
    )  # fmt: skip
    def choose(self, region: int, owner: str, nbytes: int, bids: list[float], active: set[str], pieces: bool) -> None:
        bids = sorted(bids, reverse=True)
        free = 0 if pieces else self.free(region)
        room = self.shelf.choose(region, owner, nbytes, np.array(bids), free, active)
        fair = CAPACITIES[region] / len({owner, *active})
        there = {copy_id: copy for copy_id, copy in self.copies.items() if copy.arrived and copy.region == region}
        left = {name: self.used(region, name) for name in OWNERS}
        victims = iter(room.evictions.tolist())
        for placed, bid in enumerate(bids):
            while free < nbytes:
                legal = self.legal(owner, nbytes, bid, there, left, fair, active)
                # What was taken for a record that got no room in the end was put back.
                victim = next(victims) if placed < room.placed else min(legal, default=None)
                if victim is None:
                    break
                assert victim in legal
                gone = there.pop(victim)
                free, left[gone.owner] = free + gone.nbytes, left[gone.owner] - gone.nbytes
            assert (free >= nbytes) == (placed < room.placed)
            if free < nbytes:
                break
            free, left[owner] = free - nbytes, left[owner] + nbytes
        assert next(victims, None) is None
        self.forget(room.evictions.tolist())

    def legal(
        self, owner: str, nbytes: int, bid: float, there: dict[int, Copy], left: dict[str, int], fair: float, active: set[str]
    ) -> set[int]:
        """Which copies may be the next to go."""
        others = [name for name in OWNERS if name != owner and (name not in active or left[name] > fair)]
        rich = [name for name in others if any(copy.owner == name for copy in there.values())] if left[owner] + nbytes <= fair else []
        if rich:
            most = max(left[name] for name in rich)
            return {i for name in rich if left[name] == most for i in least({i: c for i, c in there.items() if c.owner == name})}
        return least({i: copy for i, copy in there.items() if copy.owner in [*others, owner] and copy.worth < bid})

    @invariant()
    def agrees(self) -> None:
        assert len(self.shelf) == len(self.copies)
        for region in range(len(CAPACITIES)):
            assert [self.shelf.used_bytes(region, name) for name in OWNERS] == [self.used(region, name) for name in OWNERS]

    def used(self, region: int, name: str) -> int:
        return sum(copy.nbytes for copy in self.copies.values() if (copy.region, copy.owner) == (region, name))

    def free(self, region: int) -> int:
        return CAPACITIES[region] - sum(self.used(region, name) for name in OWNERS)

    def forget(self, gone: list[int]) -> None:
        self.shelf.drop(ids(*gone))
        for copy_id in gone:
            del self.copies[copy_id]


def least(copies: dict[int, Copy]) -> set[int]:
    worth = min((copy.worth for copy in copies.values()), default=0.0)
    return {copy_id for copy_id, copy in copies.items() if copy.worth == worth}


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=40)


@given(st.integers(1, 20), st.integers(0, 9))
def test_room_is_made_in_a_region_that_does_not_hold_a_whole_number_of_records(records: int, rest: int) -> None:
    for bid, evicted in ((9.0, [0]), (1.0, [])):
        shelf = Shelf(10 * records + rest)
        shelf.put(np.zeros(records, np.int64), np.arange(records), "a", 10, 1.0 + np.arange(records))
        shelf.arrive(np.arange(records))
        room = shelf.choose(0, "a", 10, np.array([bid]), rest, ["a"])
        assert (room.placed, room.evictions.tolist()) == (len(evicted), evicted)


def test_who_found_no_room_is_no_owner() -> None:
    shelf = Shelf(4096, 4096)
    for number in range(100):
        assert shelf.choose(0, f"s{number}", 8192, np.ones(3), 4096, ()).placed == 0
    assert shelf._numbers == {}
    shelf.put(np.array([0]), np.array([0]), "a", 4096, np.ones(1))
    for region in (0, 1):
        assert shelf.choose(region, "a", 4096, np.zeros(1), 0, ("a",)).placed == 0, "not worth more than what is there, or none is"
    assert shelf.used_bytes(0, "a") == 4096


def test_a_copy_has_one_owner() -> None:
    shelf = Shelf(4096)
    shelf.put(np.array([0]), np.array([3]), "a", 64, np.ones(1))
    with pytest.raises(AssertionError, match="has an owner"):
        shelf.put(np.array([0]), np.array([3]), "b", 64, np.ones(1))
