"""What the benchmark of the CUDA kernels says of originals that were read, and how it finds its tolerances. No times."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "attend"))
import shares


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.01, 0.05]))
def test_a_tolerance_is_found_in_few_tries(seed: int, wanted: float) -> None:
    """Rows miss their budget at tolerances of their own, and read ever more below."""
    random = np.random.default_rng(seed)
    missed = np.log(random.uniform(0.026, 0.036)) + 0.02 * random.standard_normal(64)
    tried: dict[float, float] = {}

    def share_at(rtol: float) -> float:
        assert rtol not in tried
        tried[rtol] = float(np.minimum(1.0, 4 * np.clip((missed - np.log(rtol)) / 0.12, 0, None) ** 2).mean())
        return tried[rtol]

    found = shares.tolerance(share_at, wanted)
    off = {rtol: abs(np.log(max(share, 1e-9) / wanted)) for rtol, share in tried.items()}
    assert len(tried) <= shares.TRIES + 2 and off[found] == min(off.values()) < 0.3


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_that_no_tolerance_has_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"not 0\.01 at any tolerance"):
        shares.tolerance(lambda rtol: share, 0.01)


@pytest.fixture
def bench(cuda: None) -> Iterator[Any]:
    yield importlib.import_module("bench_attend_cuda")
    for name in ("bench_attend_cuda", "timing"):  # they hold on to the emulator's modules
        del sys.modules[name]


@pytest.mark.gpu
def test_every_step_of_a_graph_is_asked_for_its_own_promotions(bench: Any) -> None:
    """Steps share one workspace: the last one's promotions lay where all were looked for."""
    import torch

    generator = torch.Generator().manual_seed(3)
    shapes = (bench.HEADS, 256, bench.D), (bench.HEADS, 256, bench.D), (bench.HEADS * bench.GROUP, 1, bench.D)
    sessions = [tuple(torch.randn(*x, generator=generator).half() for x in shapes) for _ in range(2)]
    layout = bench.Layout(bench.HEADS, bench.D, 16, 16, "float16")
    memory, calls = bench.stored(layout, sessions)
    calls[1].rtol = 0.5  # where nothing is needed
    graph = bench.Graph(layout, [bench.own_buffers(memory) for _ in calls], [[call] for call in calls])
    graph.graph.launch(graph.stream)
    for answer in graph.answers():
        promoted = sum(float(answer.fields[name].sum()) for name in ("promoted_key_blocks", "promoted_value_blocks"))
        assert answer.cold.sum() == promoted
    first, second = graph.answers()
    assert 0.0 < bench.read_share(first, calls[0]) < 1.0 and bench.read_share(second, calls[1]) == 0.0
