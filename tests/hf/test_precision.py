"""Half precision: logits stay as near to float64 attention as dense attention does."""

import pytest
import torch
from fake_tier import FakeTier
from models import build
from precision import check_logits
from tierd_client.hf import TierdCache
from tierd_client.types import Tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma"])
def test_exact_tier(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype, initializer_range=0.08)
    check_logits(model, lambda: TierdCache(FakeTier(), model.config, tolerance=Tolerance(rtol=0.0), max_tokens=64))
