"""Arrays that stay on the device: each step finds its own, whatever was kept before and whatever is forgotten for it."""

from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from stored import Cache
from test_cuda import LAYOUTS, draw, store
from tierd_kernels.call import Result
from tierd_kernels.policy import Budget

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]
ROOM, UNIT = 4096, 256  # bytes; what an array takes is a multiple of the unit


def on_device(at: int, like: NDArray[Any]) -> NDArray[Any]:
    """What lies at that address of the device."""
    import cupy

    out = cupy.empty(like.nbytes + 1, cupy.uint8)
    cupy.cuda.runtime.memcpy(int(out.data.ptr), at, like.nbytes, cupy.cuda.runtime.memcpyDeviceToDevice)
    return np.array(out.get()[: like.nbytes]).view(like.dtype).reshape(like.shape)


class Arrays:
    """An array for every name, until it is renewed. No two have had the same contents, and one may lie where one before it lay."""

    def __init__(self) -> None:
        self._arrays: dict[int, NDArray[Any]] = {}
        self._next = 0

    def get(self, name: int, length: int, renewed: bool) -> NDArray[Any]:
        if renewed or name not in self._arrays:
            self._arrays.pop(name, None)
            dtype = np.int64 if name % 2 else np.float32
            self._arrays[name] = np.arange(self._next, self._next + length).astype(dtype).reshape(-1, 1)
            self._next += max(1, length)
        return self._arrays[name]


USES = st.tuples(st.integers(0, 9), st.integers(0, 150), st.sampled_from([False, False, True]))


