"""What steps the parameters: Muon for the matrices of the layers, AdamW for the embedding and the norms."""

from typing import Any

import torch

# Rates at full height, as Muon's author gives them for matrices (kellerjordan.github.io/posts/muon).
MATRIX_RATE, VECTOR_RATE = 0.02, 3e-3
MATRIX_DECAY = 0.1  # nothing else holds queries and keys small: Llama does not normalise them


class Optimisers:
    """Both optimisers as one; rates are set for every step."""

    def __init__(self, model: Any) -> None:
        layers = [p for p in model.model.layers.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if not any(p is matrix for matrix in layers)]
        self.parameters = [*layers, *others]
        fused = others[0].device.type == "cuda"
        self.muon = torch.optim.Muon(layers, lr=MATRIX_RATE, momentum=0.95, weight_decay=MATRIX_DECAY)
        self.adam = torch.optim.AdamW(others, lr=VECTOR_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)

    def step(self, rate: float) -> None:
        """One step with both rates at `rate` (0..1) of their height, then gradients are dropped."""
        for optimiser, full in ((self.muon, MATRIX_RATE), (self.adam, VECTOR_RATE)):
            for group in optimiser.param_groups:
                group["lr"] = full * rate
            optimiser.step()  # type: ignore[no-untyped-call]
            optimiser.zero_grad(set_to_none=True)
