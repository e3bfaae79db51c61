"""Tiny models with random weights, of head dimensions that the daemon stores."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97
COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=256, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=512,
    pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.2, attn_implementation="sdpa",
)
ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": dict(num_key_value_heads=2, head_dim=64),
    "qwen2": dict(num_key_value_heads=2, hidden_size=320),
    "qwen3": dict(num_key_value_heads=1, head_dim=64),
    "mistral": dict(num_key_value_heads=2, head_dim=128, sliding_window=None),
    "phi": dict(),
    "gpt_neox": dict(hidden_size=384),
    "gemma": dict(num_key_value_heads=1, head_dim=256),
    "stablelm": dict(num_key_value_heads=2),
    "granite": dict(num_key_value_heads=2, attention_multiplier=0.05),
    "olmo2": dict(num_key_value_heads=4),
    "starcoder2": dict(num_key_value_heads=2, sliding_window=None),
    "cohere": dict(num_key_value_heads=2),
    "phi3": dict(num_key_value_heads=2, sliding_window=None),
    "gpt2": dict(n_embd=256, n_layer=3, n_head=4, n_positions=512),
    "opt": dict(ffn_dim=96, word_embed_proj_dim=256),
    "mixtral": dict(num_key_value_heads=2, num_local_experts=4, sliding_window=None),
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A model of architecture `name`, attending by SDPA, in evaluation mode."""
    config = AutoConfig.for_model(name, **{**COMMON, **ARCHITECTURES[name], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def prompt(rows: int, tokens: int, seed: int = 1) -> torch.Tensor:
    """Token ids [rows, tokens], none of them padding."""
    return torch.randint(2, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [rows, longest], short rows padded on the left."""
    ids = prompt(len(lengths), max(lengths), seed)
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths])
    return ids * mask, mask.long()
