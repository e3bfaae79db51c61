"""The policies on snapshots: what each keeps, fetches and lets go. Pure functions, so properties over random snapshots."""

from math import inf

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray
from tierd_kernels.select.candidates import largest

from tierd.notes import NOTE
from tierd.policy import FIRST_STEP, NO_READS, NONE, Choice, LinkBudget, Nothing, Predictive, Reactive, Snapshot, Turns, named
from tierd.policy.link import BURST_S
from tierd.policy.predictive import EVERY, RESCALE_AT
from tierd.policy.weighing import (
    AT_FIRST,
    FADES,
    GRADES,
    LEAST,
    NEEDED_SHARE,
    RIPENS,
    SOON,
)
from tierd.residency import BARRED

SEEDS = st.integers(0, 1 << 30)


class Table:
    """Six rows, two heads; a call of the rows 4, 2, 0, 5."""

    def __init__(self) -> None:
        self.ids = np.array([4, 2, 0, 5])
        self.notes = np.zeros((2, 6, 2), NOTE)
        self.copy_id, self.worth = self.notes["copy_id"], self.notes["worth"]
        self.copy_id[:] = NONE
        self.looked = inf

    def snapshot(
        self, shares: NDArray[np.float32], needed: NDArray[np.bool_], now: float = FIRST_STEP, exact: tuple[bool, bool] = (False, False)
    ) -> Snapshot:
        blocks, scores = largest(np.where((shares == 0) & needed & ~np.array(exact), np.float32(0.5), shares), 4)
        last, self.looked = self.looked, now
        return Snapshot(self.ids, np.array(np.nonzero(needed)), np.array(exact), blocks, scores, self.notes, now, last)


def shares_of(values: dict[tuple[int, int, int], float]) -> NDArray[np.float32]:
    shares = np.zeros((2, 4, 2), np.float32)
    for at, value in values.items():
        shares[at] = value
    return shares


def records(choice: Choice) -> list[tuple[int, ...]]:
    return [tuple(record) for record in choice.records.tolist()]


def test_policies_are_chosen_by_name() -> None:
    assert [type(named(name)) for name in ("none", "reactive", "predictive")] == [Nothing, Reactive, Predictive]
    with pytest.raises(ValueError, match="tiering_policy is 'lru'; allowed: none, reactive, predictive"):
        named("lru")


@given(SEEDS, st.booleans())
def test_reactive_fetches_what_was_needed_and_has_no_copy(seed: int, exact: bool) -> None:
    rng, table = np.random.default_rng(seed), Table()
    needed = rng.random((2, 4, 2)) < 0.5
    table.copy_id[rng.random(table.copy_id.shape) < 0.5] = 7
    choice = Reactive().choose(table.snapshot(shares_of({}), needed, now=3.0, exact=(exact, False)))
    wanted = {(kind, int(table.ids[b]), head) for kind, b, head in np.argwhere(needed).tolist() if not (exact and head == 0)}
    assert set(records(choice)) == {record for record in wanted if table.copy_id[record] == NONE}
    assert {tuple(at) for at in np.argwhere(table.worth == 3.0).tolist()} == wanted
    assert not len(Nothing().choose(table.snapshot(shares_of({}), needed)).records)


def test_predictive_fetches_what_was_needed_and_what_came_near_best_first() -> None:
    table, needed = Table(), np.zeros((2, 4, 2), bool)
    needed[0, 1, 0] = needed[1, 3, 1] = True
    shares = shares_of({(0, 1, 0): 0.4, (0, 2, 0): 0.2, (0, 3, 0): 0.01, (1, 3, 1): 0.2})
    choice = Predictive().choose(table.snapshot(shares, needed))
    assert set(records(choice)[:2]) == {(0, 2, 0), (1, 5, 1)}
    assert records(choice)[2:] == [(0, 0, 0)], "block 3's keys are far from the threshold"
    assert choice.worths[0] == choice.worths[1] > choice.worths[2] > 0
    assert not table.worth[0, 5, 0]


def test_a_share_that_grows_is_fetched_before_it_is_needed() -> None:
    needed = np.zeros((2, 4, 2), bool)

    def fetched(shares: list[float], apart: float) -> list[list[tuple[int, ...]]]:
        policy, table, each = Predictive(floor=0.5), Table(), [shares_of({(0, 0, 0): share}) for share in shares]
        return [records(policy.choose(table.snapshot(x, needed, FIRST_STEP + apart * t))) for t, x in enumerate(each)]

    # 0.4 after 0.3 becomes 0.5; what the last look at the layer did not show is not known to have grown.
    for apart in (0.25, 4.0, 16.0):
        assert fetched([0.3, 0.4], apart) == [[], [(0, 4, 0)]]
        assert fetched([0.4, 0.4], apart) == [[], []] == fetched([0.45, 0.4], apart) and fetched([0.3, 0.0, 0.4], apart) == [[], [], []]


