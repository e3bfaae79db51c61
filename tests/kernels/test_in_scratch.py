"""What is said of copies in scratch, beside a dict of record -> place."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tierd_kernels.in_scratch import UNIT, InScratch, close, empty_words, holds, say, take_over
from tierd_kernels.layout import ALIGNMENT, Layout

Model = dict[tuple[int, int, int], int]  # (kind, block, head) -> byte offset in scratch
SOURCE = """
extern "C" __global__ void find(const Call *calls, int heads, i64 *out) {  // [full][2][heads] of a call, behind those of the ones before
  for (int i = 0; i < (int)blockIdx.x; i++) out += 2 * calls[i].full * heads;
  const Call &call = calls[blockIdx.x];
  for (int i = threadIdx.x; i < 2 * call.full * heads; i += LANES) {
    const Place place = place_of(call, heads, i % heads, i / heads / 2);
    const unsigned char *at = i / heads % 2 ? place.values : place.keys;
    out[i] = at >= call.originals ? ~(at - call.originals) : at - call.scratch;
  }
}
"""


@st.composite
def models(draw: Any, heads: int) -> tuple[int, Model]:
    """Full blocks, and which of their records lie where; from none to all."""
    blocks = draw(st.integers(0, 40))
    share, seed = draw(st.sampled_from([0.0, 0.02, 0.3, 1.0])), draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    records = np.argwhere(random.random((2, blocks, heads)) < share)
    places = random.choice(2**32, len(records), replace=False) * UNIT
    return blocks, dict(zip(map(tuple, records.tolist()), places.tolist(), strict=True))


def written_out(model: Model, blocks: int, heads: int, originals: NDArray[np.int64], record_bytes: int) -> NDArray[np.int64]:
    found = np.empty((2, blocks, heads), np.int64)
    for kind, block, head in np.ndindex(found.shape):
        own = int(originals[block]) + (kind * heads + head) * record_bytes
        found[kind, block, head] = model.get((kind, block, head), ~own)
    return found


def two_heads_and_models(most: int) -> Any:
    return st.integers(1, 40).flatmap(lambda heads: st.tuples(st.just(heads), st.lists(models(heads), min_size=1, max_size=most)))


@given(two_heads_and_models(1), st.integers(0, 2**32 - 1))
def test_each_record_is_where_the_dict_says(drawn: tuple[int, list[tuple[int, Model]]], seed: int) -> None:
    heads, [(blocks, model)] = drawn
    layout = Layout(heads, 64, 16, 16, "float16")
    originals = np.random.default_rng(seed).permutation(blocks) * layout.original_block_bytes
    expected = written_out(model, blocks, heads, originals, layout.original_record_bytes)
    said = InScratch.of(expected)
    assert (said is None) == (not model)
    if said is None:
        return
    assert len(said.places) == len(model) and said.words.nbytes <= 8 * (2 * blocks * heads // 32 + 1)
    assert np.array_equal(said.locations(layout, originals), expected)
    by_number = expected.transpose(1, 0, 2).ravel()
    assert [holds(said.words, number) for number in range(len(by_number))] == (by_number >= 0).tolist()
    few = blocks // 2
    assert np.array_equal(said.locations(layout, originals[:few]), expected[:, :few])


@given(two_heads_and_models(2), st.lists(st.integers(0, 4000), max_size=12))
def test_what_is_taken_over_from_two_by_turns_is_a_mixture(drawn: tuple[int, list[tuple[int, Model]]], cuts: list[int]) -> None:
    heads, found = drawn
    blocks = min(blocks for blocks, _ in found)
    numbers = 2 * blocks * heads
    said = [InScratch.of(written_out(model, n, heads, np.zeros(n, np.int64), 64)) for n, model in found]
    sources = [(x.words, x.places) if x else (empty_words(numbers), np.empty(0, np.uint32)) for x in said]
    words, places, count, expected = empty_words(numbers), np.zeros(numbers, np.uint32), 0, np.full(numbers, -1)
    edges = sorted({0, numbers, *(cut for cut in cuts if cut < numbers)})
    for i, (start, stop) in enumerate(pairwise(edges)):
        which = i % len(sources)
        count = take_over(*sources[which], start, stop, words, places, count)
        for record in range(start, stop):
            block, kind, head = record // heads // 2, record // heads % 2, record % heads
            expected[record] = found[which][1].get((kind, block, head), -1)
    close(words, numbers, count)
    assert count == np.count_nonzero(expected >= 0)
    both = InScratch.of(expected.reshape(blocks, 2, heads).transpose(1, 0, 2))
    if both is None:
        assert not count and not words.any()
    else:
        assert np.array_equal(words, both.words) and np.array_equal(places[:count], both.places)


def test_the_first_and_the_last_record_of_a_word_are_told_apart() -> None:
    words, places, count = empty_words(64), np.zeros(4, np.uint32), 0
    for record in range(64):
        count = say(words, places, count, record, record * UNIT if record in (0, 31, 32, 63) else -1)
    close(words, 64, count)
    assert count == 4 and places.tolist() == [0, 31, 32, 63]
    assert [int(word) & 0xFFFFFFFF for word in words] == [1 << 31 | 1, 1 << 31 | 1, 0] and [int(word) >> 32 for word in words] == [0, 2, 4]


@pytest.mark.usefixtures("cuda")
@given(two_heads_and_models(4))
def test_kernels_find_each_record_where_the_dict_says(drawn: tuple[int, list[tuple[int, Model]]]) -> None:
    import cupy as cp
    from tierd_kernels.cuda.launch import CALL
    from tierd_kernels.cuda.sources import source

    heads, found = drawn
    layout = Layout(heads, 64, 16, 16, "float16")
    text, options = source(layout, "gather")
    calls, kept, expected = np.zeros(len(found), CALL), [], []
    for call, (blocks, model) in zip(calls, found, strict=True):
        originals = np.arange(blocks)[::-1] * layout.original_block_bytes
        expected.append(written_out(model, blocks, heads, originals, layout.original_record_bytes).transpose(1, 0, 2).ravel())
        said = InScratch.of(expected[-1].reshape(blocks, 2, heads).transpose(1, 0, 2))
        arrays = {"original": originals, "hot": np.zeros(blocks, np.int64)}
        arrays |= {} if said is None else {"copied": said.words, "copies": said.places}
        call["full"], call["scratch"], call["originals"] = blocks, 1 << 20, 1 << 60
        for name, array in arrays.items():
            kept.append(cp.asarray(np.ascontiguousarray(array)))
            call[name] = int(kept[-1].data.ptr)
    out, on_device = cp.asarray(np.zeros(sum(map(len, expected)) + 1, np.int64)), cp.asarray(calls.view(np.uint8))
    find = cp.RawModule(code=text + SOURCE, options=options, backend="nvrtc").get_function("find")
    find((len(found),), (32,), (np.uint64(on_device.data.ptr), np.int32(heads), out))
    assert np.array_equal(out.get()[:-1], np.concatenate(expected))


def test_scratch_is_handed_out_in_units_of_places() -> None:
    assert UNIT == ALIGNMENT and Layout(1, 64, 16, 16, "float16").original_record_bytes % UNIT == 0
