"""Sums of what happened since the last line of the log, kept on the device so that no step waits for it."""

from typing import Any

import torch
from torch import Tensor

from training.batches import KINDS


class Tally:
    """Per length and kind of row: predictions, nats, answers, answers that were right, nats of answers."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._sums: dict[int, Tensor] = {}
        self._loss, self._steps = torch.zeros((), device=device), 0.0

    def add(self, loss: Tensor, right: Tensor, weights: Tensor, answers: Tensor, kinds: Tensor) -> None:
        """Losses and correctness [rows, length] of one batch."""
        counted = (weights > 0).float()
        columns = (counted, loss.detach() * counted, answers.float(), (right & answers).float(), loss.detach() * answers)
        sums = self._sums.setdefault(loss.shape[1], torch.zeros(len(KINDS), len(columns), device=self._device))
        sums.index_add_(0, kinds, torch.stack([column.sum(dim=1) for column in columns], dim=1))

    def add_step(self, part_of_loss: Tensor, part: float) -> None:
        """One batch's part of a step's weighted loss; the parts of a step come to 1."""
        self._loss += part_of_loss.detach()
        self._steps += part

    def report(self) -> dict[str, Any]:
        """`loss` (mean of the steps), and per length and kind nats a byte and, where there are answers, their accuracy; then from zero."""
        out: dict[str, Any] = {"loss": round(float(self._loss) / max(self._steps, 1.0), 4)}
        for length in sorted(self._sums):
            out[str(length)] = {kind.__name__: _means(row) for kind, row in zip(KINDS, self._sums[length].tolist(), strict=True) if row[0]}
        self.__init__(self._device)  # type: ignore[misc]
        return out


def _means(row: list[float]) -> dict[str, float]:
    predictions, nats, answers, right, answer_nats = row
    means = {"nats": nats / predictions}
    if answers:
        means |= {"answers": right / answers, "answer_nats": answer_nats / answers}
    return {name: round(mean, 4) for name, mean in means.items()}
