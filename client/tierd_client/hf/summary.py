"""What the certificates of a cache's answers said, per layer and query head."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd_client.certificate import Certificate

NUM_RUNGS, TOGETHER = 5, 64
COUNTS = ("promoted_key_blocks", "promoted_value_blocks", "skipped_blocks", "host_bytes")
Numbers = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Summary:
    """Arrays [num_layers, num_q_heads]; `rungs` has a third axis, the rung. One answer is one head of one token over a filled session.

    Means and shares are NaN where nothing was answered. Attention of a forward with nothing cached is computed by the model's own
    library, and is not counted.
    """

    answers: Counts
    bound_mean: Numbers
    bound_max: Numbers
    budget_mean: Numbers
    over_budget: Counts
    """Answers above their budget that are not exact: the promise is that there is none."""
    exact_share: Numbers
    rungs: Counts
    promoted_key_blocks: Counts
    promoted_value_blocks: Counts
    skipped_blocks: Counts
    host_bytes: Counts
    forks: int
    """Sessions forked for beams, copies and repeated rows."""

    def __str__(self) -> str:
        head = f"{'layer':>5} {'answers':>8} {'bound mean':>10} {'bound max':>10} {'budget':>10} {'exact':>6}  answers by rung"
        return "\n".join([head, *(self._line(layer) for layer in range(len(self.answers)))])

    def _line(self, layer: int) -> str:
        answers = self.answers[layer]
        total = int(answers.sum())
        if total == 0:
            return f"{layer:>5} {0:>8}"
        mean, budget, exact = (
            float((column[layer] * answers).sum() / total) for column in (self.bound_mean, self.budget_mean, self.exact_share)
        )
        rungs = " ".join(str(int(count)) for count in self.rungs[layer].sum(axis=0))
        return f"{layer:>5} {total:>8} {mean:>10.3g} {self.bound_max[layer].max():>10.3g} {budget:>10.3g} {exact:>6.1%}  {rungs}"


class Tally:
    """Sums up certificates, those of some TOGETHER answers of a layer at once: one by one they took 30 calls of numpy each."""

    def __init__(self, num_layers: int, num_q_heads: int) -> None:
        shape = (num_layers, num_q_heads)
        self._answers, self._over, self._exact = (np.zeros(shape, np.int64) for _ in range(3))
        self._bound, self._bound_max, self._budget = (np.zeros(shape) for _ in range(3))
        self._rungs = np.zeros((*shape, NUM_RUNGS), np.int64)
        self._counts = {name: np.zeros(shape, np.int64) for name in COUNTS}
        self._waiting: list[list[Certificate]] = [[] for _ in range(num_layers)]
        self._tokens = [0] * num_layers  # of those that wait

    def add(self, layer: int, certificate: Certificate) -> None:
        """Count answers of `layer`; the certificate's arrays are [num_q_heads, n]."""
        self._waiting[layer].append(certificate)
        self._tokens[layer] += certificate.bound.shape[1]
        if self._tokens[layer] >= TOGETHER:
            self._sum_up(layer)

    def _sum_up(self, layer: int) -> None:
        waiting, self._waiting[layer], self._tokens[layer] = self._waiting[layer], [], 0
        if not waiting:
            return

        def all_of(name: str) -> NDArray[Any]:
            return np.concatenate([getattr(certificate, name) for certificate in waiting], axis=1)

        bound, budget, exact, rungs = map(all_of, ("bound", "budget", "exact", "rung"))
        self._answers[layer] += bound.shape[1]
        self._over[layer] += ((bound > budget) & ~exact).sum(axis=1)
        self._exact[layer] += exact.sum(axis=1)
        self._bound[layer] += bound.sum(axis=1)
        self._budget[layer] += budget.sum(axis=1)
        self._bound_max[layer] = np.maximum(self._bound_max[layer], bound.max(axis=1))
        for rung in range(NUM_RUNGS):
            self._rungs[layer, :, rung] += (rungs == rung).sum(axis=1)
        for name, count in self._counts.items():
            count[layer] += all_of(name).sum(axis=1)

    def summary(self, forks: int) -> Summary:
        """What was counted so far, as copies."""
        for layer in range(len(self._waiting)):
            self._sum_up(layer)
        return Summary(
            answers=self._answers.copy(),
            bound_mean=self._mean(self._bound),
            bound_max=np.where(self._answers > 0, self._bound_max, np.nan),
            budget_mean=self._mean(self._budget),
            over_budget=self._over.copy(),
            exact_share=self._mean(self._exact),
            rungs=self._rungs.copy(),
            forks=forks,
            **{name: count.copy() for name, count in self._counts.items()},
        )

    def _mean(self, total: NDArray[Any]) -> Numbers:
        mean = np.full(total.shape, np.nan)
        np.divide(total, self._answers, out=mean, where=self._answers > 0)
        return mean
