"""What a model believes about the next token, and how far two beliefs are apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lab.engine.events import Alternative


@dataclass(frozen=True)
class Belief:
    """logp float32 [V]: log-probabilities of the next token at temperature 1."""

    logp: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor) -> "Belief":
        """From logits [V]."""
        return cls(torch.log_softmax(logits.float(), -1))

    @property
    def entropy(self) -> float:
        """In nats."""
        return float(-(self.logp.exp() * self.logp).sum())

    @property
    def argmax(self) -> int:
        return int(self.logp.argmax())

    def logprob(self, token: int) -> float:
        return float(self.logp[token])

    def top(self, tokenizer, count: int = 5) -> tuple[Alternative, ...]:
        """The likeliest tokens as (id, text, probability)."""
        values, ids = self.logp.topk(count)
        return tuple((int(i), tokenizer.decode([int(i)]), float(v)) for i, v in zip(ids, values.exp()))

    def kl_to(self, other: "Belief") -> float:
        """KL(self || other) in nats, never below 0 by rounding."""
        return max(0.0, float((self.logp.exp() * (self.logp - other.logp)).sum()))
