"""Every answer against attention in float64 over the originals that the worker kept. The promise itself is `tests/oracle.py`'s.

Legend: Hq query heads, Hkv KV heads, N stored tokens, n query tokens, d head dimension.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
from mirror import Mirror
from numpy.typing import NDArray
from tierd_client import Result, Tolerance

Raw = NDArray[Any]
U = 2.0**-53


@dataclass(frozen=True)
class Verdict:
    """Of an answer that keeps its promise: `rows`, `exact`: how many; `worst`: the largest error / bound of its rows; `worst_certified`: of
    those that are not exact, whose bound is more than what rounding the output to its type may cost."""

    rows: int
    exact: int
    worst: float
    worst_certified: float


def judge(mirror: Mirror, layer: int, q: Raw, result: Result[Raw], tolerance: Tolerance) -> Verdict:
    """Raises AssertionError, with the numbers, for an answer to `q` [Hq, n, d] that breaks its promise."""
    geometry, keys = mirror.geometry, mirror.keys[layer]
    scale = geometry.head_dim**-0.5
    certificate = vars(result.certificate)
    oracle.check_form(q, result.output, certificate)
    truth = attention(keys, mirror.values[layer], q, scale)
    score_error = oracle.int8_score_error(keys, q, scale, geometry.block_size)
    oracle.check_promise(truth, result.output, certificate, tolerance.rtol, tolerance.atol, tolerance.relative_to, score_error)
    error = np.linalg.norm(oracle.exact_numbers(result.output).astype(np.float64) - truth.output.astype(np.float64), axis=2)
    bound = result.certificate.bound
    # A bound of nothing is kept: the oracle has found no error above the noise.
    share = np.where(bound > 0.0, np.maximum(error - truth.noise, 0.0) / np.where(bound > 0.0, bound, 1.0), 0.0)
    exact = result.certificate.exact
    return Verdict(bound.size, int(exact.sum()), float(share.max()), float(share[~exact].max(initial=0.0)))


def attention(keys: Raw, values: Raw, q: Raw, scale: float) -> oracle.Truth:
    """As `oracle.attention`, in float64: 87 ms there and 2 here for 700 tokens, 16 heads and 3 query tokens. Products of float32 are exact.

    `noise`: a sum of m products of numbers of norms a, b is off by m U a b at most, in any order (Higham, Accuracy and Stability of
    Numerical Algorithms, section 3.1); an error e of all scores moves weights by a factor of exp(2 e) at most.
    """
    K, V, Q = (oracle.exact_numbers(x).astype(np.float64) for x in (keys, values, q))
    heads, n, d = Q.shape
    kv_heads, tokens, _ = K.shape
    rows = Q.reshape(kv_heads, -1, d)  # the queries of a KV head, head by head
    seen = np.arange(tokens) <= np.arange(tokens - n, tokens)[:, None]
    scores = (scale * rows @ K.transpose(0, 2, 1)).reshape(kv_heads, -1, n, tokens)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=3, keepdims=True))
    weights /= weights.sum(axis=3, keepdims=True)
    norms = np.linalg.norm(V, axis=2)[:, None, None]
    reach = scale * np.linalg.norm(rows, axis=2) * np.linalg.norm(K, axis=2).max(axis=1)[:, None]
    largest = np.where(seen, norms, 0.0).max(axis=3)
    noise = 2.0 * largest * (2.0 * (d + 8) * U * reach.reshape(kv_heads, -1, n) + (tokens + 16) * U)
    output = weights.reshape(kv_heads, -1, tokens) @ V
    smallest = np.where(seen, norms, np.inf).min(axis=3)
    numbers = (np.broadcast_to(x, noise.shape).reshape(heads, n) for x in ((weights * norms).sum(axis=3), smallest, largest, noise))
    return oracle.Truth(output.reshape(heads, n, d).astype(np.longdouble), *numbers)
