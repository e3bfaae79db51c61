"""What the first passes leave, and promotion alone after them, of blocks that the test chooses: whoever's thread blocks take part, each
tile of rows gets what its own blocks' originals make of it.

Legend: a tile is four query rows of one KV head; it is open where some row of it waits for originals.
"""

from typing import Any

import device
import numpy as np
import pytest
from coded_weights import coded_weights
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracle import exact_numbers
from stored import Cache
from test_cuda import draw, store
from tierd_kernels.cuda.sources import SPLIT_TOKENS_SHORT
from tierd_kernels.layout import Layout
from tierd_kernels.policy import Budget
from tierd_kernels.quantise.reference import dequantise_values, quantise_block

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]
OPEN, CERTIFIED = 0, 1  # of `state` in cuda/common.cuh
ERROR, SPLIT_TOP, STATISTIC_WORDS, PARTIALS, FACTS, LIMIT = 15, 12, 32, 17, 7, 6
DELTA_WORD, BLOCK_TOP = 3, 7  # which words of a block's statistics
LARGEST, TOP, MASS, UNIT_NORM = [12, 13, 14, 16], 0, 1, 2  # of partials those that are maxima; of facts
PER, B, D, ROWS, SIZE_STEP = 32, 16, 128, 4, 4  # blocks of a split, mostly; rows of a tile; see select/sharing.cuh
LOG2E = np.log2(np.e)
Arrays = dict[str, NDArray[Any]]
REPEATS = 20 if device.real() else 2  # a race shows at times


