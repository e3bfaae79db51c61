"""Makes the kernels ready, so that the first worker does not wait for a compiler.

Loading them from the cache takes half a second; compiling them, once after each installation, takes tens of seconds.
"""

import logging

import numpy as np
from tierd_kernels import floats
from tierd_kernels.layout import NUMPY_DTYPE
from tierd_kernels.policy import Budget

from tierd.commands import EXACT, Append, Attend, Command, Geometry, OpenSession, Row, Tolerance
from tierd.engine import Engine, EngineConfig, counters
from tierd.policy import eviction, weighing
from tierd.residency import counting, digests, moving, reading

log = logging.getLogger(__name__)
MIB = 1 << 20
NUM_TOKENS = 17  # a full block, so that it is quantised, and a tail


def warm_policy() -> None:
    """What checks tensors and chooses copies, on the host whatever the backend. (CUDA kernels of a layout are compiled when its first
    session opens.)"""
    floats.prepare()
    counters.prepare()
    weighing.prepare()
    eviction.prepare()
    counting.prepare()
    digests.prepare()
    moving.prepare()
    reading.prepare()


def warm_up() -> None:
    """Run the policy, and every kernel once for each type of originals, in an engine that is thrown away."""
    log.info("loading the kernels; the first time after an installation they are compiled")
    warm_policy()
    engine = Engine(EngineConfig(hot_bytes=MIB, originals_bytes=MIB, scratch_bytes=MIB, canary_share=1.0))
    for dtype, raw in NUMPY_DTYPE.items():
        kv = np.zeros((1, NUM_TOKENS, 64), raw)
        opening = engine.submit(OpenSession(Geometry(1, 1, 1, 64, dtype), Tolerance(0.1), Budget(), NUM_TOKENS, worker="warm"))
        engine.run_once()
        session = opening.result()
        rows = [Row(session, 0, kv[:, :1], tolerance=tolerance) for tolerance in (None, EXACT)]
        steps: list[Command] = [Append(session, 0, kv, kv, worker="warm"), *(Attend([row], worker="warm") for row in rows)]
        done = [engine.submit(step) for step in steps]
        engine.run_once()
        for future in done:
            future.result()
    log.info("kernels are ready")
