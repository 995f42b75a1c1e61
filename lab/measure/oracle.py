"""The answer-informed oracle of prompt token dropping: which prompt tokens the model's own answer attends to.

CLAA (arXiv 2602.16054): generate densely; for every answer token softmax q.k over prompt positions only; maximum over
layers and heads; mean over answer tokens."""

from __future__ import annotations

import torch

from lab.techniques.answers import answer_importance, answer_scores
from lab.techniques.snapkv import pooled

__all__ = ["answer_scores", "oracle", "overlap", "spearman"]


def oracle(model: torch.nn.Module, ids: list[int], *, new_tokens: int = 16, kernel: int = 1) -> torch.Tensor:
    """float32 [T]: each prompt token's importance for the answer of `new_tokens` tokens, average-pooled over `kernel`."""
    return pooled(answer_importance(model, ids, new_tokens).view(1, 1, -1), kernel)[0, 0]


def overlap(a: torch.Tensor, b: torch.Tensor, rate: float) -> float:
    """Share of the top `rate` of a that is also in the top `rate` of b."""
    count = max(1, round(rate * len(a)))
    top = [set(x.argsort(descending=True, stable=True)[:count].tolist()) for x in (a, b)]
    return len(top[0] & top[1]) / count


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation; ties share their mean rank."""
    ra, rb = _ranks(a), _ranks(b)
    ra, rb = ra - ra.mean(), rb - rb.mean()
    return float((ra * rb).sum() / (ra.norm() * rb.norm()).clamp_min(1e-12))


def _ranks(x: torch.Tensor) -> torch.Tensor:
    _, inverse, counts = x.unique(sorted=True, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[inverse]
