"""The replay of the tiering benchmark: its accounts, its link, its regimes and its selection. No times."""

import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "tiering"))
import bench_tiering as bench
from decode_steps import RECORD_BYTES, TARGET, Steps, chosen, drifting, promoted, recorded, switching
from simulated import GATHER_US, LINK_BYTES_PER_US, Replay

from tierd.engine.wanted import MISSES_BORNE, PART_MIN
from tierd.policy import NONE, POLICIES, Choice, Predictive, Snapshot
from tierd.policy.weighing import LEVELS_PER_NEED


def repeated(steps: int, needed: list[int], m: int = 8) -> Steps:
    """The same blocks' keys at every step of one layer and head."""
    shares = np.zeros((steps, 1, 2, m, 1), np.float32)
    shares[:, 0, 0, needed, 0] = 0.5
    return Steps("repeated", shares, shares > 0, np.full(steps, m))


def test_without_scratch_everything_is_read_from_the_host_at_every_step() -> None:
    outcome = Replay(repeated(10, [1, 5]), "none", (8, 8)).run()
    assert (outcome.needed, outcome.hits, outcome.demand_bytes) == (20, 0, 20 * RECORD_BYTES)
    assert outcome.exposed_us == pytest.approx(10 * (GATHER_US + 2 * RECORD_BYTES / LINK_BYTES_PER_US))
    assert pytest.approx(14.0) == GATHER_US + 64 * 4096 / LINK_BYTES_PER_US


@pytest.mark.parametrize("policy", ["reactive", "predictive"])
def test_what_is_needed_again_and_again_is_read_from_the_host_once(policy: str) -> None:
    outcome = Replay(repeated(10, [1, 5]), policy, (8, 8)).run()
    assert (outcome.hits, outcome.demand_bytes, outcome.wasted) == (18, 2 * RECORD_BYTES, 0)


def test_few_copies_begin_when_calls_have_waited_for_as_many_reads_as_the_engine_bears() -> None:
    steps = MISSES_BORNE // 2  # of two misses each
    outcome = Replay(repeated(steps + 10, [1, 5]), "predictive", (8, 8), waits=True).run()
    assert (outcome.copied, outcome.hits) == (2, 2 * 8), "before anything is wanted one call misses, and one while copies are under way"
    everything = Replay(repeated(4, list(range(PART_MIN)), m=PART_MIN), "predictive", (PART_MIN, 1), waits=True).run()
    assert everything.copied == PART_MIN and everything.hits == 2 * PART_MIN


def test_by_recency_what_was_read_longest_ago_goes_for_whatever_is_needed() -> None:
    """Block 0 is needed at every step; two others in turn, for one place beside it."""
    shares = np.zeros((40, 1, 2, 3, 1), np.float32)
    shares[:, 0, 0, 0, 0] = 0.5
    shares[::2, 0, 0, 1, 0] = shares[1::2, 0, 0, 2, 0] = 0.5
    steps = Steps("in turn", shares, shares > 0, np.full(40, 3))
    by_worth, by_recency = (Replay(steps, "predictive", (2, 0), recency=recency).run() for recency in (False, True))
    assert (by_recency.hits, by_recency.copied, by_recency.wasted) == (39, 41, 40), "each pushes out the other"
    assert by_worth.hits > 50 and by_worth.wasted < 5