class Followed:
    """Steps of a table of one KV head; record 0 of the kinds in turn comes near at `share`, and is needed at the next step or never."""

    def __init__(self, policy: Predictive, begins: bool = True) -> None:
        self.policy, self.now, self.blocks, self.begins, self.looked = policy, FIRST_STEP, 4096, begins, inf
        self.ids, self.notes = np.arange(self.blocks), np.zeros((2, self.blocks, 1), NOTE)
        self.notes["copy_id"] = NONE

    def look(self, block: int, share: float, needed: bool, after: float = 1.0) -> int:
        """How many copies are asked for by a call that shows one candidate, if it has a share; if any begins they are there from then on.
        Then steps go by."""
        self.notes["worth"] *= self.policy.rescale(self.now)
        blocks, scores = np.full((2, 1, 1), -1, np.int32), np.zeros((2, 1, 1), np.float32)
        if share:
            blocks[0, 0, 0], scores[0, 0, 0] = block, share
        reads = np.array([[0], [block], [0]]) if needed else NO_READS
        choice = self.policy.choose(Snapshot(self.ids, reads, np.zeros(1, bool), blocks, scores, self.notes, self.now, self.looked))
        self.looked = self.now
        for kind, at, head in choice.records.tolist() if self.begins else []:
            self.notes["copy_id"][kind, at, head], self.notes["waits"][kind, at, head] = at, 0
        self.now += after
        return len(choice.records)

    def pairs(self, first: int, count: int, share: float, needed: bool) -> list[int]:
        """Of so many records that come near, each followed by a need or by nothing: how many copies were asked for at the first look."""
        asked = []
        for block in range(first, first + count):
            asked.append(self.look(block, share, False))
            self.look(block, share if needed else 0.0, needed)
        return asked


@given(st.floats(0.2, 0.9))
def test_what_comes_near_in_vain_is_copied_no_more_until_needs_follow_again(share: float) -> None:
    followed = Followed(Predictive())
    assert all(followed.pairs(0, 100, share, needed=True)), "needs follow, and copies are asked for"
    in_vain = followed.pairs(100, 200, share, needed=False)
    assert all(in_vain[:5]) and not any(in_vain[100:]), "it is not trusted for ever"
    again = followed.pairs(300, 300, share, needed=True)
    assert not again[0] and all(again[200:]), "what is not copied is watched"


def test_a_grade_is_held_to_its_own_asks() -> None:
    followed = Followed(Predictive())
    for block in range(0, 1000, 5):  # four weak ones and a strong one in turn: only what comes very near is needed
        followed.pairs(block, 4, 0.3, needed=False)
        strong = followed.pairs(block + 4, 1, 0.9, needed=True)
    assert strong == [1] and followed.pairs(1000, 1, 0.3, needed=False) == [0]


def test_needs_that_are_not_named_count_too() -> None:
    """More is needed than there are candidates: a call may read what it was shown nothing of."""

    def read(followed: Followed, block: int) -> int:
        return followed.look(block, 0.0, True, after=0.25)

    foreseen, once, again = (Followed(Predictive()) for _ in range(3))
    for block in range(200):
        asked = foreseen.look(block, 0.9, False, after=0.25)
        read(foreseen, block)
    assert asked == 1
    assert [read(once, block) for block in range(400)][-100:] == 100 * [0], "what is needed once is not worth a copy"
    assert [(read(again, block), read(again, block)) for block in range(400)][-100:] == 100 * [(1, 0)]


def test_however_often_a_copy_is_read_it_speaks_once() -> None:
    followed, asked = Followed(Predictive()), []
    for first in range(0, 4000, 20):
        asked += [*followed.pairs(first, 19, 0.9, needed=False), followed.look(first + 19, 0.9, False)]
        for _ in range(5):
            followed.look(first + 19, 0.9, True)
    assert asked[0] == 1 and asked[-1] == 0


