"""Where a part's arrays lie: apart from one another, and with room for every part that shares the plan."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cuda import LAYOUTS
from tierd_kernels.cuda.sources import RESIDENT, SPLIT_TOKENS_MAX, SPLIT_TOKENS_SHORT, WARPS
from tierd_kernels.policy import Budget, Coverage

SHAPES = st.tuples(
    st.integers(1, 16), st.integers(1, 64), st.integers(0, 9000), st.integers(0, 64), st.integers(0, 40), st.sampled_from([0, 1, 999]),
)  # fmt: skip


def rooms(plan: Any, place: int) -> dict[str, int]:
    """Bytes from each array of a place to the next, or to the end."""
    starts = {name: at for name, (where, at) in plan.places.items() if where == place}  # in order: empty ones begin where the next does
    ends = [*list(starts.values())[1:], plan.sizes[place]]
    return {name: end - at for (name, at), end in zip(starts.items(), ends, strict=True)}


@pytest.mark.usefixtures("cuda")
@given(st.sampled_from(LAYOUTS), SHAPES, st.sampled_from([4, 16, 64]))
def test_arrays_have_the_room_that_each_part_of_the_plan_needs(layout: Any, drawn: tuple[int, ...], per: int) -> None:
    from tierd_kernels.cuda.plan import SIZED, Shape, plan

    shape = Shape(*drawn)
    own, shared = plan(layout, shape, per), plan(layout, shape.rounded(), per)
    assert shape.rounded() == shape.rounded().rounded()
    for place in range(SIZED):
        least, most = rooms(own, place), rooms(shared, place)
        assert least.keys() == most.keys() and all(most[name] >= nbytes >= 0 for name, nbytes in least.items())
        assert sum(most.values()) == shared.sizes[place], "arrays overlap, or do not begin at the beginning"


@pytest.mark.usefixtures("cuda")
@given(st.sampled_from(LAYOUTS), st.integers(0, 20000), st.integers(1, 64), st.integers(1, 200))
def test_splits_are_the_shortest_that_find_room_at_once(layout: Any, full: int, tiles: int, processors: int) -> None:
    from tierd_kernels.cuda.launch import kernels

    def fits(per: int) -> bool:
        short = per * layout.block_size < SPLIT_TOKENS_SHORT
        return -(-full // per) * tiles <= (RESIDENT // 2 if short else RESIDENT) * processors

    lengths = [WARPS << i for i in range(12) if (WARPS << i) * layout.block_size <= SPLIT_TOKENS_MAX]
    assert kernels(layout).split_blocks(full, tiles, processors) == next(filter(fits, lengths), lengths[-1])


@pytest.mark.usefixtures("cuda")
def test_arrays_of_a_plan_hold_what_they_are_for() -> None:
    from tierd_kernels.cuda.plan import ANSWERS, INPUTS, LATE, NOWHERE, Shape, plan

    layout = LAYOUTS[0]
    found = plan(layout, Shape(group=4, n=3, full=129, candidates=7, canaries=5, copies=0), 4)
    rows = layout.num_kv_heads * 12
    for place, sizes in (
        (INPUTS, {"q": rows * 2 * layout.head_dim, "canaries": 20, "tickets": 4 * found.tickets}),
        (ANSWERS, {"output": rows * 2 * layout.head_dim, "state": 4 * rows, "failures": 5 * layout.num_kv_heads}),
        (ANSWERS, {"reads": 4 * -(-2 * 129 * layout.num_kv_heads // 32), "cold": 4 * rows}),
        (LATE, {"candidate_blocks": 8 * layout.num_kv_heads * 7, "candidate_scores": 8 * layout.num_kv_heads * 7}),
    ):
        room = rooms(found, place)
        assert all(nbytes <= room[name] < nbytes + 256 for name, nbytes in sizes.items())
    # A head has two for candidates; a tile for selection and for the exact rungs; a tile and split, where tiles share, for promotion.
    assert found.tickets == 2 * 2 + 2 * 6 + 6 * 33
    assert plan(layout, Shape(4, 17, 129, 7, 5, 0), 4).tickets == 2 * 2 + 2 * 34, "more tiles than lanes share nothing"
    assert found.places["copied"] == found.places["copies"] == (NOWHERE, 0)
    room = rooms(plan(layout, Shape(4, 3, 129, 7, 5, 1000), 4), INPUTS)
    assert room["copied"] >= 8 * -(-2 * 129 * layout.num_kv_heads // 32) and room["copies"] >= 4000


@pytest.mark.usefixtures("cuda")
def test_a_growing_context_has_few_plans() -> None:
    from tierd_kernels.cuda.plan import Shape

    assert len({Shape(4, 1, full, 32, 0, 0).rounded() for full in range(4097, 8193)}) == 16


@pytest.mark.usefixtures("cuda")
def test_what_a_policy_says() -> None:
    from tierd_kernels.cuda.plan import COUNT_MAX, terms_of

    assert terms_of(Budget(skip_share=0.25, require_rank=True)) == (True, 0, (0, 0), (0.0, 0.0, 0.0))
    assert terms_of(Budget()) == (False, 0, (0, 0), (0.0, 0.0, 0.0))
    coverage = Coverage(tau_cov=0.5, k_min=1, k_max=2**40, key_bound_max=0.125, v_tol=2.0, boundary_check=False)
    assert terms_of(coverage) == (False, 1, (1, COUNT_MAX), (0.5, 0.125, 2.0))
    assert terms_of(Coverage()).covers == 2


@pytest.mark.usefixtures("cuda")
def test_what_is_known_of_an_array_goes_with_it() -> None:
    import numpy as np
    from tierd_kernels.cuda.kept import OfArray

    worked: list[int] = []
    of = OfArray(lambda array: worked.append(len(array)) or int(array.max()))
    first = np.array([3, 9])
    assert (of(first), of(first), worked) == (9, 9, [2])
    del first
    assert not of._known
    assert [of(np.array([number])) for number in range(50)] == list(range(50))  # which lie where the one before lay


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([1.0, -(2.0**73), 1.01 * 2.0**74, 2.0**80, 1e300]),
    st.sampled_from([-140, -125, -10, 5, 12, 15]),
)  # fmt: skip
def test_what_fp32_cannot_score_is_exact_from_the_start(dtype: str, seed: int, scale: float, power: int) -> None:
    import numpy as np
    from tierd_kernels.call import Call
    from tierd_kernels.cuda.packing import SCALE_MAX, needs_exact
    from tierd_kernels.kvview import narrow, widen

    random, none, norms = np.random.default_rng(seed), np.empty(0, np.int64), np.empty((0, 1), np.float32)
    q = np.clip(random.standard_normal((2, 1, 8)) * 2.0 ** power, -6e4, 6e4)  # all are finite
    q[random.random(q.shape) < 0.3] = 0.0
    raw = narrow(q, dtype)
    size = np.abs(widen(raw, dtype))
    flushed = bool(((size > 0) & (size < 2.0**-126)).any())  # by FP32; halves are never that small
    beyond = abs(scale) * 2.0 ** np.frexp(size.max())[1] > SCALE_MAX
    call = Call(raw, 1, scale, none, none, None, norms, norms, 0.1, 0.0)
    assert needs_exact(call) == (flushed or beyond)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("per", [1, 2, 6])
def test_a_split_of_which_some_warp_has_no_part_is_refused(per: int) -> None:
    """Its blocks would be in no sum."""
    from tierd_kernels.cuda.plan import Shape, plan

    with pytest.raises(AssertionError, match=f"splits of {per} blocks.* a multiple of {WARPS} "):
        plan(LAYOUTS[0], Shape(4, 1, 100, 0, 16, 0), per)
