"""Tiny models for these tests, and the default model as transformers loads it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def _tokenizer(words: int = 96) -> Any:
    """A byte-level BPE tokenizer with few tokens, the kind SmolLM and GPT-2 use."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<|end|>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """Builds a small Llama config; keywords override."""

    def build(**changes: Any) -> Any:
        from transformers import LlamaConfig

        settings = dict(
            vocab_size=288, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=0, pad_token_id=0,
            tie_word_embeddings=True)
        return LlamaConfig(**{**settings, **changes})

    return build


@pytest.fixture(scope="session")
def tiny_model(tiny_config: Callable[..., Any]) -> Callable[..., Any]:
    """Builds a random model from a config (a small Llama by default), always the same one."""

    def build(config: Any = None) -> Any:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config or tiny_config()).float().eval()

    return build


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any]) -> Path:
    """A saved tiny Llama with its tokenizer; do not change it."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tiny_model().save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty lab cache for one test."""
    folder = tmp_path / "lab-cache"
    monkeypatch.setenv("LAB_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def plain_default(default_model: Any) -> Any:
    """The default model as transformers loads it: float32, nothing replaced."""
    from transformers import AutoModelForCausalLM

    from lab.models.sources import locate

    return AutoModelForCausalLM.from_pretrained(locate("default").folder, dtype=torch.float32).eval()
