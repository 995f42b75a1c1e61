"""Synthetic prompts whose answer lies at a known place: a passkey hidden in prose."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from lab.engine.sample_text import prose


@dataclass(frozen=True)
class Passkey:
    """ids int64 [T]: prose with a hidden number, the question, the answer. relevant: (first, last) position of the
    hidden sentence; answer: first position of the answer's tokens."""

    ids: torch.Tensor
    relevant: tuple[int, int]
    answer: int


def passkey(model: torch.nn.Module, tokenizer, length: int, seed: int) -> Passkey:
    """One prompt of about `length` tokens. Without a tokenizer: random tokens with a repeated random string."""
    rng = random.Random(seed)
    device = model.get_input_embeddings().weight.device
    if tokenizer is None:
        vocab = model.get_input_embeddings().weight.shape[0]
        body = [rng.randrange(vocab) for _ in range(length)]
        key = [rng.randrange(vocab) for _ in range(8)]
        at = rng.randrange(4, max(5, length - 40))
        body[at : at + 8] = key
        ids = body + key
        return Passkey(torch.tensor(ids, device=device), (at, at + 7), len(ids) - 4)

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    key = str(rng.randrange(10000, 99999))
    needle, answer = tokens(f"\nThe secret pass key is {key}. Remember it.\n"), tokens(f" {key}.")
    question = tokens("\n\nQuestion: What is the secret pass key?\nAnswer: The secret pass key is")
    text = prose("learn")
    start = rng.randrange(0, max(1, len(text) - 6 * length))
    body = tokens(text[start : start + 8 * length])[: max(16, length - len(needle) - len(question) - len(answer))]
    at = rng.randrange(4, max(5, len(body) - 8))
    ids = body[:at] + needle + body[at:] + question + answer
    return Passkey(torch.tensor(ids, device=device), (at, at + len(needle) - 1), len(ids) - len(answer))
