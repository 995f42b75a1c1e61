"""From logits to the next token: greedy, temperature, top-k, top-p, seeded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lab.errors import LabError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token; seed makes sampled runs repeatable."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 10:
            raise LabError(f"temperature={self.temperature} is out of range", "It is a number from 0 (greedy) to 10")
        if self.top_k < 0:
            raise LabError(f"top_k={self.top_k} is out of range", "It is 0 (all tokens) or a positive whole number")
        if not 0 < self.top_p <= 1:
            raise LabError(f"top_p={self.top_p} is out of range", "It is a number above 0 and up to 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def generator(self, device: torch.device) -> torch.Generator | None:
        return None if self.greedy else torch.Generator(device=device).manual_seed(self.seed)

    def pick(self, logits: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """logits float [B, V] -> token ids int64 [B]."""
        if self.greedy:
            return logits.argmax(-1)
        scaled = logits.float() / self.temperature
        if self.top_k:
            floor = scaled.topk(min(self.top_k, scaled.shape[-1]), dim=-1).values[:, -1:]
            scaled = scaled.masked_fill(scaled < floor, -torch.inf)
        if self.top_p < 1:
            ordered, order = scaled.sort(-1, descending=True)
            probs = ordered.softmax(-1)
            drop = probs.cumsum(-1) - probs >= self.top_p
            scaled = scaled.masked_fill(torch.zeros_like(drop).scatter_(-1, order, drop), -torch.inf)
        return torch.multinomial(scaled.softmax(-1), 1, generator=generator).squeeze(-1)
