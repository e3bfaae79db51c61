"""What kernels leave does not depend on which thread block or warp comes first, nor how far one goes ahead of the others: all of a
launch, of calls that need every kernel between them, in orders that only the emulator can choose."""

from typing import Any

import device
import numpy as np
import pytest
from test_cuda import LAYOUTS, draw, in_scratch, store
from tierd_kernels.call import Result
from tierd_kernels.layout import Layout
from tierd_kernels.policy import Budget, Coverage, Policy

pytestmark = [
    pytest.mark.gpu, pytest.mark.usefixtures("cuda"),
    pytest.mark.skipif(device.real(), reason="a device runs thread blocks and warps in an order of its own"),
]  # fmt: skip
POLICIES: list[tuple[float, Policy]] = [
    (0.02, Budget(skip_share=0.0)), (1e-4, Budget()), (0.0, Budget()), (0.1, Budget(require_rank=True)), (0.5, Coverage(k_min=2, k_max=9)),
]  # fmt: skip


def left(layout: Layout, n: int, regime: str) -> list[Any]:
    """Records, norms, and everything that is answered to calls by all policies in one launch."""
    from tierd_kernels.cuda import backend

    # A trailing block, and halves of as many whole blocks.
    k, v, q = draw(layout, 1121, 4 * layout.num_kv_heads, n, regime, 3)
    cache = store(layout, k, v)
    canaries = np.arange(3)
    calls = [in_scratch(cache, cache.call(q, rtol, policy, canary_blocks=canaries, preference=2)) for rtol, policy in POLICIES]
    found: list[Any] = [cache.memory.hot.get(), *cache.groups]
    promoted = exact = 0
    for result in backend.attend(layout, cache.memory, calls, 4 * layout.num_kv_heads):
        assert isinstance(result, Result)
        near = result.candidates()
        found += [result.output, *result.certificate.values(), *result.reads, near.blocks, near.scores, np.array(result.canary_failures)]
        promoted += np.count_nonzero(result.certificate["promoted_value_blocks"])
        exact += np.count_nonzero(result.certificate["exact"])
    assert promoted and exact, "kernels that have nothing to do are not tested"
    return found


@pytest.mark.parametrize(("layout", "n", "regime"), [*((layout, 1, "sharp") for layout in LAYOUTS[:3]), (LAYOUTS[0], 5, "ties")], ids=str)
def test_a_launch_leaves_the_same_in_every_order(monkeypatch: pytest.MonkeyPatch, layout: Layout, n: int, regime: str) -> None:
    from tierd_kernels.cuda import launch

    if n > 1:
        monkeypatch.setattr(launch, "PICK_BLOCKS", 1)  # a thread block of selection goes through all groups
    expected = left(layout, n, regime)
    for order in range(1, 5):
        monkeypatch.setenv("TIERD_EMULATOR_ORDER", str(order))
        for i, (one, other) in enumerate(zip(left(layout, n, regime), expected, strict=True)):
            assert one.tobytes() == other.tobytes(), f"order {order}, array {i}"
