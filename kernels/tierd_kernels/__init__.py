"""Certified attention over a quantised KV cache: arrays in, arrays out. `ladder.attend` is the way in."""

import os

# Read by OpenMP when Numba first loads it. Threads that wait by spinning stall every step as soon as another process wants their core:
# with two threads on two busy cores a step of 8192 tokens took 40 ms, with waiting threads asleep 3.3 ms (on idle cores 3.9 and 3.3).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
