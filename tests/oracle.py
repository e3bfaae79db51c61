"""Attention in extended precision over the originals, and the promise of every reply. Imports nothing of tierd.

Raw originals are numpy arrays of float16, float32, or uint16 holding bfloat16 bits. K, V are [num_kv_heads, N, d] and
q is [num_q_heads, n, d]; query token j is the (n - 1 - j)-th from the end and sees the tokens up to its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Raw = NDArray[Any]
Long = NDArray[np.longdouble]
LONG_EPS = float(np.finfo(np.longdouble).eps)
assert LONG_EPS < 2e-19, "the oracle needs an 80-bit longdouble"
# Fields that may hold NaN or infinity by their meaning.
MAY_BE_NAN = {"paper_key_bound"}
MAY_BE_INFINITE = {"paper_key_bound", "candidate_bound", "key_error", "value_error"}


@dataclass(frozen=True)
class Truth:
    """Exact attention per query head and token: `output` [Hq, n, d]; `value_norm` sum_t rho_t ||V_t||, `value_norm_min`
    and `value_norm_max` over visible tokens, `noise` (what the oracle's rounding may move the output by), [Hq, n]."""

    output: Long
    value_norm: NDArray[np.float64]
    value_norm_min: NDArray[np.float64]
    value_norm_max: NDArray[np.float64]
    noise: NDArray[np.float64]


def exact_numbers(raw: Raw) -> Long:
    """Raw originals as longdouble, exact."""
    if raw.dtype == np.uint16:
        raw = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    assert raw.dtype in (np.float16, np.float32), f"raw originals are float16, float32 or uint16 bits, not {raw.dtype}"
    return raw.astype(np.longdouble)


def attention(K: Raw, V: Raw, q: Raw, softmax_scale: float) -> Truth:
    """Exact attention of the newest n tokens' queries. Products of float32 are exact here; sums: see `noise`."""
    num_q_heads, n, d = q.shape
    num_kv_heads, tokens, _ = K.shape
    assert num_q_heads % num_kv_heads == 0 and n <= tokens and V.shape == K.shape
    keys, values, queries = exact_numbers(K), exact_numbers(V), exact_numbers(q)
    norms = np.sqrt((values * values).sum(axis=2))
    output = np.zeros((num_q_heads, n, d), np.longdouble)
    numbers = np.zeros((4, num_q_heads, n))
    for head in range(num_q_heads):
        kv = head // (num_q_heads // num_kv_heads)
        for j in range(n):
            seen = tokens - n + 1 + j
            terms = keys[kv, :seen] * queries[head, j]
            scores = terms.sum(axis=1) * np.longdouble(softmax_scale)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            output[head, j] = (weights[:, None] * values[kv, :seen]).sum(axis=0)
            largest = norms[kv, :seen].max()
            score_error = (d + 4) * LONG_EPS * abs(softmax_scale) * float(np.abs(terms).sum(axis=1).max())
            noise = 2.0 * float(largest) * (2.0 * score_error + (seen + 16) * LONG_EPS)
            numbers[:, head, j] = (weights * norms[kv, :seen]).sum(), norms[kv, :seen].min(), largest, noise
    return Truth(output, *numbers)


def int8_score_error(K: Raw, q: Raw, softmax_scale: float, block_size: int = 16) -> NDArray[np.float64]:
    """How far any score may be off with INT8 keys per channel and block of tokens: float64[Hq, n], generous.

    Half a code step with a float16 scale (2**-10 relative, at least its smallest normal), plus FP32 arithmetic.
    """
    keys, queries = exact_numbers(K).astype(np.float64), np.abs(exact_numbers(q).astype(np.float64))
    num_kv_heads, tokens, d = keys.shape
    padded = np.concatenate([keys, np.repeat(keys[:, -1:], -tokens % block_size, axis=1)], axis=1)
    blocks = padded.reshape(num_kv_heads, -1, block_size, d)
    # The offset is rounded to float16 too, which widens the range on one side by up to 2**-11 of it.
    spread = np.ptp(blocks, axis=2) + 2.0**-9 * np.abs(blocks).max(axis=2)
    step = spread / 254.0 * (1.0 + 2.0**-9) + 2.0**-14
    heads = np.arange(q.shape[0]) // (q.shape[0] // num_kv_heads)
    half_steps = np.einsum("hnd,hbd->hnb", queries, 0.51 * step[heads])
    rounding = (
        2.0**-24
        * (2 * d + 32)
        * np.einsum("hnd,hbd->hnb", queries, np.abs(blocks).max(axis=2)[heads] + 128 * step[heads])
    )
    with np.errstate(over="ignore"):  # infinite where nothing can be said
        worst: NDArray[np.float64] = abs(softmax_scale) * (half_steps + rounding).max(axis=2) + 2e-5
    return worst


def reference_ceiling(
    truth: Truth, score_error: NDArray[np.float64], skip_error: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The largest honest Vbar, [Hq, n]: weights are off by the score error, skipped tokens missing."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        moved = np.minimum(np.exp(2.0 * score_error) * truth.value_norm, truth.value_norm_max)
        # Mass m of skipped tokens costs at least m * their norm, and lifts the mean of the others by 1 + m at most.
        skipped = np.where(skip_error > 0, skip_error / truth.value_norm_min, 0.0)
        ceiling: NDArray[np.float64] = np.minimum(moved * (1.0 + skipped), truth.value_norm_max)
    return np.where(np.isnan(ceiling), truth.value_norm_max, ceiling)


def _fail_where(wrong: NDArray[np.bool_], what: str, **values: NDArray[Any]) -> None:
    if wrong.any():
        head, token = np.argwhere(wrong)[0]
        shown = ", ".join(
            f"{name} {np.broadcast_to(value, wrong.shape)[head, token]!r}" for name, value in values.items()
        )
        raise AssertionError(
            f"{what} in {int(wrong.sum())} of {wrong.size} rows; head {head}, query token {token}: {shown}"
        )


def check_reply(
    K: Raw,
    V: Raw,
    q: Raw,
    output: Raw,
    certificate: Mapping[str, Raw],
    rtol: float,
    atol: float,
    relative_to: str = "values",
    *,
    softmax_scale: float,
    score_error: float | NDArray[np.float64] | None = None,
    block_size: int = 16,
) -> Truth:
    """AssertionError unless the reply keeps the promise; `output` [Hq, n, d] raw, certificate fields [Hq, n].

    `score_error` bounds how far scores used for the budget may be off; by default what INT8 keys allow. Returns the
    truth.
    """
    check_form(q, output, certificate, relative_to)
    truth = attention(K, V, q, softmax_scale)
    if relative_to == "values" and score_error is None:
        score_error = int8_score_error(K, q, softmax_scale, block_size)
    check_promise(truth, output, certificate, rtol, atol, relative_to, score_error)
    return truth


def check_form(q: Raw, output: Raw, certificate: Mapping[str, Raw], relative_to: str = "values") -> None:
    """AssertionError unless the reply is one to this `q`: shapes, types, and no number that means nothing."""
    assert relative_to in ("values", "output"), f"relative_to is {relative_to!r}; allowed: values, output"
    assert output.shape == q.shape and output.dtype == q.dtype, (
        f"output is {output.dtype}{output.shape}, q {q.dtype}{q.shape}"
    )
    for name in ("bound", "budget", "exact"):
        assert name in certificate, f"the certificate has no {name}; it has {sorted(certificate)}"
    rows = q.shape[:2]
    for name, field in certificate.items():
        assert field.shape == rows, f"{name} is {field.shape}; it must be [Hq, n] = {rows}"
        if field.dtype.kind == "f":
            if name not in MAY_BE_NAN:
                _fail_where(np.isnan(field), f"{name} is NaN", value=field)
            if name not in MAY_BE_INFINITE:
                _fail_where(np.isinf(field), f"{name} is infinite", value=field)
            _fail_where(field < 0, f"{name} is negative", value=field)
    _fail_where(np.asarray(~np.isfinite(exact_numbers(output)).all(axis=2)), "the output is not finite")


def check_promise(
    truth: Truth,
    output: Raw,
    certificate: Mapping[str, Raw],
    rtol: float,
    atol: float,
    relative_to: str,
    score_error: float | NDArray[np.float64] | None,
) -> None:
    """AssertionError unless a reply of good form keeps the promise. `score_error` is not asked for where the budget is relative to the
    output."""
    bound, budget, exact = certificate["bound"], certificate["budget"], certificate["exact"].astype(bool)
    returned, rows = exact_numbers(output), output.shape[:2]
    difference = returned - truth.output
    error = np.sqrt((difference * difference).sum(axis=2))
    _fail_where(
        bound + truth.noise < error, "the bound is below the true error", bound=bound, error=error.astype(float)
    )
    _fail_where(
        (bound > budget) & ~exact, "the bound is above the budget and the head is not exact", bound=bound, budget=budget
    )

    if relative_to == "output":
        reference = np.sqrt((returned * returned).sum(axis=2)).astype(np.float64)
    else:
        assert score_error is not None
        allowed = np.broadcast_to(np.asarray(score_error), rows)
        reference = reference_ceiling(truth, allowed, certificate.get("skip_error", np.zeros(rows)))
    most = (atol + rtol * reference) * (1.0 + 1e-3)
    _fail_where(budget > most, "the budget is above what was asked for", budget=budget, most=most)
