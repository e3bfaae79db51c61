"""Exact attention from the same q, k, v, and whether a certificate tells the truth. Knows nothing of how tierd computes.

float64 in torch, on the tensors' device, all head-steps of a forward at once. Its own rounding is bounded from above (`noise`) in the
manner of Higham, Accuracy and Stability of Numerical Algorithms, section 3: a sum of d products is off by gamma_d of their sizes.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

U = 2.0**-53
ROWS_AT_ONCE = 1 << 24  # scores of one slice: 128 MB of float64
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Truth:
    """`output` float64 [heads, n, d] on the device of q; `value_norm` sum_t p_t ||V_t|| and `noise`, at most the norm of what `output` is
    off by, float64 [heads, n]."""

    output: torch.Tensor
    value_norm: torch.Tensor
    noise: torch.Tensor


def exact_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Truth:
    """Causal attention of `q` [heads, n, d], the newest n tokens of `k`, `v` [kv_heads, tokens, d]. Raises ValueError for other shapes."""
    heads, n, d = q.shape
    kv_heads, tokens, _ = k.shape
    if heads % kv_heads or k.shape != v.shape or n > tokens or k.shape[2] != d:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; q is [heads, n, d], k and v [kv_heads, tokens >= n, d]")
    queries, keys, values = q.double().view(kv_heads, -1, n, d), k.double(), v.double()
    norms = values.norm(dim=2)
    reach = queries.norm(dim=3) * keys.norm(dim=2).amax(dim=1)[:, None, None] * abs(scale)  # no score or sum of its terms exceeds it
    output, value_norm = torch.empty_like(queries), torch.empty_like(reach)
    at_once = max(1, ROWS_AT_ONCE // (heads * tokens))
    for start in range(0, n, at_once):
        part = slice(start, min(start + at_once, n))
        last = torch.arange(tokens - n + start, tokens - n + part.stop, device=q.device)
        unseen = torch.arange(tokens, device=q.device) > last[:, None]
        # The queries of a KV head as rows of one product: broadcasting would copy its keys for each of them.
        some = heads // kv_heads, part.stop - start
        scores = (queries[:, :, part].flatten(1, 2) @ keys.mT).mul_(scale).view(kv_heads, *some, tokens)
        weights = scores.masked_fill_(unseen, -torch.inf).softmax(dim=3).flatten(1, 2)
        output[:, :, part] = (weights @ values).view(kv_heads, *some, d)
        value_norm[:, :, part] = (weights @ norms[..., None]).view(kv_heads, *some)
    score_error = (d + 8) * U * reach * 2.0
    noise = 2.0 * norms.amax(dim=1)[:, None, None] * (2.0 * score_error + (tokens + 16) * U)
    return Truth(output.view(heads, n, d), value_norm.view(heads, n), noise.view(heads, n))


@dataclass
class Verdict:
    """Counts of head-steps. `violations`: the true error is above the bound; `broken`: the bound is above the budget though the head is
    not exact; `worst`: the largest error / bound; `loose_budgets`: a budget above rtol times the true Vbar by more than a tenth."""

    head_steps: int = 0
    violations: int = 0
    broken: int = 0
    loose_budgets: int = 0
    exact: int = 0
    worst: float = 0.0

    def add(self, other: "Verdict") -> None:
        """Count what `other` counted, too."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, max(mine, theirs) if field.name == "worst" else mine + theirs)


def judge(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, output: torch.Tensor, certificate: Any, rtol: float
) -> tuple[Verdict, Numbers]:
    """The verdict on a reply `output` [heads, n, d] with `certificate` (arrays [heads, n]), and the true errors float64 [heads, n]."""
    truth = exact_attention(q, k, v, scale)
    error = (output.double().to(truth.output.device) - truth.output).norm(dim=2)
    noise, value_norm, errors = (x.cpu().numpy() for x in (truth.noise, truth.value_norm, error))
    bound, budget, exact = certificate.bound, certificate.budget, certificate.exact
    lies = ~(errors - noise <= bound)  # a NaN on either side is a lie, too
    verdict = Verdict(
        head_steps=int(errors.size),
        violations=int(lies.sum()),
        broken=int((~(bound <= budget) & ~exact).sum()),
        loose_budgets=int((budget > 1.1 * rtol * value_norm).sum()),
        exact=int(exact.sum()),
        worst=float(np.max(np.maximum(errors - noise, 0.0) / np.maximum(bound, 1e-300))),
    )
    return verdict, errors
