"""Tiny random language models of many architectures, sharp enough that attention matters."""

from __future__ import annotations

import logging
from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 128
COMMON = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
)
WINDOWED = dict(head_dim=16, sliding_window=8)
ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3": dict(head_dim=16),
    "gemma": dict(head_dim=16),
    "gemma2": WINDOWED,
    "gemma3_text": WINDOWED,
    "mistral": dict(sliding_window=8),
    "olmo": {},
    "olmo2": {},
    "cohere": {},
    "cohere2": dict(sliding_window=8),
    "gpt_oss": dict(WINDOWED, num_local_experts=4, num_experts_per_tok=2),
    "phi": {},
    "phi3": {},
    "glm": dict(head_dim=16),
    "starcoder2": {},
    "gpt2": {},
    "smollm3": {},
    "stablelm": {},
    "qwen3_moe": dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "opt": {},
    "granite": {},
    "ministral": dict(head_dim=16, sliding_window=8),
}
SHAPES = {"gpt2": dict(vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=4, n_positions=512),
          "opt": dict(vocab_size=VOCAB, hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4,
                      word_embed_proj_dim=64, max_position_embeddings=512, init_std=0.2)}


def config_of(name: str, **changes):
    """The tiny configuration of an architecture, its special tokens inside the vocabulary."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    wanted = dict(SHAPES.get(name) or {**COMMON, **ARCHITECTURES.get(name, {})}, initializer_range=0.2)
    special = dict(pad_token_id=1, bos_token_id=1, eos_token_id=1)
    return AutoConfig.for_model(name, **{**wanted, **special, **changes})


def build(name: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A fresh float32 model in eval mode with eager attention; the same seed gives the same weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(name, **changes), attn_implementation="eager").eval().float()
    model.generation_config.eos_token_id = None  # random models would stop anywhere
    model.generation_config.pad_token_id = 1
    return model


@cache
def llama() -> PreTrainedModel:
    """The model most engine tests share; they must leave it as they find it (attaching is allowed)."""
    return build("llama", head_dim=16, max_position_embeddings=2048)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids without the special ones."""
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
