"""Variants differ in what later tokens attend to, and in nothing else."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import rows
import running
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import NaiveLayer, stored
from replay import raw
from tierd_client import Tier
from tierd_kernels.layout import Layout
from tierd_kernels.quantise.reference import dequantise_keys, dequantise_values, quantise_block
from truth import exact_attention
from variants import ALL, BY_NAME, Variant, attending, connection, named

EXACT = Variant("exact", "budget", 0.0)


@pytest.fixture(scope="module")
def checkpoint() -> checkpoints.Checkpoint:
    return tiny.checkpoint()


@pytest.fixture(scope="module")
def tier(checkpoint: checkpoints.Checkpoint) -> Iterator[Tier]:
    with connection(checkpoint.model, 400, rows=3) as tier:
        yield tier


@settings(max_examples=25)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    *[st.sampled_from([1.0, 1e-6, 1e6])] * 2,
)  # fmt: skip
def test_naive_numbers_are_those_of_the_hot_tier_bit_for_bit(seed: int, dtype: torch.dtype, key_size: float, value_size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    most = 1e4 if dtype == torch.float16 else 1e6  # so large that no scale in FP16 spans them: either half is stored raw without the other
    sizes = (min(size, most) for size in (key_size, value_size))
    k, v = (torch.randn(2, 32, 64, generator=generator).mul_(size).to(dtype) for size in sizes)
    k[0, 3, 5] = 3e4  # one block with a large key
    keys, values = stored(k, v)
    layout = Layout(2, 64, 16, 16, str(dtype).removeprefix("torch."))
    for head in range(2):
        for start in (0, 16):
            part = slice(start, start + 16)
            block = quantise_block(raw(k[head, part]), raw(v[head, part]), layout)
            key = k[head, part].double().numpy() if block.raw_keys else dequantise_keys(block)
            value = v[head, part].double().numpy() if block.raw_values else dequantise_values(block, layout)
            assert np.array_equal(keys[head, part].numpy(), key.astype(np.float32))
            assert np.array_equal(values[head, part].numpy(), value.astype(np.float32))


@settings(max_examples=15)
@given(st.integers(0, 40), st.lists(st.integers(1, 33), min_size=1, max_size=6), st.integers(0, 99))
def test_a_naive_layer_is_the_same_however_its_tokens_come(pad: int, chunks: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    chunks = [chunks[0] + pad, *chunks[1:]]
    k, v = (torch.randn(2, 2, sum(chunks), 64, generator=generator) for _ in range(2))
    layer = NaiveLayer([pad, 0])
    for part in torch.arange(sum(chunks)).split(chunks):
        layer.update(k[:, :, part], v[:, :, part])
    for row, start in enumerate((pad, 0)):
        full = start + (sum(chunks) - start) // 16 * 16
        decoded = stored(k[row, :, start:full], v[row, :, start:full]) if full > start else (k[row, :, :0], v[row, :, :0])
        for found, whole, original in zip((layer.keys, layer.values), decoded, (k, v), strict=True):
            assert found is not None
            assert torch.equal(found[row, :, start:full], whole)
            assert torch.equal(found[row, :, full:], original[row, :, full:])


@torch.no_grad()
def test_naive_is_exact_attention_over_the_decoded_cache(checkpoint: checkpoints.Checkpoint, tier: Tier) -> None:
    model, seen = checkpoint.model, {}
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: seen.update(output=inputs[0]))
    queries: list[torch.Tensor] = []
    with attending(BY_NAME["naive"], model, tier, 100) as cache, pytest.MonkeyPatch.context() as patch:
        model(tiny.ids(70), past_key_values=cache)
        inner = rows._one_row
        patch.setattr(rows, "_one_row", lambda module, q, k, v, scaling: queries.append(q) or inner(module, q, k, v, scaling))
        model(tiny.ids(5, seed=2), past_key_values=cache)
        k, v = cache.layers[0].keys[0], cache.layers[0].values[0]
        assert not torch.equal(k[:, :64].half().float(), k[:, :64]), "these would be rounded by a half-precision cache"
        truth = exact_attention(queries[0][0], k, v, 64**-0.5)
    hook.remove()
    torch.testing.assert_close(seen["output"][0].view(5, 4, 64).transpose(0, 1).double(), truth.output, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_all_variants_share_their_prefill_and_a_tolerance_of_zero_is_dense(checkpoint: checkpoints.Checkpoint, tier: Tier) -> None:
    model, first, second = checkpoint.model, {}, {}
    for variant in (*ALL, EXACT):
        with attending(variant, model, tier, 300) as cache:
            first[variant.name] = model(tiny.ids(200), past_key_values=cache).logits
            second[variant.name] = model(tiny.ids(30, seed=2), past_key_values=cache).logits
    assert all(torch.equal(logits, first["dense"]) for logits in first.values())
    distance = {name: float((logits - second["dense"]).abs().max()) for name, logits in second.items()}
    assert distance["exact"] < 1e-3 < distance["rtol1"] < distance["naive"]
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("variant", [BY_NAME["dense"], BY_NAME["naive"], BY_NAME["rtol2"]])
def test_a_row_is_completed_the_same_whatever_it_shares_a_batch_with(
    variant: Variant, checkpoint: checkpoints.Checkpoint, tier: Tier
) -> None:
    prompts = ["import os\n" * 9, "xy", "def f(a, b):\n    return a + b\n" * 3]
    attend = partial(attending, variant, checkpoint.model, tier)
    together, said = running.complete(checkpoint, attend, prompts, 12)
    alone = [running.complete(checkpoint, attend, [prompt], 12)[0][0] for prompt in prompts]
    assert together == alone
    assert bool(said) == variant.certified
    if said:
        assert said["answers"] == sum(said["rungs"]) and said["over_budget"] == 0
        assert said["answers"] == 12 * 3 * 2 * 4
    with pytest.raises(ValueError, match="prompt 1 has 1 tokens"):
        running.complete(checkpoint, attend, ["ab", "x"], 12)


def test_an_answer_ends_where_the_model_ends_it() -> None:
    assert running._until_end([1, 2, 256, 3], frozenset({256})) == [1, 2]
    assert running._until_end([1, 2], frozenset({256})) == [1, 2]


def test_perplexity_is_that_of_the_whole_text_at_once(checkpoint: checkpoints.Checkpoint, tier: Tier) -> None:
    window = tiny.ids(400)
    found = running.negative_log_likelihood(checkpoint, BY_NAME["dense"], tier, window)
    logits = checkpoint.model(window).logits[0, running.CHUNK : -1]
    expected = torch.nn.functional.cross_entropy(logits, window[0, running.CHUNK + 1 :], reduction="sum")
    assert found["tokens_scored"] == 400 - 1 - running.CHUNK and found["nll"] == pytest.approx(float(expected), rel=1e-5)
    judged = running.negative_log_likelihood(checkpoint, BY_NAME["rtol5"], tier, window)["verdict"]
    assert judged["head_steps"] == found["tokens_scored"] * 2 * 4 and judged["violations"] == judged["broken"] == 0
    with pytest.raises(ValueError, match="longer than the first chunk"):
        running.negative_log_likelihood(checkpoint, BY_NAME["dense"], tier, window[:, :256])


def test_names_that_do_not_exist_are_refused() -> None:
    assert [variant.name for variant in named(["rtol5", "naive"])] == ["dense", "naive", "rtol5"]
    with pytest.raises(ValueError, match="'rtol3' does not exist; allowed: dense, naive"):
        named(["rtol3"])


def test_a_checkpoint_is_read_back_and_what_is_none_is_refused(tmp_path: Path, checkpoint: checkpoints.Checkpoint) -> None:
    loaded = checkpoints.load(tiny.saved(tmp_path / "tiny"), "cpu", "float32")
    ids = tiny.ids(9)
    assert torch.equal(loaded.model(ids).logits, checkpoint.model(ids).logits)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("naïve")) == "naïve" and loaded.count("naïve") == 6
    with pytest.raises(ValueError, match="dtype is 'int8'; allowed: float16"):
        checkpoints.load(tmp_path / "tiny", "cpu", "int8")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        checkpoints.load(tmp_path)
    (tmp_path / "tiny" / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        checkpoints.load(tmp_path / "tiny")


def test_a_vocabulary_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    model: Any = tiny.build()
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer .* a vocabulary of 300"):
        checkpoints.load(tmp_path)


def test_text_comes_from_a_file_a_folder_or_the_standard_library(tmp_path: Path, checkpoint: checkpoints.Checkpoint) -> None:
    for name, text in (("b.txt", "second"), ("a.txt", "first"), ("c.md", "no text")):
        (tmp_path / name).write_text(text)
    assert list(checkpoints.texts(tmp_path)) == ["first", "second"]
    windows = checkpoints.windows(checkpoint, tmp_path, 5, 3)
    assert bytes(torch.cat(windows, dim=1)[0].tolist()) == b"first\n\nsecond\n\n"
    with pytest.raises(ValueError, match="holds 3 windows of 5 tokens; 4 are needed"):
        checkpoints.windows(checkpoint, tmp_path, 5, 4)
    with pytest.raises(ValueError, match="neither a text file nor a folder"):
        checkpoints.windows(checkpoint, tmp_path / "none", 5, 1)
    assert len(checkpoints.windows(checkpoint, None, 4096, 3)) == 3
