"""Short forms for tests that drive an engine over the fake kernels by hand."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
from fake_kernels import FakeKernels, attention
from numpy.typing import NDArray
from tierd_kernels.policy import Budget

from tierd.clock import ManualClock
from tierd.commands import Append, Attend, CloseSession, Command, Geometry, OpenSession, Row, Tolerance
from tierd.engine import Engine, EngineConfig

GEOMETRY = Geometry(num_layers=2, num_q_heads=4, num_kv_heads=2, head_dim=64, dtype="float32")
RECORD_BYTES = GEOMETRY.layout().original_record_bytes
CONFIG = EngineConfig(hot_bytes=1 << 20, originals_bytes=4 << 20, scratch_bytes=1 << 20, canary_share=0.0)
EXACT, LOOSE = Tolerance(0.0), Tolerance(0.1)


class Bench:
    """An engine with its fake kernels and clock; tensors come from one seed."""

    def __init__(self, config: EngineConfig = CONFIG, promote_every: int = 1, **more: Any) -> None:
        self.clock, self.kernels = ManualClock(100.0), FakeKernels(promote_every)
        self.engine = Engine(config, self.clock, self.kernels, **more)
        self.random = np.random.default_rng(0)

    def run(self, *commands: Command) -> list[Any]:
        """Results or exceptions of `commands`, all waiting in one turn."""
        futures = [self.engine.submit(command) for command in commands]
        self.engine.run_once()
        self.engine.check_integrity()
        return [future.exception(timeout=0) or future.result() for future in futures]

    def opened(self, worker: str = "w", tokens: int = 0, geometry: Geometry = GEOMETRY) -> str:
        """A session with `tokens` stored at layer 0."""
        (name,) = self.run(OpenSession(geometry, LOOSE, Budget(), 4096, worker=worker))
        if tokens:
            assert self.run(self.append(name, tokens, worker=worker, geometry=geometry)) == [tokens]
        return str(name)

    def append(self, name: str, n: int, layer: int = 0, worker: str = "w", geometry: Geometry = GEOMETRY) -> Append:
        k, v = (self.numbers(geometry.num_kv_heads, n, geometry) for _ in "kv")
        return Append(name, layer, k, v, worker=worker)

    def attend(self, *names: str, worker: str = "w", tolerance: Tolerance = LOOSE, geometry: Geometry = GEOMETRY) -> Attend:
        """One query of each session at layer 0, nothing appended."""
        rows = [Row(name, 0, self.numbers(geometry.num_q_heads, 1, geometry), tolerance=tolerance) for name in names]
        return Attend(rows, worker=worker)

    def numbers(self, heads: int, n: int, geometry: Geometry = GEOMETRY) -> NDArray[Any]:
        return self.random.standard_normal((heads, n, geometry.head_dim)).astype(geometry.dtype)


def decode_on_threads(ask: "Callable[[Command], Future[Any]]", count: int, wait_s: float) -> None:
    """`count` workers on threads of their own, each with a session and thirty steps, whose answers are held against attention."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            rng = np.random.default_rng(seed)
            k, v = (rng.standard_normal((2, 60, 64)).astype(np.float32) for _ in "kv")
            worker = f"w{seed}"
            name = ask(OpenSession(GEOMETRY, LOOSE, Budget(), 100, worker=worker)).result(wait_s)
            ask(Append(name, 0, k[:, :30], v[:, :30], worker=worker))
            for i in range(30, 60):
                q = rng.standard_normal((4, 1, 64)).astype(np.float32)
                step = Attend([Row(name, 0, q, k[:, i : i + 1], v[:, i : i + 1])], worker=worker)
                (row,) = ask(step).result(wait_s)
                np.testing.assert_array_equal(row.output, attention(k[:, : i + 1], v[:, : i + 1], q, GEOMETRY.scale, "float32"))
            ask(CloseSession(name, worker=worker)).result(wait_s)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(wait_s)
    assert not failures, failures