@given(st.lists(st.lists(USES, max_size=8), min_size=1, max_size=25))
def test_a_step_finds_all_of_its_arrays(steps: list[list[tuple[int, int, bool]]]) -> None:
    import cupy
    from tierd_kernels.cuda.kept import Kept

    kept, arrays, stream = Kept(ROOM), Arrays(), cupy.cuda.Stream(non_blocking=True)
    for uses in steps:
        own = [arrays.get(*use) for use in {use[0]: use for use in uses}.values()]
        while sum(-(-array.nbytes // UNIT) * UNIT for array in own) > ROOM:
            own.pop()
        places = kept.at(own)
        kept.upload(stream)
        stream.synchronize()
        for array, at in zip(own, places, strict=True):
            assert kept._pile.staging.at <= at <= at + array.nbytes <= kept._pile.staging.at + ROOM
            assert np.array_equal(on_device(at, array), array)


@given(st.lists(st.tuples(st.sampled_from(["grow", "again", "cut", "part", "anew"]), st.integers(1, 9)), max_size=20), st.randoms())
def test_the_largest_is_that_of_all_elements_and_only_new_ones_are_looked_up(steps: list[tuple[str, int]], random: Random) -> None:
    from tierd_kernels.cuda.kept import Largest

    looked_up, numbers = list[int](), np.array([random.randrange(100) for _ in range(400)])

    def look_up(array: NDArray[Any]) -> NDArray[Any]:
        looked_up.append(len(array))
        return numbers[array]

    largest = Largest(look_up)
    memory, count, most = np.arange(200), 1, 0  # `most`: elements of the memory that it has seen
    for what, by in steps:
        if what == "anew":
            memory, count, most = np.arange(200) + random.randrange(200), 1, 0
        count = min(200, count + by) if what == "grow" else max(1, count - by) if what == "cut" else count
        array = memory[by : by + count] if what == "part" else memory[:count]
        looked_up.clear()
        assert largest(array) == numbers[array].max()
        if what == "part" or count <= most:
            assert looked_up == [len(array)]
        else:
            assert looked_up == [count - most]
            most = count
    assert len(largest._known) <= 1, "of memory that is gone nothing is kept"


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each upload of what is kept."""
    from tierd_kernels.cuda import staging

    sizes, upload = list[int](), staging.Staging.upload

    def counted(self: Any, stream: Any, start: int, stop: int) -> None:
        sizes.append(stop - start)
        upload(self, stream, start, stop)

    monkeypatch.setattr(staging.Staging, "upload", counted)
    return sizes


def test_an_array_is_carried_once_until_the_room_is_full(carried: list[int]) -> None:
    import cupy
    from tierd_kernels.cuda.kept import Kept

    kept, stream = Kept(ROOM), cupy.cuda.Stream(non_blocking=True)
    arrays = [np.full(UNIT // 4, i, np.float32) for i in range(ROOM // UNIT + 1)]
    places = [kept.at([array])[0] for array in arrays[:-1]]  # no upload yet: the first carries all
    for _ in range(3):
        assert kept.at(arrays[:-1]) == places and len({*places}) == ROOM // UNIT
        kept.upload(stream)
    assert carried == [ROOM]
    assert kept.at(arrays[-1:]) == kept.at(arrays[-1:]) == places[:1]
    kept.upload(stream)
    assert carried == [ROOM, UNIT]
    with pytest.raises(ValueError, match=f"more than the {ROOM} bytes"):
        kept.at(arrays)
    stream.synchronize()


def test_what_an_enqueued_step_reads_is_there_until_it_has_run() -> None:
    """One that fills the room is uploaded behind it; the host is far ahead of the device."""
    import cupy
    from tierd_kernels.cuda.kept import Kept
    from tierd_kernels.cuda.start import pinned

    runtime, stream, kept = cupy.cuda.runtime, cupy.cuda.Stream(non_blocking=True), Kept(ROOM)
    first, second = (np.full(ROOM // 8, number, np.int64) for number in (1, 2))
    read = pinned(ROOM, "a test").view(np.int64)
    (at,) = kept.at([first])
    kept.upload(stream)
    stream.synchronize()
    stream.begin_capture()
    runtime.memcpyAsync(int(read.ctypes.data), at, ROOM, runtime.memcpyDeviceToHost, stream.ptr)
    assert kept.at([second]) == [at]
    kept.upload(stream)
    graph = stream.end_capture()
    graph.launch(stream)
    stream.synchronize()
    assert np.array_equal(read, first) and np.array_equal(on_device(at, second), second)


def test_an_array_that_is_kept_cannot_be_written() -> None:
    from tierd_kernels.cuda.kept import Kept

    array = np.zeros(3)
    Kept(ROOM).at([array])
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1.0


def caches() -> list[Cache]:
    """Two in one memory, block by block in turn, of different lengths."""
    layout = LAYOUTS[4]
    k, v, _ = draw(layout, 40 * layout.block_size, 3, 1, "diffuse", 3)
    whole = store(layout, k, v)
    return [
        Cache(layout, whole.memory, *(x[:, : count * 64] for x in (k, v)), whole.hot[start::2][:count].copy(),
              whole.originals[start::2][:count].copy(), [x[:0].copy() for x in whole.groups])
        for start, count in ((0, 20), (1, 15))
    ]  # fmt: skip


def test_calls_are_answered_the_same_where_little_can_be_kept(carried: list[int]) -> None:
    from tierd_kernels.cuda import backend
    from tierd_kernels.cuda.kept import Kept

    first, second = caches()
    memory: Any = first.memory
    q = draw(first.layout, 3, 3, 1, "diffuse", 4)[2]
    calls = [cache.call(q, 0.1, Budget()) for cache in (first, second)]
    roomy = backend.attend(first.layout, memory, calls, 3)
    assert all(isinstance(x, Result) for x in roomy) and not np.array_equal(roomy[0].output, roomy[1].output)  # type: ignore[union-attr]
    memory.kept = Kept(6 * UNIT)  # one call's at a time
    for batch in ([0], [1], [0, 1], [1, 0], [0]):
        for number, found in zip(batch, backend.attend(first.layout, memory, [calls[i] for i in batch], 3), strict=True):
            assert isinstance(found, Result) and np.array_equal(found.output, roomy[number].output)  # type: ignore[union-attr]
    memory.kept = Kept(UNIT)
    for refused in backend.attend(first.layout, memory, calls, 3):
        assert isinstance(refused, ValueError) and "kept for calls" in str(refused)