class Promotion:
    """A step of 8 KV heads whose first passes have run, and which promotes what it is told to, again and again."""

    def __init__(self, query_heads: int, n: int, tokens: int, per: int = PER) -> None:
        from tierd_kernels.cuda.packing import Part
        from tierd_kernels.cuda.step import Step

        layout = Layout(8, D, B, 16, "float16")
        self.k, self.v, self.q = draw(layout, tokens, query_heads, n, "sharp", 1)
        self.cache: Cache = store(layout, self.k, self.v)
        self.step = Step(layout, self.cache.memory, [Part(layout, self.cache.call(self.q, 1e-3, Budget(skip_share=0.0)), 0, n)], per)  # type: ignore[arg-type]
        self.step.upload()
        self.step.kernels.certify(self.step.at, self.step.grid, False, self.step.memory.stream)
        self.per, self.full, self.rows = per, tokens // B, query_heads // 8 * n
        self.of_head, self.splits = -(-self.rows // ROWS), -(-self.full // per)
        self.tiles = 8 * self.of_head
        self.shapes: dict[str, tuple[tuple[int, ...], type]] = {
            "state": ((8, self.rows), np.int32), "facts": ((8, self.rows, FACTS), np.float32), "counts": ((8, self.rows, 2), np.int32),
            "row_weights": ((self.tiles, self.full, ROWS, 2), np.float32), "marks": ((self.tiles, self.full), np.uint32),
            "sums": ((self.tiles, self.splits + 1, ROWS, D), np.float32),
            "partials": ((self.tiles, self.splits + 1, PARTIALS, ROWS), np.float32),
            "statistics": ((self.tiles, self.full + 1, STATISTIC_WORDS), np.uint32),
            "dots": ((8, self.rows, self.splits + 1), np.float32), "output": ((query_heads, n, D), np.float16),
            "dense": ((self.tiles * (self.splits + 1) * ROWS * (6 + D) * 2,), np.float32),
            "tickets": ((2 * (8 + self.tiles) + (self.tiles * self.splits if self.tiles <= 32 else 0),), np.int32),
        }  # fmt: skip
        self.first, self.weights = self.read(), coded_weights(self.step).astype(np.float64)
        for name in ("marks", "counts"):
            self.first[name] = np.zeros_like(self.first[name])

    def _bytes(self, name: str) -> Any:
        """Of one of CALL's arrays, on the device."""
        from tierd_kernels.cuda.launch import POINTERS

        (x,), memory, (shape, dtype) = self.step.arranged.parts, self.step.memory, self.shapes[name]
        size, at = int(np.prod(shape)) * np.dtype(dtype).itemsize, x.addresses[POINTERS.index(name)]
        for start, held in (
            (memory.workspace_at, memory.workspace), (memory.inputs.at, memory.inputs.device), (memory.outputs.at, memory.outputs.device),
        ):  # fmt: skip
            if start <= at < start + held.nbytes:
                return held[at - start : at - start + size]
        raise AssertionError(name)

    def read(self) -> Arrays:
        self.step.memory.stream.synchronize()
        return {name: np.array(self._bytes(name).get()).view(dtype).reshape(shape) for name, (shape, dtype) in self.shapes.items()}

    def run(self, state: NDArray[Any], limit: NDArray[Any], row_weights: NDArray[Any]) -> Arrays:
        """What promotion leaves. state, limit [8, rows]; row_weights [tiles, full, 4, 2]."""
        import cupy

        facts = self.first["facts"].copy()
        facts[..., LIMIT] = limit
        left = self.first | {"state": state.astype(np.int32), "facts": facts, "row_weights": row_weights.astype(np.float32)}
        for name, x in left.items():
            self._bytes(name).set(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
        self._bytes("dense").fill(0xFF)  # whoever reads what no part has left finds NaN
        cupy.cuda.Device().synchronize()
        self.step.kernels._splits("promote", self.step.at, self.step.grid, self.step.memory.stream)
        return self.read()

    def rounding_of_scores(self, tile: int, b: int, row: int) -> float:
        """What sums over channels may be off by, of a block's original keys and a row."""
        h, index = tile // self.of_head, tile % self.of_head * ROWS + row
        q = exact_numbers(self.q).reshape(8, self.rows, D)[h, index]
        k = exact_numbers(self.k)[h, b * B : (b + 1) * B]
        return float(np.linalg.norm(q) * np.linalg.norm(k, axis=1).max() * D**-0.5 * (D / 16 + 8) * 2.0**-24)

    def changes(self, marks: NDArray[np.uint32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """By how much the marked blocks' originals change the splits' sums, relative to the splits' largest scores of before, and the
        absolute sum of what is put in and taken back: [tiles, splits, 4, d], float64."""
        change, size = np.zeros((2, self.tiles, self.splits, ROWS, D))
        keys, values = (exact_numbers(x).astype(np.float64) for x in (self.k, self.v))
        q = exact_numbers(self.q).astype(np.float64).reshape(8, self.rows, D)
        for tile, b in zip(*np.nonzero(marks), strict=True):
            h, here = tile // self.of_head, slice(b * B, (b + 1) * B)
            codes = dequantise_values(quantise_block(self.k[h, here], self.v[h, here], self.cache.layout), self.cache.layout)
            stored = codes.astype(np.float16).astype(np.float64)
            for row in range(ROWS):
                index, mark = tile % self.of_head * ROWS + row, int(marks[tile, b]) >> row
                if not mark & 17:
                    continue
                top = float(self.first["partials"][tile, b // self.per, SPLIT_TOP, row])
                largest = self.first["statistics"][tile, b].view(np.float32)[(BLOCK_TOP ^ (b & 7)) * ROWS + row]
                was = np.exp2(largest - top) * self.weights[tile, b, row]
                scores = keys[h, here] @ q[h, index] * D**-0.5 * LOG2E
                now = np.exp2(scores - top) if mark & 1 else was
                used = values[h, here] if mark & 16 else stored
                change[tile, b // self.per, row] += now @ used - was @ stored
                size[tile, b // self.per, row] += now @ np.abs(used) + was @ np.abs(stored)
        return change, size


@pytest.fixture(scope="module")
def decoding(cuda: None) -> Promotion:
    """One token, 8 tiles, 65 full blocks: the last split has one, and a trailing block is left over."""
    return Promotion(32, 1, 65 * B + 3)


@pytest.fixture(scope="module")
def short(cuda: None) -> Promotion:
    """Splits in which no thread block helps another."""
    return Promotion(32, 1, 40 * B, SPLIT_TOKENS_SHORT // 2 // B)


@pytest.fixture(scope="module")
def wide(cuda: None) -> Promotion:
    """16 tiles, of which every second has two rows; splits of which two warps have blocks."""
    return Promotion(48, 1, 100 * B, 64)


@pytest.fixture(scope="module")
def prefilling(cuda: None) -> Promotion:
    """More tiles than a warp has lanes, which share nothing."""
    return Promotion(16, 10, 20 * B + 10)


def drawn(of: Promotion, open_tiles: frozenset[int], most: int, seed: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """What selection might leave: rows of open tiles wait for originals, some of them for none, others for up to `most` sixteenths of the
    blocks of each split, which are few in one split and many in another. Of rows that are not open nothing is known."""
    random = np.random.default_rng(seed)
    limit, state = random.choice([0.0, 0.5, np.inf], (8, of.rows)), np.full((8, of.rows), CERTIFIED)
    weights = np.full((of.tiles, of.full, ROWS, 2), np.nan)
    for tile in open_tiles:
        h, rows = tile // of.of_head, slice(tile % of.of_head * ROWS, (tile % of.of_head + 1) * ROWS)
        count = state[h, rows].size
        state[h, rows] = OPEN
        limit[h, rows] = np.where(random.random(count) < 0.7, random.uniform(0.5, 1, count), np.inf)
        if most and np.isinf(limit[h, rows]).all():
            limit[h, rows.start] = 0.9
        share = np.repeat(random.integers(0, most + 1, of.splits) / 16, of.per)[: of.full, None, None]
        some = random.random((of.full, 1, 1)) < share  # rows of a tile need the same blocks, most of them
        weights[tile] = np.where(some & (random.random((of.full, ROWS, 2)) < 0.8), random.uniform(1, 9, (of.full, ROWS, 2)), 1e-3)
    return state, limit, weights


def shared(of: Promotion, marks: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Which thread blocks [splits, tiles] leave a part: one behind the other, as many of a tile as have SIZE_STEP promoted blocks each
    at most, or the least multiple of it with which there are enough thread blocks; one alone leaves none."""
    found = np.zeros((of.splits, of.tiles), np.bool_)
    if of.tiles > 32 or of.per * B < SPLIT_TOKENS_SHORT:
        return found
    for split in range(of.splits):
        numbers = (marks[:, split * of.per : (split + 1) * of.per] > 0).sum(axis=1)
        parts = next(x for x in (-(-numbers // size) for size in range(SIZE_STEP, 129, SIZE_STEP)) if x.sum() <= of.tiles)
        found[split, : parts.sum()] = np.repeat(parts > 1, parts)
    return found


def check(of: Promotion, open_tiles: frozenset[int], most: int, seed: int) -> Arrays:
    state, limit, weights = drawn(of, open_tiles, most, seed)
    found = of.run(state, limit, weights)
    promoting = (state == OPEN) & np.isfinite(limit)
    marks, counts = np.zeros((of.tiles, of.full), np.uint32), np.zeros((8, of.rows, 2), np.int32)
    for h, row in zip(*np.nonzero(promoting), strict=True):
        tile, own = h * of.of_head + row // ROWS, row % ROWS
        needs = weights[tile, :, own] >= limit[h, row]
        marks[tile] |= (needs[:, 0].astype(np.uint32) + 16 * needs[:, 1].astype(np.uint32)) << np.uint32(own)
        counts[h, row] = needs.sum(axis=0)
    assert np.array_equal(found["marks"], marks) and np.array_equal(found["counts"], counts)
    change, size = of.changes(marks)
    before, after = (x["sums"][:, : of.splits].astype(np.float64) for x in (of.first, found))
    risen = found["partials"][:, : of.splits, SPLIT_TOP].astype(np.float64) - of.first["partials"][:, : of.splits, SPLIT_TOP]
    after *= np.exp2(risen)[..., None]
    where = size > 0
    assert np.array_equal(after[~where], before[~where], equal_nan=True), "sums of what is not promoted"
    off = np.abs(after - before - change)[where]
    assert (off <= 1e-5 * size[where] + 2.0**-23 * np.abs(before[where])).all(), f"off by {off.max()}"
    assert not found["tickets"].any()
    idle = np.ones((of.tiles, of.splits + 1), np.bool_)
    idle[np.nonzero(marks)[0], np.nonzero(marks)[1] // of.per] = False
    for name in ("sums", "partials"):
        assert np.array_equal(found[name][idle].view(np.uint32), of.first[name][idle].view(np.uint32)), name
    left = ~np.isnan(found["dense"][: of.splits * of.tiles * (D + 1) * 4].reshape(of.splits, of.tiles, -1))
    taking_part = shared(of, marks)
    assert np.array_equal(left.all(axis=2), taking_part) and np.array_equal(left.any(axis=2), taking_part)
    for tile, b, row in np.argwhere(marks[..., None] >> np.arange(ROWS, dtype=np.uint32) & 1):
        delta = found["statistics"].view(np.float32)[tile, b, (DELTA_WORD ^ (b & 7)) * ROWS + row]
        assert of.rounding_of_scores(tile, b, row) <= delta < 1e-3, "promoted keys' scores err by their rounding"
    unmarked = np.append(marks == 0, np.ones((of.tiles, 1), np.bool_), axis=1)
    assert np.array_equal(found["statistics"][unmarked], of.first["statistics"][unmarked])
    return found


TILES = st.frozensets(st.integers(0, 7))
NONE, ALL = frozenset[int](), frozenset(range(8))


@given(TILES, st.integers(0, 16), st.integers(0, 2**31))
@example(NONE, 3, 0)
@example(frozenset({3}), 1, 1)  # a KV head has all, a block or none
@example(frozenset({7}), 16, 2)  # all blocks, four parts
@example(frozenset({0, 2, 5}), 16, 3)  # two parts or three, and thread blocks that have none
@example(frozenset({0, 1, 3, 4, 6, 7}), 16, 4)  # more are open than closed
@example(ALL, 8, 5)
@settings(max_examples=12)
def test_each_tile_gets_what_its_own_originals_make_of_it(decoding: Promotion, open_tiles: frozenset[int], most: int, seed: int) -> None:
    found = check(decoding, open_tiles, most, seed)
    state, limit, weights = drawn(decoding, open_tiles, most, seed)
    for _ in range(REPEATS):
        again = decoding.run(state, limit, weights)
        for name, x in found.items():
            assert np.array_equal(x.view(np.uint32), again[name].view(np.uint32)), f"{name}: other bits the second time"


@given(st.frozensets(st.integers(0, 15)), st.integers(0, 16), st.integers(0, 2**31))
@settings(max_examples=6)
def test_tiles_of_fewer_rows_share_too(wide: Promotion, open_tiles: frozenset[int], most: int, seed: int) -> None:
    check(wide, open_tiles, most, seed)


@given(TILES, st.integers(0, 2**31))
@settings(max_examples=3)
def test_short_splits_have_a_thread_block_each(short: Promotion, open_tiles: frozenset[int], seed: int) -> None:
    check(short, open_tiles, 16, seed)


@given(st.frozensets(st.integers(0, 39)), st.integers(0, 2**31))
@settings(max_examples=3)
def test_more_tiles_than_lanes_have_a_thread_block_each(prefilling: Promotion, open_tiles: frozenset[int], seed: int) -> None:
    check(prefilling, open_tiles, 4, seed)


@pytest.mark.skipif(device.real(), reason="a device runs thread blocks in an order of its own")
@pytest.mark.parametrize("open_tiles", [{3}, {0, 2, 5}], ids=str)
def test_it_is_the_same_whichever_thread_block_ends_last(
    decoding: Promotion, monkeypatch: pytest.MonkeyPatch, open_tiles: set[int]
) -> None:
    selected = drawn(decoding, frozenset(open_tiles), 16, 6)
    in_order = decoding.run(*selected)
    assert (in_order["marks"] > 0).sum() > 20
    for order in range(5, 10):
        monkeypatch.setenv("TIERD_EMULATOR_ORDER", str(order))
        found = decoding.run(*selected)
        for name, x in in_order.items():
            assert np.array_equal(x.view(np.uint32), found[name].view(np.uint32)), f"{name}, order {order}"


def test_what_is_left_does_not_depend_on_how_many_share_it(decoding: Promotion) -> None:
    """Statistics and the bound's sums have the same bits; ERROR, of what was taken back, is a sum in another order."""
    state, limit, weights = drawn(decoding, ALL, 9, 7)
    together = decoding.run(state, limit, weights)  # each has its own
    for tile in (0, 5):
        alone = decoding.run(np.where(np.arange(8)[:, None] == tile, state, CERTIFIED), limit, weights)
        for name in ("statistics", "marks", "counts"):
            assert np.array_equal(alone[name][tile], together[name][tile]), name
        one, other = (x["partials"][tile, : decoding.splits] for x in (alone, together))
        assert np.array_equal(np.delete(one, ERROR, 1), np.delete(other, ERROR, 1))
        np.testing.assert_allclose(one[:, ERROR], other[:, ERROR], rtol=1e-5)
        assert (one[:, ERROR] > decoding.first["partials"][tile, : decoding.splits, ERROR]).any()


def test_a_row_that_promotes_alone_has_the_sums_that_it_has_among_others(decoding: Promotion) -> None:
    """The thread block adds up one row's blocks by all its threads, or those of all four side by side."""
    state, limit, weights = drawn(decoding, ALL, 9, 8)
    limit = np.full_like(limit, 0.9)
    together, first = (x["partials"][:, : decoding.splits] for x in (decoding.run(state, limit, weights), decoding.first))
    for row in range(ROWS):
        alone = decoding.run(state, np.where(np.arange(ROWS) == row, limit, np.inf), weights)["partials"][:, : decoding.splits]
        assert np.array_equal(alone[:, :, LARGEST, row], together[:, :, LARGEST, row])
        np.testing.assert_allclose(alone[..., row], together[..., row], rtol=1e-5, atol=1e-30)
        others = np.arange(ROWS) != row
        assert np.array_equal(alone[..., others].view(np.uint32), first[..., others].view(np.uint32))
        assert (alone[..., row] != first[..., row]).any()


def test_each_split_s_part_of_the_output_is_told(cuda: None) -> None:
    """o_G . O, as selection and the bound's spread use it, of 51 splits; the trailing block is another."""
    first = Promotion(32, 1, 201 * B + 3, per=4).first
    sums, tops = first["sums"].astype(np.float64), first["partials"][:, :, SPLIT_TOP].astype(np.float64)
    row_top, mass = (first["facts"][..., i].astype(np.float64)[:, None] for i in (TOP, MASS))
    parts = sums * (np.exp2(tops - row_top) / mass)[..., None]  # [8, splits + 1, 4, d]
    output = first["output"].reshape(8, 1, ROWS, D).astype(np.float64)
    norm = np.linalg.norm(output[:, 0], axis=-1)
    unit = np.exp2(np.round(np.log2(norm / first["facts"][..., UNIT_NORM])))  # norms are told in it
    assert np.allclose(parts.sum(axis=1), output[:, 0], atol=1e-3 * norm.max())
    want = (parts * output).sum(axis=-1).transpose(0, 2, 1) / unit[..., None] ** 2
    np.testing.assert_allclose(first["dots"], want, rtol=1e-4, atol=1e-5 * float(np.abs(want).max()))
