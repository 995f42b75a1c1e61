"""A loaded model for tests of the measuring side: the tiny random llama and a tokenizer of one word per token."""

from __future__ import annotations

import re
from types import SimpleNamespace

import tiny_models

from lab.engine.attach import attach
from lab.models.facts import ModelFacts


class Words:
    """"w17" is token 17; anything else is spread over the vocabulary by its length."""

    eos_token_id = 1
    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict:
        words = re.findall(r"\S+", text)
        return {"input_ids": [int(w[1:]) if re.fullmatch(r"w\d+", w) else 2 + len(w) % 100 for w in words]}

    def decode(self, ids, **_) -> str:
        return "".join(f" w{int(i)}" for i in ids)


def loaded(**changes) -> SimpleNamespace:
    """A stand-in for LoadedModel on a fresh tiny llama (its facts true to it)."""
    model = attach(tiny_models.build("llama", head_dim=16, max_position_embeddings=512, **changes))
    facts = ModelFacts(
        id="tiny", source="tiny", revision="0", architecture="LlamaForCausalLM", parameters=model.num_parameters(), layers=3,
        heads=4, kv_heads=2, head_dim=16, context=512, vocab=tiny_models.VOCAB, dtype="float32", weights="float32",
        device="cpu", sliding_window=None, layer_types=("full_attention",) * 3, kv_bytes_per_token=3 * 2 * 2 * 16 * 4,
    )
    return SimpleNamespace(model=model, tokenizer=Words(), facts=facts)


def prompt(tokens: int) -> str:
    return " ".join(f"w{2 + (i * 7) % 120}" for i in range(tokens))
