"""How far a model's logits are from those of dense attention, in float64 and as it is, over a cache of ours."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from models import left_padded
from tierd_client.hf import TierdCache
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


@contextmanager
def float64_attention() -> Iterator[None]:
    """An attention implementation "float64": SDPA over widened inputs."""

    def attend(module, query, key, value, mask, **options):  # type: ignore[no-untyped-def]
        output, _ = sdpa_attention_forward(module, query.double(), key.double(), value.double(), mask, **options)
        return output.to(query.dtype), None

    AttentionInterface.register("float64", attend)
    AttentionMaskInterface.register("float64", sdpa_mask)
    try:
        yield
    finally:
        del AttentionInterface._global_mapping["float64"], AttentionMaskInterface._global_mapping["float64"]


def teacher_forced(model: PreTrainedModel, implementation: str, cache: Cache) -> torch.Tensor:
    """Logits of the real tokens of a padded batch, read as a prompt, a longer piece and single tokens."""
    model.set_attn_implementation(implementation)
    ids, mask = left_padded([48, 37])
    cuts = [0, 24, 32, *range(33, 49)]
    with torch.no_grad():
        logits = [
            model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
            for start, end in itertools.pairwise(cuts)
        ]
    return torch.cat(logits, dim=1)[mask.bool()].double()


def check_same(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Fails unless they differ by rounding alone. In FP32 dense attention is 2e-4 from float64 in logits of up to 11, by processor and
    by how a prompt is cut; a token that is left out of a prompt moves them by 8."""
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)


def check_logits(model: PreTrainedModel, make: Callable[[], TierdCache]) -> None:
    """Fails unless teacher-forced logits are within twice dense SDPA's own distance from float64 attention."""
    with float64_attention():
        reference = teacher_forced(model, "float64", DynamicCache())
    dense = teacher_forced(model, "sdpa", DynamicCache())
    with make() as cache:
        ours = teacher_forced(model, "tierd", cache)
    distance, limit = ((logits - reference).norm() for logits in (ours, dense))
    assert limit > 0
    assert distance <= 2 * limit, f"{distance / limit:.2f} times dense attention's own distance"
