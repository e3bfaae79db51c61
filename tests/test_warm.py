"""No call waits for a compiler once the daemon serves: what sessions of all kinds need was compiled by `warm_up`."""

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "server"))
from daemon_process import environment
from numba.core.dispatcher import Dispatcher
from tierd_kernels.kvview import narrow
from tierd_kernels.policy import Budget, Coverage

from tierd.commands import Append, Attend, Command, Geometry, OpenSession, Row, Tolerance, Truncate
from tierd.engine import Engine, EngineConfig
from tierd.warm import warm_up

POLICIES = Budget(), Budget(skip_share=0.0, require_rank=True), Coverage(), Coverage(tau_cov=0.5, boundary_check=False)
TOLERANCES = Tolerance(0.0), Tolerance(0.01), Tolerance(0.05, relative_to="output"), Tolerance(10.0)
TOKENS = 20, 1100


def compiled() -> set[tuple[str, str]]:
    """Name and types of all that this process has compiled, or loaded."""
    found = [each for each in gc.get_objects() if isinstance(each, Dispatcher)]
    return {(f"{each.py_func.__module__}.{each.py_func.__qualname__}", str(types)) for each in found for types in each.signatures}


class Driven:
    """An engine whose scratch holds some of what its sessions need."""

    def __init__(self) -> None:
        self._engine = Engine(EngineConfig(hot_bytes=16 << 20, originals_bytes=32 << 20, scratch_bytes=1 << 18, canary_share=0.1))
        self._rng = np.random.default_rng(0)

    def run(self, command: Command) -> Any:
        future = self._engine.submit(command)
        self._engine.run_once()
        return future.result(timeout=0)

    def use(self, geometry: Geometry, policy: Budget | Coverage, tokens: int) -> None:
        """A session of `tokens`, asked at every tolerance, with a token and without, some originals at hand in the end, and cut."""
        session = self.run(OpenSession(geometry, TOLERANCES[0], policy, 2 * tokens, worker="w"))
        self.run(Append(session, 0, *(self._numbers(geometry, geometry.num_kv_heads, tokens) for _ in "kv"), worker="w"))
        for tolerance in TOLERANCES * 2:
            for n in (1, 3):
                q = self._numbers(geometry, geometry.num_q_heads, n)
                new = self._numbers(geometry, geometry.num_kv_heads, 1) if n == 1 else None
                self.run(Attend([Row(session, 0, q, new, new, tolerance)], worker="w"))
        self.run(Truncate(session, tokens // 2, worker="w"))

    def _numbers(self, geometry: Geometry, heads: int, n: int) -> Any:
        return narrow(self._rng.standard_normal((heads, n, geometry.head_dim)), geometry.dtype)


def main() -> None:
    warm_up()
    before, driven = compiled(), Driven()
    for dtype in ("float16", "bfloat16", "float32"):
        for number, policy in enumerate(POLICIES):
            kv_heads = 1 + number % 3
            geometry = Geometry(1, 2 * kv_heads, kv_heads, (64, 80, 128, 96)[number], dtype, block_size=(16, 32, 64, 16)[number])
            for tokens in TOKENS:
                driven.use(geometry, policy, tokens)
    for name, types in sorted(compiled() - before):
        print(name, types)


def test_nothing_is_compiled_once_the_daemon_serves() -> None:
    """In a process of its own: this one may have compiled anything."""
    done = subprocess.run([sys.executable, __file__], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


if __name__ == "__main__":
    main()
