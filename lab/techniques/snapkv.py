"""SnapKV: what the end of the prompt looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import BUDGET_HELP, Paper, Technique, param


@dataclass(frozen=True)
class SnapKV(Technique):
    """Rank prompt entries by the attention of the last `window` queries, pooled over neighbours (arXiv 2404.14469)."""

    name: ClassVar[str] = "snapkv"
    title: ClassVar[str] = "SnapKV"
    paper: ClassVar[Paper] = Paper("SnapKV: LLM Knows What You Are Looking for Before Generation", "2404.14469", 2024)
    slots: ClassVar[tuple[str, ...]] = ("observe", "score")
    help: ClassVar[str] = (
        "The last words of a prompt are usually the question, and what they attend to is what the answer will need. "
        "SnapKV keeps those entries and their neighbours, once, after the prompt. Put the question at the end."
    )
    does_not_save: ClassVar[str] = "Tokens generated afterwards are all kept, so the cache grows again."

    budget: float = param(0.25, BUDGET_HELP, min=0.001, max=1_000_000)
    window: int = param(32, "How many of the last prompt rows are asked; they always stay.", min=1, max=1024, unit="tokens")
    kernel: int = param(5, "Width of the pooling that lets neighbours of an important token stay (odd).", min=1, max=63)
    pool: str = param("avg", "Pooling over neighbouring positions.", choices=("avg", "max"))

    @property
    def observation_window(self) -> int:
        return self.window

    def protected(self, entries: int, prompt: int) -> tuple[int, int]:
        return 0, self.window

    def score(self, ctx: LayerContext) -> torch.Tensor:
        weights, _ = ctx.window_weights(self.window)
        return pooled(ctx.per_kv_head(weights.mean(2)), self.kernel, self.pool)


def pooled(scores: torch.Tensor, kernel: int, kind: str = "avg") -> torch.Tensor:
    """1-D pooling of scores [B, Hk, N] over positions, same length, edges averaged over what exists."""
    if kernel == 1:
        return scores
    half = kernel // 2
    if kind == "max":
        return torch.nn.functional.max_pool1d(scores, 2 * half + 1, stride=1, padding=half)
    return torch.nn.functional.avg_pool1d(scores, 2 * half + 1, stride=1, padding=half, count_include_pad=False)
