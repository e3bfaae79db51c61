"""Copies that are begun in parts while kernels run: in the end those that one turn out of their shadow begins, and none of what is gone."""

import threading
from dataclasses import replace
from random import Random
from typing import Any, cast

import numpy as np
import pytest
from engine_calls import CONFIG, EXACT, RECORD_BYTES, Bench
from hypothesis import given
from hypothesis import strategies as st

from tierd.commands import Attend, CloseSession, CloseWorker, Command, Fork, Row, Truncate
from tierd.engine import EngineConfig
from tierd.engine.scratch import Asker
from tierd.engine.wanted import MISSES_BORNE, MISSES_SEEN, PART, PART_MIN, Part, Wanted, Wish, together
from tierd.policy import Choice
from tierd.policy.link import BURST_S
from tierd.residency import BlockTable, Ids

RECORDS = 16  # originals of 64 tokens at one layer
TABLE = cast(BlockTable, None)  # of wishes that nobody begins


class Hidden(Bench):
    """An engine over a device, with a thread that always goes on with the next call; nothing is taken in."""

    def __init__(self, config: EngineConfig = CONFIG, promote_every: int = 1) -> None:
        super().__init__(replace(config, prefetch_wait_us_max=0.0), promote_every)
        self.kernels.has_device = True
        self.engine._thread = threading.current_thread()
        self.engine._migrator.poll = list  # type: ignore[method-assign,assignment]
        self.cache, self.counters = self.engine._cache, self.engine.counters

    def filled(self, tokens: list[list[int]]) -> list[str]:
        """Sessions with so many tokens at their layers."""
        names = [self.opened() for _ in tokens]
        self.run(*(self.append(name, n, layer) for name, layers in zip(names, tokens, strict=True) for layer, n in enumerate(layers) if n))
        return names

    def called(self, tokens: list[list[int]]) -> list[str]:
        """Every layer of these is called once, all together."""
        names = self.filled(tokens)
        rows = [Row(name, i, self.numbers(4, 1)) for name, layers in zip(names, tokens, strict=True) for i, n in enumerate(layers) if n]
        (answers,) = self.run(Attend(rows, worker="w"))
        assert len(answers) == len(rows)
        return names

    def hide(self) -> int:
        """A turn of tiering behind kernels; returns how many copies began."""
        before = self.counters.prefetched
        self.engine._tier(hidden=True)
        self.engine.check_integrity()
        return self.counters.prefetched - before

    def begun(self) -> set[tuple[int, int, int]]:
        return {(copy.kind, copy.block, copy.head) for copy in self.engine.residency.copies()}

    def run(self, *commands: Command) -> list[Any]:
        outcomes = super().run(*commands)
        assert self.counters.events["fault"] == 0
        return outcomes


def drawn(seed: int) -> tuple[EngineConfig, int, list[list[int]]]:
    """A configuration, how many originals are promoted, and the tokens of sessions' layers. Printed where a test fails."""
    rng = np.random.default_rng(seed)
    scratch, copier = int(rng.choice([20, 100, 4000])), int(rng.choice([5, 64, 256]))
    tokens = [[int(n) for n in rng.integers(0, 700, 2)] for _ in range(int(rng.integers(1, 4)))]
    config = replace(CONFIG, scratch_bytes=scratch * RECORD_BYTES, migrations_max=copier, originals_bytes=16 << 20)
    print(seed, scratch, copier, tokens)
    return config, int(rng.integers(1, 4)), tokens


