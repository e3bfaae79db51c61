"""Drives an engine in this process through a trace, and tells what its steps took and what tiering did for them."""

import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from asking import answered
from needle_trace import Trace
from numpy.typing import NDArray
from tierd_kernels.policy import Budget

from tierd.commands import Append, Attend, Command, OpenSession, Row, RowResult, Status, Tolerance, Truncate
from tierd.commands import Geometry as EngineGeometry
from tierd.engine import Engine, EngineConfig
from tierd.policy import Nothing

WORKER = "bench"
RTOL = 0.05
LINGER_S = 3600.0  # in a pause an engine begins what waits, at no call's cost: a model that decodes makes none, as another's turn would
OWN_S = 40e-6  # of the model's own work between two layers, at least: no part of any time below, but copies go on meanwhile
COUNTED = ("hits", "misses", "late", "prefetched", "wasted", "demand_bytes", "prefetch_bytes", "exact_heads", "head_steps")


@dataclass(frozen=True)
class Setting:
    """`share`: scratch, of the originals. `replayed`: all steps were made once before, so that whatever they need lies in scratch.
    `stress`: over the trace of that name."""

    name: str
    policy: str
    share: float
    replayed: bool = False
    stress: bool = False


class Driven:
    """An engine with the trace's tokens stored, on threads of its own as in a daemon."""

    def __init__(self, trace: Trace, setting: Setting, backend: str) -> None:
        s = self._shape = trace.shape
        self._trace = trace
        originals = s.originals_bytes
        unhindered: dict[str, Any] = {"prefetch_link_share": 1.0, "link_bytes_per_s": 1e12, "migrations_max": 1 << 16}
        self.engine = Engine(EngineConfig(
            backend=backend, hot_bytes=originals, originals_bytes=originals, scratch_bytes=round(originals * setting.share),
            tiering_policy=setting.policy, **(unhindered if setting.replayed else {}),
        ), linger_s=LINGER_S)  # fmt: skip
        self.engine.start()
        geometry = EngineGeometry(s.layers, s.q_heads, s.kv_heads, s.head_dim, "float16")
        opening = OpenSession(geometry, Tolerance(RTOL), Budget(), s.tokens + s.steps, worker=WORKER)
        self._session = str(self._run(opening))
        for layer in range(s.layers):
            self._run(Append(self._session, layer, trace.k_raw[:, : s.tokens], trace.v_raw[:, : s.tokens], worker=WORKER))

    def replay(self) -> None:
        """All steps, and back to before the first: copies of what they read and was stored then stay, and from now on no policy looks at
        calls."""
        for number in range(self._shape.steps):
            self.step(number)
            self._run(Status(worker=WORKER))  # for which all that is wanted begins: few copies would wait, and for some nobody asks again
        self._run(Truncate(self._session, self._shape.tokens, worker=WORKER))
        self.engine._cache._policy = Nothing()

    def step(self, number: int) -> tuple[float, list[RowResult]]:
        """Microseconds that its calls took, of all layers together, and their answers."""
        k, v = self._trace.new(number)
        taken_s, results = 0.0, []
        for layer in range(self._shape.layers):
            time.sleep(OWN_S)  # not a busy wait, which would hold up the engine's threads in this process
            began_s = time.perf_counter()
            results += self._run(Attend([Row(self._session, layer, self._trace.q[number, layer], k, v)], worker=WORKER))
            taken_s += time.perf_counter() - began_s
        return 1e6 * taken_s, results

    def counts(self) -> dict[str, int]:
        return {name: int(getattr(self.engine.counters, name)) for name in COUNTED}

    def _run(self, command: Command) -> Any:
        return answered(self.engine, command)


@contextmanager
def driven(trace: Trace, setting: Setting, backend: str) -> Iterator[Driven]:
    """Stopped at the end: its arenas must go before the next one's are reserved."""
    run = Driven(trace, setting, backend)
    try:
        yield run
    finally:
        run.engine.stop(grace_s=10.0)
        gc.collect()  # engine and residency hold one another


def check(trace: Trace, number: int, results: list[RowResult]) -> float:
    """The largest error over bound of a step's first and last layer. Ends the program above 1, or where a budget was missed."""
    worst = 0.0
    for layer in {0, len(results) - 1}:
        output, certificate = results[layer].output[:, 0].astype(np.float64), results[layer].certificate
        error = np.linalg.norm(output - trace.truth(number, layer), axis=1)
        bound: NDArray[np.float64] = certificate["bound"][:, 0].astype(np.float64)
        if not (certificate["exact"][:, 0] | (bound <= certificate["budget"][:, 0])).all():
            sys.exit(f"step {number}, layer {layer}: a budget was missed by a head that is not exact: nothing is reported")
        worst = max(worst, float((error / bound).max()))
    if not worst <= 1.0:
        sys.exit(f"step {number}: an error is {worst} times its bound: nothing is reported")
    return worst
