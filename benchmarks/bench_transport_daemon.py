"""The daemon of the load test: kernels of the CPU, or ones that do nothing, so that a call costs the hand-over and no more.

    python benchmarks/bench_transport_daemon.py unix:///path/of.sock null|cpu
"""

import asyncio
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tierd_kernels import host
from tierd_kernels.call import Call, Result
from tierd_kernels.layout import Layout, Memory
from tierd_kernels.reads import NONE_READ
from tierd_kernels.select.candidates import Candidates
from tierd_proto.coding import CERTIFICATE_COLUMNS

from tierd.config import load
from tierd.engine import Engine
from tierd.server import Daemon
from tierd.warm import warm_up

ENGINES = ("null", "cpu")


class NullKernels:
    """Every answer is zero and called exact: true of a session whose values are zero, and the oracle notices any other."""

    reserve = staticmethod(host.reserve)
    prepare = staticmethod(host.prepare)
    hot_block_bytes = staticmethod(host.hot_block_bytes)
    begin_copies = staticmethod(host.begin_copies)

    def limit_threads(self, count: int) -> None:
        pass

    def quantise_blocks(
        self, layout: Layout, memory: Memory, original_offsets: NDArray[np.int64], hot_offsets: NDArray[np.int64]
    ) -> None:
        pass

    def group_norms(
        self, layout: Layout, memory: Memory, original_offsets: NDArray[np.int64], hot_offsets: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        shape = len(hot_offsets), layout.num_kv_heads
        return np.zeros(shape, np.float32), np.zeros(shape, np.float32)

    def attend(
        self, layout: Layout, memory: Memory, calls: list[Call], num_q_heads: int, meanwhile: Callable[[], None]
    ) -> list[Result | Exception]:  # fmt: skip
        meanwhile()  # as over a device
        return [_zero(layout, call) for call in calls]


def _zero(layout: Layout, call: Call) -> Result:
    shape = call.q.shape[:2]
    certificate: dict[str, NDArray[Any]] = {name: np.zeros(shape, dtype) for name, dtype in CERTIFICATE_COLUMNS.items()}
    certificate["exact"] = np.ones(shape, np.bool_)
    return Result(np.zeros_like(call.q), certificate, NONE_READ, lambda: Candidates.none(layout.num_kv_heads), [])


async def serve(target: str, engine: str) -> None:
    """Until SIGTERM; says where it listens once it does."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    settings = load({"listen": target})
    daemon = Daemon(settings, Engine(settings.engine(), kernels=NullKernels() if engine == "null" else None))
    bound = daemon.bind()
    if engine == "cpu":
        await asyncio.to_thread(warm_up)
    await daemon.start()
    print(bound, flush=True)
    await stopping.wait()
    await daemon.stop()


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[2] not in ENGINES:
        print(f"usage: {sys.argv[0]} TARGET {'|'.join(ENGINES)}", file=sys.stderr)
        return 2
    asyncio.run(serve(*sys.argv[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
