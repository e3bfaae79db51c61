"""The byte-level model: what is saved is what is loaded, its size, and what its heads look at before any training."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model import WEIGHT_BYTES_MAX, ByteTokenizer, configuration, create, load, save
from transformers import AutoModelForCausalLM
from vocabulary import END, VOCABULARY

TINY = {"layers": 2, "hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 2}


@given(st.text(max_size=50))
def test_text_comes_back_from_its_bytes(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, END]) == text and len(ids) == tokenizer.count(text)


def test_ids_outside_the_vocabulary_are_refused_and_broken_text_shows() -> None:
    with pytest.raises(ValueError, match=r"\[264\] are outside the vocabulary of 264"):
        ByteTokenizer().decode([65, VOCABULARY])
    assert ByteTokenizer().decode([65, 0xC3]) == "A\ufffd"


def test_the_real_model_fits_into_the_repository() -> None:
    config = configuration()
    model = create(config, 1)
    size = 2 * sum(weight.numel() for weight in model.parameters())
    assert 12_000_000 < size <= WEIGHT_BYTES_MAX
    assert config.head_dim == 128 and config.num_attention_heads > config.num_key_value_heads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_saved_model_is_loaded_with_its_weights_and_by_transformers_alone(dtype: torch.dtype, tmp_path: Path) -> None:
    model = create(configuration(**TINY), 2)
    model.model.layers[0].mlp.down_proj.weight.data.normal_()
    save(model, tmp_path, dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load(tmp_path, dtype=dtype)
    for name, weight in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight.to(dtype)) and not loaded.get_parameter(name).requires_grad
        assert weight.dtype == torch.float32
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    ids = torch.arange(30)[None]
    assert other.dtype == dtype and torch.equal(other(ids).logits, loaded(ids).logits)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


def test_what_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 32000}')
    with pytest.raises(ValueError, match="a vocabulary of 32000; the byte-level model has 264"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"dtype is torch.int8; allowed are torch.float32"):
        load(tmp_path, dtype=torch.int8)
    with pytest.raises(ValueError, match="at most 16000000 are kept"):
        save(create(configuration(), 0), tmp_path, torch.float32)


@given(seed=st.integers(0, 100))
def test_before_training_head_h_of_the_first_layer_looks_h_plus_one_bytes_back(seed: int) -> None:
    model = create(configuration(layers=1, intermediate=128), seed)
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 256, (1, 150), generator=torch.Generator().manual_seed(seed))
    weights = model(ids, output_attentions=True).attentions[0][0]
    for head in range(4):
        by_distance = torch.stack([weights[head].diagonal(-distance)[20:].mean() for distance in range(100)])
        assert int(by_distance.argmax()) == head + 1 and by_distance[head + 1] > 0.5


def test_the_same_seed_makes_the_same_model() -> None:
    a, b, c = (create(configuration(**TINY), seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(a[name], b[name]) for name in a) and not torch.equal(
        a["model.embed_tokens.weight"], c["model.embed_tokens.weight"]
    )