def test_what_scratch_has_no_room_for_until_it_is_needed_is_copied_less() -> None:
    followed, asked = Followed(Predictive()), []
    for block in range(400):
        asked.append(followed.look(block, 0.9, False, after=0.25))
        followed.notes["copy_id"][0, block, 0] = NONE  # gone at once
        followed.look(block, 0.9, True, after=0.25)
    # Never for good: what is watched and not copied is needed, and so trusted again.
    assert all(asked[:5]) and 0.2 < np.mean(asked[100:]) < 0.9


def test_what_waits_for_its_copy_until_it_is_needed_is_asked_for_all_the_same() -> None:
    followed = Followed(Predictive(), begins=False)
    assert all(followed.pairs(0, 400, 0.9, needed=True)), "that nothing begins is not its fault"
    assert not all(followed.pairs(400, 400, 0.9, needed=False))


def test_a_need_long_after_does_not_speak_for_what_was_asked() -> None:
    followed, asked = Followed(Predictive()), []
    for first in range(0, 1000, 50):
        asked.append(sum(followed.look(block, 0.9, False, after=0.0) for block in range(first, first + 50)))
        followed.now += SOON + 1e-6  # of looks at one time each is a little later
        for block in range(first, first + 50):
            followed.look(block, 0.9, True, after=0.0)
    assert asked[0] == 50 and asked[-1] == 0


def test_predictive_learns_nothing_from_reads_of_exact_heads() -> None:
    table = Table()
    assert not len(Predictive().choose(table.snapshot(shares_of({}), np.ones((2, 4, 2), bool), exact=(True, True))).records)
    assert not table.worth.any()


def test_worth_halves_and_survives_rescaling() -> None:
    policy, table, needed = Predictive(), Table(), np.zeros((2, 4, 2), bool)
    needed[0, 0, 0] = True
    policy.choose(table.snapshot(shares_of({}), needed))
    old = table.worth[0, 4, 0]
    later = FIRST_STEP + policy.half_life
    assert policy.rescale(later) == 1.0
    policy.choose(table.snapshot(shares_of({}), needed, now=later))
    assert table.worth[0, 4, 0] == pytest.approx(3 * old)
    far = later + RESCALE_AT * policy.half_life
    factor = policy.rescale(far)
    assert factor == 2.0**-RESCALE_AT and policy.rescale(far) == 1.0
    table.worth *= factor
    policy.choose(table.snapshot(shares_of({}), needed, now=far))
    assert np.isfinite(table.worth).all() and table.worth[0, 4, 0] > 0


