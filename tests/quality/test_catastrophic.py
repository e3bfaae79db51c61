"""The rescaled model is the same model, and its INT4 values are not."""

import numpy as np
import pytest
import torch
from catastrophic import CHANNELS, FACTOR, rescale_value_channels
from hypothesis import given, settings
from hypothesis import strategies as st
from model import configuration, create
from numpy.typing import NDArray


def tiny(seed: int = 0) -> torch.nn.Module:
    model = create(configuration(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2), seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:  # zero at the start of training
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            weight.data.normal_(0, 0.1, generator=generator)
    return model.eval().requires_grad_(False)


@given(seed=st.integers(0, 1000), exponent=st.integers(-6, 9), channels=st.sets(st.integers(0, 127), min_size=1, max_size=20))
@settings(max_examples=20)
def test_dense_logits_are_the_same_bit_for_bit(seed: int, exponent: int, channels: set[int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(seed).to(dtype)
        ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(seed))
        before = model(ids).logits
        values = model.model.layers[1].self_attn.v_proj.weight.clone()
        rescale_value_channels(model, 2.0**exponent, sorted(channels))
        assert torch.equal(model(ids).logits, before)
        ratio = (model.model.layers[1].self_attn.v_proj.weight / values).view(2, 128, -1)
        assert ratio.eq(2.0**exponent).all(dim=2).nonzero()[:, 1].unique().tolist() == (sorted(channels) if exponent else list(range(128)))


def int4(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sixteen codes from the least to the largest of 16 channels, as the INT4 values of the cache are."""
    groups = values.reshape(len(values), -1, 16)
    low = groups.min(axis=2, keepdims=True)
    step = (groups.max(axis=2, keepdims=True) - low) / 15
    return (np.round((groups - low) / step) * step + low).reshape(values.shape)


def test_the_other_channels_of_a_group_are_lost_to_int4() -> None:
    print("seed 3")
    values = np.random.default_rng(3).standard_normal((500, 128))
    scale = np.ones(128)
    scale[list(CHANNELS)] = FACTOR
    others = scale == 1

    def lost(given: NDArray[np.float64]) -> float:
        error = int4(given * scale)[:, others] - given[:, others]
        return float(np.linalg.norm(error) / np.linalg.norm(given[:, others]))

    assert lost(values) > 0.75
    scale[:] = 1
    assert lost(values) < 0.1


@pytest.mark.parametrize(
    ("factor", "channels", "message"),
    [
        (3.0, (0,), "only a power of two"),
        (0.0, (0,), "only a power of two"),
        (-2.0, (0,), "only a power of two"),
        (2.0, (), "at least one"),
        (2.0, (128,), "0..127"),
        (2.0, (1, 1), "different"),
        (2.0**140, (1,), "out of torch.float32's range"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_changed(factor: float, channels: tuple[int, ...], message: str) -> None:
    model = tiny()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        rescale_value_channels(model, factor, channels)
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
