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
        if what == "append":
            assert (hot is before[0]) == (session.lengths[0] // BLOCK == lengths[0] // BLOCK), "the same array until a block is full"
            assert (original is before[1]) == (-(-session.lengths[0] // BLOCK) == -(-lengths[0] // BLOCK)), "or until one is new"
