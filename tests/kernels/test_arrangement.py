"""Where the arrays of a launch lie: the host looks where kernels are sent, and no two share a byte, whatever parts go together."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_cuda import LAYOUTS, draw, store
from tierd_kernels.call import Result
from tierd_kernels.policy import Budget

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]
SHAPES = st.tuples(
    st.just(4), st.sampled_from([1, 2, 7]), st.integers(0, 3000), st.sampled_from([0, 3, 64]), st.sampled_from([0, 16, 32]),
    st.sampled_from([0, 1, 56]),
)  # fmt: skip
CARRIED_IN = "q", "tickets", "canaries", "copied", "copies"  # the last two where there are copies
CARRIED_BACK = "output", "fields", "state", "failures", "reads", "cold"


@pytest.fixture(scope="module")
def memory(cuda: None) -> Any:
    from tierd_kernels.cuda import backend

    return backend.reserve(0, 0, 0)


def byte_range(view: NDArray[Any], base: int) -> tuple[int, int]:
    start = int(view.ctypes.data) - base
    return start, start + view.nbytes


@settings(max_examples=40)
@given(layout=st.sampled_from(LAYOUTS), drawn=st.lists(SHAPES, min_size=1, max_size=5))
def test_views_are_where_kernels_are_sent_and_apart(memory: Any, layout: Any, drawn: list[tuple[int, ...]]) -> None:
    from tierd_kernels.cuda.arrangement import Arrangement
    from tierd_kernels.cuda.launch import CALL, POINTERS
    from tierd_kernels.cuda.plan import Shape

    shapes = tuple(Shape(*x) for x in drawn)
    found = Arrangement(layout, memory, shapes, None)
    inputs, outputs = memory.inputs, memory.outputs
    into, back = [(0, len(shapes) * CALL.itemsize), byte_range(found.unused, inputs.host_at)], list[tuple[int, int]]()
    groups = list[int]()
    assert found.at == inputs.at
    for shape, x in zip(shapes, found.parts, strict=True):
        address = dict(zip(POINTERS, x.addresses, strict=True))
        for name in CARRIED_IN if shape.copies else CARRIED_IN[:3]:
            view = getattr(x, name)
            assert address[name] - inputs.at == byte_range(view, inputs.host_at)[0], name
            into.append(byte_range(view, inputs.host_at))
        for name in CARRIED_BACK:
            view = getattr(x, name)
            assert address[name] - outputs.at == byte_range(view, outputs.host_at)[0], name
            back.append(byte_range(view, outputs.host_at))
            assert back[-1][1] <= found.answers_end
        for name, view in (("candidate_blocks", x.late.blocks), ("candidate_scores", x.late.scores)):
            assert address[name] == view.ctypes.data >= outputs.host_at + found.answers_end  # written over the link
            back.append(byte_range(view, outputs.host_at))
        assert x.per * x.splits >= shape.full > x.per * (x.splits - 1) or not shape.full
        groups.append(-(-shape.full // max(x.per, 1024 // layout.block_size)) + 1)  # the last the trailing block
        if not shape.copies:
            assert address["copied"] == address["copies"] == 0
    assert max(end for _, end in into) <= found.inputs_end
    assert max(groups) <= found.grid.groups
    assert found.grid.groups <= 1.125 * max(groups) + 1 or len({x.per for x in found.parts}) > 1
    for ranges, most in ((into, len(inputs.host)), (back, len(outputs.host))):
        taken = sorted(x for x in ranges if x[0] < x[1])
        assert taken[0][0] >= 0 and taken[-1][1] <= most and all(end <= start for (_, end), (start, _) in pairwise(taken))


def test_launches_of_the_same_shape_are_arranged_once_and_answer_their_own() -> None:
    from tierd_kernels.cuda import backend
    from tierd_kernels.cuda.packing import Part
    from tierd_kernels.cuda.step import Step

    layout = LAYOUTS[4]
    k, v, q = draw(layout, 300, 3, 6, "diffuse", 8)
    cache = store(layout, k, v)
    memory: Any = cache.memory
    counts: tuple[list[int], ...] = ([], [1], [0, 1, 2, 3], [2])  # canaries
    calls = [cache.call(q[:, i : i + 1], 0.1, Budget(), canary_blocks=np.array(x, np.int64)) for i, x in enumerate(counts)]
    once = backend.attend(layout, memory, calls, 3)
    assert all(isinstance(x, Result) for x in once) and len({x.output.tobytes() for x in once if isinstance(x, Result)}) == len(calls)
    arranged = len(memory.arranged._items)
    for _ in range(2):
        for call, before in zip(calls, once, strict=True):
            (found,) = backend.attend(layout, memory, [call], 3)
            assert isinstance(found, Result) and isinstance(before, Result) and found.canary_failures == []
            assert np.array_equal(found.output, before.output)
    assert len(memory.arranged._items) == arranged + 1, "whether they have canaries or not"
    grids = [Step(layout, memory, [Part(layout, call, 0, 1)]).grid for call in calls]
    assert [grid.canaries > 0 for grid in grids] == [len(x) > 0 for x in counts], "no kernel where there are none"


def test_a_launch_has_no_call_of_the_one_before() -> None:
    """Three calls are launched as four, of which the last is empty."""
    from tierd_kernels.cuda import backend
    from tierd_kernels.cuda.launch import CALL

    layout = LAYOUTS[4]
    k, v, q = draw(layout, 130, 3, 1, "diffuse", 8)
    cache = store(layout, k, v)
    memory: Any = cache.memory
    there: list[bool] = []
    for count in (4, 3):
        backend.attend(layout, memory, [cache.call(q, 0.1, Budget())] * count, 3)
        there.append(bool(memory.inputs.view(3 * CALL.itemsize, (CALL.itemsize,), np.uint8).any()))
    assert there == [True, False]


def test_what_was_used_least_recently_is_forgotten() -> None:
    from tierd_kernels.cuda.recent import Recent

    recent = Recent[str](2)
    assert [recent.add(key, str(key)) for key in (1, 2)] == ["1", "2"]
    assert recent.find(1) == "1"
    recent.add(3, "3")
    assert [recent.find(key) for key in (1, 2, 3)] == ["1", None, "3"]