@given(SEEDS, st.floats(0.0, 1.0))
def test_copies_never_take_more_than_their_share_of_the_link(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    link, spent, demand, now = LinkBudget(1e6, share), 0, 0, 0.0
    link.refill(now, ["a", "b"])
    for _ in range(60):
        now += float(rng.exponential(1e-3))
        read = int(rng.integers(0, 1500))
        link.read(read)
        demand += read
        link.refill(now, ["a", "b"][: int(rng.integers(0, 3))])
        name = "abc"[rng.integers(3)]
        nbytes = int(link.available(name) * rng.random())
        link.spend(name, nbytes)
        spent += nbytes
        assert spent <= share * 1e6 * (now + 2 * BURST_S) + 1
    if share == 0.0:
        assert spent == 0


def test_copies_yield_to_reads_that_calls_wait_for() -> None:
    link = LinkBudget(1e6, 0.5)
    link.refill(0.0, ["a"])
    link.spend("a", link.available("a"))
    link.read(100_000)  # a tenth of a second of link
    for now in (0.02, 0.05, 0.09):
        link.refill(now, ["a"])
        assert link.available("a") == 0
    link.refill(0.2, ["a"])
    assert link.available("a") > 0


def test_a_session_that_asks_rarely_is_not_passed_by_one_that_always_asks() -> None:
    """One copy at a time; `busy` asks a hundred times as often, and its copy always has just begun when `rare` asks."""
    turns, active, started = Turns(1), ["busy", "rare"], {"busy": 0, "rare": 0}

    def ask(name: str) -> None:
        if turns.room(name, active):
            turns.start(name)
            started[name] += 1
        else:
            turns.refuse(name)

    under_way = None
    for at in range(1000):
        if under_way:
            turns.end(under_way)
        before = dict(started)
        for name in ("busy", "rare") if at % 100 == 50 else ("busy",):
            ask(name)
        under_way = next((name for name in started if started[name] > before[name]), None)
    assert started["rare"] >= 4 and started["busy"] >= 100


def test_a_candidate_list_may_be_shorter_than_its_room() -> None:
    table, needed = Table(), np.zeros((2, 4, 2), bool)
    blocks, scores = np.full((2, 2, 3), -1, np.int32), np.zeros((2, 2, 3), np.float32)
    blocks[0, 0, 0], scores[0, 0, 0] = 2, 0.9
    snapshot = table.snapshot(shares_of({}), needed)._replace(blocks=blocks, scores=scores)
    assert records(Predictive().choose(snapshot)) == [(0, 0, 0)]


@given(SEEDS, st.integers(0, 4))
def test_predictive_does_what_its_rule_says(seed: int, candidates: int) -> None:
    """Random calls against the rule, record by record: notes, what is asked for, best first to a sixteenth of a need, what copies gain, and
    which grades are trusted. Some calls need more than they name candidates."""
    rng, table, policy = np.random.default_rng(seed), Table(), Predictive()
    expected, last, asked, waits = np.zeros((2, 6, 2)), {}, dict[tuple[int, int, int], int](), np.zeros((2, 6, 2), np.int8)
    lately, before_that, met = np.zeros((3, GRADES))
    now, looked, passed = FIRST_STEP, inf, 0.0
    for _ in range(16):
        ripe = lately * (1 - 0.5 ** (passed / RIPENS))
        lately, before_that, met = lately - ripe, before_that * 0.5 ** (passed / FADES) + ripe, met * 0.5 ** (passed / FADES)
        trusted = met + AT_FIRST >= NEEDED_SHARE * (before_that + AT_FIRST)
        shares = np.where(rng.random((2, 4, 2)) < 0.7, rng.random((2, 4, 2)), 0).astype(np.float32)
        needed, exact = rng.random((2, 4, 2)) < 0.3, rng.random(2) < 0.2
        named = largest(shares, candidates)
        shares = named.shares(4)
        table.copy_id[:] = rng.choice([NONE, 7, BARRED], table.copy_id.shape, p=(0.7, 0.2, 0.1))
        waits[rng.random(waits.shape) < 0.5] = 0
        table.notes["waits"][:] = waits
        wanted, held = set[tuple[int, int, int]](), list[float]()
        for kind, b, head in np.ndindex(2, 4, 2):
            at, need = (kind, int(table.ids[b]), head), bool(needed[kind, b, head] and not exact[head])
            score, (before, then) = float(shares[kind, b, head]), last.get(at, (0.0, -9.0))
            of_head = needed[kind, :, head] & (shares[kind, :, head] > 0) & ~exact[head]
            threshold = float(shares[kind, of_head, head].min(initial=1.0))
            near = score > 0 and (need or score >= 0.5 * policy.floor * threshold)
            grown = max(score - before, 0.0) if then == looked else 0.0
            closeness = min((score + grown) / threshold, 1.0)
            soon = now - then <= SOON or then == looked
            if near or need:
                last[at] = (score if score > 0 else 1.0), now
            if need and (grade := asked.pop(at, None)) is not None:
                met[grade] += soon and (table.copy_id[at] == 7 or waits[at] or not trusted[grade])
            if need or (near and closeness >= policy.floor):
                expected[at] += 2.0 ** (now / policy.half_life) * (1.0 if need else policy.near * closeness)
                held += [expected[at]] if table.copy_id[at] == 7 else []
                if table.copy_id[at] == NONE:
                    worth = expected[at] / 2.0 ** (now / policy.half_life)
                    grade = int(np.searchsorted(LEAST * 2.0 ** np.arange(GRADES - 1), worth, side="right"))
                    if at not in asked or not soon:
                        asked[at] = grade
                        lately[grade] += 1
                    if trusted[grade]:
                        wanted.add(at)
                        waits[at] = 1
        snapshot = table.snapshot(shares, needed, now, tuple(exact))._replace(blocks=named.blocks, scores=named.scores)
        choice = policy.choose(snapshot)
        np.testing.assert_allclose(table.worth, expected, rtol=1e-5)
        assert set(records(choice)) == wanted and len(choice.records) == len(wanted)
        np.testing.assert_allclose(choice.worths, [expected[at] for at in records(choice)], rtol=1e-5)
        assert choice.displace == policy.displace
        assert (np.diff(choice.worths / 2.0 ** (now / policy.half_life)) <= 1 / 16 + 1e-9).all()
        assert set(choice.held.tolist()) <= {7}
        np.testing.assert_allclose(np.sort(choice.held_worths), sorted(held), rtol=1e-5)
        assert choice.settled == (not wanted and not held and not needed.any()), "a 64th of fewer needs is none"
        assert np.array_equal(table.notes["waits"], waits)
        np.testing.assert_allclose(policy.asks, [lately, before_that, met], rtol=1e-9, atol=1e-12)
        looked, passed = now, float(rng.choice([1, 4, 7, 16, 40]))
        now += passed


def test_what_was_needed_gets_a_copy_though_it_is_no_candidate() -> None:
    """Of a hundred and fifty records that a call needs, a device names those of the first blocks: the others must not go unnoticed."""
    table = Table()
    snapshot = table.snapshot(shares_of({(0, 0, 0): 0.5}), np.ones((2, 4, 2), bool))
    none = np.empty((2, 2, 0), np.int32)
    for policy in (Predictive(), Reactive()):
        choice = policy.choose(snapshot._replace(blocks=none, scores=none.astype(np.float32)))
        assert set(records(choice)) == {(kind, int(at), head) for kind in (0, 1) for at in table.ids for head in (0, 1)}


def test_what_one_look_found_needed_is_not_needed_at_another_of_the_same_time() -> None:
    """Sessions that share blocks by fork are answered together."""
    policy, table, needed = Predictive(), Table(), np.zeros((2, 4, 2), bool)
    needed[0, 1, 0] = True
    shares = shares_of({(0, 1, 0): 0.2, (0, 2, 0): 0.1})
    policy.choose(table.snapshot(shares, needed))
    before = table.worth.copy()
    policy.choose(table.snapshot(shares, np.zeros_like(needed)))
    assert table.worth[0, 2, 0] - before[0, 2, 0] == pytest.approx(2.0 ** (FIRST_STEP / policy.half_life) * policy.near * 0.2)


@pytest.mark.parametrize(("settled", "every"), [(0, EVERY), (1, 2 * EVERY), (2, 4 * EVERY), (3, 4 * EVERY), (1000, 4 * EVERY)])
def test_predictive_looks_the_more_seldom_the_longer_a_layer_is_settled_and_where_much_was_missed(settled: int, every: int) -> None:
    policy = Predictive()
    for misses in (0, 2):  # of 64
        looked = [policy.looks_at(turn, settled, 64, misses) for turn in range(2 * every)]
        assert looked.count(True) == 2 and looked[:every] == looked[every:], "neighbouring layers take turns: each step has the same work"
    assert all(policy.looks_at(turn, settled, 64, 3) and policy.looks_at(turn, settled, 1, 1) for turn in range(every))


@pytest.mark.parametrize(
    ("needs", "wanted", "settled"),
    [(0, 0, True), (1, 0, False), (63, 0, False), (64, 0, True), (64, 1, False), (640, 9, True), (640, 10, False)],
)
def test_a_layer_is_settled_where_next_to_none_of_its_needs_has_no_copy(needs: int, wanted: int, settled: bool) -> None:
    notes, reads = np.zeros((2, needs, 1), NOTE), np.stack([np.zeros(needs, np.int64), np.arange(needs), np.zeros(needs, np.int64)])
    notes["copy_id"] = np.where(np.arange(needs) < wanted, NONE, np.arange(needs))[:, None]
    none = np.empty((2, 1, 0), np.int32)
    shown = np.arange(needs), reads, np.zeros(1, bool), none, none.astype(np.float32), notes, FIRST_STEP, inf
    choice = Predictive().choose(Snapshot(*shown))
    assert len(choice.records) == wanted and choice.settled == settled


def test_what_exact_heads_read_settles_no_layer() -> None:
    """Two records of head 1 are wanted, among sixty-two others that it needs; head 0 is exact, and reads two hundred."""
    notes, needed = np.zeros((2, 200, 2), NOTE), np.zeros((2, 200, 2), bool)
    needed[0, :, 0] = needed[1, :64, 1] = True
    notes["copy_id"][1, :2, 1] = NONE
    none = np.empty((2, 2, 0), np.int32)
    shown = np.arange(200), np.array(np.nonzero(needed)), np.array([True, False]), none, none.astype(np.float32), notes, FIRST_STEP, inf
    choice = Predictive().choose(Snapshot(*shown))
    assert len(choice.records) == 2 and not choice.settled


@pytest.mark.parametrize("copy_id", [NONE, 3])
def test_a_layer_that_comes_near_its_needs_is_not_settled(copy_id: int) -> None:
    table = Table()
    table.copy_id[:] = copy_id
    assert not Predictive().choose(table.snapshot(shares_of({(0, 2, 0): 0.2}), np.zeros((2, 4, 2), bool))).settled
