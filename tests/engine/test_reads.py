"""What a call read, as a list, is what the masks say, and what came from the host is what kernels could not find in scratch."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tierd_kernels.in_scratch import UNIT, InScratch

from tierd.engine.reads import Reads


@given(st.integers(0, 40), st.integers(1, 4), st.sampled_from([0.0, 0.05, 1.0]), st.booleans(), st.integers(0, 1 << 30))
def test_it_is_what_the_masks_say(blocks: int, heads: int, share: float, scratch: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.random((2, blocks, heads)) < share
    masks[int(rng.integers(2))] = False  # keys or values alone
    reads = Reads.of(masks[0], masks[1])
    assert np.array_equal(np.stack(reads, axis=1).reshape(-1, 3), np.argwhere(masks))
    locations = rng.integers(-9, 9, masks.shape) * UNIT
    in_scratch = InScratch.of(locations) if scratch else None  # None as well where nothing lies there
    exact = rng.random(heads) < 0.5
    cold = np.ones(masks.shape, np.bool_) if in_scratch is None else (locations < 0) | exact
    hosts = reads.where(reads.from_host(in_scratch, exact))
    assert np.array_equal(np.stack(hosts, axis=1).reshape(-1, 3), np.argwhere(masks & cold))
