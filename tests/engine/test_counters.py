"""What the counters make of an answer."""

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tierd.engine.counters import Counters


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_totals_are_sums_over_all_answers(heads: int, tokens: int, seed: int) -> None:
    random, shape = np.random.default_rng(seed), (heads, tokens)
    total, answers = Counters(), []
    for _ in range(3):
        certificate = {name: random.integers(0, 2**40, shape) for name in
                       ("promoted_key_blocks", "promoted_value_blocks", "skipped_blocks", "host_bytes")}  # fmt: skip
        answers.append(certificate | {"exact": random.random(shape) < 0.5})
        total.add(SimpleNamespace(certificate=answers[-1]))  # type: ignore[arg-type]

    def summed(*names: str) -> int:
        return sum(int(answer[name].sum()) for answer in answers for name in names)

    assert total.head_steps == 3 * heads * tokens
    assert (total.exact_heads, total.skipped_blocks, total.host_bytes) == (summed("exact"), summed("skipped_blocks"), summed("host_bytes"))
    assert total.promoted_blocks == summed("promoted_key_blocks", "promoted_value_blocks")
