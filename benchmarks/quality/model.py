"""The small model of the quality evidence: Llama's architecture, reading and writing bytes, with the heads of a large model.

Seven million parameters in five layers, each with four query heads and two KV heads of dimension 128 (what the kernels are made for).
`vocabulary.py` has what its ids mean.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from vocabulary import END, VOCABULARY

ROPE_THETA = 1_000_000.0
CONTEXT_MAX = 32_768
WEIGHT_BYTES_MAX = 16_000_000
EMBEDDING_DEVIATION = 0.02
HALF = 64  # the rotary embedding turns channel i with channel i + 64
LOOKING_PAIRS, LOOKING_SCORE = 24, 3.5  # the next distance is 1.4 * 3.5 nats behind the one looked at
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ByteTokenizer:
    """Text to byte values and back, with the names that a tokenizer of transformers has."""

    eos_token_id = END

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes; nothing is put before them."""
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        """The text of the ids that are bytes; broken UTF-8 shows as U+FFFD. Raises ValueError for an id outside the vocabulary."""
        if not all(0 <= i < VOCABULARY for i in ids):
            raise ValueError(f"ids {[i for i in ids if not 0 <= i < VOCABULARY]} are outside the vocabulary of {VOCABULARY}")
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(text.encode())


def configuration(layers: int = 5, hidden: int = 384, intermediate: int = 768, heads: int = 4, kv_heads: int = 2) -> LlamaConfig:
    """The model's shape; other numbers make models for tests. Heads have dimension 128 whatever `hidden` is."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        max_position_embeddings=CONTEXT_MAX,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
    )


def create(config: LlamaConfig, seed: int) -> Any:
    """A LlamaForCausalLM with random weights, float32, on the CPU.

    Matrices have standard deviation 1/sqrt(inputs), those that write into the residual stream start at zero (so every layer starts as
    the identity). Embeddings share a direction, and the first layer's heads start out looking 1, 2, ... bytes back along it.
    """
    generator = torch.Generator().manual_seed(seed)
    model: Any = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.data.fill_(1.0)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.zero_()
        else:
            deviation = EMBEDDING_DEVIATION if "embed" in name else weight.shape[1] ** -0.5
            weight.data.normal_(0.0, deviation, generator=generator)
    shared = torch.randn(config.hidden_size, generator=generator).sign()
    model.model.embed_tokens.weight.data.add_(EMBEDDING_DEVIATION * shared)
    _look_back(model.model.layers[0].self_attn, shared / config.hidden_size**0.5, model.model.rotary_emb.inv_freq[:LOOKING_PAIRS])
    return model


def _look_back(attention: Any, shared: Any, frequencies: Any) -> None:
    """Add to the projections what makes head h attend h + 1 bytes back: a key that is the same for all bytes, a query turned by h + 1.

    The rotary embedding turns pair i by frequency i times the position, so the score is a sum of cos(f * (distance - h - 1)). Without
    this start the heads that copy had not formed after 1.4 million bytes of repeated strings; such starts are known from vision
    (Trockman and Kolter, arXiv 2305.09828).
    """
    hidden, dim = len(shared), 2 * HALF
    strength = (LOOKING_SCORE * dim**0.5 / (hidden / 2)) ** 0.5  # half of a normed embedding's energy lies along `shared`
    for weight, turned in ((attention.q_proj.weight, True), (attention.k_proj.weight, False)):
        by_head = weight.data.view(-1, dim, hidden)
        for head in range(len(by_head)):
            angle = -frequencies * (head + 1) * turned
            pairs = torch.arange(len(frequencies))
            by_head[head, pairs] += strength * angle.cos()[:, None] * shared
            by_head[head, pairs + HALF] += strength * angle.sin()[:, None] * shared


def save(model: Any, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write `config.json` and `model.safetensors` in `dtype` into the folder `path`; the model is left as it is.

    Raises ValueError if the weights take more than 16 MB.
    """
    _check_dtype(dtype)
    weights = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in model.named_parameters()}  # the tied one once
    size = sum(weight.numel() * weight.element_size() for weight in weights.values())
    if size > WEIGHT_BYTES_MAX:
        raise ValueError(f"the weights take {size} bytes in {dtype}; at most {WEIGHT_BYTES_MAX} are kept in the repository")
    path.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(path)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def load(path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """The LlamaForCausalLM saved in the folder `path`, in evaluation mode, attending by SDPA, without gradients.

    Raises FileNotFoundError for a folder without a model, ValueError for one whose vocabulary is not bytes or an unknown dtype.
    """
    _check_dtype(dtype)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no config.json: train.py leaves a model in its output folder, under `model`")
    if (found := json.loads((path / "config.json").read_text()).get("vocab_size")) != VOCABULARY:
        raise ValueError(f"{path} has a vocabulary of {found}; the byte-level model has {VOCABULARY}")
    model: Any = LlamaForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, attn_implementation="sdpa")
    return model.to(device).eval().requires_grad_(False)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; allowed are {', '.join(map(str, DTYPES))}")
