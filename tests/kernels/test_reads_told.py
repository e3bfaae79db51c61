"""What a device tells of the originals that a call read, beside the marks of its blocks."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_candidates import Left, unstored
from test_cuda import LAYOUTS, draw, store
from tierd_kernels.in_scratch import UNIT, InScratch
from tierd_kernels.policy import Budget
from tierd_kernels.reads import words_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]
HEADS, GROUP, ROWS = 2, 2, 4  # rows of a tile
CERTIFIED = 1  # of `state` in cuda/common.cuh: what promotion has left is not looked at


def told(step: Any) -> tuple[NDArray[np.uint32], NDArray[np.int32]]:
    """The words and the rows' counts of its only part, as they lie on the device."""
    memory, (placed,) = step.memory, step.arranged.parts
    memory.outputs.download(memory.stream, 0, step.answers_end)
    memory.stream.synchronize()
    return placed.reads, placed.cold


@given(
    full=st.sampled_from([1, 37, 513, 2049, 5000]), n=st.sampled_from([1, 5]), share=st.sampled_from([0.0, 0.003, 0.4, 1.0]),
    copied=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=12)
def test_a_bit_a_record_and_what_each_row_had_from_the_host(full: int, n: int, share: float, copied: float, seed: int) -> None:
    """Of tiles of which some have promoted nothing."""
    random, rows = np.random.default_rng(seed), GROUP * n
    tiles = -(-rows // ROWS)
    has_copy = random.random((2, full, HEADS)) < copied
    step = unstored(full, n, in_scratch=InScratch.of(np.where(has_copy, random.integers(0, 9, has_copy.shape) * UNIT, -1)))
    real = np.arange(tiles * ROWS).reshape(tiles, 1, 1, ROWS) < rows
    promoting = random.random((HEADS, tiles, 1, 1, 1)) < 0.7
    read = (random.random((HEADS, tiles, full, 2, ROWS)) < share) & real & promoting
    marks = (read * (1 << np.arange(2 * ROWS).reshape(2, ROWS))).sum(axis=(3, 4))
    by_row = read.sum(axis=2).transpose(0, 1, 3, 2).reshape(HEADS, tiles * ROWS, 2)[:, :rows]
    Left(step).write(
        state=np.full((HEADS, rows), CERTIFIED, np.int32), counts=by_row.astype(np.int32), marks=marks.astype(np.uint32),
        reads=np.zeros_like(step.arranged.parts[0].reads), cold=np.zeros((HEADS, rows), np.int32),
    )  # fmt: skip
    step.kernels._finish(step.at, step.grid, step.memory.stream, again=True)
    words, from_host = told(step)
    assert np.array_equal(words, words_of(read.any(axis=(1, 4)).transpose(2, 0, 1)))
    cold = (read & ~has_copy.transpose(2, 1, 0)[:, None, :, :, None]).sum(axis=(2, 3)).reshape(HEADS, tiles * ROWS)[:, :rows]
    assert np.array_equal(from_host.reshape(HEADS, rows), cold)


@pytest.mark.parametrize("tokens", [16, 528, 1040])
def test_what_another_step_has_read_is_forgotten(tokens: int) -> None:
    """Of splits whose records begin in the middle of a word, too."""
    from tierd_kernels.cuda.packing import Part
    from tierd_kernels.cuda.step import Step

    layout = LAYOUTS[0]
    k, v, q = draw(layout, tokens, 4, 1, "diffuse", 1)
    cache = store(layout, k, v)
    step = Step(layout, cache.memory, [Part(layout, cache.call(q, 0.1, Budget()), 0, 1)], split_blocks=4)  # type: ignore[arg-type]
    step.upload()
    Left(step).write(reads=np.full_like(step.arranged.parts[0].reads, 0xFFFFFFFF))
    step.kernels.certify(step.at, step.grid, False, step.memory.stream)
    words, _ = told(step)
    assert len(words) == -(-4 * tokens // 16 // 32) and not words.any()
