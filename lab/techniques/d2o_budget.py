"""D2O's layer budgets: layers with even attention keep more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import Forward, Paper, Technique, param
from lab.techniques.shares import SHARED_BUDGET_HELP, share_budget, split, total_to_spread
from lab.techniques.snapkv import SnapKV


@dataclass(frozen=True)
class D2OBudget(Technique):
    """Layer budgets in proportion to exp(-variance of the layer's attention) (arXiv 2406.13035)."""

    name: ClassVar[str] = "d2o_budget"
    title: ClassVar[str] = "D2O variance budgets"
    paper: ClassVar[Paper] = Paper(
        "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large Language Models",
        "2406.13035", 2024
    )
    slots: ClassVar[tuple[str, ...]] = ("allocate",)
    help: ClassVar[str] = (
        "Where a layer's attention is spread evenly, many tokens matter; where it sits on a few, few do. Layers whose "
        "attention varies little get more of the same total. The variance is measured on the last prompt rows and compared "
        "between layers, which is the lab's reading of a sentence in the paper."
    )
    does_not_save: ClassVar[str] = (
        "The total stays the same as with equal budgets; the whole cache is held until the prompt ends."
    )
    whole_cache: ClassVar[bool] = True
    watches: ClassVar[bool] = True

    budget: float = param(0, SHARED_BUDGET_HELP, min=0, max=1_000_000)
    strength: float = param(1.0, "How strongly variance counts; 0 gives equal budgets.", min=0, max=20)
    window: int = param(32, "Last prompt rows whose attention is measured.", min=1, max=1024, unit="tokens")

    @property
    def observation_window(self) -> int:
        return self.window

    def budget_entries(self, prompt: int) -> int | None:
        return share_budget(self, prompt)

    def default_scorer(self) -> Technique:
        return SnapKV(budget=self.budget or 0.25)

    def watch(self, step: Forward) -> None:
        total = total_to_spread(self, step)
        if total is None:
            return
        first = step.contexts[0]
        variances = torch.stack([self.variance(ctx).to(step.hidden.device) for ctx in step.contexts], 1)  # [B, L]
        floor = min(total, 1 + sum(first.scorer.protected(1, first.prompt)))
        cap = min(ctx.store.longest for ctx in step.contexts)
        rows = [split(total * len(one), self.shares(one), floor, cap) for one in variances.tolist()]
        for ctx, counts in zip(step.contexts, torch.tensor(rows).mT):
            ctx.state["d2o_count"] = counts.to(ctx.q.device)

    def variance(self, ctx: LayerContext) -> torch.Tensor:
        """Variance over entries of the attention they received in the window, mean over heads, [B]; the mean entry counts 1."""
        weights = ctx.window_weights(self.window)[0]
        valid = ctx.store.valid()
        seen = torch.ones_like(weights[:, :, 0]) if valid is None else valid.repeat_interleave(ctx.groups, 1).float()
        count = seen.sum(-1, keepdim=True).clamp_min(1)
        column = weights.mean(2) * count
        mean = (column * seen).sum(-1, keepdim=True) / count
        return (((column - mean).square() * seen).sum(-1) / count.squeeze(-1)).mean(1)

    def shares(self, variances: list[float]) -> list[float]:
        """Weights of the layers, exp(-strength * variance / mean variance)."""
        mean = sum(variances) / len(variances) or 1.0
        return [math.exp(-self.strength * v / mean) for v in variances]

    def allocate(self, ctx: LayerContext, total: int, scores: torch.Tensor | None) -> int | torch.Tensor:
        counts = ctx.state.pop("d2o_count", None)  # [B]
        if counts is None:
            return total
        return int(counts) if counts.numel() == 1 else counts[:, None].expand(-1, ctx.kv_heads)
