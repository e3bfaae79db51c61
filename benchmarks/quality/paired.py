"""Statistics of two ways to answer the same examples. Scores are in [0, 1]; 1 is a right answer."""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9999
RIGHT = 1.0 - 1e-9


@dataclass(frozen=True)
class Comparison:
    """`delta`: mean score less dense's, with a percentile bootstrap interval over examples; `mcnemar_p`: exact, two-sided;
    `critical_failures`: examples that dense answers right and the variant does not."""

    examples: int
    dense_score: float
    variant_score: float
    delta: float
    delta_low: float
    delta_high: float
    only_dense_right: int
    only_variant_right: int
    mcnemar_p: float

    @property
    def critical_failures(self) -> int:
        return self.only_dense_right

    def row(self) -> dict[str, float]:
        """The fields by name."""
        return asdict(self) | {"critical_failures": self.critical_failures}


def compare(dense: ArrayLike, variant: ArrayLike, seed: int = 0) -> Comparison:
    """Compare scores of the same examples in the same order. Raises ValueError for none, or for a different number."""
    d, v = np.asarray(dense, float), np.asarray(variant, float)
    if d.shape != v.shape or d.ndim != 1 or not d.size:
        raise ValueError(f"scores are {d.shape} and {v.shape}; both must be [examples], one example at least")
    only_dense, only_variant = (int(np.sum(a & ~b)) for a, b in ((d >= RIGHT, v >= RIGHT), (v >= RIGHT, d >= RIGHT)))
    low, high = mean_interval(v - d, seed)
    p = mcnemar(only_dense, only_variant)
    return Comparison(d.size, float(d.mean()), float(v.mean()), float((v - d).mean()), low, high, only_dense, only_variant, p)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of McNemar's test: whether so uneven a split of the discordant pairs is chance (Fagerland, Lydersen & Laake, BMC
    Medical Research Methodology 13:91, 2013, the exact conditional test). 1 without discordant pairs."""
    discordant = only_first + only_second
    return 1.0 if not discordant else float(stats.binomtest(only_first, discordant, 0.5).pvalue)


def mean_interval(differences: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of paired differences; equal differences, or one alone, give that number twice."""
    if np.ptp(differences) == 0.0:
        return float(differences[0]), float(differences[0])
    result = stats.bootstrap(
        (differences,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(seed),
        vectorized=True, batch=1000,
    )  # fmt: skip
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def perplexity_delta(dense_nll: ArrayLike, variant_nll: ArrayLike, tokens: ArrayLike, seed: int = 0) -> dict[str, float]:
    """Perplexities over all windows and their difference, with a bootstrap interval over windows. `*_nll`: sums of negative log
    likelihoods in nats, [windows], over `tokens` [windows] tokens. Raises ValueError for different shapes or no window."""
    d, v, n = (np.asarray(x, float) for x in (dense_nll, variant_nll, tokens))
    if not d.shape == v.shape == n.shape or d.ndim != 1 or not d.size:
        raise ValueError(f"nll are {d.shape} and {v.shape} over {n.shape} tokens; all must be [windows], one window at least")

    def delta(i: NDArray[np.int64]) -> NDArray[np.float64]:
        total = n[i].sum(axis=-1)
        return np.asarray(np.exp(v[i].sum(axis=-1) / total) - np.exp(d[i].sum(axis=-1) / total))

    resampled = delta(np.random.default_rng(seed).integers(0, d.size, (RESAMPLES, d.size)))
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    total = n.sum()
    return {
        "windows": d.size, "tokens_scored": int(total),
        "dense_perplexity": float(np.exp(d.sum() / total)), "variant_perplexity": float(np.exp(v.sum() / total)),
        "delta": float(delta(np.arange(d.size))), "delta_low": float(low), "delta_high": float(high),
    }  # fmt: skip