@settings(max_examples=20)
@given(
    st.integers(0, 1 << 30), st.sampled_from(["none", "reactive", "predictive"]), st.integers(0, 6), st.integers(0, 6),
    st.sampled_from([(False, False), (True, False), (False, True)]),
)  # fmt: skip
def test_the_accounts_add_up_whatever_happens(seed: int, policy: str, keys: int, values: int, how: tuple[bool, bool]) -> None:
    rng = np.random.default_rng(seed)
    shares = rng.gamma(0.5, 0.3, (20, 2, 2, 6, 2)).astype(np.float32)
    steps = Steps("random", shares, promoted(shares), np.minimum(6, 3 + np.arange(20) // 4))
    for t, blocks in enumerate(steps.blocks):
        steps.needed[t, :, :, blocks:] = False
    replay = Replay(steps, policy, (keys, values), *how)
    bench.check(steps, replay.run())
    held = replay._copy_id >= 0
    assert held[0].sum() <= keys and held[1].sum() <= values and held.sum() == len(replay._places)
    assert not (replay._resident & ~held).any()


@given(st.integers(0, 1 << 30))
def test_promotion_takes_the_fewest_blocks_that_are_enough(seed: int) -> None:
    shares = np.random.default_rng(seed).gamma(0.5, 0.4, (2, 7, 1)).astype(np.float32)
    needed = promoted(shares)
    left = shares[~needed].sum()
    assert left <= TARGET + 1e-5
    assert not needed.any() or left + shares[needed].min() > TARGET - 1e-5
    assert not needed.any() or shares[needed].min() >= shares[~needed].max(initial=0.0)


@given(st.integers(0, 1 << 30), st.sampled_from((1, 3, 8)))
def test_what_is_at_hand_spares_what_is_not(seed: int, times: int) -> None:
    random = np.random.default_rng(seed)
    shares = random.gamma(0.5, 0.4, (2, 7, 3)).astype(np.float32)
    needed, at_hand = promoted(shares), random.random(shares.shape) < 0.5
    reads = chosen(shares, needed, at_hand, times)
    if times == 1 or not at_hand.any():
        assert np.array_equal(reads, needed)
        return
    counted = np.where(at_hand, times * shares, shares)
    for head in range(3):
        mine, left = reads[..., head], shares[..., head][~reads[..., head]].sum()
        assert left <= shares[..., head][~needed[..., head]].sum() * (1 + 1e-5)
        assert not mine.any() or counted[..., head][mine].min() >= counted[..., head][~mine].max(initial=0.0)
    assert (reads & ~at_hand).sum() <= (needed & ~at_hand).sum()


def test_regimes_are_what_they_say() -> None:
    topics, needles = switching(3, steps=80, m=256), drifting(3, steps=80, m=256)
    for steps in (topics, needles):
        assert steps.needed.any((1, 2, 3, 4)).all() and steps.needed.mean() < 0.2
    alike = [(topics.needed[t] & topics.needed[t + 1]).sum() / topics.needed[t].sum() for t in range(79)]
    assert np.median(alike) > 0.5 and min(alike) < 0.3, "topics last, and end at once"


@pytest.mark.parametrize("name", bench.HELD_OUT)
def test_held_out_regimes_ask_for_some_and_not_for_all(name: str) -> None:
    steps = bench.HELD_OUT[name](seed=5, steps=40, m=128)
    assert 0.001 < steps.needed.mean() < 0.5 and np.isfinite(steps.shares).all() and (steps.shares >= 0).all()
    bench.check(steps, Replay(steps, "predictive", bench.capacity(steps, 1 / 8)).run())


def test_the_headline_keeps_apart_what_was_fitted_what_was_not_and_what_is_real() -> None:
    def row(steps: str, policy: str, us: float, **more: object) -> dict[str, object]:
        size = {"scratch_share": 1 / 8, "key_share": 0.5}
        exposed = {"exposed_us_per_step": us, "exposed_us_per_call": us / 2}
        return {"steps": steps, "policy": policy, "waits": False, "recency": False, **size, **exposed, "wasted_share": us, **more}

    kinds = {"a": {}, "b": {"held_out": True}, "c": {"tokens": 8192}, "d": {"tokens": 300}}
    rows = [row(name, "reactive", 10.0, **more) for name, more in kinds.items()]
    rows += [row(name, "predictive", us, **more) for us, (name, more) in zip((2.0, 3.0, 4.0, 9.0), kinds.items(), strict=True)]
    rows += [{**row, "waits": True, "exposed_us_per_call": 10.0 * row["exposed_us_per_call"]} for row in rows[len(kinds) :]]
    rows += [{**row, "recency": True, "exposed_us_per_step": 99.0, "exposed_us_per_call": 99.0} for row in rows if not row["waits"]]
    assert bench.headline(rows, 7.0) == {
        "exposed_us_per_call": 1.0, "exposed_us_per_call_held_out": 1.5, "exposed_us_per_call_recorded": 2.0,
        "exposed_us_per_call_waiting": 10.0, "exposed_us_per_call_waiting_held_out": 15.0, "exposed_us_per_call_waiting_recorded": 20.0,
        "exposed_transfer_vs_reactive": 0.2, "exposed_transfer_vs_reactive_held_out": 0.3, "exposed_transfer_vs_reactive_recorded": 0.4,
        "wasted_prefetch_share": 2.0, "wasted_prefetch_share_held_out": 3.0, "wasted_prefetch_share_recorded": 4.0,
        "policy_us_per_step": 7.0,
    }  # fmt: skip


def test_the_committed_trace_can_be_replayed() -> None:
    steps = recorded(bench.TRACES[0])
    assert steps.shares.shape == (24, 2, 2, 20, 2) and steps.blocks[0] == 18 and steps.blocks[-1] == 20 and steps.record_bytes == 2048
    bench.check(steps, Replay(steps, "predictive", bench.capacity(steps, 0.5)).run())
    with pytest.raises(ValueError, match=r"holds no trace\.json"):
        recorded(Path(__file__).parent)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_each_policy_chooses_on_recorded_steps(policy: str) -> None:
    steps = recorded(bench.TRACES[0])
    replay, chosen_in_all = Replay(steps, policy, bench.capacity(steps, 1 / 8)), 0
    choose = replay._policy.choose

    def checked(snapshot: Snapshot) -> Choice:
        nonlocal chosen_in_all
        copy_id = snapshot.notes["copy_id"].copy()
        kinds, heads = np.indices(snapshot.blocks.shape)[[0, 1]]
        named = snapshot.blocks >= 0
        needs = set(zip(snapshot.reads[0], snapshot.ids[snapshot.reads[1]], snapshot.reads[2], strict=True))
        near = set(zip(kinds[named], snapshot.ids[snapshot.blocks[named]], heads[named], strict=True))
        choice = choose(snapshot)
        records = [tuple(record) for record in choice.records.tolist()]
        without = {record for record in needs if copy_id[record] == NONE}
        assert len(records) == len(set(records)) and {copy_id[record] for record in records} <= {NONE}
        assert set(records) == without if policy == "reactive" else set(records) <= without | near
        held = {copy_id[record] for record in needs} - {NONE}
        assert held <= set(choice.held.tolist()) <= held | {copy_id[record] for record in near}
        assert (np.diff(choice.worths) <= 1 / LEVELS_PER_NEED * 2.0 ** (snapshot.now / Predictive.half_life)).all(), "best first"
        chosen_in_all += len(records)
        return choice

    replay._policy.choose = checked  # type: ignore[method-assign]
    replay.run()
    assert (chosen_in_all > 0) == (policy != "none")


def test_a_replay_that_loses_a_need_is_not_reported() -> None:
    steps = repeated(4, [1])
    outcome = Replay(steps, "reactive", (2, 2)).run()
    outcome.hits -= 1
    with pytest.raises(RuntimeError, match="do not add up"):
        bench.check(steps, outcome)
