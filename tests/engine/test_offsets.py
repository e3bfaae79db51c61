"""Where a layer's blocks lie, as calls are told: what the table says, in the same arrays for as long as it says so."""

import hypothesis.strategies as st
import numpy as np
from engine_calls import Bench
from hypothesis import given

from tierd.commands import Append, Fork, Truncate

BLOCK = 16
GROWTHS = st.lists(st.tuples(st.sampled_from(["append", "cut", "fork"]), st.integers(1, 40)), min_size=1, max_size=12)


@given(GROWTHS)
def test_offsets_are_those_of_the_table_however_a_layer_grew(steps: list[tuple[str, int]]) -> None:
    bench = Bench()
    name = bench.opened(tokens=30)
    for what, amount in steps:
        session = bench.engine.sessions.by_id[name]
        before, lengths = session.offsets(0), session.lengths
        said = [x.copy() for x in before]
        command: Append | Fork | Truncate = bench.append(name, amount)
        if what == "cut":
            command = Truncate(name, max(0, lengths[0] - amount), worker="w")
        elif what == "fork":
            command = Fork(name, worker="w")
        (result,) = bench.run(command)
        assert not isinstance(result, Exception)
        name = str(result) if what == "fork" else name
        session = bench.engine.sessions.by_id[name]
        hot, original = session.offsets(0)
        assert np.array_equal(hot, session.table.hot_offset[session.full_ids(0)])
        assert np.array_equal(original, session.table.original_offset[session.layers[0].ids])
        assert all(map(np.array_equal, before, said)), "what was said before stays"
        if what == "append":
            assert (hot is before[0]) == (session.lengths[0] // BLOCK == lengths[0] // BLOCK), "the same array until a block is full"
            assert (original is before[1]) == (-(-session.lengths[0] // BLOCK) == -(-lengths[0] // BLOCK)), "or until one is new"


def test_offsets_of_a_layer_that_grows_mostly_stay_where_they_are() -> None:
    bench = Bench()
    name = bench.opened(tokens=30)
    session = bench.engine.sessions.by_id[name]
    memories = []
    for _ in range(40):
        (result,) = bench.run(bench.append(name, BLOCK))
        assert not isinstance(result, Exception)
        memories += [x.base for x in session.offsets(0)]
        assert np.array_equal(session.offsets(0)[0], session.table.hot_offset[session.full_ids(0)])
    assert len(set(map(id, memories))) <= 2 * 5