def wanted_after(tokens: list[list[int]], promote_every: int) -> int:
    """The model: every original that was read is wanted."""
    blocks = [block for layers in tokens for n in layers for block in range(n // 16)]
    return 2 * sum((block + head) % promote_every == 0 for block in blocks for head in range(2))


@pytest.mark.parametrize("seed", range(40))
def test_parts_are_in_the_end_what_one_turn_begins(seed: int) -> None:
    config, promote_every, tokens = drawn(seed)
    parts, whole = Hidden(config, promote_every), Hidden(config, promote_every)
    parts.called(tokens)
    whole.called(tokens)
    assert parts.hide() == 0, "looked at, and no more"
    left = everything = wanted_after(tokens, promote_every)
    while parts.cache.is_behind:
        assert len(parts.cache._wanted) == left
        if left < PART_MIN:
            assert parts.hide() == 0, "few wait"
            parts.cache._wanted.missed(MISSES_BORNE)
        most = min(left, max(PART_MIN, -(-left // PART)))
        begun = parts.hide()
        assert begun <= most and len(parts.cache._wanted) <= left - most
        assert begun == most or parts.counters.prefetched < everything, "less only where there was no room"
        left = len(parts.cache._wanted)
    whole.engine._tier()
    assert not whole.cache.is_behind and parts.counters.prefetched == whole.counters.prefetched > 0
    if whole.counters.prefetched == everything or sum(n >= 16 for layers in tokens for n in layers) == 1:
        assert parts.begun() == whole.begun()


def test_what_has_arrived_is_taken_in_behind_kernels_too() -> None:
    bench = Hidden()
    poll = bench.engine._migrator.poll
    del bench.engine._migrator.poll
    assert poll is list
    (name,) = bench.called([[64, 0]])
    bench.hide()
    while bench.counters.misses < MISSES_BORNE + RECORDS:  # the first ones were read before anything was wanted
        bench.run(bench.attend(name))
        assert bench.counters.prefetched == 0
        bench.hide()
    assert bench.hide() == RECORDS
    assert bench.engine.residency.num_copies == RECORDS and bench.engine.residency.num_in_flight == 0


def test_a_call_is_not_looked_at_for_a_few_misses_whose_copies_would_wait() -> None:
    bench = Hidden()
    (name,) = bench.filled([[64, 0]])
    session = bench.engine.sessions.by_id[name]
    for turn, least in ((lambda: None, 1), (bench.hide, MISSES_SEEN), (bench.engine._tier, 1)):
        turn()
        looks_at = bench.cache.looks_at(session, 0)
        assert looks_at(16, least) and not looks_at(16, least - 1), "in a turn that is not hidden all copies begin"


def test_what_a_call_taught_is_learnt_though_the_engine_stops() -> None:
    bench = Bench()
    bench.kernels.has_device = True
    name = bench.opened(tokens=64)
    bench.engine.start()
    assert len(bench.engine.submit(bench.attend(name)).result(30.0)) == 1
    bench.engine.stop(30.0)
    bench.engine.check_integrity()
    assert bench.engine.counters.prefetched == RECORDS == bench.engine.residency.num_copies


def test_nothing_more_of_a_kind_is_tried_once_scratch_has_no_room_for_a_better_one(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, tried = Hidden(replace(CONFIG, scratch_bytes=8 * RECORD_BYTES)), list[tuple[int, int]]()
    bench.called([[400, 400]])
    place = bench.cache._scratch.place

    def told(askers: Any, table: BlockTable, blocks: Ids, heads: Ids, worths: Any, num_keys: int, *arguments: Any) -> Any:
        tried.append((num_keys, len(blocks) - num_keys))
        return place(askers, table, blocks, heads, worths, num_keys, *arguments)

    monkeypatch.setattr(bench.cache._scratch, "place", told)
    bench.hide()
    (table,) = bench.engine.residency.tables.values()
    assert np.count_nonzero(table.notes["waits"]) == 200
    bench.hide()
    bench.run()
    assert not table.notes["waits"].any(), "what has no room waits no more"
    assert len(tried) == 1 and sum(tried[0]) == PART_MIN and bench.counters.prefetched == 8 and not bench.cache.is_behind


def test_copies_of_several_layers_are_placed_together_and_are_each_layers_own() -> None:
    bench = Hidden()
    (name,) = bench.called([[64, 48]])
    placed, place = list[int](), bench.cache._scratch.place
    bench.cache._scratch.place = lambda askers, *rest: [placed.append(len(askers)), place(askers, *rest)][1]  # type: ignore[method-assign]
    bench.run()
    session = bench.engine.sessions.by_id[name]
    assert placed == [RECORDS + 12] and bench.counters.prefetched == RECORDS + 12
    assert bench.cache._under_way == {(session.family, 0): RECORDS, (session.family, 1): 12}
    (told,) = bench.cache.status()["sessions"]
    assert told["layers"]["prefetched"] == [RECORDS, 12]
    for copy in bench.engine.residency.copies():
        (asker,) = bench.cache._scratch.askers(np.array([copy.copy_id]))
        assert copy.block in session.full_ids(asker.layer)


def test_layers_that_are_placed_together_share_the_links_budget() -> None:
    affordable = RECORDS + 3
    bench = Hidden(replace(CONFIG, prefetch_link_share=1.0, link_bytes_per_s=affordable * RECORD_BYTES / BURST_S))
    bench.called([[64, 64]])
    bench.run()
    assert bench.counters.prefetched == affordable, "the clock stands still"


def test_scratch_that_is_full_for_one_session_may_have_room_for_another() -> None:
    wanted, wishes = Wanted(), [wish(0, 4), wish(1, 4), wish(0, 4, session="another")]
    for each in wishes:
        each.choice.records[:] = [[0, 7, 0], [1, 7, 0], [1, 8, 0], [0, 8, 0]]
        each.choice.worths[:] = [4.0, 3.0, 2.0, 1.0]
        wanted.add(each)
    wishes[1].next(2)
    left_out = wanted.leave_out("s", 1)
    assert [rest.tolist() for rest in left_out] == [[[1, 7, 0], [1, 8, 0]], [[1, 8, 0]]]
    left = [each.choice.worths[each.next(9)].tolist() for each in wishes]
    assert left == [[4.0, 1.0], [1.0], [4.0, 3.0, 2.0, 1.0]]


@pytest.mark.parametrize("ending", ["truncate", "close", "worker", "lease", "fork", "append"])
def test_nothing_is_wanted_any_more_when_a_command_may_free_blocks(ending: str) -> None:
    bench = Hidden(replace(CONFIG, lease_s=10.0))
    (name,) = bench.called([[400, 400]])
    bench.hide()
    bench.hide()
    assert bench.cache.is_behind and 0 < len(bench.cache._wanted) < 200
    commands: dict[str, list[Command]] = {
        "truncate": [Truncate(name, 8, worker="w")], "close": [CloseSession(name, worker="w")], "worker": [CloseWorker(worker="w")],
        "lease": [], "fork": [Fork(name, worker="w")], "append": [bench.append(name, 1)],
    }  # fmt: skip
    bench.clock.advance(11.0 if ending == "lease" else 0.0)
    bench.run(*commands[ending])
    assert not bench.cache.is_behind and bench.counters.prefetched == 200
    other, begun = bench.called([[400, 400]]), bench.counters.prefetched
    assert other and begun == 200, "blocks of another have taken the places"


def test_what_is_wanted_does_not_outlive_a_turn_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Hidden()
    (name,) = bench.called([[400, 0]])
    bench.hide()

    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    bench.engine.submit(bench.attend(name, tolerance=EXACT))
    bench.engine.run_once()
    begun = bench.counters.prefetched
    monkeypatch.setattr(bench.cache, "_learn", broken)
    with pytest.raises(AssertionError):
        bench.run(Truncate(name, 8, worker="w"))
    monkeypatch.undo()
    assert bench.counters.events["fault"] == 1 and bench.engine.sessions.by_id[name].lengths == [8, 0]
    assert bench.hide() == 0 and bench.counters.prefetched == begun < 100 and bench.counters.events["fault"] == 1


def test_a_call_that_fails_leaves_what_others_want() -> None:
    """Its own blocks are taken back; and once it is idle the engine begins what is left."""
    bench = Hidden()
    (name,) = bench.called([[60, 64]])
    k, v = bench.numbers(2, 20), bench.numbers(2, 20)
    bench.kernels.unkept = True
    (refused,) = bench.run(Attend([Row(name, 0, bench.numbers(4, 1), k, v)], worker="w"))
    assert isinstance(refused, Exception) and bench.engine.sessions.by_id[name].lengths == [60, 64]
    assert bench.cache.is_behind and not bench.cache._answered and bench.counters.prefetched == 0
    bench.run()
    assert not bench.cache.is_behind and bench.counters.prefetched == RECORDS + 12


def test_what_has_got_a_copy_meanwhile_is_not_copied_again() -> None:
    bench = Hidden()
    (name,) = bench.filled([[64, 0]])
    (child,) = bench.run(Fork(name, worker="w"))
    bench.run(bench.attend(name), bench.attend(child), bench.attend(child, tolerance=EXACT))
    assert len(bench.cache._wanted) == 2 * RECORDS and bench.counters.prefetched == 0
    bench.cache._wanted.missed(MISSES_BORNE)
    bench.hide()
    assert bench.counters.prefetched == RECORDS and not bench.cache._wanted


def test_worths_that_are_rescaled_are_those_of_what_waits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Hidden()
    first, second = bench.called([[400, 0], [400, 0]])
    bench.hide()
    bench.hide()
    monkeypatch.setattr(bench.cache._policy, "rescale", lambda now: 2.0**-40)
    bench.run(bench.attend(first), bench.attend(first))
    monkeypatch.undo()
    assert len(bench.cache._wanted) > 0
    bench.run()
    notes, shelf = bench.engine.sessions.by_id[second].table.notes, bench.cache._scratch._shelf
    copies = list(bench.engine.residency.copies())
    assert len(copies) == 200 and {copy.block for copy in copies} > set(bench.engine.sessions.by_id[second].full_ids(0).tolist())
    for copy in copies:
        noted, held = notes["worth"][copy.kind, copy.block, copy.head], shelf._copies["worth"][copy.copy_id]
        assert held == pytest.approx(noted, rel=1e-6), copy


def wish(layer: int, count: int, session: str = "s") -> Wish:
    records = np.zeros((count, 3), np.int64)
    return Wish(Asker(session, session, 64, layer, 1), TABLE, Choice(records, np.ones(count), 1.0, *np.zeros((2, 0), np.int64)))


def served(wanted: Wanted, room: int = 1 << 30) -> list[tuple[int, int]]:
    """The next part; layers and how many records of each, in order."""
    done: list[tuple[int, int]] = []
    wanted.missed(MISSES_BORNE)
    most = wanted.due()

    def begin(parts: list[Part]) -> None:
        assert len({wish.asker.session_id for wish, _ in parts}) == 1, "one session's"
        done.extend((wish.asker.layer, some.stop - some.start) for wish, some in parts)

    wanted.serve(most, lambda wish, taken: room - taken - sum(count for _, count in done), begin)
    return done


@pytest.mark.parametrize("layers", [1, 4, 64])
def test_what_waits_is_bounded_though_every_call_is_looked_at(layers: int) -> None:
    rng, wanted, most, first = np.random.default_rng(layers), Wanted(), 300, 0

    def go_on() -> None:
        wanted.serve(wanted.due(), lambda wish, taken: 1 << 30, lambda parts: None)

    for turn in range(400):
        go_on()
        first = max(first, len(wanted))
        wanted.add(wish(turn % layers, int(rng.integers(200, most + 1))))
        assert len(wanted) <= min(layers, 4) * most and len(wanted._wishes) <= layers
    assert first > 0
    for _ in range(100):
        go_on()
    assert len(wanted) < PART_MIN
    wanted.missed(MISSES_BORNE)
    go_on()
    assert not wanted


def test_few_wait_for_others_and_until_calls_have_missed_many() -> None:
    wanted = Wanted()
    wanted.missed(2 * MISSES_BORNE)
    wanted.add(wish(0, PART_MIN - 1))
    assert wanted.due() == 0, "nobody waited before"
    wanted.missed(MISSES_BORNE - 1)
    assert wanted.due() == 0
    wanted.add(wish(0, 1))
    wanted.missed(1)
    assert wanted.due() == PART_MIN, "a later look does not begin the wait anew"
    assert wanted.due() == 0
    wanted.add(wish(1, PART_MIN - 1))
    assert wanted.due() == PART_MIN
    wanted.missed(MISSES_BORNE)
    wanted.clear()
    wanted.add(wish(0, 1))
    assert wanted.due() == 0
    wanted.add(wish(0, 0))
    wanted.missed(MISSES_BORNE)
    assert wanted.due() == 0 and not wanted, "a look that wants nothing ends what was wanted"


def test_a_later_look_at_a_layer_takes_the_place_of_an_earlier_one() -> None:
    wanted = Wanted()
    for row, count in ((0, 50), (1, PART_MIN + 8), (0, 7)):
        wanted.add(wish(row, count))
    wanted.add(wish(0, 3, session="another"))
    assert len(wanted) == PART_MIN + 8 + 7 + 3
    assert served(wanted) == [(1, PART_MIN)] and served(wanted) == [(0, 7), (0, 3), (1, 8)] and not wanted


def test_rows_take_turns_also_from_one_part_to_the_next() -> None:
    wanted = Wanted()
    for row in range(3):
        wanted.add(wish(row, PART_MIN + 1))
    assert [served(wanted) for _ in range(4)] == [[(0, PART_MIN)], [(1, PART_MIN)], [(2, PART_MIN)], [(0, 1), (1, 1), (2, 1)]]


def test_little_room_is_shared_by_those_that_wait() -> None:
    wanted = Wanted()
    for row in range(4):
        wanted.add(wish(row, 40))
    assert served(wanted, room=10) == [(0, 3), (1, 3), (2, 2), (3, 2)] and not wanted


def test_room_for_a_whole_part_is_not_shared() -> None:
    wanted = Wanted()
    for row in range(4):
        wanted.add(wish(row, 2 * PART_MIN))
    assert served(wanted, room=2 * PART_MIN) == [(0, 2 * PART_MIN)], "a part is a quarter of all"


def test_layers_of_a_session_are_neighbours_and_begin_together() -> None:
    wanted, begun = Wanted(), list[list[tuple[str, int]]]()
    for row, session in ((0, "a"), (0, "b"), (1, "a"), (1, "b"), (0, "a"), (2, "b")):
        wanted.add(wish(row, 3, session=session))
    wanted.serve(64, lambda wish, taken: 64 - taken, lambda parts: begun.append([(w.asker.session_id, w.asker.layer) for w, _ in parts]))
    assert begun == [[("a", 1), ("a", 0)], [("b", 0), ("b", 1), ("b", 2)]] and not wanted


@given(st.lists(st.lists(st.integers(0, 6), min_size=1), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_the_best_of_several_layers_come_first(worths: list[list[int]], random: Random) -> None:
    """Each with its own layer's number; of one layer as it has them."""
    parts = list[Part]()
    for layer, own in enumerate(worths):
        each = wish(layer, len(own))
        each.choice.worths[:] = own
        each.choice.records[:] = [[layer, i, 0] for i in range(len(own))]
        parts.append((each, slice(random.randint(0, len(own)), len(own))))
    records, found, which = together(parts)
    named = enumerate(zip(worths, parts, strict=True))
    expected = [(own[i], layer, i) for layer, (own, (_, some)) in named for i in range(some.start, len(own))]
    if len(parts) > 1:
        expected.sort(key=lambda x: -x[0])
    assert list(zip(found.tolist(), which.tolist(), records[:, 1].tolist(), strict=True)) == expected
    assert records[:, 0].tolist() == which.tolist()
