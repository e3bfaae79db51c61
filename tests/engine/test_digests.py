"""Hashes of records are those of their bytes, however many are fetched together."""

import hypothesis.strategies as st
import numpy as np
import pytest
import xxhash
from hypothesis import given

from tierd.residency import digests


@given(st.integers(0, 1 << 30), st.integers(1, 200), st.integers(0, 70), st.sampled_from([64, 256, 1 << 16]))
def test_digests_are_those_of_the_bytes(seed: int, nbytes: int, count: int, together: int) -> None:
    rng = np.random.default_rng(seed)
    memory = rng.integers(0, 256, 1000, np.uint8)
    starts = rng.integers(0, len(memory) - nbytes + 1, (count, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "TOGETHER_BYTES", together)
        found = digests.digests(memory, starts, nbytes)
    assert found.shape == starts.shape and found.dtype == np.uint64
    for at, digest in zip(starts.ravel().tolist(), found.ravel().tolist(), strict=True):
        assert digest == xxhash.xxh3_64_intdigest(memory[at : at + nbytes].tobytes())
