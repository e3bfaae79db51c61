"""Makes the kernels ready, so that the first worker does not wait for a compiler.

Loading them from the cache takes half a second; compiling them, once after each installation, takes tens of seconds.
"""

import logging

import numpy as np
from tierd_kernels import floats
from tierd_kernels.kvview import narrow
from tierd_kernels.layout import NUMPY_DTYPE
from tierd_kernels.policy import Budget

from tierd.commands import EXACT, Append, Attend, Geometry, OpenSession, Row, Tolerance
from tierd.engine import Engine, EngineConfig, counters
from tierd.policy import eviction, weighing
from tierd.residency import counting, digests, moving, reading, stored

log = logging.getLogger(__name__)
MIB = 1 << 20
NUM_TOKENS = 1025  # a complete group, whose norms are measured, and a tail
STRICT = Tolerance(1e-3)  # not met by codes of random numbers: originals are promoted, and get copies


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
    stored.prepare()


def warm_up() -> None:
    """Run the policy, and every kernel once for each type of originals, in an engine that is thrown away. What reads originals is compiled
    twice: where they lie is told by arrays of another layout once some have copies in scratch."""
    log.info("loading the kernels; the first time after an installation they are compiled")
    warm_policy()
    engine = Engine(EngineConfig(hot_bytes=4 * MIB, originals_bytes=8 * MIB, scratch_bytes=MIB, canary_share=1.0))
    numbers = np.random.default_rng(0).standard_normal((2, NUM_TOKENS, 64))
    for dtype in NUMPY_DTYPE:
        kv = narrow(numbers, dtype)
        opening = engine.submit(OpenSession(Geometry(1, 2, 2, 64, dtype), STRICT, Budget(), NUM_TOKENS, worker="warm"))
        engine.run_once()
        session = opening.result()
        filling = engine.submit(Append(session, 0, kv, kv, worker="warm"))
        engine.run_once()
        filling.result()
        for tolerance in (STRICT, EXACT, STRICT):
            answer = engine.submit(Attend([Row(session, 0, kv[:, :1], tolerance=tolerance)], worker="warm"))
            engine.run_once()
            answer.result()
    assert engine.residency.num_copies, "nothing was copied: what reads copies is not compiled"
    log.info("kernels are ready")
