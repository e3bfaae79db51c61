"""One layer's recorded keys and values, stored as the CPU backend stores them: any recorded query is answered again, by any policy."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tierd_kernels import ladder
from tierd_kernels.bound.reference import GROUP_TOKENS
from tierd_kernels.host import reserve
from tierd_kernels.layout import Layout, Memory
from tierd_kernels.policy import Policy
from tierd_kernels.step import Step
from tierd_kernels.workspace import Workspace

Offsets = NDArray[np.int64]


def raw(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor as kernels take it: bfloat16 as its bits."""
    tensor = tensor.cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@dataclass(frozen=True)
class Stored:
    """Keys and values of all `tokens`; every block that is full at the end is quantised. Calls say how many tokens they see."""

    layout: Layout
    memory: Memory
    scale: float
    tokens: int
    hot: Offsets
    originals: Offsets
    group_norms: tuple[NDArray[np.float32], NDArray[np.float32]]

    @staticmethod
    def of(k: torch.Tensor, v: torch.Tensor, scale: float, block_size: int, value_group: int) -> "Stored":
        """Store `k`, `v` [kv_heads, tokens, d]."""
        heads, tokens, d = k.shape
        layout = Layout(heads, d, block_size, value_group, str(k.dtype).removeprefix("torch."))
        full, blocks = tokens // block_size, -(-tokens // block_size)
        both = torch.zeros(2, heads, blocks * block_size, d, dtype=k.dtype)
        both[:, :, :tokens] = torch.stack((k, v)).cpu()
        memory = reserve(max(1, full) * layout.hot_block_bytes, 64, blocks * layout.original_block_bytes)
        in_blocks = both.view(2, heads, blocks, block_size, d).permute(2, 0, 1, 3, 4)
        memory.originals[:] = raw(in_blocks).reshape(-1).view(np.uint8)
        originals = np.arange(blocks, dtype=np.int64) * layout.original_block_bytes
        hot = np.arange(full, dtype=np.int64) * layout.hot_block_bytes
        ladder.quantise_blocks(layout, memory, originals[:full], hot)
        per_group = GROUP_TOKENS // block_size
        whole = full // per_group * per_group
        groups = (x[:whole].reshape(-1, per_group) for x in (originals, hot))
        return Stored(layout, memory, scale, tokens, hot, originals, ladder.group_norms(layout, memory, *groups))

    def call(self, q: torch.Tensor, seen: int, rtol: float, policy: Policy) -> ladder.Call:
        """One query token `q` [heads, d] whose newest token is the `seen`-th; no original is cached anywhere but on the host."""
        full, blocks = seen // self.layout.block_size, -(-seen // self.layout.block_size)
        values, errors = (norms[: seen // GROUP_TOKENS] for norms in self.group_norms)
        return ladder.Call(
            q=raw(q[:, None]), num_tokens=seen, softmax_scale=self.scale, hot_offsets=self.hot[:full],
            original_offsets=self.originals[:blocks], in_scratch=None,
            group_value_norms=values, group_error_norms=errors, rtol=rtol, atol=0.0, policy=policy, candidates_max=full,
        )  # fmt: skip

    def attend(self, q: torch.Tensor, seen: int, rtol: float, policy: Policy) -> ladder.Result:
        """The answer, with the original records that were read for it and the blocks' shares of the budget. Raises what the kernels do."""
        (result,) = ladder.attend(self.layout, self.memory, [self.call(q, seen, rtol, policy)], len(q))
        if isinstance(result, Exception):
            raise result
        return result

    def climbed(self, q: torch.Tensor, seen: int, rtol: float, policy: Policy) -> tuple[Step, ladder.Result]:
        """The same, with the step that gave it, whose statistics and annotations can be looked at."""
        step = Step(self.layout, self.memory, self.call(q, seen, rtol, policy), 0, 1, Workspace())
        return step, step.run()

    def host_bytes(self, result: ladder.Result) -> int:
        """Bytes of originals that the answer read: a record once, however many heads read it."""
        return result.reads.from_host.size * self.layout.original_record_bytes
